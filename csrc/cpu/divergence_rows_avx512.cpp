#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#define ISA avx512
#include "cpu/divergence_rows_kernel.inl"
#endif
