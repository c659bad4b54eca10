#define ISA scalar
#include "cpu/divergence_rows_kernel.inl"
