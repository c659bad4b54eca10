"""Returning free memory to the OS: the C library keeps the gaps between tensors of many sizes.

On a CPU, a run over examples of many lengths grows to several times its peak use. Trimming now and then keeps it near
its peak use; trimming more often would make every step request the same pages again.
"""

import ctypes
import sys
from functools import cache
from typing import Any


def trim_memory() -> None:
    """Returns free memory to the OS, if the C library supports that (glibc)."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
