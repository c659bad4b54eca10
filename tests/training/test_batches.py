"""Batches limited by tokens: complete, within the limit, well filled, reproducible."""

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


def test_every_trace_is_in_one_batch_within_the_limit():
    lengths = np.random.default_rng(0).integers(50, 1000, 500)
    batches = batches_by_tokens(some_examples(lengths), 4096, seed=0)
    assert sorted(chain.from_iterable(ids(batches))) == sorted(map(str, range(500)))
    assert max(sizes(batches)) <= 4096
    assert sum(lengths) / (4096 * len(batches)) > 0.93


def test_batch_may_be_exactly_full():
    assert sizes(batches_by_tokens(some_examples([60, 40]), 100, seed=0)) == [100]


def test_trace_over_the_limit_gets_its_own_batch():
    batches = batches_by_tokens(some_examples([10, 500, 10, 300, 10]), 100, seed=0)
    assert sorted(sizes(batches)) == [30, 300, 500]


def test_seed_alone_decides_the_batches():
    examples = some_examples(np.random.default_rng(0).integers(50, 1000, 100))
    first, again, other = (ids(batches_by_tokens(examples, 4096, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_examples_and_batches_collate_alike():
    examples = some_examples([3, 2, 4])
    rows = [collate_items(items) for items in (examples, [examples[:2], examples[2:]])]
    assert rows[0]["lengths"] == rows[1]["lengths"] == [3, 2, 4]
    assert torch.equal(rows[0]["input_ids"], rows[1]["input_ids"])


@pytest.mark.parametrize("tokens", [1, 10**9])
def test_extreme_token_limits(tokens):
    batches = batches_by_tokens(some_examples([5, 6, 7]), tokens, seed=0)
    assert len(batches) == (3 if tokens == 1 else 1)
