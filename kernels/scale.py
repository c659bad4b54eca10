"""scaled_ in Triton: out = x * factor, with the factor on the device; out may be x, or of another dtype.

In nearly every backward pass the factor is 1, but only the device knows it. Then an in-place call stops after reading
the factor, so that a gradient of 1 GB costs microseconds. Otherwise x is read once and out is written once, with
products in the factor's dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rbfast.kernels.columns import _launch

BLOCK = 4096
PROGRAMS = 2048


@triton.jit
def scale_kernel(out, x, factor, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if not IN_PLACE or by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            i = start + tl.arange(0, BLOCK)
            value = tl.load(x + i, mask=i < n) * by
            tl.store(out + i, value.to(out.dtype.element_ty), mask=i < n)


def scaled_(out: Tensor, x: Tensor, factor: Tensor) -> None:
    if not (out.shape == x.shape and out.is_contiguous() and x.is_contiguous()):
        raise ValueError(
            f"scaled_: out and x must be contiguous and of one shape, got {list(out.shape)} with strides "
            f"{out.stride()} and {list(x.shape)} with {x.stride()}"
        )
    if factor.numel() != 1 or factor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scaled_: factor must be one float32 or float64, got {factor.dtype} {list(factor.shape)}")
    grid, in_place = min(PROGRAMS, triton.cdiv(x.numel(), BLOCK)), out.data_ptr() == x.data_ptr()
    _launch(scale_kernel, (grid,), out, x, factor, x.numel(), in_place, BLOCK)
