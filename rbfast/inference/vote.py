"""Self-consistency: the answer that most samples of one prompt agree on (Wang et al., arXiv 2203.11171).

Two answers are the same if `math_equality.equal` says so, as in grading. Equal numbers have the same key
(`answer_key`). Only other answers are compared, each with the first of every group.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rbfast.grading.math_equality import equal, is_number


class Vote(NamedTuple):
    """The winner (None if no sample had an answer), its votes, and the number of samples that voted."""

    answer: str | None
    votes: int
    of: int


def majority(answers: Sequence[str | None]) -> Vote:
    """The most frequent answer; of equally frequent answers, the first one given. None does not vote."""
    counts = _counts(answers)
    if not counts:
        return Vote(None, 0, 0)
    winner = max(counts, key=counts.__getitem__)  # `max` returns the first of equals
    return Vote(winner, counts[winner], sum(counts.values()))


def decided(answers: Sequence[str | None], running: int) -> bool:
    """Whether `running` more answers can neither change the majority nor tie with it."""
    counts = sorted(_counts(answers).values(), reverse=True)
    return bool(counts) and counts[0] - (counts[1] if len(counts) > 1 else 0) > running


def _counts(answers: Sequence[str | None]) -> dict[str, int]:
    """The votes for each group of equal answers, under the first one given, in that order."""
    counts: dict[str, int] = {}
    for answer, votes in Counter(answer for answer in answers if answer is not None).items():
        group = next((first for first in counts if _are_same_answer(first, answer)), answer)
        counts[group] = counts.get(group, 0) + votes
    return counts


@functools.lru_cache(maxsize=4096)
def _are_same_answer(first: str, answer: str) -> bool:
    if is_number(first) and is_number(answer):
        return first == answer
    try:
        return equal(first, answer)
    except ImportError:  # without math-verify, only numbers and words are compared
        return False
