"""Keep one trace for each problem: find equal problems, and nearly equal problems with equal answers.

    keeper = duplicates(fingerprints, signatures, keys, preference)
    keeper[i] == i                                     # i is kept; else it duplicates keeper[i]

Problems with the same tokens are duplicates even if their answers differ: one answer may be wrong. Near duplicates
share most shingles (MinHash), and must also agree in their answers and in the problems' numbers, letters and signs:
different problems made from one template share most of their words. The problem of a conversation is its last question.
The turns before it must be equal too: "Are you sure?" is another problem after other turns.
"""

import re
from hashlib import blake2b

import numpy as np

from rbfast.curation.text import fold
from rbfast.curation.text_reference import mix, tokens

SIGNATURE = 64  # values in a MinHash signature: a standard error of 0.05 at a Jaccard index of 0.8
_BANDS = 16  # of 4 values: a pair with Jaccard index 0.8 collides with probability 0.9998, one with 0.3 with 0.12
_LEAST_AGREEMENT = 0.8
_DATA = re.compile(r"[0-9]+|(?<![^\W\d_])[b-z](?![^\W\d_])")  # "a" is an article more often than a variable

_SIGNS = frozenset([*"+*/=<>()[]{}|!'%^", "neg"])  # not "-", which is often a hyphen


def agreement_key(problem: str, answer: str) -> int:
    """A 64-bit hash of what near duplicates must share: the answer's tokens; the problem's numbers, letters, signs."""
    folded = fold(problem)
    signs = [token for token in tokens(folded) if token in _SIGNS]
    shared = [*tokens(fold(answer)), "", *_DATA.findall(folded), "", *signs]
    return int.from_bytes(blake2b("\0".join(shared).encode(), digest_size=8).digest(), "big")


def history_hash(turns: np.ndarray) -> int:
    """A 64-bit hash of the turns before a problem, from the fingerprint of each, uint64; 0 if there are none."""
    return int.from_bytes(blake2b(turns.tobytes(), digest_size=8).digest(), "big") if len(turns) else 0


def mix_history(histories: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mix the `history_hash` of the earlier turns into fingerprints or keys of problems, uint64 [n]; 0 stays 0."""
    return np.where((histories == 0) | (values == 0), values, mix(values ^ histories))


def duplicates(
    fingerprints: np.ndarray, signatures: np.ndarray, keys: np.ndarray, preference: np.ndarray
) -> np.ndarray:
    """For each item, the item that is kept in its place (itself if it is kept), int64 [n].

    Args:
        fingerprints: of the problem's tokens and its history, uint64 [n]; 0 (no tokens) equals no other.
        signatures: MinHash of the problem's shingles, uint32 [n, 64].
        keys: `agreement_key` of each item, uint64 [n].
        preference: float [n]; of duplicates, the one with the highest preference is kept, or the first of equals.
    """
    same = _equal_pairs(fingerprints, fingerprints != 0)
    near = [_similar_pairs(signatures, keys, band) for band in range(_BANDS)]
    groups = _components(len(fingerprints), np.concatenate([same, *near]))
    order = np.lexsort((np.arange(len(groups)), -preference, groups))  # by group, the best first
    opens = np.append(True, np.diff(groups[order]) > 0)[: len(order)]
    keeper = np.empty(len(groups), dtype=np.int64)
    keeper[order] = order[opens][np.cumsum(opens) - 1]
    return keeper


def _equal_pairs(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Pairs (first item with a value, another item with it), int64 [pairs, 2]."""
    items = np.flatnonzero(counted)
    order = items[np.argsort(values[items], kind="stable")]
    opens = np.append(True, np.diff(values[order]) > 0)[: len(order)]  # unsigned differences are never negative
    first = order[opens][np.cumsum(opens) - 1]
    return np.stack([first, order], axis=1)[first != order]


def _similar_pairs(signatures: np.ndarray, keys: np.ndarray, band: int) -> np.ndarray:
    """The pairs with equal keys that collide in a band and agree in enough of their signatures."""
    width = signatures.shape[1] // _BANDS
    meet = keys
    for column in range(band * width, (band + 1) * width):
        meet = mix(meet + signatures[:, column].astype(np.uint64))
    pairs = _equal_pairs(meet, signatures[:, 0] != np.iinfo(np.uint32).max)  # an empty problem has no duplicates
    agreement = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(1)
    return pairs[(agreement >= _LEAST_AGREEMENT) & (keys[pairs[:, 0]] == keys[pairs[:, 1]])]


def _components(n: int, pairs: np.ndarray) -> np.ndarray:
    """Connected components: the least item that each item is connected to, int64 [n]."""
    label = np.arange(n)
    while len(pairs := np.sort(label[pairs])):
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        np.minimum.at(label, pairs[:, 1], pairs[:, 0])  # joins whole groups, so a few rounds suffice
        while (label[label] != label).any():
            label = label[label]
    return label
