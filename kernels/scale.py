"""scale_ in Triton: x *= factor, with the factor on the device.

It is 1 in nearly every backward pass, which only the device knows: then every program stops after reading it, and a
gradient of a GB costs microseconds. Else x is read and written once, with products in the factor's dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
PROGRAMS = 2048


@triton.jit
def scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            i = start + tl.arange(0, BLOCK)
            value = tl.load(x + i, mask=i < n) * by
            tl.store(x + i, value.to(x.dtype.element_ty), mask=i < n)


def _launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args: object, **options: object) -> None:
    kernel[grid](*args, **options)


def scale_(x: Tensor, factor: Tensor) -> None:
    if not x.is_contiguous() or factor.numel() != 1 or factor.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "scale_: x must be contiguous and factor one float32 or float64, "
            f"got strides {x.stride()} and {factor.dtype} {list(factor.shape)}"
        )
    if x.numel():
        _launch(scale_kernel, (min(PROGRAMS, triton.cdiv(x.numel(), BLOCK)),), x, factor, x.numel(), BLOCK)
