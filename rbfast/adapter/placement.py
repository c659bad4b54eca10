"""Placement: which columns of which matrices are trained, under a budget.

    scores = score_columns(model, batches, loss_fn)     # column_scores: one backward pass per batch of reasoning traces
    adapter = SparseAdapter.attach(model, placement=scores)

Matrices that read the same input (q, k, v; gate, up) form a group and share one support. A support is made of runs of
16 aligned columns, which move at the speed of a copy; single columns cost several times as much.
"""

import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, nn

from rbfast.adapter.adapter_files import AdapterConfig, Delta, MatrixInfo
from rbfast.adapter.column_scores import ColumnScores
from rbfast.models.linears import (
    Shape,
    count_parameters,
    dtype_name,
    fingerprint,
    group_siblings,
    non_text_linears,
    select_linears,
    stacked_experts,
    unfit,
)
from rbfast.models.names import loaded_name

DEFAULT_DENSITY = 0.003
DEFAULT_RANK = 2
RUN = 16  # columns: 32 bytes of bf16, the least a GPU moves
LARGE_WIDTH = 1024  # input width from which a model counts as large: there the memory of the supports matters
_DIVISOR = 8  # a support takes at most 1/8 of the inputs of a large model
START_NORM = 0.1  # of each row of A


@dataclass(frozen=True)
class InitialDelta:
    """The initial state of one delta: cols [s] int64 sorted, A [k, s] fp32 ([E, k, s] for E experts), and its score if
    it has one. B starts at zero."""

    cols: Tensor
    A: Tensor
    score: float | None


