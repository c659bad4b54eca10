"""Quotas per domain, the shortlist, and the choice of representatives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbfast.curation.selection import quotas, select_representatives, shortlist
from rbfast.curation.text import pack


@given(st.lists(st.integers(0, 3000), max_size=12), st.integers(0, 4000))
def test_quotas_fit_the_counts_and_follow_square_roots(counts: list[int], size: int) -> None:
    share = quotas(counts, size)
    assert sum(share) == min(size, sum(counts))
    assert all(0 <= part <= count for part, count in zip(share, counts, strict=True))
    open_ = [(part / np.sqrt(count), count) for part, count in zip(share, counts, strict=True) if part < count]
    for rate, count in open_:  # shares of domains with items left follow square roots, up to rounding
        assert all(abs(rate - other) <= 1 / np.sqrt(count) + 1 / np.sqrt(more) for other, more in open_)
    assert quotas(counts, size) == share


def test_quotas() -> None:
    assert quotas([900, 100, 4], 42) == [30, 10, 2]
    assert quotas([900, 100, 4], 40) == [29, 9, 2]
    assert quotas([10_000, 1, 1], 100) == [98, 1, 1]
    assert quotas([9, 9, 9], 4) == [2, 1, 1]
    with pytest.raises(ValueError, match="must be 0 or more"):
        quotas([1], -1)


@given(st.integers(0, 200), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_shortlist_equals_the_top_of_a_full_sort(n: int, reach: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, ties = rng.integers(0, 5, n) / 4, rng.integers(0, 9, n).astype(np.uint64)
    domains = rng.integers(-1, 3, n)  # -1: excluded
    share = [3, 0, 20]
    for domain, chosen in enumerate(shortlist(scores, ties, domains, share, reach=reach)):
        items = [i for i in range(n) if domains[i] == domain]
        best = sorted(items, key=lambda i: (-scores[i], ties[i], i))
        half = (len(items) + 1) // 2
        assert chosen.tolist() == best[: max(share[domain], min(reach * share[domain], half))]


def test_shortlist_has_eight_items_per_item_wanted() -> None:
    scores, zeros = np.arange(100.0), np.zeros(100, dtype=int)
    [best] = shortlist(scores, zeros, zeros, [3])
    assert best.tolist() == list(range(99, 75, -1))


def test_representatives_differ_from_each_other() -> None:
    kinds = ["the cat sat on a mat {}", "integral of {} dx over reals", "probability of {} heads in tosses"]
    texts = [kind.format(i) for kind in kinds for i in range(20)]
    chosen = select_representatives(pack(texts), 3)
    assert sorted(place // 20 for place in chosen.tolist()) == [0, 1, 2]
    assert sorted(select_representatives(pack(texts), 60).tolist()) == list(range(60))
    assert select_representatives(pack([]), 0).tolist() == []
    assert select_representatives(pack(["only one"]), 1).tolist() == [0]
