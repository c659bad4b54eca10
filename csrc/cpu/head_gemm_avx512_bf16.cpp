#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")
#define ISA avx512_bf16
#define BF16_PAIRS
#include "cpu/head_gemm_filtered_kernel.inl"
#endif
