"""Self-consistency: the answer most samples of one prompt agree on (Wang et al., arXiv 2203.11171)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Vote(NamedTuple):
    """The winner, None where no sample had an answer; the samples that voted for it, and all that voted."""

    answer: str | None
    votes: int
    of: int


def majority(answers: Sequence[str | None]) -> Vote:
    """The most frequent answer; of equally frequent ones the first that was given. None is no vote."""
    given = [answer for answer in answers if answer is not None]
    if not given:
        return Vote(None, 0, 0)
    # A Counter keeps the order of first sight, and `max` the first of equals.
    counts = Counter(given)
    winner = max(counts, key=counts.__getitem__)
    return Vote(winner, counts[winner], len(given))


def decided(answers: Sequence[str | None], running: int) -> bool:
    """Whether `running` more answers can no longer change the majority, nor tie with it."""
    counts = sorted(Counter(answer for answer in answers if answer is not None).values(), reverse=True)
    return bool(counts) and counts[0] - (counts[1] if len(counts) > 1 else 0) > running
