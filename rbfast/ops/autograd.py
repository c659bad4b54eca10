"""The column ops and the grouped product in autograd.

A delta that is folded into its weight needs only a backward: a tap, the identity on the layer's output. A delta beside
its weight runs as a side branch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rbfast.ops.registry import (
    LIBRARY,
    column_grad,
    column_grad_all,
    column_linear_,
    column_scatter_,
    grouped_column_grad,
    grouped_column_linear_,
    grouped_column_scatter_,
    grouped_linear,
)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """once_differentiable, applied only if a graph is kept: its no_grad costs more than everything else around the op.

    Incoming gradients are marked as requiring grad first. Otherwise once_differentiable would treat the result of a
    constant gradient, such as a loss's own 1, as a constant, and a second derivative would silently be 0.
    """
    once = once_differentiable(backward)

    def call(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        return once(ctx, *(None if grad is None else grad.detach().requires_grad_() for grad in grads))

    return call


def _save_for_grouped_linear(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _grouped_linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, ends = ctx.saved_tensors
    return grouped_linear(dy, weight.mT, ends), None, None


torch.library.register_autograd(
    "rbfast::grouped_linear", _grouped_linear_backward, setup_context=_save_for_grouped_linear, lib=LIBRARY
)


class _ColumnTap(torch.autograd.Function):
    """The identity on y [..., out]. Its backward computes dA and dB of a delta that is already in the weight.

    For a stack of experts y is [S, out], xs [S, s], and the rows of each expert end at `ends` [E].
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float, ends: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(xs, A, B, ends)
        ctx.scale = scale
        return y.detach()  # an alias that autograd does not treat as a view, so later in-place changes are allowed

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xs, A, B, ends = ctx.saved_tensors
        dA, dB = _factor_grads(dy.reshape(-1, dy.shape[-1]), xs, ends, A, B, ctx.scale)
        return dy, None, dA, dB, None, None


class _SharedTap(torch.autograd.Function):
    """See `column_tap_shared`. factors: A of every matrix, then B of every matrix."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, xs: Tensor, scale: float, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(xs, *factors)
        ctx.scale, ctx.is_spent = scale, False
        others = factors[len(factors) // 2 + 1 :]
        # Expanded from one element: in deterministic mode torch fills new memory, once per element of a shape.
        return y.detach(), *(xs.new_empty(()).expand(*y.shape[:-1], len(B)).detach() for B in others)

    @staticmethod
    @first_order
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.is_spent = True
        xs, *factors = ctx.saved_tensors
        count = len(dys)
        at = [i for i, dy in enumerate(dys) if dy is not None]
        rows = [dy.reshape(-1, dy.shape[-1]) for dy in dys if dy is not None]
        results = column_grad_all(rows, xs, [factors[i] for i in at], [factors[count + i] for i in at], ctx.scale)
        grads: list[Tensor | None] = [None] * (2 * count)
        for i, dA, dB in zip(at, *results, strict=True):
            grads[i], grads[count + i] = dA, dB
        return dys[0], None, None, *grads


class _TapInto(torch.autograd.Function):
    """See `column_tap_into`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, sink: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy


class _ColumnSide(torch.autograd.Function):
    """y [..., out] + scale * (xs A^T) B^T, where xs [T, s] are the columns `cols` of x [..., in], in runs of `run`.
    Stacks of experts as in `_ColumnTap`."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        xs: Tensor,
        cols: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        run: int = 1,
        ends: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(xs, cols, A, B, ends)
        ctx.scale, ctx.run, ctx.x_shape, ctx.x_dtype = scale, run, x.shape, x.dtype
        out = y.clone(memory_format=torch.contiguous_format)
        rows = out.view(-1, out.shape[-1])
        if ends is None:
            column_linear_(rows, xs, A, B, scale)
        else:
            grouped_column_linear_(rows, xs, ends, A, B, scale)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xs, cols, A, B, ends = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = None
        if ctx.needs_input_grad[1]:
            dx = rows.new_zeros(rows.shape[0], ctx.x_shape[-1])
            if ends is None:
                column_scatter_(dx, rows, cols, A, B, ctx.scale, ctx.run)
            else:
                grouped_column_scatter_(dx, rows, ends, cols, A, B, ctx.scale, ctx.run)
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        dA, dB = _factor_grads(rows, xs, ends, A, B, ctx.scale)
        return dy, dx, None, None, dA, dB, None, None, None


def _factor_grads(
    dy: Tensor, xs: Tensor, ends: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    if ends is None:
        return column_grad(dy, xs, A, B, scale)
    return grouped_column_grad(dy, xs, ends, A, B, scale)


# `Function.apply` searches the arguments for tensors of dead functorch transforms and checks for setup_context, which
# takes longer than the op. Without an active transform, its base class's method, which it calls next, is enough.
_tap: Any = super(torch.autograd.Function, _ColumnTap).apply
_shared_tap: Any = super(torch.autograd.Function, _SharedTap).apply
_tap_into: Any = super(torch.autograd.Function, _TapInto).apply


def column_tap(y: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float, ends: Tensor | None = None) -> Tensor:
    """The identity on y [..., out]. Its backward computes dA and dB of a delta that is already in the weight; with
    `ends`, of the deltas of a stack of experts."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _ColumnTap.apply(y, xs, A, B, scale, ends)
    return _tap(y, xs, A, B, scale, ends)


def column_tap_shared(
    y: Tensor, xs: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: float
) -> tuple[Tensor, ...]:
    """`column_tap` for matrices that share xs, given the output y [..., out] of the first one. Returns y, and for each
    other matrix a sink [..., its out] for `column_tap_into`: a tensor without memory or values.

    Autograd holds the gradients until all have arrived; then the backward computes dA and dB of every matrix in one
    call.
    """
    return _shared_tap(y, xs, scale, *A, *B)


def column_tap_into(y: Tensor, sink: Tensor) -> Tensor:
    """The identity on y [..., out]. Its backward also passes the gradient to the sink."""
    return _tap_into(y, sink)


def is_spent(sink: Tensor) -> bool:
    """Whether the backward behind a sink has run; it may not be able to run again."""
    return sink.grad_fn.is_spent  # type: ignore[union-attr]


column_side = _ColumnSide.apply
