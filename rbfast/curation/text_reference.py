"""The reference implementation of every text loop in plain Python and NumPy: the oracle of the tests, and the fallback
if `rbfast._text` is not built. `rbfast.curation.text` documents arguments and results."""

import heapq
import re
from functools import lru_cache

import numpy as np

_TYPESETTING = {
    "left", "right", "big", "bigl", "bigr", "bigg", "displaystyle", "text", "textbf", "textit", "mathrm", "mathbf",
    "mathit", "operatorname", "quad", "qquad", "limits", "ldots", "cdots", "dots", "begin", "end",
}  # fmt: skip
_ALIASES = {
    **{"dfrac": "frac", "tfrac": "frac", "leq": "le", "geq": "ge", "neq": "ne", "times": "*", "cdot": "*"},
    **{"prime": "'", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "lbrace": "{", "rbrace": "}"},
    "lnot": "neg",
}
_RELATIONS = {"in", "notin", "cup", "cap", "setminus", "subset", "subseteq"}  # a brace after these is no argument
_TOKEN = re.compile(
    r"\\(?P<command>[a-z]+)|\\(?P<escaped>[{}|%])|(?P<stop>\\\\|[,;&])|\\[^a-z\u0080-\U0010ffff]?|"
    r"(?P<word>[a-z\u0080-\U0010ffff]+)|(?P<digits>[0-9]+(?:\.[0-9]+)?)|(?P<figure>\[asy\])|\^(?=\{?\\(?:circ|prime))|"
    r"(?P<operator>[-+*/=<>()\[\]|%^])|(?P<brace>[{}])|(?P<mark>[!'])|"
    r"(?P<negation>(?<![^ \t-\r(\[$~>&|^])~(?=[a-z(~\u0080-\U0010ffff]))"  # ~p, but not the space of 5~cm
)
_SPACES = " \t\n\v\f\r"
_ENVIRONMENT = re.compile(r"\{[a-z*]*\}")
_NUMERAL = re.compile(r"[0-9]+(?:(?:,|\{,\}|,\\!)[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?")
_IN_WORD = re.compile(r"(?![a-z]')[a-z\u0080-\U0010ffff]")  # after an apostrophe; in a'b' it is a prime
_FIGURE_END = "[/asy]"
_DIGITS = "0123456789"
_STOP = ","  # separates two numbers; not a token
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_GROUPED = "-+*/=<>^|!"  # brackets around these operators matter
# The opening brace of an argument (of a command, ^ or /), a closing brace, the opening brace of a set if it has a list.
_ARGUMENT, _END, _SET = "\x02", "\x03", "\x04"
_OPENING, _CLOSING = ("(", _ARGUMENT, _SET), (")", _END)


def tokens(text: str, mask_digits: bool = False) -> list[str]:
    """The tokens of a folded text: words, numerals, signs, names of LaTeX commands.

    Typesetting gives no tokens: `\\left`, `\\text`, dollars, Asymptote figures, brackets that group nothing. Braces
    count as round brackets; both group if they contain an operator, or several tokens that are the argument of a
    command, `^` or `/`. But `{1, 2}`, if it is not an argument, is the set `\\{1, 2\\}`. A tilde before a negated term
    is "neg", else a space. A digit after a command is a token of its own, as in TeX. With `mask_digits` a whole numeral
    is "0", its sign, commas and point included, and so is a fraction of two numerals.
    """
    row = _scan(text, mask_digits)
    return _resolve_brackets(_mask_numerals(row) if mask_digits else row)


def _scan(text: str, mask_digits: bool) -> list[str]:
    """The tokens in order, with stops, before numerals are masked and brackets resolved."""
    row: list[str] = []
    at, bound = 0, -1  # bound: where a prime or a factorial would belong to the last token
    figures_end = True  # whether a figure may have an end in the rest of the text
    taking = -1  # where the argument of the last command would start
    named, relates = -1, False  # where the name of the last command ended, and whether it is a relation (no argument)
    while match := _TOKEN.search(text, at):
        start, at = match.span()
        kind, token = match.lastgroup, match.group(match.lastgroup or 0)
        if kind == "command":
            if token not in _TYPESETTING:
                row.append(_ALIASES.get(token, token))
                taking = -1 if token in _RELATIONS else at
            named, relates = at, token in _RELATIONS
            if token in ("begin", "end") and (name := _ENVIRONMENT.match(text, at)):
                at = name.end()
            elif at < len(text) and text[at] in _DIGITS:
                row.append("0" if mask_digits else text[at])
                at += 1
            bound = at
        elif kind == "digits":
            if mask_digits and (numeral := _NUMERAL.match(text, start)):
                at = numeral.end()
            bound = at
            row.append("0" if mask_digits else token)
        elif kind == "word":
            row.append(token)
            shortened = start > 0 and text[start - 1] == "'" and bound != start  # the t of "don't"
            bound = at if len(token) == 1 and token in _LETTERS and not shortened else -1
        elif kind == "figure":
            end = text.find(_FIGURE_END, at) if figures_end else -1
            figures_end = end >= 0
            if figures_end:
                at = end + len(_FIGURE_END)
            else:
                row.append("[")
                at = start + 1
        elif kind == "mark":
            bound = _read_mark(text, start, bound, row)
        elif kind == "brace":
            is_argument = start == taking or text[start - 1 : start] in ("}", "^", "/")
            opening = _ARGUMENT if is_argument else _SET if _may_be_set(text, start, named, relates) else "("
            row.append(_END if token == "}" else opening)
        elif kind is not None:
            row.append({"stop": _STOP, "negation": "neg"}.get(kind, token))
    return row


