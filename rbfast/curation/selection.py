"""Select a few items from many: each domain gets a quota, filled from its best items by those that represent the rest.

    share = quotas([900, 100, 4], size=40)                                 # [29, 9, 2]: by square roots
    short = shortlist(merits, ties, domains, share)                        # the best of each domain
    chosen = select_representatives(pack(problems of short[0]), share[0])  # indices into short[0], in the order chosen

Square roots give small domains a share without letting them dominate. Merit alone would choose near copies of the best
item. Facility location chooses, among items with merit, those that are unlike each other and represent many others.
"""

import math
from collections.abc import Sequence

import numpy as np

from rbfast.curation import text
from rbfast.curation.text import Texts

REACH = 8  # shortlisted candidates for each item to be chosen


def quotas(counts: Sequence[int], size: int) -> list[int]:
    """How many of `size` items each domain gives: in proportion to the square root of its count, at most its count.

    If a domain has too few items, the others give more. The quotas sum to the lesser of `size` and the total count. Of
    equal remainders, the earlier domain's is rounded up.
    """
    if size < 0 or any(count < 0 for count in counts):
        raise ValueError(f"size and counts must be 0 or more, got {size} and {list(counts)}")
    size = min(size, sum(counts))
    share = [0.0] * len(counts)
    open_ = [i for i, count in enumerate(counts) if count]
    left = float(size)
    while open_:
        unit = left / sum(math.sqrt(counts[i]) for i in open_)
        full = [i for i in open_ if unit * math.sqrt(counts[i]) >= counts[i]]
        for i in full or open_:
            share[i] = float(counts[i]) if full else unit * math.sqrt(counts[i])
        left -= sum(share[i] for i in full)
        open_ = [i for i in open_ if i not in full] if full else []
    whole = [int(part) for part in share]
    for i in sorted(range(len(counts)), key=lambda i: whole[i] - share[i]):
        if sum(whole) < size and whole[i] < counts[i]:
            whole[i] += 1
    return whole


def shortlist(
    merits: np.ndarray, ties: np.ndarray, domains: np.ndarray, share: Sequence[int], *, reach: int = REACH
) -> list[np.ndarray]:
    """The `reach * share[d]` best items of each domain d, but at most its better half, best first, int64.

    The lower half is used only if the upper half has too few items, so merits count in a small pool too.

    Args:
        merits: float [n].
        ties: [n]; of equal merits the lower tie comes first, then the lower index.
        domains: the domain of each item, int [n].
    """
    best = []
    for domain, wanted in enumerate(share):
        items = np.flatnonzero(domains == domain)
        count = min(len(items), max(wanted, min(reach * wanted, (len(items) + 1) // 2)))
        if 0 < count < len(items):  # sort only what may make the shortlist
            least = np.partition(merits[items], len(items) - count)[len(items) - count]
            items = items[merits[items] >= least]
        best.append(items[np.lexsort((items, ties[items], -merits[items]))][:count])
    return best


def select_representatives(texts: Texts, size: int, *, threads: int = 1) -> np.ndarray:
    """The indices of the `size` texts that best represent all of them by their words, int64, in the order chosen."""
    vectors, values = text.unit_vectors(texts, threads=threads)
    return text.facility_location(vectors, values, size, threads=threads)[0]
