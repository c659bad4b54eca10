"""The plain-torch definition of every op: readable, any floating dtype up to fp64, the oracle of the tests.

Shapes: T tokens, `in`/`out` features of a frozen weight [out, in], s columns in the support, k the rank, V vocabulary.
"""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the accumulation dtype: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def column_gather(x: Tensor, cols: Tensor) -> Tensor:
    """The support's columns of x [T, in], copied: [T, s]."""
    return x.index_select(1, cols)


def column_grad(dy: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of A [k, s] and B [out, k] in `y += scale * (xs A^T) B^T`, given dy [T, out] and xs [T, s]."""
    dy, xs, A, B = wide(dy), wide(xs), wide(A), wide(B)
    dB = scale * (dy.T @ (xs @ A.T))
    dA = scale * ((dy @ B).T @ xs)
    return dA, dB


def column_linear_(y: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """Adds the delta beside the weight: y [T, out] += scale * (xs A^T) B^T."""
    y.copy_(wide(y) + scale * (wide(xs) @ wide(A).T) @ wide(B).T)


def column_scatter_(dx: Tensor, dy: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """The delta's part of the input gradient: dx[:, cols] += scale * (dy B) A, with dx [T, in] and dy [T, out]."""
    delta = scale * (wide(dy) @ wide(B)) @ wide(A)
    dx[:, cols] = (wide(dx[:, cols]) + delta).to(dx.dtype)


def column_fold_(weight: Tensor, base_columns: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """Writes the delta into the weight [out, in]: weight[:, cols] = cast(base_columns + scale * B A).

    The sum over k runs in order, each product rounded before it is added: a fold has the same bits on every machine.
    """
    delta = torch.zeros_like(wide(base_columns))
    for b, a in zip((scale * wide(B)).unbind(1), wide(A).unbind(0), strict=True):
        delta = delta + torch.outer(b, a)
    weight[:, cols] = (wide(base_columns) + delta).to(weight.dtype)
