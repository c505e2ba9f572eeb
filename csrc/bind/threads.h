// Splits work over torch's threads (`torch.set_num_threads`), each with scratch memory of its own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "torch.h"

namespace {

constexpr int64_t kWorthAThread = 128 << 10;  // products that are worth a thread, at least
constexpr int64_t kColumns = 32;              // of y: work is split among threads in multiples of this
constexpr int64_t kUnitsOfThread = 8;         // of work per thread, from which one more or less does not matter
constexpr int64_t kElement = 8;               // products that take as long as what is done to an element of a row

// The first address in `memory` that is a multiple of 64. It has 64 bytes more than are used.
char* aligned(void* memory) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~static_cast<uintptr_t>(63));
}

// 64-byte aligned memory of this thread, kept from call to call.
void* scratch_of(size_t bytes) {
  thread_local std::vector<char> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  return aligned(memory.data());
}

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }
int64_t up_to_multiple(int64_t value, int64_t of) { return ceil_div(value, of) * of; }

template <class Work>
void in_parallel(int64_t units, int64_t cost_of_unit, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, cost_of_unit));
  if (units <= grain)
    work(0, units);
  else
    torch::stable::parallel_for(0, units, grain, work);
}

// The same for work on each element of rows [rows, K].
template <class Work>
void over_rows(int64_t rows, int64_t K, const Work& work) {
  in_parallel(rows, K * kElement, work);
}

// How many parts rows are to be cut into, if each part has `whole` units of work, so that threads get equal shares.
// least: the fewest rows that are worth a part.
int64_t even_parts(int64_t whole, int64_t rows, int64_t least) {
  const int64_t threads = torch::stable::get_num_threads();
  if (whole >= kUnitsOfThread * threads || whole % threads == 0) return 1;
  return std::max<int64_t>(1, std::min(threads, rows / least));
}

// The most equal shares, of whole units, in which threads can take `whole` units of work.
int64_t even_shares(int64_t whole) {
  int64_t shares = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), whole));
  while (whole % shares != 0) shares--;
  return shares;
}

}  // namespace
