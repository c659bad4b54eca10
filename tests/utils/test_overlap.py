"""Overlapping blocks share one change to an object; the last block to end undoes it."""

from contextlib import contextmanager

import pytest

from rbfast.utils.overlap import Overlap


def changing(log, fails=False):
    @contextmanager
    def change():
        log.append("changed")
        try:
            if fails:
                raise KeyboardInterrupt
            yield
        finally:
            log.append("undone")

    return change


def test_first_block_makes_the_change_and_the_last_to_end_undoes_it():
    overlap, log, one, other = Overlap(), [], object(), object()
    first, second = overlap.block(one, changing(log)), overlap.block(one, changing(log))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert log == ["changed"]
    with overlap.block(other, changing([])):
        second.__exit__(None, None, None)
    assert log == ["changed", "undone"]


def test_failed_change_is_undone_and_can_be_retried():
    overlap, log, one = Overlap(), [], object()
    with pytest.raises(KeyboardInterrupt), overlap.block(one, changing(log, fails=True)):
        pass
    with overlap.block(one, changing(log)):
        assert log == ["changed", "undone", "changed"]
    assert log.pop() == "undone"
