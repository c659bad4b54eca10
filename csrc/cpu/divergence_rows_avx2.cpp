#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define ISA avx2
#include "cpu/divergence_rows_kernel.inl"
#endif
