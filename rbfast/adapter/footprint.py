"""The memory that an adapter takes beside its base."""

from collections.abc import Mapping
from dataclasses import dataclass

from rbfast.models.linears import Shape

_INDEX, _FP32 = 8, 4  # bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes. `base` is what the base's own weights take.

    kept: the original columns, which a fold writes over, and their numbers; of a delta beside its weight the numbers
    alone. values: A and B. adamw: the gradient and the two moments of each value while AdamW trains them.
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
        """What is attached, by the base's weights."""
        return self.attached / self.base

    def __str__(self) -> str:
        attached, base, kept, values, adamw = map(
            _megabytes, (self.attached, self.base, self.kept, self.values, self.adamw)
        )
        return (
            f"{attached} beside the base's {base} ({self.share:.1%}): {kept} of kept columns, {values} of A and B; "
            f"AdamW adds {adamw} while it trains"
        )


def planned(shapes: Mapping[str, Shape], rank: int, supports: Mapping[str, int], base: int, itemsize: int) -> Footprint:
    """That of deltas of these shapes, folded into weights of `itemsize` bytes a value."""
    kept = sum(supports[name] * (shape.out_features * itemsize + _INDEX) for name, shape in shapes.items())
    values = sum(rank * (shape.out_features + supports[name]) for name, shape in shapes.items())
    return Footprint(base, kept, _FP32 * values, 3 * _FP32 * values)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
