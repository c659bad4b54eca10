"""The definition of every text loop in plain Python and NumPy: the oracle of the tests, and what runs where
`rbfast._text` is not built. Arguments and results are described in `rbfast.curation.text`."""

import heapq
import re
from functools import lru_cache

import numpy as np

_TYPESETTING = {
    "left", "right", "big", "bigl", "bigr", "bigg", "displaystyle", "text", "textbf", "textit", "mathrm", "mathbf",
    "mathit", "operatorname", "quad", "qquad", "limits", "ldots", "cdots", "dots", "begin", "end",
}  # fmt: skip
_ALIASES = {"dfrac": "frac", "tfrac": "frac", "leq": "le", "geq": "ge", "neq": "ne", "times": "*", "cdot": "*"}
_TOKEN = re.compile(
    r"\\(?P<command>[a-z]+)|\\[^a-z\u0080-\U0010ffff]?|(?P<word>[a-z\u0080-\U0010ffff]+)|(?P<digits>[0-9]+)|"
    r"(?P<figure>\[asy\])|(?P<operator>[-+*/=<>])"
)
_ENVIRONMENT = re.compile(r"\{[a-z*]*\}")
_FIGURE_END = "[/asy]"
_DIGITS = "0123456789"


def tokens(text: str, mask_digits: bool = False) -> list[str]:
    """The tokens of a folded text: words, runs of digits ("0" where masked), operators, names of LaTeX commands.

    What only sets type gives none: `\\left`, `\\text`, dollars, braces, Asymptote figures. A digit after a command
    stands alone, as TeX reads it.
    """
    found: list[str] = []
    at, figures = 0, True
    while match := _TOKEN.search(text, at):
        at = match.end()
        kind, token = match.lastgroup, match.group(match.lastgroup or 0)
        if kind == "command":
            if token not in _TYPESETTING:
                found.append(_ALIASES.get(token, token))
            if token in ("begin", "end") and (name := _ENVIRONMENT.match(text, at)):
                at = name.end()
            elif at < len(text) and text[at] in _DIGITS:
                found.append("0" if mask_digits else text[at])
                at += 1
        elif kind == "digits":
            found.append("0" if mask_digits else token)
        elif kind == "figure":
            close = text.find(_FIGURE_END, at) if figures else -1
            figures = close >= 0
            at = close + len(_FIGURE_END) if figures else match.start() + 1
        elif kind is not None:
            found.append(token)
    return found


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, uint64 to uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1 << 16)
def hash_token(token: str) -> int:
    """FNV-1a, 64 bits, of the token's UTF-8."""
    value = 0xCBF29CE484222325
    for byte in token.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def shingles(
    data: np.ndarray, starts: np.ndarray, k: int, mask_digits: bool, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, counts = [], []
    buffer = data.tobytes()
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        row = tokens(buffer[first:last].decode(), mask_digits)
        rows.append(_shingles_of(np.array([hash_token(token) for token in row], dtype=np.uint64), k))
        counts.append(len(row))
    return _joined(rows, np.uint64), _starts(rows), np.array(counts, dtype=np.int64)


def _shingles_of(row: np.ndarray, k: int) -> np.ndarray:
    length = min(k, len(row))
    value = np.zeros(len(row) - length + 1 if length else 0, dtype=np.uint64)
    for offset in range(length):
        value = mix(value + row[offset : offset + len(value)])
    return np.unique(value)


def find(
    data: np.ndarray, starts: np.ndarray, k: int, mask_digits: bool, index: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    hashes, rows, _ = shingles(data, starts, k, mask_digits, threads)
    at = np.searchsorted(index, hashes)
    known = at < len(index)
    known[known] = index[at[known]] == hashes[known]
    before = np.append(0, np.cumsum(known))
    return at[known].astype(np.int32), before[rows]


def containment(
    ids: np.ndarray,
    starts: np.ndarray,
    postings: np.ndarray,
    posting_starts: np.ndarray,
    weights: np.ndarray,
    totals: np.ndarray,
    least: float,
    threads: int,
) -> tuple[np.ndarray, np.ndarray]:
    best, share = np.full(len(starts) - 1, -1, dtype=np.int32), np.zeros(len(starts) - 1)
    for row in np.flatnonzero(np.diff(starts)).tolist():
        shared: dict[int, int] = {}
        for term in ids[starts[row] : starts[row + 1]].tolist():
            for item in postings[posting_starts[term] : posting_starts[term + 1]].tolist():
                shared[item] = shared.get(item, 0) + int(weights[term])
        for item in sorted(shared):
            part = shared[item] / int(totals[item])
            if part >= least and part > share[row]:
                best[row], share[row] = item, part
    return best, share


def minhash(hashes: np.ndarray, starts: np.ndarray, multipliers: np.ndarray, threads: int) -> np.ndarray:
    signatures = np.full((len(starts) - 1, len(multipliers)), 2**32 - 1, dtype=np.uint32)
    filled = np.flatnonzero(np.diff(starts))
    if len(filled):
        for column, multiplier in enumerate(multipliers):
            values = ((hashes * multiplier) >> np.uint64(32)).astype(np.uint32)
            signatures[filled, column] = np.minimum.reduceat(values, starts[filled])
    return signatures


def facility_location(
    starts: np.ndarray, features: np.ndarray, values: np.ndarray, width: int, size: int, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    n = len(starts) - 1
    order = np.argsort(features, kind="stable")
    rows = np.repeat(np.arange(n), np.diff(starts))[order]
    column_values = values[order].astype(np.int64)
    column_starts = np.searchsorted(features[order], np.arange(width + 1))

    def similarities(item: int) -> np.ndarray:
        total = np.zeros(n, dtype=np.int64)
        for at in range(starts[item], starts[item + 1]):
            column = slice(column_starts[features[at]], column_starts[features[at] + 1])
            total[rows[column]] += int(values[at]) * column_values[column]  # a column names a row once
        return total

    best = np.zeros(n, dtype=np.int64)
    bounds = [(-int(similarities(item).clip(0).sum()), item, 0) for item in range(n)]
    heapq.heapify(bounds)
    chosen: list[int] = []
    gains: list[int] = []
    while len(chosen) < size:
        gain, item, computed = heapq.heappop(bounds)
        if computed < len(chosen):
            gain = -int((similarities(item) - best).clip(0).sum())
            heapq.heappush(bounds, (gain, item, len(chosen)))
            continue
        best = np.maximum(best, similarities(item))
        chosen.append(item)
        gains.append(-gain)
    return np.array(chosen, dtype=np.int64), np.array(gains, dtype=np.int64)


def _joined(rows: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *rows])


def _starts(rows: list[np.ndarray]) -> np.ndarray:
    return np.append(0, np.cumsum([len(row) for row in rows], dtype=np.int64))
