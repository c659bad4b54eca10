"""Operands of the head's products, and checks of the results."""

from typing import Any

import torch
from torch import Tensor

import rbfast.ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS32 = torch.finfo(torch.float32).eps
# T, H, V: below one vector, odd, an exact tile, more rows than a block, more of k than one block and than one panel.
SHAPES = ((1, 1, 1), (3, 5, 7), (16, 192, 96), (17, 33, 49), (130, 577, 1001), (300, 4100, 50))


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def head_backward(dz: Tensor, weight: Tensor, thresholds: Tensor | None = None, ops: Any = rbfast.ops) -> Tensor:
    """The result of head_backward_ in a tensor of NaNs."""
    d_hidden = torch.full((len(dz), weight.shape[1]), torch.nan, device=dz.device)
    ops.head_backward_(d_hidden, dz, weight, thresholds)
    return d_hidden


def assert_product(ours: Tensor, a: Tensor, b: Tensor, start: Tensor | None = None) -> None:
    """ours = start + a @ b within the error that any order of an fp32 sum may have."""
    a, b = a.double(), b.double()
    truth, size = a @ b, a.abs() @ b.abs()
    if start is not None:
        truth, size = truth + start, size + start.abs()
    assert ours.dtype == torch.float32
    assert bool(((ours - truth).abs() <= (a.shape[1] + 1) * EPS32 * size).all())
