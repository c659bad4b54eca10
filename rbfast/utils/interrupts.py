"""Ctrl-C handling for work that should not be interrupted midway."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def counted_interrupts() -> Iterator[list[int]]:
    """Counts Ctrl-C within the block instead of interrupting it: each one appends to the list.

    The list stays empty outside the main thread, which alone receives Ctrl-C, and in a program that handles Ctrl-C
    itself.
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


def announce_wait(replies: int) -> None:
    """After the first Ctrl-C: say which replies the program still waits for, because they are paid for."""
    if replies:
        print(f"waiting for pending replies: {replies}; press Ctrl-C again to drop them", file=sys.stderr)
