// torch's stable ABI. What fails behind it is told in torch's own words (memory that is not there, above all), where
// torch has them to give: 2.13 and later. The macro is of 2.10, whose words are those of the call.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)                                          \
  if ((call) != TORCH_SUCCESS) {                                              \
    if (torch_exception_get_what_without_backtrace)                           \
      throw std::runtime_error(torch_exception_get_what_without_backtrace()); \
    torch::headeronly::detail::throw_exception(#call, __FILE__, __LINE__);    \
  }

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
