"""In which dtype sums are taken."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the accumulation dtype: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()
