"""Batches by tokens: every trace in one of them, none too full, well filled, and the same again."""

from itertools import chain

import numpy as np
import pytest
import torch

from rbfast.data.encoding import Example
from rbfast.training.batches import batches_by_tokens, collate_items


def some_examples(lengths):
    return [Example(np.arange(n), np.full(n, -100), np.full(n, -1), id=str(i)) for i, n in enumerate(lengths)]


def ids(batches):
    return [[example.id for example in batch] for batch in batches]


def sizes(batches):
    return [sum(len(example.input_ids) for example in batch) for batch in batches]


def test_every_trace_is_in_one_batch_and_no_batch_is_too_full():
    lengths = np.random.default_rng(0).integers(50, 1000, 500)
    batches = batches_by_tokens(some_examples(lengths), 4096, seed=0)
    assert sorted(chain.from_iterable(ids(batches))) == sorted(map(str, range(500)))
    assert max(sizes(batches)) <= 4096
    assert sum(lengths) / (4096 * len(batches)) > 0.93


def test_a_batch_may_be_full():
    assert sizes(batches_by_tokens(some_examples([60, 40]), 100, seed=0)) == [100]


def test_a_longer_trace_is_alone_in_its_batch():
    batches = batches_by_tokens(some_examples([10, 500, 10, 300, 10]), 100, seed=0)
    assert sorted(sizes(batches)) == [30, 300, 500]


def test_the_seed_alone_decides():
    examples = some_examples(np.random.default_rng(0).integers(50, 1000, 100))
    first, again, other = (ids(batches_by_tokens(examples, 4096, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_items_are_packed_whether_they_are_examples_or_batches():
    examples = some_examples([3, 2, 4])
    rows = [collate_items(items) for items in (examples, [examples[:2], examples[2:]])]
    assert rows[0]["lengths"] == rows[1]["lengths"] == [3, 2, 4]
    assert torch.equal(rows[0]["input_ids"], rows[1]["input_ids"])


@pytest.mark.parametrize("tokens", [1, 10**9])
def test_the_ends(tokens):
    batches = batches_by_tokens(some_examples([5, 6, 7]), tokens, seed=0)
    assert len(batches) == (3 if tokens == 1 else 1)
