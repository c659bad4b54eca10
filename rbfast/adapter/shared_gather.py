"""The columns of an input that several matrices share, gathered once."""

import weakref

import torch
from torch import Tensor

from rbfast import ops


class SharedGather:
    """Gathers a group's support once for all its matrices, if they get the same unchanged input tensor."""

    def __init__(self) -> None:
        self.members = 0
        self._cached: tuple[weakref.ref, int, Tensor] | None = None  # the input, its version, and its columns
        self._remaining_uses = 0  # members that have not used them yet

    def __call__(self, x: Tensor, cols: Tensor, run: int, dtype: torch.dtype) -> Tensor:
        # A compiler merges equal gathers itself. Inference tensors have no version counter to detect changes by.
        if self.members == 1 or torch.compiler.is_compiling() or x.is_inference():
            return _gather(x, cols, run, dtype)
        cached = self._cached  # read once: another thread may replace it at any time
        if cached is None or cached[0]() is not x or cached[1] != x._version or cached[2].dtype != dtype:
            cached = weakref.ref(x, self._drop), x._version, _gather(x, cols, run, dtype)
            self._cached, self._remaining_uses = cached, self.members
        self._remaining_uses -= 1
        if self._remaining_uses <= 0:
            self._cached = None
        return cached[2]

    def _drop(self, dead: weakref.ref) -> None:
        cached = self._cached
        if cached is not None and cached[0] is dead:
            self._cached = None


def _gather(x: Tensor, cols: Tensor, run: int, dtype: torch.dtype) -> Tensor:
    x = x.detach()
    xs = ops.column_gather(x.reshape(-1, x.shape[-1]), cols, run)
    return xs if xs.dtype == dtype else xs.to(dtype)
