"""Threads that work through a queue."""

import threading

import pytest

from rbfast.utils.workers import Workers


def all_of(workers: Workers[int, int]) -> list[int]:
    items = []
    while workers.left:
        if ended := workers.take(1.0):
            items.append(ended[0])
    return items


def test_items_are_worked_on_in_order() -> None:
    assert all_of(Workers(abs, range(20), 1)) == [*range(20)]
    assert sorted(all_of(Workers(abs, range(20), 3))) == [*range(20)]


def test_results_and_errors_are_taken() -> None:
    workers = Workers(lambda item: 6 // item, [3, 0], 1)
    [(_, good), (_, bad)] = [workers.take(5.0) or pytest.fail("nothing ended") for _ in range(2)]
    assert good.result() == 2 and isinstance(bad.exception(), ZeroDivisionError) and workers.left == 0


def test_dropped_queue_leaves_the_items_that_have_begun() -> None:
    begun, released = threading.Semaphore(0), threading.Event()

    def work(item: int) -> bool:
        begun.release()
        return released.wait(10)

    workers = Workers(work, range(9), 2)
    begun.acquire(), begun.acquire()
    workers.drop_queue()
    assert workers.left == 2 and workers.take(0) is None
    released.set()
    assert sorted(all_of(workers)) == [0, 1]
    for thread in workers.threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in workers.threads)
