"""Tensors beside inaccessible pages: a read or write just outside them kills the process."""

import ctypes
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

_PROTECT = ctypes.CDLL(None, use_errno=True).mprotect
_PROTECT.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_NO_ACCESS = 0  # PROT_NONE


def fenced_at_end(x: Tensor) -> Tensor:
    """A contiguous CPU copy that ends where an inaccessible page starts."""
    return _fenced(x, lambda room, size: room - size)


def fenced_at_start(x: Tensor) -> Tensor:
    """A contiguous CPU copy that starts where an inaccessible page ends."""
    return _fenced(x, lambda room, size: 0)


def _fenced(x: Tensor, place: Callable[[int, int], int]) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, page + room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (start, start + page + room):
        if _PROTECT(fence, page, _NO_ACCESS) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    inside = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=page + place(room, size))
    return inside.view(x.shape).copy_(x)
