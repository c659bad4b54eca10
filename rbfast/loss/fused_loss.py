"""DistillLoss as an autograd function: forward, which has the logits, computes the gradients; backward scales them.

Backward hands its gradients to the caller, so a second backward pass recomputes them. With reduction "none" the first
one computes the head's gradients too, because they depend on each row's upstream gradient.

Shapes: T tokens, n of them take part, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rbfast.loss.chunked_loss import LossJob, compute_chunks
from rbfast.ops import first_order, scaled_
from rbfast.ops.dtypes import wide

Gradients = tuple[Tensor | None, ...]

_LARGE = 2**20  # values; below that a GPU only pays for the launch, and torch.mul launches faster than our op


class FusedLoss(torch.autograd.Function):
    """Loss (a scalar, or [T] by token), divergence, CE and, with a gradient filter, its error bound, each [T]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: LossJob
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.job, ctx.dtypes = job, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        wanted = (wants_hidden, wants_weight and not job.by_token, wants_bias and not job.by_token)
        divergence, ce, loss, left_out, ctx.gradients = compute_chunks((hidden, weight, bias), job, wanted)
        bound = None if job.gradient_filter == 0 else _error_bound(left_out, divergence, weight, job)
        loss = loss if job.by_token else _sum(loss)
        order, T = job.active.order, hidden.shape[0]
        if order is not None:
            divergence, ce = _scatter_to_tokens(divergence, order, T), _scatter_to_tokens(ce, order, T)
            bound = None if bound is None else _scatter_to_tokens(bound, order, T)
            loss = _scatter_to_tokens(loss, order, T) if job.by_token else loss
        ctx.mark_non_differentiable(divergence, ce, *(() if bound is None else (bound,)))
        return loss, divergence, ce, bound

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> Gradients:  # type: ignore[override]
        if upstream is None:
            return None, None, None, None
        gradients, ctx.gradients = ctx.gradients, (None, None, None)  # they belong to the caller from here on
        d_hidden, d_weight, d_bias = _scale_gradients(gradients, upstream, ctx.dtypes)
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        lacks = (wants_hidden and d_hidden is None, wants_weight and d_weight is None, wants_bias and d_bias is None)
        if any(lacks):
            made = compute_chunks(ctx.saved_tensors, _weight_job(ctx.job, upstream), lacks).gradients
            ours = (d_hidden, d_weight, d_bias)  # autograd casts the recomputed ones
            d_hidden, d_weight, d_bias = (x if y is None else y for x, y in zip(ours, made, strict=True))
        return d_hidden, d_weight, d_bias, None


def _scale_gradients(gradients: Gradients, upstream: Tensor, dtypes: Sequence[torch.dtype | None]) -> Gradients:
    """The gradients times the upstream gradient (a scalar, or [T] if only hidden has a gradient), cast to `dtypes`."""
    d_hidden, d_weight, d_bias = gradients
    if d_hidden is not None:
        d_hidden = _scale_to(d_hidden, upstream.unsqueeze(1) if upstream.dim() else upstream, dtypes[0])
    if d_weight is not None:
        scaled_(d_weight, d_weight, upstream)
        d_weight = d_weight.to(dtypes[1])
    if d_bias is not None:
        d_bias = _scale_to(d_bias, upstream, dtypes[2])
    return d_hidden, d_weight, d_bias


def _scale_to(x: Tensor, factor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x * factor in `dtype`, in one pass over memory; in place if that is the dtype of x."""
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    if x.is_cuda and factor.dim() == 0 and x.numel() >= _LARGE:
        scaled_(out, x, factor)
    else:
        torch.mul(x, factor, out=out)
    return out


def _weight_job(job: LossJob, upstream: Tensor) -> LossJob:
    """The job whose gradients are those of `job` times the upstream gradient."""
    rows, order = job.active.size, job.active.order
    by = upstream[order] if job.by_token and order is not None else upstream
    return job._replace(kl_weight=job.kl_weight.times(by, rows), ce_weight=job.ce_weight.times(by, rows))


def _scatter_to_tokens(values: Tensor, order: Tensor, tokens: int) -> Tensor:
    """Values of the rows `order` as [T], with 0 elsewhere."""
    return values.new_zeros(tokens).index_copy_(0, order, values)


def _error_bound(left_out: Tensor | None, like: Tensor, weight: Tensor, job: LossJob) -> Tensor:
    """Upper bounds [n] of the norms of rows of dz W, where row i of dz sums to left_out[i] in magnitude; W is [V, H].

    left_out is None if the filter is ignored: the bound is 0.
    """
    if left_out is None:
        return torch.zeros_like(like)
    longest = wide(torch.linalg.vector_norm(weight.detach(), dim=1).max())
    bound = torch.where(left_out > 0, left_out * (1.01 * longest), 0.0)  # 1.01: norms are rounded to the head's dtype
    return bound * job.divisor


def _sum(loss: Tensor) -> Tensor:
    # Sorted, so that the order in which rows were packed does not change the last bit. On a GPU a row's own bits depend
    # on its position in a GEMM, so sorting would gain nothing, and would cost more than all other sums.
    if loss.device.type != "cpu":
        return loss.sum()
    # In NumPy: for a small batch the overhead of torch ops would equal the rest of the work.
    return torch.tensor(np.sort(loss.numpy()).sum(dtype=np.float64), dtype=loss.dtype, device="cpu")
