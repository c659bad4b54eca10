"""Placement: which columns of which matrices are trained, under a budget.

    scores = score(model, batches, loss_fn)             # one backward pass per batch over reasoning traces
    adapter = SparseAdapter.attach(model, placement=scores)

Matrices that read the same input (q, k, v; gate, up) form a group and share one support.
"""

import hashlib
import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rbfast.columns import AdapterConfig, Delta, MatrixInfo, fingerprint, matrix_shape, matrix_view

DEFAULT_DENSITY = 0.003
DEFAULT_RANK = 2
_FULL_SHARE = 0.5  # a default rank grows until the supports take at most this share of the inputs


@dataclass(frozen=True)
class Shape:
    """One matrix [out_features, in_features] and the group it shares its input with."""

    out_features: int
    in_features: int
    group: int


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
    placement: str | Path | None,
    scale: float,
    seed: int,
) -> tuple[AdapterConfig, dict[str, Delta]]:
    """Everything SparseAdapter.attach decides: the matrices, their supports and columns, and where A starts."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1 (the share of trained values), got {density}")
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    if placement not in (None, "random"):
        raise ValueError(f'placement must be "random", got {placement!r}')
    if placement is None:
        warnings.warn("no placement given: columns are random, the control. Pass placement=score(...)", stacklevel=3)
    linears = select_linears(model, targets)
    shapes = group_siblings(linears)
    rank, supports = allocate(shapes, int(density * count_parameters(model)), rank, support)
    starts = place_random(shapes, rank, supports, seed)
    modules, deltas = {}, {}
    for name, start in starts.items():
        shape, weight = shapes[name], matrix_view(linears[name])
        print_ = fingerprint(weight) if weight is not None else None
        modules[name] = MatrixInfo(
            shape.out_features, shape.in_features, supports[name], rank, shape.group, print_, start.score
        )
        deltas[name] = Delta(start.cols, start.A, torch.zeros(shape.out_features, rank))
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    return AdapterConfig(base or None, dtype, density, scale, seed, "random", modules), deltas


def select_linears(model: nn.Module, targets: str | Sequence[str] = "all-linear") -> dict[str, nn.Module]:
    """The linear layers to adapt, by PEFT's rule: a list is exact-or-suffix, a string is a full-match regex, and
    "all-linear" is every linear but the output head and those whose weight is tied to another module's.

    Raises ValueError where the model has no linear layer or a target matches none.
    """
    linears = {name: module for name, module in model.named_modules() if name and matrix_shape(module) is not None}
    if not linears:
        raise ValueError(
            f"expected a model with linear layers (nn.Linear, Conv1D, or a module with in_features, out_features and "
            f"a weight), found none in {type(model).__name__}"
        )
    tied = _tied_weights(model)
    if targets == "all-linear":
        find_head = getattr(model, "get_output_embeddings", None)
        head = find_head() if find_head else None
        chosen = {name: m for name, m in linears.items() if m is not head and id(m.weight) not in tied}
        if not chosen:
            raise ValueError(f"every linear layer of {type(model).__name__} is its output head or tied; name targets")
        return chosen
    chosen = _match(linears, targets)
    for name, module in chosen.items():
        if id(module.weight) in tied:
            raise ValueError(f"the weight of {name} is tied to another module's: a delta would change both; omit it")
    return chosen


def group_siblings(linears: Mapping[str, nn.Module]) -> dict[str, Shape]:
    """Shapes, with siblings of equal in_features guessed to share their input: for placements that saw no forward."""
    groups: dict[tuple[str, int], int] = {}
    shapes = {}
    for name, module in linears.items():
        out_features, in_features = matrix_shape(module)  # type: ignore[misc]
        key = name.rpartition(".")[0], in_features
        shapes[name] = Shape(out_features, in_features, groups.setdefault(key, len(groups)))
    return shapes


def count_parameters(model: nn.Module) -> int:
    """All parameters of the base: tied ones once, a quantised matrix as the out * in values it stands for."""
    counts = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        shape = matrix_shape(module)
        if shape is not None and matrix_view(module) is None:
            counts[id(module.weight)] = shape[0] * shape[1]
    return sum(counts.values())


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
    """The control: random columns per group, random A whose rows have norm 1. Bitwise the same for one seed."""
    starts, drawn = {}, {}
    for name, shape in shapes.items():
        if shape.group not in drawn:
            order = torch.randperm(shape.in_features, generator=_generator(seed, "columns", name))
            drawn[shape.group] = order[: supports[name]].sort().values
        start = torch.randn(rank, supports[name], generator=_generator(seed, "A", name))
        starts[name] = Start(drawn[shape.group], start / start.norm(dim=1, keepdim=True), None)
    return starts


def _tied_weights(model: nn.Module) -> set[int]:
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    return {key for key, count in names.items() if count > 1}


def _match(linears: Mapping[str, nn.Module], targets: str | Sequence[str]) -> dict[str, nn.Module]:
    examples = ", ".join(list(linears)[:3])
    if isinstance(targets, str):
        chosen = {name: module for name, module in linears.items() if re.fullmatch(targets, name)}
        if not chosen:
            raise ValueError(f"targets: the regex {targets!r} matches no linear layer; they are named like {examples}")
        return chosen
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise ValueError(f"targets: {target!r} names no linear layer; they are named like {examples}")
    if not targets:
        raise ValueError(f"targets: expected at least one name, got none; linear layers are named like {examples}")
    return {
        name: module
        for name, module in linears.items()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }


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


def _generator(seed: int, *what: str) -> torch.Generator:
    """Independent streams by name, so that what one matrix draws does not depend on which others are there."""
    digest = hashlib.blake2b(":".join((str(seed), *what)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
