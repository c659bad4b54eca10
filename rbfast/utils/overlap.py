"""Blocks that change something of an object for as long as any of them runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Overlap:
    """Blocks may overlap, within a thread or among several: the first one changes the object, the last undoes it.

    With a `contextmanager` for each block, one that ends first would undo what another still needs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, tuple[Callable[[], None], int]] = {}  # by the object's id: how to undo, blocks

    @contextmanager
    def block(self, of: object, change: Callable[[], Callable[[], None]]) -> Iterator[None]:
        """change: changes the object and returns what undoes that."""
        with self._lock:
            undo, blocks = self._running.get(id(of)) or (change(), 0)
            self._running[id(of)] = undo, blocks + 1
        try:
            yield
        finally:
            with self._lock:
                undo, blocks = self._running.pop(id(of))
                if blocks > 1:
                    self._running[id(of)] = undo, blocks - 1
                else:
                    undo()
