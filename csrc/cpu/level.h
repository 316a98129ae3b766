// Which instructions the CPU kernels may use: what the processor and the system allow, lowered by FASTSEQ_CPU_LEVEL. And what else the
// environment says: it is read once, by the first call of these, since calls take microseconds and other threads may set variables.
#pragma once

#include <string>

namespace fastseq::cpu {

enum class Level { kDefault, kAvx2, kAvx512, kAvx512Bf16, kAmx };

Level level();

// "amx", "avx512_bf16", "avx512", "avx2" or "default".
std::string cpu_level();

// For tests: whether scratch holds NaN until it is written (FASTSEQ_CPU_POISON), and whether AMX multiplies float32 attention without
// gradients in parts whatever its size (FASTSEQ_CPU_PARTS).
bool poisons_scratch();
bool attends_in_parts();
// To be read anew: a test has set one of these variables.
void forget_environment();

// Why this process does not use AMX, though nothing lowers the level; empty where it does.
std::string cpu_amx_obstacle();

}  // namespace fastseq::cpu
