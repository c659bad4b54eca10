"""Operations on many texts at a time: tokens, shingles, sketches, and the choice of a few that represent all.

    texts = pack(["Find $\\frac12+1$.", "Find \\(\\dfrac{1}{2} + 1\\)."])          # the same tokens
    hashes, counts = shingles(texts, 5)                                            # Ragged of sorted distinct uint64
    found = find(texts, 5, index)                                                  # those that an index has

The native module `rbfast._text` runs if it was built, else `rbfast.curation.text_reference`. Both give the same
arrays, for any number of threads: all sums are of integers, so the order of summation does not matter.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from rbfast.curation import text_reference


class Texts(NamedTuple):
    """Folded texts in one UTF-8 buffer: `data` uint8 [bytes]; text i is `data[starts[i] : starts[i + 1]]`."""

    data: np.ndarray
    starts: np.ndarray  # int64 [n + 1]


class Ragged(NamedTuple):
    """Rows of different lengths: row i is `values[starts[i] : starts[i + 1]]`."""

    values: np.ndarray
    starts: np.ndarray  # int64 [n + 1]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


def _load_native() -> Any:
    """`rbfast._text` if it was built for this Python. Raises ImportError if it was built but cannot be loaded."""
    return import_module("rbfast._text") if find_spec("rbfast._text") else None


_NATIVE = _load_native()
_IMPL = _NATIVE or text_reference


def implementation() -> str:
    """Which implementation the functions below run: 'native' or 'reference'."""
    return "reference" if _NATIVE is None else "native"


def cores() -> int:
    """The number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------------- folding

# Unicode signs by their LaTeX names, so that both spellings give one token. Spaces keep a name from joining a word.
_NAMED = (
    "≤ le ⩽ le ≥ ge ⩾ ge ≠ ne ≈ approx ≡ equiv ≅ cong ∼ sim ¬ neg ± pm ∓ mp ÷ div √ sqrt ∞ infty ° circ ∑ sum ∏ prod "
    "∫ int ∂ partial ∇ nabla ∈ in ∉ notin ⊂ subset ⊆ subseteq ∪ cup ∩ cap ∅ emptyset → to ⇒ implies ∠ angle △ triangle "
    "⊥ perp ∥ parallel ∀ forall ∃ exists ⌊ lfloor ⌋ rfloor ⌈ lceil ⌉ rceil ⟨ langle ⟩ rangle"
)
_SIGNS = dict(zip(_NAMED.split()[::2], (f" {name} " for name in _NAMED.split()[1::2]), strict=True))
_SIGNS |= dict.fromkeys("×·⋅∙∗", "*") | dict.fromkeys("−‒", "-") | dict.fromkeys("⁄∕", "/")
_SIGNS |= dict.fromkeys("’‘′", "'") | {"∣": "|"}
_UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")  # written without spaces
_RAISED = re.compile("[⁰¹²³⁴-⁾ⁿⁱ]+")
_LONE_GREEK = re.compile("(?<![α-ω])[α-ω](?![α-ω])")  # a variable; in Greek words the letters stay together


def fold(text: str) -> str:
    """`text` in lower case with one spelling for each sign; the tokens are read from this form.

    Beyond ASCII: NFKC, full case folding, digits of any script as 0 to 9, superscripts after "^", mathematical signs
    and lone Greek letters by their LaTeX names, spaces around ideographs, other punctuation as space. A lone surrogate
    counts as punctuation.
    """
    if text.isascii():
        return text.lower()
    raised = _RAISED.sub(lambda match: f"^{match.group()}", text)
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", raised).casefold())
    return _LONE_GREEK.sub(_greek_name, plain.translate(_FOLDED))


def _greek_name(match: re.Match[str]) -> str:
    name = unicodedata.name(match.group()).rpartition(" ")[2].lower()
    return f" {'lambda' if name == 'lamda' else name} "