def plan_adapter(
    model: nn.Module,
    density: float,
    support: int | None,
    rank: int | None,
    targets: str | Sequence[str],
    placement: ColumnScores | str | Path,
    scale: float,
    seed: int,
) -> tuple[AdapterConfig, dict[str, Delta]]:
    """Everything SparseAdapter.attach decides: the matrices, their supports and columns, and the initial A."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1 (the share of trained values), got {density}")
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    scores = _scores_of(placement)
    linears = select_linears(model, targets)
    if targets == "all-linear":
        _warn_of_experts(model, linears)
        _warn_of_non_text(model)
        _warn_of_unfit(model)
    shapes = group_siblings(linears)
    if scores is not None:
        shapes = scores.shapes_of(shapes)
    rank, supports = allocate(shapes, int(density * count_parameters(model)), rank, support)
    if scores is not None:
        starts = place_scored(scores, shapes, rank, supports, seed)
    else:
        starts = place_random(shapes, rank, supports, seed)
    modules, deltas = {}, {}
    for name, start in starts.items():
        shape, made_for = shapes[name], fingerprint(linears[name])
        modules[name] = MatrixInfo(
            shape.out_features,
            shape.in_features,
            supports[name],
            rank,
            shape.group,
            made_for,
            start.score,
            shape.experts,
        )
        B = torch.zeros(*start.A.shape[:-2], shape.out_features, rank, dtype=torch.float32, device="cpu")
        deltas[name] = Delta(start.cols, start.A, B)
    method = "random" if scores is None else scores.method
    dtype = dtype_name(next(model.parameters()))
    return AdapterConfig(loaded_name(model), dtype, density, scale, seed, method, modules), deltas


def _scores_of(placement: ColumnScores | str | Path) -> ColumnScores | None:
    """The scores of a placement; None for a random one."""
    if isinstance(placement, ColumnScores):
        return placement
    if placement == "random":
        return None
    if not Path(placement).is_file():
        raise FileNotFoundError(
            f'unknown placement {str(placement)!r}: use "random", ColumnScores (from '
            "rbfast.adapter.column_scores.score_columns) or the path of a score file"
        )
    return ColumnScores.load(placement)


def _warn_of_experts(model: nn.Module, chosen: Collection[str]) -> None:
    experts = {name: weight for name, weight in stacked_experts(model).items() if name not in chosen}
    if experts:
        share = sum(weight.numel() for weight in experts.values()) / count_parameters(model)
        warnings.warn(
            f"{len(experts)} stacks of experts (the first is {next(iter(experts))}), {share:.0%} of the parameters, "
            "get no delta, because they are quantised or their module does more than multiply by them and gate; "
            "adapter.left_out lists every weight without a delta",
            stacklevel=4,
        )


def _warn_of_non_text(model: nn.Module) -> None:
    outside_text = non_text_linears(model)
    if outside_text:
        warnings.warn(
            f"{len(outside_text)} linear layers get no delta, because text does not run through them (the first is "
            f"{next(iter(outside_text))}); to train them, name them as targets",
            stacklevel=4,
        )


def _warn_of_unfit(model: nn.Module) -> None:
    outside_text = non_text_linears(model)
    reasons = [why.reason for name, why in unfit(model).items() if why.should_warn and name not in outside_text]
    if reasons:
        warnings.warn(
            f"{len(reasons)} linear layers cannot have a delta and stay as they are; the first: {reasons[0]}",
            stacklevel=4,
        )


def allocate(
    shapes: Mapping[str, Shape], budget: int, rank: int | None = None, support: int | None = None
) -> tuple[int, dict[str, int]]:
    """Splits a budget of trained values over matrices: (rank k, support s of each), the sum of k (out + s) <= budget.

    Every matrix gets the same support, in whole runs, capped at its inputs. Leftover budget buys one more run for the
    first groups. If the usual input width is at least LARGE_WIDTH, supports are at most an eighth of it (stacks of
    experts: also of their own width) and the rank is the largest that fits; the rest of the budget stays unspent.
    Smaller models take DEFAULT_RANK, or less if that does not fit, or more if it would leave budget unused. A given
    `support` is kept (up to a matrix's inputs), with the largest rank that fits; if it is not a multiple of a run, the
    last run is cut. Raises ValueError if nothing fits.
    """
    for name, value in (("rank", rank), ("support", support)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if support is None:
        limits = _support_limits(shapes)
    else:
        limits = {name: min(support, shape.in_features) for name, shape in shapes.items()}
    rank = rank or _default_rank(shapes, budget, limits, support is not None)
    if rank > min(limits.values()):
        raise ValueError(f"rank must be at most the support ({min(limits.values())}), got {rank}")
    supports = limits if support is not None else _round_to_runs(shapes, limits, rank, rank)
    if _cost(shapes, rank, supports) > budget:
        raise ValueError(
            f"the budget is {budget:,} trained values; rank {rank} with {max(supports.values())} column(s) in each of "
            f"{len(shapes)} matrices needs {_cost(shapes, rank, supports):,}; to train this model, raise density "
            "(`rbfast distill --density`) or name fewer targets (`--targets`)"
        )
    if support is not None:
        return rank, supports
    columns = bisect_right(
        range(1, max(limits.values()) + 1),
        budget,
        key=lambda n: _cost(shapes, rank, _round_to_runs(shapes, limits, n, rank)),
    )
    return rank, _spend_leftover(shapes, _round_to_runs(shapes, limits, columns, rank), limits, budget, rank)


def place_random(
    shapes: Mapping[str, Shape], rank: int, supports: Mapping[str, int], seed: int
) -> dict[str, InitialDelta]:
    """Random runs of columns for each group; A from `_initial_a`. Bitwise the same for a given seed."""
    drawn: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        if shape.group not in drawn:
            runs = shape.in_features // run_length(shape.in_features)
            order = torch.randperm(runs, generator=_generator(seed, "columns", name), device="cpu")
            drawn[shape.group] = _columns(order, shape.in_features, supports[name])
    return {
        name: InitialDelta(drawn[shape.group], _initial_a(name, shape, rank, supports[name], seed), None)
        for name, shape in shapes.items()
    }


def place_scored(
    scores: ColumnScores, shapes: Mapping[str, Shape], rank: int, supports: Mapping[str, int], seed: int
) -> dict[str, InitialDelta]:
    """The runs with the highest score, summed over a run's columns and a group's matrices; ties go to the lower index.
    A from `_initial_a`."""
    totals: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        totals[shape.group] = totals.get(shape.group, 0) + scores.columns[name].double()
    starts = {}
    for name, shape in shapes.items():
        by_run = totals[shape.group].view(-1, run_length(shape.in_features)).sum(1)
        cols = _columns(by_run.argsort(descending=True, stable=True), shape.in_features, supports[name])
        score = float(scores.columns[name][cols].sum())
        starts[name] = InitialDelta(cols, _initial_a(name, shape, rank, supports[name], seed), score)
    return starts


def run_length(in_features: int) -> int:
    """The number of columns in a run: the largest power of two up to RUN that divides the inputs.

    16 for 576 inputs, 8 for 584. With an odd number of inputs rows are not aligned, and a run is one column.
    """
    return math.gcd(in_features, RUN)


def _columns(runs: Tensor, in_features: int, support: int) -> Tensor:
    """The first `support` columns of these runs, sorted. The last run may be cut."""
    run = run_length(in_features)
    return (runs[:, None] * run + torch.arange(run, device=runs.device)).flatten()[:support].sort().values


def _initial_a(name: str, shape: Shape, rank: int, support: int, seed: int) -> Tensor:
    """A random A [(E,) rank, support] with rows of norm START_NORM: small enough that a few steps can turn it.

    The gradient's leading directions make a worse start: they are the inputs that are large for every token.
    """
    source = _generator(seed, "A", name)
    stack = () if shape.experts is None else (shape.experts,)
    start = torch.randn(*stack, rank, support, generator=source, dtype=torch.float32, device="cpu")
    return START_NORM * start / start.norm(dim=-1, keepdim=True)


def _generator(seed: int, *what: str) -> torch.Generator:
    """An independent random stream for each name: what a matrix draws does not depend on the other matrices."""
    digest = blake2b(":".join((str(seed), *what)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _cost(shapes: Mapping[str, Shape], rank: int, supports: Mapping[str, int]) -> int:
    return sum(shape.values(rank, supports[name]) for name, shape in shapes.items())


def _round_to_runs(shapes: Mapping[str, Shape], limits: Mapping[str, int], columns: int, rank: int) -> dict[str, int]:
    """Supports of at most `columns`, in whole runs; no narrower than the rank, no wider than `limits`."""

    def support(width: int, widest: int) -> int:
        run = run_length(width)
        return min(widest, max(columns // run, -(-rank // run)) * run)

    return {name: support(shape.in_features, limits[name]) for name, shape in shapes.items()}


def _support_limits(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The default upper limit of each support. In a large model it is 1/_DIVISOR of the usual input width; for a stack
    of experts, whose columns take the most memory, at most 1/_DIVISOR of its own too. A small model has no limit."""
    widths = Counter(shape.in_features for shape in shapes.values())
    usual = max(widths, key=lambda width: (widths[width], -width))
    if usual < LARGE_WIDTH:
        return {name: shape.in_features for name, shape in shapes.items()}
    return {
        name: min(usual // _DIVISOR, shape.in_features if shape.experts is None else _stack_limit(shape.in_features))
        for name, shape in shapes.items()
    }


def _stack_limit(in_features: int) -> int:
    run = run_length(in_features)
    return max(1, in_features // _DIVISOR // run) * run


def _default_rank(shapes: Mapping[str, Shape], budget: int, limits: Mapping[str, int], is_fixed: bool) -> int:
    """The largest rank that fits with supports at their limits. Unless `is_fixed`, narrower ones may buy more rank."""
    narrowest = min(limits.values())
    if is_fixed:
        return max(1, min(narrowest, budget // _cost(shapes, 1, limits)))
    wide = {name: min(width, max(1, shapes[name].in_features // 2)) for name, width in limits.items()}
    rank = min(narrowest, max(DEFAULT_RANK, budget // _cost(shapes, 1, wide)))
    while rank > 1 and _cost(shapes, rank, _round_to_runs(shapes, limits, rank, rank)) > budget:
        rank -= 1
    return rank


def _spend_leftover(
    shapes: Mapping[str, Shape], supports: dict[str, int], limits: Mapping[str, int], budget: int, rank: int
) -> dict[str, int]:
    """Adds one run to each group, in order, while the budget allows. All members of a group keep the same support."""
    rest = budget - _cost(shapes, rank, supports)
    members: dict[int, list[str]] = {}
    for name, shape in shapes.items():
        members.setdefault(shape.group, []).append(name)
    for names in members.values():
        run = run_length(shapes[names[0]].in_features)
        cost = rank * run * sum(shapes[name].experts or 1 for name in names)
        if supports[names[0]] + run <= limits[names[0]] and cost <= rest:
            rest -= cost
            for name in names:
                supports[name] += run
    return supports
