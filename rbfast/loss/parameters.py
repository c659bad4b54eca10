"""Weights and temperatures of a loss: one number for all rows, or one per row. Shapes: T tokens, n active rows."""

import math
from numbers import Real
from typing import NamedTuple

from torch import Tensor

from rbfast.ops.dtypes import wide_dtype


class RowParameter(NamedTuple):
    """values [n] * factor, or `factor` in every row. The op takes both, which avoids tensors of constants."""

    values: Tensor | None
    factor: float = 1.0

    def at(self, rows: Tensor) -> "RowParameter":
        return self if self.values is None else RowParameter(self.values[rows], self.factor)

    def divided(self, divisor: int | Tensor, rows: int) -> "RowParameter":
        if isinstance(divisor, Tensor):
            return self.times(divisor.reciprocal(), rows)
        return self if divisor == 1 else RowParameter(self.values, self.factor / divisor)

    def times(self, by: Tensor, rows: int) -> "RowParameter":
        """by: 0-dimensional or [n], in the dtype of the values."""
        return RowParameter(by.expand(rows) if self.values is None else self.values * by, self.factor)


def check_parameter(name: str, value: float | Tensor, hidden: Tensor) -> RowParameter:
    """The parameter for a loss of hidden [T, H], in the accumulation dtype. Checks the value of a number, not of a
    tensor, which would synchronise with the device.

    Raises:
        ValueError: its shape or value does not fit.
    """
    if isinstance(value, Tensor):
        if value.dim() > 0 and value.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must be a float or [T] = [{hidden.shape[0]}], got {tuple(value.shape)}")
        values = value.detach().to(hidden.device, wide_dtype(hidden.dtype))
        return RowParameter(values if values.dim() else values.expand(hidden.shape[0]))
    if not isinstance(value, Real):
        raise ValueError(f"{name} must be a float or a tensor [T] = [{hidden.shape[0]}], got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if name == "temperature" and value <= 0:
        raise ValueError(f"temperature must be positive, got {value}")
    return RowParameter(None, float(value))
