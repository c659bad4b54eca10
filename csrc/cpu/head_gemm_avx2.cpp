#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define ISA avx2
#include "cpu/head_gemm_filtered_kernel.inl"
#endif
