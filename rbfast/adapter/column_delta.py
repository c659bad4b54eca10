"""The delta of one matrix: its parameters, and the hooks that run it folded into the weight or beside it.

    with unhooked(model), torch.no_grad():              # a folded delta costs a forward nothing
        model(...)

Without gradients the hooks of a folded delta do nothing, but calling them takes time: `unhooked(model)` takes them off
for a block, and so does `rbfast.evaluating(model)`, which all our decoding uses.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rbfast import ops
from rbfast.adapter.adapter_files import Delta
from rbfast.models.linears import matrix_shape, matrix_view

_DELTA = "_rbfast_delta"  # the attribute of a linear that holds its ColumnDelta


class SharedGather:
    """Gathers a group's support once for all its matrices, as long as they are given the same, unchanged tensor."""

    def __init__(self) -> None:
        self.members = 0
        self._kept: tuple[weakref.ref, int, Tensor] | None = None  # the input, its version, and its columns
        self._left = 0  # members that have yet to take them

    def __call__(self, x: Tensor, cols: Tensor, run: int, dtype: torch.dtype) -> Tensor:
        if self.members == 1 or torch.compiler.is_compiling():  # a compiler merges equal gathers itself
            return _gather(x, cols, run, dtype)
        if (
            self._kept is None
            or self._kept[0]() is not x
            or self._kept[1] != x._version
            or self._kept[2].dtype != dtype
        ):
            self._kept = weakref.ref(x, self._drop), x._version, _gather(x, cols, run, dtype)
            self._left = self.members
        xs = self._kept[2]
        self._left -= 1
        if self._left == 0:
            self._kept = None
        return xs

    def _drop(self, dead: weakref.ref) -> None:
        if self._kept is not None and self._kept[0] is dead:
            self._kept = None


