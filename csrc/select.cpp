// Asks the processor what it supports (cpuid), and the operating system what it saves and permits, and chooses the best
// kernels that this allows.

#include "select.h"

#include <cstdio>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace octavo {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{};
  if (__get_cpuid_max(0, nullptr) >= leaf) __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
  return r;
}

// The register states that the operating system saves when it switches threads.
unsigned long long saved_states() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

bool has(unsigned value, int bit) { return (value >> bit) & 1; }

// Linux permits tiles on request only: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), for the whole process.
bool request_tiles() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

#endif

struct Candidate {
  const Kernels* kernels;
  bool usable;
  const char* lacks;
};

}  // namespace

Machine this_machine() {
  Machine machine{};
#if defined(__x86_64__)
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  const bool saves = has(basic.c, 27);  // OSXSAVE
  const unsigned long long states = saves ? saved_states() : 0;
  const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6, tiles = (states & 0x60000) == 0x60000;
  machine.avx2 = ymm && has(extended.b, 5) && has(basic.c, 12) && has(basic.c, 29);
  machine.avxvnni = machine.avx2 && has(more.a, 4);
  machine.avx512 = machine.avx2 && zmm && has(extended.b, 16) && has(extended.b, 17) && has(extended.b, 30) &&
                   has(extended.b, 31) && has(extended.c, 1) && has(extended.c, 11) && has(more.a, 5);
  machine.wider = zmm && has(extended.b, 16);
  machine.amx = machine.avx512 && tiles && has(extended.d, 22) && has(extended.d, 24) && has(extended.d, 25);
  machine.amx_permitted = machine.amx && request_tiles();
#endif
  return machine;
}

Choice choose(const Machine& machine, const char* forced) {
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {&amx_kernels, machine.amx && machine.amx_permitted,
       machine.amx ? "the operating system denied AMX tiles to this process (ARCH_REQ_XCOMP_PERM)"
                   : "this processor or operating system lacks AMX int8 and bf16 tiles"},
      {&avx512_kernels, machine.avx512, "this processor or operating system lacks AVX-512 with VBMI, VNNI and BF16"},
      {&avxvnni_kernels, machine.avxvnni,
       machine.avx512 ? "this processor or operating system lacks AVX-VNNI"
                      : "this processor or operating system lacks AVX-VNNI, and AVX-512 with VBMI, VNNI and BF16"},
      {&avx2_kernels, machine.avx2, "this processor or operating system lacks AVX2 with FMA and F16C"},
#endif
      {&scalar_kernels, true, ""},
  };
  Choice choice{};
  const bool force = forced && *forced;
  char valid[64] = "";
  const char* missed = nullptr;
  for (const Candidate& candidate : candidates) {
    strncat(valid, valid[0] ? ", " : "", sizeof valid - strlen(valid) - 1);
    strncat(valid, candidate.kernels->isa, sizeof valid - strlen(valid) - 1);
    if (force && strcmp(forced, candidate.kernels->isa) != 0) continue;
    if (force && !candidate.usable) {
      choice.error = true;
      snprintf(choice.why, sizeof choice.why, "OCTAVO_ISA is '%s', but %s; unset it for the best that this machine has",
               forced, candidate.lacks);
      return choice;
    }
    if (candidate.usable && (force || candidate.kernels != &scalar_kernels)) {
      choice.kernels = candidate.kernels;
      snprintf(choice.why, sizeof choice.why, "%s",
               force    ? "forced by OCTAVO_ISA"
               : missed ? missed
                        : "the best there is");
      return choice;
    }
    missed = candidate.lacks;
  }
  choice.error = force;
  if (force)
    snprintf(choice.why, sizeof choice.why, "OCTAVO_ISA is '%s', expected one of: %s", forced, valid);
  else
    snprintf(choice.why, sizeof choice.why, "no native kernel for this processor is faster than the reference");
  return choice;
}

}  // namespace octavo
