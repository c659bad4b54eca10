"""Threads that send requests. Ctrl-C over a server is tested in `test_served_evaluation` and `test_logprobs`."""

from collections.abc import Callable, Iterable
from threading import Event, Semaphore
from typing import Any

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

    def work(item: int) -> bool:
        begun.release()
        return released.wait(10)

    workers = Workers(work, range(9), 2)
    assert begun.acquire(timeout=10) and begun.acquire(timeout=10)
    stop.set()
    ended = workers.ended(Retries(), stop)
    released.set()
    assert sorted(item for item, _ in ended) == [0, 1]


def test_closed_iteration_begins_nothing_more() -> None:
    begun, released, stop = [], Semaphore(1), Event()

    def work(item: int) -> None:
        released.acquire(timeout=10)
        begun.append(item)

    ended = Workers(work, range(9), 1).ended(Retries(), stop)
    next(ended)
    ended.close()
    for _ in range(9):
        released.release()
    assert stop.is_set() and begun in ([0], [0, 1])
