#if defined(__x86_64__)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#define ISA amx
#include "cpu/head_gemm_amx_kernel.inl"
#endif