def _may_be_set(text: str, at: int, named: int, relates: bool) -> bool:
    r"""Whether the brace at `at` is not an argument and not a font group: `{\bf a, b}`."""
    end, inside = at, at + 1  # where the text before ends and the text inside starts; slices would be quadratic
    while end and text[end - 1] in _SPACES:
        end -= 1
    while text[inside : inside + 1] and text[inside] in _SPACES:
        inside += 1
    before = text[max(0, end - 1) : end]
    if text.startswith("\\", inside) or (before and before in "_^/}]"):
        return False
    if end == named:
        return relates
    return end < at or re.fullmatch(r"[a-z0-9\u0080-\U0010ffff]", before) is None


def _read_mark(text: str, at: int, bound: int, row: list[str]) -> int:
    """Read "!" or "'" as a factorial or prime if it is one, else as punctuation; returns where the next may follow."""
    follows = at == bound or (at > 0 and text[at - 1] in "})]|")
    factorial, prime = text[at] == "!", follows and not _IN_WORD.match(text, at + 1)
    if not ((follows or text[at + 1 : at + 2] == "=") if factorial else prime):
        return -1
    row.append(text[at])
    return at + 1


def _mask_numerals(row: list[str]) -> list[str]:
    """Replace each numeral, with its sign, by "0", fractions too; a sign between two terms becomes "+"."""
    masked: list[str] = []
    for token in row:
        if token == _END and masked[-1:] == ["0"] and masked[-2:-1] and masked[-2] in _OPENING:
            del masked[-2:]
            token = "0"
        while token == "0" and masked:
            if masked[-2:] in (["frac", "0"], ["0", "/"]):
                del masked[-2:]
            elif masked[-1] not in ("+", "-"):
                break
            elif len(masked) > 1 and (masked[-2] in ("0", ")", "]") or masked[-2] in tuple(_LETTERS)):
                masked[-1] = "+"
                break
            else:
                masked.pop()
        masked.append(token)
    return masked


def _resolve_brackets(row: list[str]) -> list[str]:
    """Drop stops, brackets that group nothing, and unmatched brackets."""
    shown = [{_STOP: "", ")": "", _END: ""}.get(token, token) for token in row]  # "" is dropped
    opened: list[tuple[int, bool]] = []  # index, and whether an operator came before it in the enclosing brackets
    lists: set[int] = set()  # open brackets that contain a stop
    signed, inner = False, (-1, -1)  # whether an operator came in these brackets; the brackets that were closed last
    for at, token in enumerate(row):
        if token in _OPENING:
            shown[at] = ""
            opened.append((at, signed))
            signed = False
        elif token == _STOP and opened:
            lists.add(opened[-1][0])
        elif token in _CLOSING and opened:
            before, outer = opened.pop()
            terms = sum(map(bool, shown[before:at]))
            is_set = row[before] == _SET and token == _END and before in lists and terms > 1
            groups = signed or (terms > 1 and _is_taken(row, before, at))
            if is_set:
                shown[before], shown[at] = "{", "}"
            elif groups and inner != (before + 1, at - 1):  # else the brackets are doubled
                shown[before], shown[at] = "(", ")"
            signed, inner = signed or outer, (-1, -1) if is_set else (before, at)
        elif token not in (*_CLOSING, _STOP):
            signed = signed or token in tuple(_GROUPED)
    return [token for token in shown if token]


def _is_taken(row: list[str], opened: int, closed: int) -> bool:
    """Whether the brackets are the argument of a command, `^` or `/`."""
    return row[opened] == _ARGUMENT or row[max(0, opened - 1)] in ("/", "^") or row[closed + 1 : closed + 2] == ["^"]


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
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return np.concatenate([np.empty(0, np.uint64), *rows]), np.append(0, ends), np.array(counts, dtype=np.int64)


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
    own: np.ndarray,
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
            total = int(totals[item])
            part = 2 * shared[item] / (total + int(own[row])) if len(own) else shared[item] / total
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
            total[rows[column]] += int(values[at]) * column_values[column]  # a row occurs once in a column
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
