"""Statistics of an evaluation: proportions and gains with intervals, pass@k, clustered errors, the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval."""

    mean: float
    low: float
    high: float


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Interval:
    """The mean gain over the same problems, in [-1, 1], with a 95% interval.

    The interval is Agresti and Min's for matched proportions (Statistics in Medicine 24, 2005): two pseudo-problems
    (half a loss, half a win, one unchanged) are added before the normal approximation. So the interval has a width even
    if all differences are equal, and is nearly [-1, 1] at n = 1. They are not in the mean.

    Raises:
        ValueError: no problems, unequal lengths, or scores outside [0, 1].
    """
    if not before or len(before) != len(after):
        raise ValueError(f"before and after must score the same problems, got {len(before)} and {len(after)}")
    if outside := [score for score in (*before, *after) if not 0.0 <= score <= 1.0]:
        raise ValueError(f"scores must lie in [0, 1], got {outside[0]}")
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    n = len(differences) + 2
    centre = sum(differences) / n
    spread = _Z95 * math.sqrt(((sum(d * d for d in differences) + 1) / n - centre**2) / n)
    return Interval(sum(differences) / len(differences), max(-1.0, centre - spread), min(1.0, centre + spread))


def proportion(outcomes: Sequence[float]) -> Interval:
    """The share of successes in 0/1 outcomes with Wilson's 95% score interval. Raises ValueError without outcomes."""
    if not outcomes:
        raise ValueError("a proportion needs at least one outcome, got none")
    n, share = len(outcomes), sum(outcomes) / len(outcomes)
    pull = _Z95**2 / n
    centre = (share + pull / 2) / (1 + pull)
    spread = _Z95 * math.sqrt(share * (1 - share) / n + pull / (4 * n)) / (1 + pull)
    # If no outcome is a success, or all are, the bound equals the share: avoid rounding errors.
    low = centre - spread if share > 0 else 0.0
    return Interval(share, low, centre + spread if share < 1 else 1.0)


def clustered(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean over items and samples, and its standard error clustered by item.

    The samples of one item are not independent: their errors are summed within the item before they are squared
    (Liang and Zeger's estimator; Miller, "Adding Error Bars to Evals", arXiv 2411.00640, section 2.2).

    Args:
        scores: the scores of each item's samples.

    Raises:
        ValueError: no item, or an item without a sample.
    """
    if not scores or not all(scores):
        raise ValueError("every item needs at least one sample")
    n = sum(map(len, scores))
    mean = sum(map(sum, scores)) / n
    return mean, math.sqrt(sum(sum(score - mean for score in item) ** 2 for item in scores)) / n


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k, that one of k samples is correct (Chen et al., arXiv 2107.03374, section 2.1).

    Raises:
        ValueError: k is below 1 or above the number of samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"expected 1 <= k <= samples and 0 <= correct <= samples, got {k=}, {correct=}, {samples=}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def paired_bootstrap(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], *, seed: int = 0, draws: int = 10_000
) -> Interval:
    """The mean gain of one run over another on the same items, with a 95% percentile interval over items.

    Args:
        before, after: the scores of each item's samples; the two runs may have different numbers of samples.

    Raises:
        ValueError: no items, or different numbers of them.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"before and after must score the same items, got {len(before)} and {len(after)}")
    gains = np.array([np.mean(b) - np.mean(a) for a, b in zip(before, after, strict=True)])
    generator = np.random.default_rng(seed)
    means = [gains[generator.integers(len(gains), size=len(gains))].mean() for _ in range(draws)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(gains.mean()), float(low), float(high))
