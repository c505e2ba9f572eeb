// Which kernels this machine gets, and why.
#pragma once

#include "kernels.h"

namespace octavo {

// What the processor and the operating system support.
struct Machine {
  bool avx2;           // AVX2, FMA, F16C
  bool avxvnni;        // AVX-VNNI
  bool avx512;         // AVX-512 F, BW, VL, DQ, VNNI, BF16
  bool wider;          // AVX-512 F: vectors wider than 256 bits, with or without what the kernels need
  bool amx;            // AMX tiles, int8 and bf16
  bool amx_permitted;  // the operating system lets this process use them
};

Machine this_machine();

struct Choice {
  const Kernels* kernels;  // null: none; the reference serves
  bool error;              // `forced` names no instruction set, or one that this machine lacks; `why` says what to do
  char why[320];
};

// The best kernels, or those of the instruction set `forced`, unless that is null or empty. Scalar ones are chosen only
// if forced: the reference, whose products are torch's own, is faster.
Choice choose(const Machine& machine, const char* forced);

}  // namespace octavo
