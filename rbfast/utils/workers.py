"""Daemon threads that work through a queue. They end with the program: those of a pool would keep it alive.

```python
workers = Workers(ask, questions, 8)
while workers.left:
    if ended := workers.take(0.2):
        question, reply = ended[0], ended[1].result()
```
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers(Generic[_Item, _Result]):
    """Calls `function` with each item, in order, in `count` threads.

    Attributes:
        left: the number of items that have not been taken.
    """

    def __init__(self, function: Callable[[_Item], _Result], items: Iterable[_Item], count: int) -> None:
        self._function, self._queue = function, deque(items)
        self._ended: SimpleQueue[tuple[_Item, Future[_Result]]] = SimpleQueue()
        self.left = len(self._queue)
        self.threads = [Thread(target=self._work, daemon=True) for _ in range(min(count, self.left))]
        for thread in self.threads:
            thread.start()

    def take(self, seconds: float) -> tuple[_Item, Future[_Result]] | None:
        """The next item that has ended, with its result or error; None if none ends within these seconds."""
        with suppress(Empty):
            ended = self._ended.get(timeout=seconds)
            self.left -= 1
            return ended
        return None

    def drop_queue(self) -> None:
        """Drop the items that no thread has begun."""
        with suppress(IndexError):
            while True:
                self._queue.popleft()
                self.left -= 1

    def _work(self) -> None:
        with suppress(IndexError):
            while True:
                item = self._queue.popleft()
                self._ended.put((item, self._call(item)))

    def _call(self, item: _Item) -> Future[_Result]:
        future: Future[_Result] = Future()
        try:
            future.set_result(self._function(item))
        except BaseException as error:
            future.set_exception(error)
        return future
