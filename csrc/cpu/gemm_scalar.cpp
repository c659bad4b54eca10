#define ISA scalar
#include "cpu/gemm_kernel.inl"
#include "cpu/filtered_kernel.inl"
