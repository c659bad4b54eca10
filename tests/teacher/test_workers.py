"""Threads that send requests. Ctrl-C over a server is tested in `test_served_evaluation` and `test_logprobs`."""

from collections.abc import Callable, Iterable
from threading import Event, Semaphore, Thread
from typing import Any

import pytest

from rbfast.teacher.client import Retries
from rbfast.teacher.workers import Workers


def results(function: Callable[[int], Any], items: Iterable[int], count: int) -> list[tuple[int, Any]]:
    ended = Workers(function, items, count).ended(Retries(), Event())
    return [(item, future.exception() or future.result()) for item, future in ended]


def test_items_are_worked_on_in_order() -> None:
    assert results(abs, range(20), 1) == [(item, item) for item in range(20)]
    assert sorted(results(abs, range(20), 3)) == [(item, item) for item in range(20)]


def test_error_is_the_end_of_its_item_alone() -> None:
    [(_, whole), (_, error), (_, half)] = results(lambda item: 6 // item, [1, 0, 2], 1)
    assert (whole, half) == (6, 3) and isinstance(error, ZeroDivisionError)


def test_stop_leaves_the_items_that_have_begun() -> None:
    begun, released, stop = Semaphore(0), Event(), Event()

    class ToldRetries(Retries):
        def give_up(self, thread: Thread) -> None:  # called once nothing more can begin
            released.set()

    def work(item: int) -> bool:
        begun.release()
        if item == 1:
            assert begun.acquire(timeout=10) and begun.acquire(timeout=10)
            stop.set()
        return released.wait(10)

    ended = Workers(work, range(9), 2).ended(ToldRetries(), stop)
    assert sorted((item, future.result()) for item, future in ended) == [(0, True), (1, True)]


def test_closed_iteration_begins_nothing_more() -> None:
    begun, released, stop = [], Semaphore(1), Event()

    def work(item: int) -> None:
        released.acquire(timeout=10)
        begun.append(item)

    workers = Workers(work, range(9), 1)
    ended = workers.ended(Retries(), stop)
    next(ended)
    ended.close()
    released.release(9)
    [thread] = workers._threads
    thread.join(10)
    assert stop.is_set() and begun in ([0], [0, 1])


def test_ctrl_c_in_a_loop_that_ends_early_is_not_lost(ctrl_c: Callable[[], None]) -> None:
    ended = Workers(abs, range(9), 1).ended(Retries(), Event())
    next(ended)
    ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        ended.close()


def test_thread_that_does_not_start_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system refuses it. Otherwise the others would send every request, and nobody would read the replies."""
    begun, released, stop, start = [], Event(), Event(), Thread.start

    def work(item: int) -> None:
        assert released.wait(10)
        begun.append(item)

    workers = Workers(work, range(9), 2)
    first, second = workers._threads

    def refuse(thread: Thread) -> None:
        if thread is second:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        next(workers.ended(Retries(), stop))
    released.set()
    first.join(10)
    assert stop.is_set() and begun in ([], [0])
