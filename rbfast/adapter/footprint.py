"""The memory that an adapter takes in addition to its base, and the default adapter of a model."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from rbfast.adapter.placement import DEFAULT_DENSITY, allocate
from rbfast.models.linears import Shape, count_parameters, group_siblings, select_linears

_INDEX, _FP32, _BF16 = 8, 4, 2  # bytes


@dataclass(frozen=True)
class Footprint:
    """Sizes in bytes.

    base: the base's weights. kept: the column indices and, for folded deltas, the original columns that a fold
    overwrites. values: A and B. adamw: the gradients and the two moments of A and B during training with AdamW.
    """

    base: int
    kept: int
    values: int
    adamw: int

    @property
    def attached(self) -> int:
        return self.kept + self.values

    @property
    def share(self) -> float:
        """The size of the adapter as a fraction of the base's."""
        return self.attached / self.base

    def __str__(self) -> str:
        attached, base, kept, values, adamw = map(
            megabytes, (self.attached, self.base, self.kept, self.values, self.adamw)
        )
        return (
            f"{attached} beside the base's {base} ({self.share:.1%}): {kept} of kept columns, {values} of A and B; "
            f"AdamW adds {adamw} during training"
        )


def planned_footprint(
    shapes: Mapping[str, Shape], rank: int, supports: Mapping[str, int], base: int, itemsize: int
) -> Footprint:
    """The footprint of deltas of these shapes, folded into weights of `itemsize` bytes per value."""
    kept = sum(
        supports[name] * ((shape.experts or 1) * shape.out_features * itemsize + _INDEX)
        for name, shape in shapes.items()
    )
    values = sum(shape.values(rank, supports[name]) for name, shape in shapes.items())
    return Footprint(base, kept, _FP32 * values, 3 * _FP32 * values)


@dataclass(frozen=True)
class Outline:
    """A model and the adapter that SparseAdapter.attach(model) would give it; `support` is (narrowest, widest)."""

    parameters: int
    matrices: int
    support: tuple[int, int]
    rank: int
    values: int
    footprint: Footprint


def outline(model: nn.Module) -> Outline:
    """The outline of a model, from its shapes alone: it may be on the meta device. Assumes weights in bf16."""
    shapes, parameters = group_siblings(select_linears(model)), count_parameters(model)
    rank, supports = allocate(shapes, int(DEFAULT_DENSITY * parameters))
    planned = planned_footprint(shapes, rank, supports, parameters * _BF16, _BF16)
    support = min(supports.values()), max(supports.values())
    return Outline(parameters, len(shapes), support, rank, planned.values // _FP32, planned)


def megabytes(count: int) -> str:
    """A number of bytes as text, in MB or GB."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
