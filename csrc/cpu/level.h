// Which instructions the CPU kernels may use: what the processor and the system allow, lowered by FASTSEQ_CPU_LEVEL.
#pragma once

#include <string>

namespace fastseq::cpu {

enum class Level { kDefault, kAvx2, kAvx512, kAvx512Bf16, kAmx };

Level level();

// "amx", "avx512_bf16", "avx512", "avx2" or "default".
std::string cpu_level();

// Why this process does not use AMX, though nothing lowers the level; empty where it does.
std::string cpu_amx_obstacle();

}  // namespace fastseq::cpu
