"""The head's three products on a GPU: library GEMMs of 16-bit operands with fp32 output, which torch has for CUDA only.

Any other pair of dtypes is widened first, as in the reference. Shapes: T tokens, H hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from rbfast import reference


def _has_wide_output(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def head_forward_(logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Sets logits [T, V] fp32 to hidden [T, H] weight [V, H]^T; they are never rounded to 16 bits on the way."""
    if _has_wide_output(hidden, weight):
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=logits)
    else:
        reference.head_forward_(logits, hidden, weight)


def head_backward(dz: Tensor, weight: Tensor) -> Tensor:
    """dz [T, V] weight [V, H] in fp32."""
    if _has_wide_output(dz, weight):
        return torch.mm(dz, weight, out_dtype=torch.float32)
    return reference.head_backward(dz, weight)


def head_grad_(dW: Tensor, dz: Tensor, hidden: Tensor) -> None:
    """dW [V, H] fp32 += dz [T, V]^T hidden [T, H], in one product that starts from dW."""
    if _has_wide_output(dz, hidden):
        torch.addmm(dW, dz.T, hidden, out_dtype=torch.float32, out=dW)
    else:
        reference.head_grad_(dW, dz, hidden)
