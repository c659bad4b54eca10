"""The head's three products on a GPU: library GEMMs of 16-bit operands with fp32 output, which torch has only for CUDA.

Any other pair of dtypes is widened first, as in the reference, but one slice of the vocabulary at a time: a whole head
in fp32 is twice as large as the 16-bit original. This happens for an fp16 student, whose dz is fp32, and for mixed
dtypes. Shapes: T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rbfast.ops.dtypes import wide
from rbfast.ops.reference import zero_below

SLICE_BYTES = 64 * 2**20  # of the slice of the head in fp32


def _has_fp32_output(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def _slices(V: int, H: int) -> Iterator[slice]:
    """Slices along V that cut [V, H] into pieces of SLICE_BYTES in fp32."""
    step = max(1, SLICE_BYTES // (4 * max(1, H)))
    return (slice(start, start + step) for start in range(0, V, step))


def head_forward_(logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Sets logits [T, V] fp32 to hidden [T, H] weight [V, H]^T, without rounding to 16 bits in between."""
    if _has_fp32_output(hidden, weight):
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=logits)
        return
    x = wide(hidden)
    for part in _slices(*weight.shape):
        torch.mm(x, wide(weight[part]).T, out=logits[:, part])


def head_backward_(d_hidden: Tensor, dz: Tensor, weight: Tensor, thresholds: Tensor | None = None) -> None:
    """Sets d_hidden [T, H] fp32 to dz [T, V] weight [V, H].

    Entries below the threshold [T] of their row are set to 0 first. That saves no work here.
    """
    dz = zero_below(dz, thresholds)
    if _has_fp32_output(dz, weight):
        torch.mm(dz, weight, out_dtype=torch.float32, out=d_hidden)
        return
    d_hidden.zero_()
    for part in _slices(*weight.shape):
        d_hidden.addmm_(wide(dz[:, part]), wide(weight[part]))


def head_grad_(dW: Tensor, dz: Tensor, hidden: Tensor) -> None:
    """dW [V, H] fp32 += dz [T, V]^T hidden [T, H], accumulated onto dW in the GEMM itself."""
    if _has_fp32_output(dz, hidden):
        torch.addmm(dW, dz.T, hidden, out_dtype=torch.float32, out=dW)
        return
    x = wide(hidden)
    for part in _slices(*dW.shape):
        dW[part].addmm_(wide(dz[:, part]).T, x)


def head_grad_rounded_(dW: Tensor, dz: Tensor, hidden: Tensor, adds: bool) -> None:
    """dW [V, H] (+)= dz [T, V]^T hidden [T, H], all in bf16: each product is summed in fp32 and rounded once.

    Takes half the memory of a sum in fp32, and no cast afterwards. n products give an error of about 0.1% sqrt(n / 2).
    """
    if adds:
        dW.addmm_(dz.T, hidden)
    else:
        torch.mm(dz.T, hidden, out=dW)
