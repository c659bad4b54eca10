#define ISA scalar
#include "cpu/gemm_kernel.inl"
