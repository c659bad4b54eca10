#define ISA scalar
#include "cpu/columns_kernel.inl"
