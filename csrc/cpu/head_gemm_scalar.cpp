#define ISA scalar
#include "cpu/head_gemm_kernel.inl"
#include "cpu/filtered_kernel.inl"
