"""Ctrl-C where what is under way should not be broken off."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def counted_interrupts() -> Iterator[list[int]]:
    """A list that each Ctrl-C within the block adds to, in place of breaking off what runs there.

    It stays empty outside the main thread, which alone gets Ctrl-C, and in a program that handles Ctrl-C itself.
    """
    seen: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
