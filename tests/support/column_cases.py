"""Inputs for the adapter's ops: random deltas of any shape and layout, and a call of each op."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rbfast import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS32 = torch.finfo(torch.float32).eps
EMPTY = ((0, 9, 5, 7, 2), (3, 9, 5, 0, 2), (3, 9, 5, 7, 0), (3, 9, 0, 7, 2))


@dataclass(frozen=True)
class Delta:
    """The operands of the ops: x and dx [T, in], y and dy [T, out], weight [out, in]; xs and base are their columns."""

    x: Tensor
    dx: Tensor
    y: Tensor
    dy: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    cols: Tensor
    xs: Tensor
    base: Tensor
    scale: float
    run: int = 1

    def map(self, f: Callable[[Tensor], Tensor]) -> "Delta":
        """Applies f to every floating-point tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: f(v) for name, v in values.items() if isinstance(v, Tensor) and name != "cols"})


def make(shape: tuple[int, ...], dtype: torch.dtype, magnitude: float = 1.0, seed: int = 0, run: int = 1) -> Delta:
    """shape: T, in, out, s and k. The columns are drawn in runs."""
    tokens, features, out, s, k = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    runs = torch.randperm(features // run, generator=generator)[: s // run]
    cols = (runs[:, None] * run + torch.arange(run)).flatten()
    x, dx, y, dy, weight = (
        (magnitude * draw(*size)).to(dtype)
        for size in ((tokens, features), (tokens, features), (tokens, out), (tokens, out), (out, features))
    )
    return Delta(x, dx, y, dy, weight, draw(k, s), draw(out, k), cols, x[:, cols], weight[:, cols], 0.7, run)


def run(name: str, d: Delta, module: object = ops) -> tuple[Tensor, ...]:
    """The results of an op; those written in place are copies."""
    op = getattr(module, name)
    if name == "column_gather":
        return (op(d.x, d.cols, d.run),)
    if name == "column_grad":
        return op(d.dy, d.xs, d.A, d.B, d.scale)
    if name == "column_linear_":
        op(y := d.y.clone(), d.xs, d.A, d.B, d.scale)
        return (y,)
    if name == "column_scatter_":
        op(dx := d.dx.clone(), d.dy, d.cols, d.A, d.B, d.scale, d.run)
        return (dx,)
    op(weight := d.weight.clone(), d.base, d.cols, d.A, d.B, d.scale, d.run)
    return (weight,)


def fold_all(deltas: Sequence[Delta], module: object = ops) -> list[Tensor]:
    """The weights that column_fold_all_ leaves in copies; the scale is the first delta's."""
    op = module.column_fold_all_  # type: ignore[attr-defined]
    weights = [d.weight.clone() for d in deltas]
    lists = ([getattr(d, name) for d in deltas] for name in ("base", "cols", "A", "B"))
    op(weights, *lists, deltas[0].scale, [d.run for d in deltas])
    return weights


def sharing_xs(outs: Sequence[int], tokens: int, s: int, k: int, dtype: torch.dtype) -> list[Delta]:
    """Deltas of matrices with these numbers of output features and a shared input."""
    made = [make((tokens, s, out, s, k), dtype, seed=seed) for seed, out in enumerate(outs)]
    return [replace(d, xs=made[0].xs) for d in made]


def grad_all(deltas: Sequence[Delta], module: object = ops) -> list[tuple[Tensor, Tensor]]:
    """dA and dB of each delta by column_grad_all; xs and the scale are the first delta's."""
    dys, As, Bs = ([getattr(d, name) for d in deltas] for name in ("dy", "A", "B"))
    op = module.column_grad_all  # type: ignore[attr-defined]
    return list(zip(*op(dys, deltas[0].xs, As, Bs, deltas[0].scale), strict=True))


IN_RUNS = ("column_gather", "column_scatter_", "column_fold_")
RUNS = (2, 4, 8, 16)
OPS = ("column_gather", "column_grad", "column_linear_", "column_scatter_", "column_fold_")


def scattered_in_memory(t: Tensor) -> Tensor:
    """t in another layout: every second element of a larger, transposed tensor that holds NaN elsewhere."""
    empty = float("nan") if t.is_floating_point() else -1
    wide = torch.full([2 * size for size in reversed(t.shape)], empty, dtype=t.dtype, device=t.device)
    view = wide.T[::2, ::2] if t.dim() == 2 else wide[::2]
    view.copy_(t)
    return view


def arguments(name: str, d: Delta) -> tuple:
    return {
        "column_gather": (d.x, d.cols, d.run),
        "column_grad": (d.dy, d.xs, d.A, d.B, d.scale),
        "column_linear_": (d.y, d.xs, d.A, d.B, d.scale),
        "column_scatter_": (d.dx, d.dy, d.cols, d.A, d.B, d.scale, d.run),
        "column_fold_": (d.weight, d.base, d.cols, d.A, d.B, d.scale, d.run),
    }[name]
