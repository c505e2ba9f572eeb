// What every op does with tensors: types, sizes, and calls of the reference where there is no kernel.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../kernels.h"
#include "torch.h"

namespace {

using octavo::Float;
using octavo::Kernels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<const Kernels*> active{nullptr};  // null: the reference serves
const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

// A type that the kernels serve; the reference serves the others.
std::optional<Float> float_type(ScalarType type) {
  if (!active.load(std::memory_order_relaxed)) return std::nullopt;
  if (type == ScalarType::Float) return Float::f32;
  if (type == ScalarType::BFloat16) return Float::bf16;
  if (type == ScalarType::Half) return Float::f16;
  return std::nullopt;
}

// Whether the kernels serve this type (of x in w8a16, of y in w8a8) and that of the bias.
bool served(ScalarType type, const std::optional<Tensor>& bias) {
  return float_type(type) && (!bias || float_type(bias->scalar_type()));
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); d++) rows *= x.size(d);
  return rows;
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

const void* at(const void* base, int64_t bytes) { return static_cast<const char*>(base) + bytes; }
void* at(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }

// Calls an op of torch, or of any library, by its name.
template <class Result, class... Args>
Result call(const std::string& op, const Args&... args) {
  std::array<StableIValue, std::max<size_t>(sizeof...(Args), 2)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op.c_str(), "", stack.data(), TORCH_ABI_VERSION));
  if constexpr (std::is_same_v<Result, std::tuple<Tensor, Tensor>>)
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
  else if constexpr (!std::is_void_v<Result>)
    return torch::stable::detail::to<Result>(stack[0]);
}

// Calls the same op of the reference, where there is no kernel: in float64.
template <class Result, class... Args>
Result reference(const std::string& name, const Args&... args) {
  return call<Result>("octavo_reference::" + name, args...);
}

}  // namespace
