"""Counts on a CPU how often code would wait for a GPU: ops whose values the host needs before it can continue."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "bincount", "equal", "unique", "_unique2", "masked_select", "is_nonzero"}

NOT_LAUNCHED = {"detach", "empty", "empty_like", "empty_strided", "new_empty"}


class HostWaits(TorchDispatchMode):
    """Counts waits by name; `tolist` reads memory without the dispatcher, so it is counted separately."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_mask = name in ("index", "index_put_", "index_put") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or is_mask:
            self.found.append(name)
        self.launches += not func.is_view and name not in NOT_LAUNCHED
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostWaits]:
    tolist = Tensor.tolist
    with HostWaits() as waits:

        def counted(self: Tensor) -> list:
            waits.found.append("tolist")
            return tolist(self)

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "tolist", counted)
            yield waits
