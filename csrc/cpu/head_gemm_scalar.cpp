#define ISA scalar
#include "cpu/head_gemm_filtered_kernel.inl"