class ColumnDelta(nn.Module):
    """The delta of one matrix, and the hooks that run it: parameters A [k, s] and B [out, k], buffer cols [s]."""

    A: nn.Parameter
    B: nn.Parameter
    cols: Tensor
    base_columns: Tensor
    linear: nn.Module

    def __init__(self, linear: nn.Module, delta: Delta, scale: float, fold: bool, gather: SharedGather) -> None:
        super().__init__()
        object.__setattr__(self, "linear", linear)  # not a submodule: the base stays outside the adapter's state
        device = next((t.device for t in (*linear.parameters(), *linear.buffers())), None)
        # In one layout, whatever their source: fused optimizers pair values, gradients and moments by their place.
        self.A, self.B = (
            nn.Parameter(torch.empty(part.shape, dtype=torch.float32, device=device).copy_(part))
            for part in (delta.A, delta.B)
        )
        self.register_buffer("cols", delta.cols.to(device, copy=True))
        self.register_buffer("base_columns", None, persistent=False)
        self.scale, self.folds, self.enabled = scale, fold, True
        shape = matrix_shape(linear)
        assert shape is not None, "only matrices get a delta"
        self.run = ops.run_of(delta.cols, shape[1])
        self._versions: tuple[int, int] | None = None
        self._masters = (self.A, self.B)  # read in every forward: nn.Module's own attribute lookup is slow
        self._gather = gather
        gather.members += 1
        if fold:
            self.base_columns = self.weight.index_select(1, self.cols)
            self.fold()
        self._hooks: tuple[RemovableHandle, ...] = ()
        linear.__dict__[_DELTA] = self  # not a submodule either
        self.hook()

    @property
    def weight(self) -> Tensor:
        """The base's weight as a writable [out, in] view, and the delta moved to its device: call it first."""
        self._follow_base()
        view = matrix_view(self.linear)
        if view is None:
            raise RuntimeError("the base's weight is no longer a plain floating tensor; detach the adapter before that")
        return view

    def _follow_base(self) -> None:
        """Moves the delta to the base's device: model.to(device) does not reach it."""
        weight = self.linear.weight
        if isinstance(weight, Tensor) and weight.device != self._masters[0].device and not weight.is_meta:
            self.to(weight.device)

    @torch.no_grad()
    def fold(self) -> None:
        """Writes W0[:, cols] + scale * B A into the weight."""
        weight, base = self.weight, self.base_columns
        ops.column_fold_(weight, base.to(weight.dtype), self.cols, self.A, self.B, self.scale, self.run)
        self._versions = self.A._version, self.B._version

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the original columns back, bitwise."""
        weight = self.weight
        base, A, B = self.base_columns.to(weight.dtype), self.A[:0], self.B[:, :0]
        ops.column_fold_(weight, base, self.cols, A, B, self.scale, self.run)

    @property
    def attached(self) -> bool:
        return self.linear.__dict__.get(_DELTA) is self

    def hook(self) -> None:
        """Puts the hooks on the matrix. Our hook runs first, because the delta belongs to the matrix's own output."""
        after = self.linear.register_forward_hook(self._after, prepend=True)
        self._hooks = self.linear.register_forward_pre_hook(self._before), after

    def unhook(self) -> None:
        """Removes the hooks: without gradients a folded delta needs none, because it is in the weight."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def release(self) -> None:
        """Detaches from the matrix permanently."""
        self.unhook()
        del self.linear.__dict__[_DELTA]
        self._gather.members -= 1

    @torch.no_grad()
    def folded_columns(self) -> Tensor:
        """The columns [out, s] that fold() writes, bitwise."""
        weight = self.weight
        base = self.base_columns.to(weight.dtype)
        folded = torch.empty_like(base)
        every = torch.arange(base.shape[1], device=base.device)
        ops.column_fold_(folded, base, every, self.A, self.B, self.scale, self.run)
        return folded

    @torch.no_grad()
    def survivors(self) -> tuple[int, int]:
        """(how many weights the fold changes, how many it would change without rounding)."""
        folded = self.folded_columns()
        wanted, changed = self.scale * (self.B @ self.A) != 0, folded != self.base_columns.to(folded.dtype)
        return int((wanted & changed).sum()), int(wanted.sum())

    def _before(self, linear: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or not self.enabled:
            return
        self._follow_base()
        self.catch_up()

    def catch_up(self) -> None:
        """Folds what was changed since the last fold."""
        a, b = self._masters
        if self.folds and self.enabled and self._versions != (a._version, b._version):
            self.fold()

    def _after(self, linear: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        if not self.enabled or (self.folds and not torch.is_grad_enabled()):
            return None
        x = args[0]
        xs = self._gather(x, self.cols, self.run, y.dtype)
        if self.folds:
            return ops.column_tap(y, xs, self.A, self.B, self.scale)
        return ops.column_side(y, x, xs, self.cols, self.A, self.B, self.scale, self.run)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a model with a SparseAdapter attached can be neither copied nor pickled: call adapter.merge() or "
            "adapter.detach() first, or keep the adapter with adapter.save_pretrained(dir)"
        )


def deltas_of(model: nn.Module) -> Iterator[tuple[str, ColumnDelta]]:
    """The deltas attached to a model, with the names of their matrices."""
    for name, module in model.named_modules():
        if _DELTA in module.__dict__:
            yield name, module.__dict__[_DELTA]


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Within the block a folded adapter of `model` costs nothing: its hooks are off, and the forward is the base's own.

    For forwards without gradients: a backward would give the adapter none. Steps of an optimizer and load_state_dict()
    fold as usual; after changing parameters by hand call adapter.fold(). Deltas beside the weight keep their hooks.
    Blocks may nest, and the adapter may be disabled, merged or detached within one.
    """
    sites = [site for _, site in deltas_of(model) if site.folds and site._hooks]
    for site in sites:
        site.catch_up()
    for site in sites:
        site.unhook()
    try:
        yield
    finally:
        for site in sites:
            if site.attached:
                site.hook()


def _gather(x: Tensor, cols: Tensor, run: int, dtype: torch.dtype) -> Tensor:
    x = x.detach()
    return ops.column_gather(x.reshape(-1, x.shape[-1]), cols, run).to(dtype)
