"""Memory that is free and still held: the C library keeps the gaps between tensors of many sizes.

On a CPU a run over examples of all lengths grows to several times of what it uses at any time. Giving back now and then
keeps it near that; more often would make every step ask for the same pages again.
"""

import ctypes
import sys
from functools import cache
from typing import Any


def give_back() -> None:
    """Returns free memory to the system, if the C library can (glibc)."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
