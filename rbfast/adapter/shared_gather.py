"""What matrices with the same input share: its gathered columns, and the call that computes their gradients."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor

from rbfast import ops


class Member(Protocol):
    """What SharedGather needs of a ColumnDelta."""

    scale: float
    is_folded: bool
    enabled: bool

    @property
    def factors(self) -> tuple[Tensor, Tensor]: ...
    def follow_base(self) -> None: ...


class _Gathered:
    """The columns xs of an input, and for each matrix that has not used it yet the sink of its output's gradient."""

    def __init__(self, x: weakref.ref[Tensor], version: int, xs: Tensor) -> None:
        self.x, self.version, self.xs = x, version, xs
        self.sinks: dict[Member, Tensor] = {}


class SharedGather:
    """Gathers a group's support once for all its matrices, if they get the same unchanged input tensor."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.shares_gradients = False  # see SparseAdapter.sharing_gradients
        self._cached: _Gathered | None = None
        self._remaining_uses = 0  # members that have not used it yet

    def __call__(self, x: Tensor, cols: Tensor, run: int, dtype: torch.dtype) -> Tensor:
        """The columns of x as [T, s]."""
        return self._gathered(x, cols, run, dtype).xs if self._is_shared(x) else _columns_of(x, cols, run, dtype)

    def tap(self, member: Member, y: Tensor, x: Tensor, cols: Tensor, run: int) -> Tensor:
        """`ops.column_tap` on a member's output y. If gradients are shared, one call computes those of all members that
        get x."""
        if not (self.shares_gradients and self._is_shared(x) and _trains(member)) or _has_saved_tensor_hooks():
            return ops.column_tap(y, self(x, cols, run, y.dtype), *member.factors, member.scale)
        gathered = self._gathered(x, cols, run, y.dtype)
        sink = gathered.sinks.pop(member, None)
        if sink is not None and sink.shape == y.shape and not ops.is_spent(sink):
            return ops.column_tap_into(y, sink)
        others = [other for other in self.members if other is not member and _goes_with(other, member)]
        A, B = zip(*(one.factors for one in (member, *others)), strict=True)
        tapped, *sinks = ops.column_tap_shared(y, gathered.xs, A, B, member.scale)
        gathered.sinks = dict(zip(others, sinks, strict=True))
        return tapped

    def _is_shared(self, x: Tensor) -> bool:
        # A compiler merges equal gathers itself. Inference tensors have no version counter to detect changes by.
        is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        return len(self.members) > 1 and not is_traced and not x.is_inference()

    def _gathered(self, x: Tensor, cols: Tensor, run: int, dtype: torch.dtype) -> _Gathered:
        cached = self._cached  # read once: another thread may replace it at any time
        if cached is None or cached.x() is not x or cached.version != x._version or cached.xs.dtype != dtype:
            cached = _Gathered(weakref.ref(x, self._drop), x._version, _columns_of(x, cols, run, dtype))
            self._cached, self._remaining_uses = cached, len(self.members)
        self._remaining_uses -= 1
        if self._remaining_uses <= 0:
            self._cached = None
        return cached

    def _drop(self, dead: weakref.ref) -> None:
        cached = self._cached
        if cached is not None and cached.x is dead:
            self._cached = None


def _goes_with(member: Member, first: Member) -> bool:
    device = first.factors[0].device
    if member.factors[0].device != device:  # the model may have moved since this member last ran
        member.follow_base()
    A, dims = member.factors[0], first.factors[0].dim()  # a stack of experts has more
    is_alike = A.device == device and A.dim() == dims and member.scale == first.scale
    return is_alike and member.is_folded and member.enabled and _trains(member)


def _has_saved_tensor_hooks() -> bool:
    """Whether a checkpoint is being recorded or recomputed: it must save the same tensors both times, whatever is
    cached."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _trains(member: Member) -> bool:
    return any(factor.requires_grad for factor in member.factors)


def _columns_of(x: Tensor, cols: Tensor, run: int, dtype: torch.dtype) -> Tensor:
    x = x.detach()
    xs = ops.column_gather(x.reshape(-1, x.shape[-1]), cols, run)
    return xs if xs.dtype == dtype else xs.to(dtype)
