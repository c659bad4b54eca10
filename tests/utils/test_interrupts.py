"""Ctrl-C is counted where it arrives, and left alone elsewhere."""

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


def test_a_block_counts_and_afterwards_an_interrupt_is_one() -> None:
    assert count_one() == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_program_that_handles_it_itself_goes_on_to_do_so() -> None:
    handled: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: handled.append(number))
    assert count_one() == [] and handled == [signal.SIGINT]


def test_another_thread_than_the_main_one_counts_nothing() -> None:
    def enter() -> list[int]:
        with counted_interrupts() as seen:
            return seen

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() == []
