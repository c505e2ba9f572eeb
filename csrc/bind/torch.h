// torch's stable ABI. Errors behind it (out of memory, above all) are reported in torch's own words, if torch passes
// them on: 2.13 and later do. The macro is torch 2.10's, whose message only quotes the call.
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
