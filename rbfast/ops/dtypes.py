"""In which dtype sums are taken."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays, everything else becomes fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype that its sums are taken in."""
    return x.to(wide_dtype(x.dtype))
