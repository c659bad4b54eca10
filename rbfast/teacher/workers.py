"""Daemon threads that send requests. They end with the program: those of a pool would keep it alive.

```python
for question, future in Workers(ask, questions, 8).ended(server.retried, stop):
    reply = future.result()
```
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Generic, TypeVar

from rbfast.teacher.client import Retries
from rbfast.utils.interrupts import announce_wait, counted_interrupts

_LONGEST_SILENCE = 0.2  # seconds between checks for Ctrl-C
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers(Generic[_Item, _Result]):
    """Calls `function` with each item, in order, in `count` threads, which `ended` starts.

    A thread has one request at a time.
    """

    def __init__(self, function: Callable[[_Item], _Result], items: Iterable[_Item], count: int) -> None:
        self._function, self._queue = function, deque(items)
        self._ended: SimpleQueue[tuple[_Item, Future[_Result]]] = SimpleQueue()
        self._left = len(self._queue)  # items that have not been taken
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(min(count, self._left))]

    def ended(self, retried: Retries, stop: Event) -> Generator[tuple[_Item, Future[_Result]]]:
        """Yields each item as it ends, with its result or error.

        After `stop` or Ctrl-C nothing more is sent or retried, but replies under way are waited for, because they are
        paid for. A second Ctrl-C drops them. Sets `stop` at the end.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
        """
        is_told = False
        with counted_interrupts() as interrupts:
            try:
                for thread in self._threads:  # within the try: if one does not start, the others must stop
                    thread.start()
                while self._left:
                    if interrupts:
                        stop.set()
                    if stop.is_set():
                        self._drop_queue()
                        for thread in self._threads:
                            retried.give_up(thread)
                    coming = sum(thread.is_alive() and not retried.is_waiting(thread) for thread in self._threads)
                    if interrupts and not is_told:
                        is_told = True
                        announce_wait(coming)
                    leaves = len(interrupts) > 1 or (stop.is_set() and not coming)
                    if (ended := self._take(0 if leaves else _LONGEST_SILENCE)) is not None:
                        yield ended
                    elif leaves:
                        break
            finally:
                stop.set()
                self._drop_queue()
                if interrupts:  # a caller that leaves its loop after Ctrl-C gets it too
                    raise KeyboardInterrupt

    def _take(self, seconds: float) -> tuple[_Item, Future[_Result]] | None:
        with suppress(Empty):
            ended = self._ended.get(timeout=seconds)
            self._left -= 1
            return ended
        return None

    def _drop_queue(self) -> None:
        """Drop the items that no thread has begun."""
        with suppress(IndexError):
            while True:
                self._queue.popleft()
                self._left -= 1

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
