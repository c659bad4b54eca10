"""DistillLoss as a function of autograd: forward computes the gradients, since it has the logits, backward scales them.

It gives them away, so a second backward pass computes them anew. So does the first one for the head's gradients if
reduction is "none": those depend on each row's upstream gradient.

Shapes: T tokens, n of them take part, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rbfast.loss.solver import Job, solve
from rbfast.ops import scale_
from rbfast.ops.dtypes import wide

Reduction = Literal["mean", "sum", "none"]
Gradients = tuple[Tensor | None, ...]


class FusedLoss(torch.autograd.Function):
    """Loss (a scalar, or [T] for reduction="none"), divergence, CE and the bound of the filter's error, all [T]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, reduction: Reduction
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias)
        by_token = reduction == "none"
        ctx.job, ctx.by_token = job, by_token
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wanted = (wants_hidden, wants_weight and not by_token, wants_bias and not by_token)
        solution = solve((hidden, weight, bias), job, wanted)
        ctx.gradients = solution.gradients
        kl_weight, ce_weight, temperature = job.parameters.unbind()
        loss = torch.addcmul(ce_weight * solution.ce, kl_weight * temperature**2, solution.divergence)
        bound = None if solution.left_out is None else _norm_bound(solution.left_out, weight) * job.divisor
        divergence, ce, error = (_at_tokens(x, job, hidden) for x in (solution.divergence, solution.ce, bound))
        ctx.mark_non_differentiable(divergence, ce, error)
        return _at_tokens(loss, job, hidden) if by_token else _sum(loss), divergence, ce, error

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> Gradients:  # type: ignore[override]
        if upstream is None:
            return (None,) * 5
        gradients, ctx.gradients = ctx.gradients, (None, None, None)  # they are the caller's now
        gradients = _scaled(gradients, upstream, ctx.dtypes)
        hidden, weight, bias = (x is None and y for x, y in zip(gradients, ctx.needs_input_grad, strict=False))
        if hidden or weight or bias:
            job = _weighted(ctx.job, upstream, ctx.by_token)
            made = solve(ctx.saved_tensors, job, (hidden, weight, bias)).gradients
            gradients = tuple(x if x is not None else y for x, y in zip(gradients, made, strict=True))
        return *(None if x is None else x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)), None, None


def _scaled(gradients: Gradients, upstream: Tensor, dtypes: Sequence[torch.dtype | None]) -> Gradients:
    """By the upstream gradient: a scalar, or [T] for a gradient of hidden alone. Those of hidden and bias in dtypes."""
    d_hidden, d_weight, d_bias = gradients
    if d_hidden is not None:
        d_hidden = _times(d_hidden, upstream.unsqueeze(1) if upstream.dim() else upstream, dtypes[0])
    if d_weight is not None:
        scale_(d_weight, upstream)
    if d_bias is not None:
        d_bias = _times(d_bias, upstream, dtypes[2])
    return d_hidden, d_weight, d_bias


def _times(x: Tensor, factor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x times factor in dtype, by one pass over memory; in place of x if that is its own."""
    return torch.mul(x, factor, out=x if x.dtype == dtype else torch.empty_like(x, dtype=dtype))


def _weighted(job: Job, upstream: Tensor, by_token: bool) -> Job:
    """The job whose gradients are those of `job` times the upstream gradient."""
    order = job.taken.order
    weight = upstream[order] if by_token and order is not None else upstream
    return replace(job, parameters=torch.cat([job.parameters[:2] * weight, job.parameters[2:]]))


def _at_tokens(values: Tensor | None, job: Job, hidden: Tensor) -> Tensor:
    """Values [n] of the rows that take part as [T], with 0 elsewhere; None: 0 everywhere."""
    order = job.taken.order
    if values is None:
        return job.parameters.new_zeros(hidden.shape[0])
    return values if order is None else values.new_zeros(hidden.shape[0]).index_copy_(0, order, values)


def _norm_bound(left_out: Tensor, weight: Tensor) -> Tensor:
    """Upper bounds [n] of the norms of rows of dz W, where dz sums in magnitude to left_out [n] by row; W is [V, H]."""
    longest = wide(torch.linalg.vector_norm(weight.detach(), dim=1).max())
    return torch.where(left_out > 0, left_out * (1.01 * longest), 0.0)  # 1.01: norms are rounded to the head's dtype


def _sum(loss: Tensor) -> Tensor:
    # Sorted, so that the order in which rows were packed does not reach the last bit. On a GPU, where a row's own bits
    # depend on its place in a product, that would cost more than all other sums and keep nothing.
    if loss.device.type == "cpu":
        loss = loss.sort().values
    return loss.sum(dtype=torch.float64).to(loss.dtype)
