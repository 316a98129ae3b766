// The first part of what the programs that run CPU kernels without torch share, for the head of each; cpu_harness.inl is the second.
#pragma once

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// OF_LEVEL(few_, avx2) is few_avx2; both may be macros.
#define OF_LEVEL_(name, level) name##level
#define OF_LEVEL(name, level) OF_LEVEL_(name, level)

// Whether the tiles' registers may be used, for which the system's permission is asked.
inline bool tiles_are_allowed() {
#if (defined(TILES) || defined(FASTSEQ_TILES)) && !defined(FASTSEQ_EMULATED_TILES)
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return std::puts("the system denies AMX"), false;
#endif
  return true;
}
