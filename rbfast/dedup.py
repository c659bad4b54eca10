"""One trace for each problem: the same problem typed twice, and nearly the same problem with the same answer.

    keeper = duplicates(fingerprints, signatures, answers, preference)
    keeper[i] == i                                     # i is kept; else i says again what keeper[i] says

Problems of the same tokens are one problem, whatever their answers: one of them may be wrong. Problems whose shingles
mostly agree (MinHash) count as one only where their answers agree too, for problems made from a template share most of
their words and are different problems all the same.
"""

import numpy as np

from rbfast.text_reference import mix

SIGNATURE = 64  # values of a MinHash signature; its estimate of a Jaccard index of 0.8 has a standard error of 0.05
_BANDS = 16  # of 4 values: a pair of Jaccard index 0.8 meets in one with a probability of 0.9998, one of 0.3 with 0.12
_LEAST_AGREEMENT = 0.8


def duplicates(
    fingerprints: np.ndarray, signatures: np.ndarray, answers: np.ndarray, preference: np.ndarray
) -> np.ndarray:
    """For each item the item that stands for it, int64 [n].

    Args:
        fingerprints: of the problem's tokens, uint64 [n]; 0 is a problem without tokens, like no other.
        signatures: MinHash of the problem's shingles, uint32 [n, 64].
        answers: hash of the answer, uint64 [n].
        preference: float [n]; of duplicates the highest is kept, of equals the first.
    """
    same = _same_value(fingerprints, fingerprints != 0)
    near = [_near_in_band(signatures, answers, band) for band in range(_BANDS)]
    groups = _components(len(fingerprints), np.concatenate([same, *near]))
    order = np.lexsort((np.arange(len(groups)), -preference, groups))  # by group, the best first
    opens = np.append(True, np.diff(groups[order]) > 0)[: len(order)]
    keeper = np.empty(len(groups), dtype=np.int64)
    keeper[order] = order[opens][np.cumsum(opens) - 1]
    return keeper


def _same_value(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Pairs (first item of a value, another item of it), int64 [pairs, 2]."""
    items = np.flatnonzero(counted)
    order = items[np.argsort(values[items], kind="stable")]
    opens = np.append(True, np.diff(values[order]) > 0)[: len(order)]  # unsigned differences are never negative
    first = order[opens][np.cumsum(opens) - 1]
    return np.stack([first, order], axis=1)[first != order]


def _near_in_band(signatures: np.ndarray, answers: np.ndarray, band: int) -> np.ndarray:
    """The pairs that meet in a band and agree in enough of their signatures."""
    width = signatures.shape[1] // _BANDS
    keys = answers
    for column in range(band * width, (band + 1) * width):
        keys = mix(keys + signatures[:, column].astype(np.uint64))
    filled = signatures[:, 0] != np.iinfo(np.uint32).max
    pairs = _same_value(keys, filled)
    agreement = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(1)
    return pairs[(agreement >= _LEAST_AGREEMENT) & (answers[pairs[:, 0]] == answers[pairs[:, 1]])]


def _components(n: int, pairs: np.ndarray) -> np.ndarray:
    """The least item that each item is connected to, int64 [n]."""
    label = np.arange(n)
    while len(pairs):
        least = label[pairs].min(1)
        before = label.copy()
        np.minimum.at(label, pairs.ravel(), np.repeat(least, 2))
        label = label[label]
        if np.array_equal(label, before):
            break
    return label
