"""The memory that a loss on a CPU writes logits to, kept for the next call.

The system clears each page of fresh memory when it is first touched. For a chunk of logits that takes as long as the
product that fills them: with SmolLM2 on two cores with AMX, 97 ms in fresh memory and 47 ms in memory of a call before.
A GPU's memory is kept by torch's own allocator, and so are small pieces of a CPU's by the C library.
"""

import torch
from torch import Tensor

KEPT_FROM = 2**20  # bytes; the C library may give so much back to the system after every call
MOST_KEPT = 2**29

_kept: list[Tensor] = []  # one piece of memory, or none while a call uses it


def borrow(size: int) -> Tensor:
    """Memory of at least so many bytes [size], with anything in it. A call in another thread gets its own."""
    try:
        memory = _kept.pop()
    except IndexError:
        memory = None
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    return memory


def give_back(memory: Tensor) -> None:
    """Nobody else may refer to the memory any more."""
    if KEPT_FROM <= memory.numel() <= MOST_KEPT and not _kept:
        _kept.append(memory)


def release() -> None:
    """Gives what is kept back to the system."""
    _kept.clear()
