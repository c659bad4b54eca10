// Which instruction set the CPU kernels use: the best one the machine has, or the one named by RBFAST_CPU_ISA.
#pragma once

namespace rbfast {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// Throws if RBFAST_CPU_ISA names an unknown set or one this machine lacks.
Isa active_isa();

}  // namespace rbfast
