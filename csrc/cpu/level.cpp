#include "level.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastseq::cpu {
namespace {

constexpr std::string_view kNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)

// Between blanks, the levels that a library for one machine goes without (CMakeLists.txt, FASTSEQ_BUILD_LEVELS).
bool is_built(int level) {
  static const auto built = [] {
    std::array<bool, std::size(kNames)> found;
    for (size_t i = 0; i < found.size(); ++i)
      found[i] = std::string_view(FASTSEQ_LEFT_OUT).find(" " + std::string(kNames[i]) + " ") == std::string_view::npos;
    return found;
  }();
  return built[level];
}

// Products of pairs of bfloat16. Asked once, as calls ask for the level several times: a virtual machine's host has to answer, in
// microseconds.
bool multiplies_pairs() {
  static const bool found = [] {
    unsigned a = 0, b, c, d;
    constexpr unsigned kVectorBf16 = 1u << 5;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kVectorBf16);
  }();
  return found;
}

// Tiles with bfloat16, AVX512-BF16 beside them, and the system's permission to use the tiles' registers, which are saved only for
// processes that ask. One permission serves every thread, those to come as well.
const std::string& amx_obstacle() {
  static const std::string obstacle = []() -> std::string {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return "this processor has no AMX";
    constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
    if ((d & (kTile | kBf16)) != (kTile | kBf16)) return "this processor has no AMX with bfloat16";
    if (!multiplies_pairs()) return "this processor has no AVX512-BF16";
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr uint32_t kTileState = 3u << 17;
    if ((low & kTileState) != kTileState) return "the system does not save AMX registers";
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
    // ENOSPC: some thread's alternative signal stack is too small for the larger frame
    if (errno == ENOSPC) return "the system denies AMX: a thread's alternative signal stack is too small (ENOSPC)";
    return std::string("the system denies AMX: ") + std::strerror(errno);
  }();
  return obstacle;
}

Level highest() {
  static const Level found = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Level::kAvx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? Level::kAvx2
                                                                                                            : Level::kDefault;
  }();
  if (found != Level::kAvx512) return found;
  // asked last, and only where it may be used: permission is a property of the process
  if (amx_obstacle().empty()) return Level::kAmx;
  // AMD multiplies pairs at twice the rate of fp32's multiply-adds, Intel at half of it.
  return multiplies_pairs() && __builtin_cpu_is("amd") ? Level::kAvx512Bf16 : found;
}

#endif

Level level_of(const char* wanted) {
  int most = static_cast<int>(Level::kAmx);
  if (wanted && *wanted) {
    most = static_cast<int>(std::size(kNames)) - 1;
    while (most >= 0 && kNames[most] != wanted) --most;
    STD_TORCH_CHECK(most >= 0, "FASTSEQ_CPU_LEVEL=", wanted, " is none of default, avx2, avx512, avx512_bf16, amx");
  }
#if defined(__x86_64__)
  int found = most == 0 ? 0 : std::min(most, static_cast<int>(highest()));
  // asked for by name, wherever it can run
  if (most == static_cast<int>(Level::kAvx512Bf16) && found == static_cast<int>(Level::kAvx512) && multiplies_pairs()) found = most;
#ifdef FASTSEQ_EMULATED_TILES
  const bool vectors = found == static_cast<int>(Level::kAvx512) || found == static_cast<int>(Level::kAvx512Bf16);
  if (wanted && most == static_cast<int>(Level::kAmx) && vectors && multiplies_pairs()) found = most;
#endif
  while (found >= 0 && !is_built(found)) --found;
  STD_TORCH_CHECK(found >= 0, "this library was built for one machine, without kernels for what ",
                  wanted && *wanted ? "FASTSEQ_CPU_LEVEL asks for" : "this processor has", "; `make library` builds all of them");
  return static_cast<Level>(found);
#else
  return Level::kDefault;
#endif
}

struct Environment {
  Level level;
  bool poison, parts;
};

// What was read last; earlier ones stay, for threads that are reading them.
std::atomic<const Environment*> known = nullptr;

const Environment& environment() {
  const Environment* found = known.load(std::memory_order_acquire);
  if (!found) {
    const Level level = level_of(std::getenv("FASTSEQ_CPU_LEVEL"));
    found = new Environment{level, std::getenv("FASTSEQ_CPU_POISON") != nullptr, std::getenv("FASTSEQ_CPU_PARTS") != nullptr};
    known.store(found, std::memory_order_release);
  }
  return *found;
}

}  // namespace

void forget_environment() { known.store(nullptr, std::memory_order_release); }

Level level() { return environment().level; }
bool poisons_scratch() { return environment().poison; }
bool attends_in_parts() { return environment().parts; }

std::string cpu_level() { return std::string(kNames[static_cast<int>(level())]); }

std::string cpu_amx_obstacle() {
#if defined(__x86_64__)
  return amx_obstacle();
#else
  return "this processor has no AMX";
#endif
}

}  // namespace fastseq::cpu
