"""Triton's interpreter with two kinds of GPU rounding that NumPy lacks.

A product that is added or subtracted is not rounded, because the compiler fuses the two. (NVIDIA's special functions,
which are off by 2 ulp, are not imitated: that is far below every error budget.)

A tensor core adds 16 products and the accumulator in fixed point: each is truncated 25 bits below the leading bit of
the largest, and the sum to 24 bits. Hopper works this way (Khattak and Mikaitis 2025, "Accurate Models
of NVIDIA Tensor Cores"); earlier ones add fewer products at once and keep fewer bits.
"""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

DEPTH, BITS, EXTRA_BITS = 16, 24, 2


def fuse_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """a * b + c, c + a * b, a * b - c and c - a * b round once."""
    multiply, splat = InterpreterBuilder.create_fmul, InterpreterBuilder.create_splat

    def remember(self: Any, x: TensorHandle, y: TensorHandle) -> TensorHandle:
        result = multiply(self, x, y)
        result.factors = (x.data, y.data)
        return result

    def spread(self: Any, to: Any, x: TensorHandle) -> TensorHandle:
        result = splat(self, to, x)
        if hasattr(x, "factors"):
            result.factors = tuple(part.reshape(-1)[:1] for part in x.factors)
        return result

    def exact(x: TensorHandle) -> NDArray[np.longdouble]:
        first, second = getattr(x, "factors", (x.data, np.ones(1, x.data.dtype)))
        return np.multiply(first, second, dtype=np.longdouble)

    def add(self: Any, x: TensorHandle, y: TensorHandle, sign: int = 1) -> TensorHandle:
        if hasattr(x, "factors"):  # of two products, one is fused and the other rounded
            total = exact(x) + sign * y.data.astype(np.longdouble)
        else:
            total = x.data.astype(np.longdouble) + sign * exact(y)
        return TensorHandle(total.astype(x.data.dtype), x.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fmul", remember)
    monkeypatch.setattr(InterpreterBuilder, "create_splat", spread)
    monkeypatch.setattr(InterpreterBuilder, "create_fadd", add)
    monkeypatch.setattr(InterpreterBuilder, "create_fsub", lambda self, x, y: add(self, x, y, -1))


def _exponent(x: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.where(x != 0, np.frexp(x)[1] - 1, -1000)


def _cut(x: NDArray[np.float64], exponent: NDArray[np.int64], bits: int) -> NDArray[np.float64]:
    """x truncated: drops the bits that lie `bits` or more below that exponent."""
    step = np.ldexp(1.0, exponent - bits + 1)
    return np.trunc(x / step) * step


def tensor_core_sum(a: NDArray, b: NDArray, total: NDArray) -> NDArray[np.float64]:
    """total [m, n] + a [m, k] b [k, n] of factors of at most 11 bits, as a tensor core computes it."""
    a, b, total = (x.astype(np.float64) for x in (a, b, total))
    for start in range(0, a.shape[1], DEPTH):
        left, right = a[:, start : start + DEPTH, None], b[None, start : start + DEPTH]
        of_products = np.where(left * right != 0, _exponent(left) + _exponent(right), -1000).max(1)
        largest = np.maximum(of_products, _exponent(total))
        products = _cut(left * right, largest[:, None], BITS + EXTRA_BITS).sum(1)
        total = products + _cut(total, largest, BITS + EXTRA_BITS)
        total = _cut(total, _exponent(total), BITS)
    return total


def add_as_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every tl.dot add this way; its factors must have at most 11 bits."""

    def dot(self: Any, a: TensorHandle, b: TensorHandle, total: TensorHandle, *precision: object) -> TensorHandle:
        return TensorHandle(tensor_core_sum(a.data, b.data, total.data).astype(np.float32), total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
