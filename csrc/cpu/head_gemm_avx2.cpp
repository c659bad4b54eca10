#pragma GCC target("avx2,fma,f16c")
#define ISA avx2
#include "cpu/head_gemm_kernel.inl"
#include "cpu/filtered_kernel.inl"
