"""Placement: which columns of which matrices are trained, under a budget.

    scores = score(model, batches, loss_fn)             # scores.py: one backward pass per batch of reasoning traces
    adapter = SparseAdapter.attach(model, placement=scores)

Matrices that read the same input (q, k, v; gate, up) form a group and share one support.
"""

import math
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rbfast.adapter.adapter_files import AdapterConfig, Delta, MatrixInfo
from rbfast.adapter.column_scores import Scores, generator
from rbfast.models.linears import (
    Shape,
    count_parameters,
    fingerprint,
    group_siblings,
    select_linears,
    stacked_experts,
)

DEFAULT_DENSITY = 0.003
DEFAULT_RANK = 2
START_NORM = 0.1
_FULL_SHARE = 0.5  # a default rank grows until the supports take at most this share of the inputs


@dataclass(frozen=True)
class Start:
    """Where one delta starts: cols [s] int64 sorted, A [k, s] fp32 (B starts at zero), and its score if it has one."""

    cols: Tensor
    A: Tensor
    score: float | None


def plan(
    model: nn.Module,
    density: float,
    support: int | None,
    rank: int | None,
    targets: str | Sequence[str],
    placement: "Scores | str | Path",
    scale: float,
    seed: int,
) -> tuple[AdapterConfig, dict[str, Delta]]:
    """Everything SparseAdapter.attach decides: the matrices, their supports and columns, and where A starts."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1 (the share of trained values), got {density}")
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    if isinstance(placement, Path) or (isinstance(placement, str) and placement != "random"):
        if not Path(placement).is_file():
            raise FileNotFoundError(
                f'placement must be "random", Scores (of rbfast.adapter.column_scores.score) or the path of a '
                f"file of them, got {str(placement)!r}: there is no such file"
            )
        placement = Scores.load(placement)
    linears = select_linears(model, targets)
    if targets == "all-linear":
        _warn_of_experts(model)
    shapes = group_siblings(linears)
    if isinstance(placement, Scores):
        shapes = placement.shapes_of(shapes)
    rank, supports = allocate(shapes, int(density * count_parameters(model)), rank, support)
    if isinstance(placement, Scores):
        starts = place_scored(placement, shapes, rank, supports, seed)
    else:
        starts = place_random(shapes, rank, supports, seed)
    modules, deltas = {}, {}
    for name, start in starts.items():
        shape, print_ = shapes[name], fingerprint(linears[name])
        modules[name] = MatrixInfo(
            shape.out_features, shape.in_features, supports[name], rank, shape.group, print_, start.score
        )
        deltas[name] = Delta(start.cols, start.A, torch.zeros(shape.out_features, rank))
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    method = placement.method if isinstance(placement, Scores) else "random"
    dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    return AdapterConfig(base or None, dtype, density, scale, seed, method, modules), deltas


def _warn_of_experts(model: nn.Module) -> None:
    experts = stacked_experts(model)
    if experts:
        share = sum(weight.numel() for weight in experts.values()) / count_parameters(model)
        warnings.warn(
            f"{len(experts)} stacks of experts (the first is {next(iter(experts))}), {share:.0%} of the parameters, "
            "get no delta: only linear layers do; adapter.left_out lists every weight without one",
            stacklevel=4,
        )


def allocate(
    shapes: Mapping[str, Shape], budget: int, rank: int | None = None, support: int | None = None
) -> tuple[int, dict[str, int]]:
    """Splits a budget of trained values over matrices: (rank k, support s of each), the sum of k (out + s) <= budget.

    Every matrix gets the same support, capped at its inputs; what is left over buys one more column for the first
    groups. Without `rank`: DEFAULT_RANK, less where that does not fit, more where it would leave budget unused; with
    `support` given, the largest rank that fits. Raises ValueError where nothing fits.
    """
    for name, value in (("rank", rank), ("support", support)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rank = rank or _default_rank(shapes, budget, support)
    narrowest = min(shape.in_features for shape in shapes.values())
    if rank > min(support or narrowest, narrowest):
        raise ValueError(f"rank must be at most the support ({min(support or narrowest, narrowest)}), got {rank}")
    least = _cost(shapes, rank, support or rank)
    if least > budget:
        raise ValueError(
            f"the budget is {budget:,} trained values; rank {rank} with {support or rank} column(s) in each of "
            f"{len(shapes)} matrices needs {least:,}; raise density, or name fewer targets"
        )
    if support is not None:
        return rank, {name: min(support, shape.in_features) for name, shape in shapes.items()}
    widest = max(shape.in_features for shape in shapes.values())
    support = bisect_right(range(1, widest + 1), budget, key=lambda s: _cost(shapes, rank, s))
    supports = {name: min(support, shape.in_features) for name, shape in shapes.items()}
    return rank, _spend_rest(shapes, supports, budget - _cost(shapes, rank, support), rank)


def place_random(shapes: Mapping[str, Shape], rank: int, supports: Mapping[str, int], seed: int) -> dict[str, Start]:
    """Random columns, drawn anew for every group, A as `_start` has it. Bitwise the same for one seed."""
    drawn: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        if shape.group not in drawn:
            order = torch.randperm(shape.in_features, generator=generator(seed, "columns", name))
            drawn[shape.group] = order[: supports[name]].sort().values
    return {
        name: Start(drawn[shape.group], _start(name, rank, supports[name], seed), None)
        for name, shape in shapes.items()
    }


def place_scored(
    scores: Scores, shapes: Mapping[str, Shape], rank: int, supports: Mapping[str, int], seed: int
) -> dict[str, Start]:
    """The columns with the highest score, summed over a group, ties to the lower index; A as `_start` has it."""
    totals: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        totals[shape.group] = totals.get(shape.group, 0) + scores.columns[name]
    starts = {}
    for name, shape in shapes.items():
        cols = totals[shape.group].argsort(descending=True, stable=True)[: supports[name]].sort().values
        found = float(scores.columns[name][cols].sum())
        starts[name] = Start(cols, _start(name, rank, supports[name], seed), found)
    return starts


def _start(name: str, rank: int, support: int, seed: int) -> Tensor:
    """A random A [rank, support] with rows of norm START_NORM: so small that a few steps turn it where the traces need.

    The gradient's leading directions make a worse start: they are the inputs that are large for every token.
    """
    start = torch.randn(rank, support, generator=generator(seed, "A", name))
    return START_NORM * start / start.norm(dim=1, keepdim=True)


def _cost(shapes: Mapping[str, Shape], rank: int, support: int) -> int:
    return rank * sum(shape.out_features + min(support, shape.in_features) for shape in shapes.values())


def _default_rank(shapes: Mapping[str, Shape], budget: int, support: int | None) -> int:
    narrowest = min(shape.in_features for shape in shapes.values())
    if support is not None:
        return max(1, min(support, narrowest, budget // _cost(shapes, 1, support)))
    half = sum(shape.out_features + int(_FULL_SHARE * shape.in_features) for shape in shapes.values())
    rank = min(narrowest, max(DEFAULT_RANK, budget // half))
    while rank > 1 and _cost(shapes, rank, rank) > budget:
        rank -= 1
    return rank


def _spend_rest(shapes: Mapping[str, Shape], supports: dict[str, int], rest: int, rank: int) -> dict[str, int]:
    """One more column for each group, in order, as long as it fits: the members of a group keep one support."""
    members: dict[int, list[str]] = {}
    for name, shape in shapes.items():
        members.setdefault(shape.group, []).append(name)
    for names in members.values():
        if supports[names[0]] < shapes[names[0]].in_features and rank * len(names) <= rest:
            rest -= rank * len(names)
            for name in names:
                supports[name] += 1
    return supports
