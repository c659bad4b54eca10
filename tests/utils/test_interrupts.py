"""Ctrl-C is counted in a block of the main thread, unless the program has its own handler."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rbfast.utils.interrupts import counted_interrupts


@pytest.fixture(autouse=True)
def interrupts_raise() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest may ignore them
    yield
    signal.signal(signal.SIGINT, before)


def count_one() -> list[int]:
    with counted_interrupts() as seen:
        signal.raise_signal(signal.SIGINT)
    return seen


def test_interrupts_are_counted_in_the_block_and_raised_after_it() -> None:
    assert count_one() == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_handler_of_the_program_stays_in_force() -> None:
    handled: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: handled.append(number))
    assert count_one() == [] and handled == [signal.SIGINT]


def test_block_in_another_thread_counts_nothing() -> None:
    def enter() -> list[int]:
        with counted_interrupts() as seen:
            return seen

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() == []
