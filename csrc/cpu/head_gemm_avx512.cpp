#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#define ISA avx512
#include "cpu/head_gemm_filtered_kernel.inl"
#endif
