"""Context managers whose change to an object lasts until the last of them ends."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Overlap:
    """Blocks may nest, or overlap between threads: the first to start changes the object, the last to end undoes it.

    With independent context managers, the first block to end would undo what another still needs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, tuple[Callable[[], None], int]] = {}  # by the object's id: (undo, number of blocks)

    @contextmanager
    def block(self, of: object, change: Callable[[], Callable[[], None]]) -> Iterator[None]:
        """change: changes the object `of` and returns a function that undoes it."""
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
