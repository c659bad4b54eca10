"""Context managers whose change to an object lasts until the last of them ends."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class Overlap:
    """Blocks may nest, or overlap between threads: the first to start changes the object, the last to end undoes it.

    With independent context managers, the first block to end would undo what another still needs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, tuple[AbstractContextManager, int]] = {}  # by the object's id: (change, blocks)

    @contextmanager
    def block(self, of: object, change: Callable[[], AbstractContextManager]) -> Iterator[None]:
        """change: makes the context manager that changes the object `of` and undoes it."""
        with self._lock:
            if id(of) in self._running:
                changed, blocks = self._running[id(of)]
            else:
                changed, blocks = change(), 0
                changed.__enter__()
            self._running[id(of)] = changed, blocks + 1
        try:
            yield
        finally:
            with self._lock:
                changed, blocks = self._running.pop(id(of))
                if blocks > 1:
                    self._running[id(of)] = changed, blocks - 1
                else:
                    changed.__exit__(None, None, None)