class _Folded(dict[int, str]):
    """Translations of single characters, computed on first use."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = self._translate(chr(code))
        return folded

    @staticmethod
    def _translate(character: str) -> str:
        kind = unicodedata.category(character)
        if character.isascii():
            return character.lower()
        if character in _SIGNS:
            return _SIGNS[character]
        if kind == "Nd":
            return str(unicodedata.decimal(character))
        if kind[0] in "LMN":
            alone = unicodedata.name(character, "").startswith(_UNSPACED)
            return f" {character} " if alone else character
        if kind[0] == "S":
            return f" {character} "
        return "" if kind == "Cf" else " "


_FOLDED = _Folded()


def pack(texts: Iterable[str]) -> Texts:
    """Fold texts and join them into one buffer."""
    encoded = [fold(text).encode() for text in texts]
    starts = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in encoded], out=starts[1:])
    return Texts(np.frombuffer(b"".join(encoded), dtype=np.uint8), starts)


# --------------------------------------------------------------------------------------------------------------- loops


def shingles(texts: Texts, k: int, *, mask_digits: bool = False, threads: int = 1) -> tuple[Ragged, np.ndarray]:
    """The distinct k-token shingles of each text, sorted 64-bit hashes; and the number of tokens, int64 [n].

    A text of fewer than k tokens is a single shingle. A token's hash is FNV-1a; a shingle's hash folds its tokens'
    hashes with splitmix64's finaliser, the same on every machine. `mask_digits` reads every numeral as one token.
    """
    hashes, starts, counts = _IMPL.shingles(texts.data, texts.starts, k, mask_digits, threads)
    return Ragged(hashes, starts), counts


def fingerprints(texts: Texts, *, threads: int = 1) -> np.ndarray:
    """One hash for all the tokens of each text, in order, uint64 [n]; 0 if a text has none.

    Among a million different texts, the probability that any two collide is 3e-8.
    """
    rows, _ = shingles(texts, 2**62, threads=threads)
    hashes = np.zeros(len(rows.starts) - 1, dtype=np.uint64)
    hashes[rows.lengths > 0] = rows.values
    return hashes


def find(texts: Texts, k: int, index: np.ndarray, *, mask_digits: bool = False, threads: int = 1) -> Ragged:
    """The `shingles` that each text shares with `index` (uint64, sorted, distinct), as sorted int32 indices into it."""
    return Ragged(*_IMPL.find(texts.data, texts.starts, k, mask_digits, index, threads))


def containment(
    found: Ragged,
    postings: Ragged,
    weights: np.ndarray,
    totals: np.ndarray,
    *,
    own: np.ndarray | None = None,
    least: float,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """For each row, the item of which it contains the largest share, and that share, if it is at least `least`.

    Args:
        found: the terms of each row, as `find` gives them.
        postings: for each term, the items that have it, int32.
        weights: of the terms, int64, 0 or more.
        totals: for each item, the sum of its terms' weights, int64, more than 0.
        own: for each row, the sum of its terms' weights, int64; the share is then symmetric (Dice): twice the shared
            weight over the sum of both totals.

    Returns:
        The item, int32 [rows], the first of equal shares, -1 if none; the share, float64 [rows] in [0, 1], 0 if none.
    """
    both = np.empty(0, np.int64) if own is None else own
    return _IMPL.containment(*found, *postings, weights, totals, both, least, threads)


def minhash(rows: Ragged, width: int, *, threads: int = 1) -> np.ndarray:
    """MinHash signatures, uint32 [n, width]: the share of equal values estimates the Jaccard index of two rows.

    Value w is the least upper half of `hash * m_w` (multiply-shift), with odd m_w from splitmix64. Broder 1997.
    """
    multipliers = text_reference.mix(np.arange(width, dtype=np.uint64)) | np.uint64(1)
    return _IMPL.minhash(rows.values, rows.starts, multipliers, threads)


def facility_location(
    vectors: Ragged, values: np.ndarray, size: int, *, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The `size` rows that best represent all, greedily: each adds the most to sum_i max_(j chosen) <x_i, x_j>.

    Args:
        vectors: the features of each row, int32, 0 or more, each at most once.
        values: the value of each feature, int32; 0 or more for the greedy guarantee of 1 - 1/e.

    Returns:
        The rows in the order chosen, int64 [size], the lower row of equal gains; the gain of each, int64 [size].
    """
    width = int(vectors.values.max(initial=-1)) + 1
    return _IMPL.facility_location(vectors.starts, vectors.values, values, width, size, threads)


# ------------------------------------------------------------------------------------------------------------- vectors

_SCALE = 2**15  # a unit vector's length as an integer


def unit_vectors(texts: Texts, *, threads: int = 1) -> tuple[Ragged, np.ndarray]:
    """Texts as sparse idf vectors, for `facility_location`: dot products are cosines times 2^30.

    A feature is a distinct token (digits masked), its value the idf log((n + 1) / df) over these texts. Tokens that are
    in more than half of the texts are left out.
    """
    rows, _ = shingles(texts, 1, mask_digits=True, threads=threads)
    n = len(rows.starts) - 1
    terms, places, counts = np.unique(rows.values, return_inverse=True, return_counts=True)
    kept = (2 * counts <= n) if n > 1 else np.ones(len(terms), dtype=bool)
    idf = np.where(kept, np.log((n + 1) / counts), 0.0)
    inside = np.append(0, np.cumsum(kept[places]))
    features = (np.cumsum(kept) - 1)[places[kept[places]]].astype(np.int32)
    starts = inside[rows.starts]
    weighed = idf[places[kept[places]]]
    norm = np.sqrt(np.bincount(np.repeat(np.arange(n), np.diff(starts)), weights=weighed**2, minlength=n))
    values = np.rint(_SCALE * weighed / np.repeat(norm, np.diff(starts))).astype(np.int32)
    return Ragged(features, starts), values


def join_ragged(rows: Sequence[Ragged]) -> Ragged:
    """Concatenate the rows of several parts."""
    values = np.concatenate([part.values for part in rows])
    return Ragged(values, np.append(0, np.cumsum(np.concatenate([part.lengths for part in rows]))).astype(np.int64))
