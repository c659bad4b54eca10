r"""Read numbers in English words.

```python
parse_numeral("twenty-one")            # "21"
parse_numeral("negative two thirds")   # r"-\frac{2}{3}"
parse_numeral("two of them")           # None
```
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_UNITS = {word: value for value, word in enumerate(_SMALL.split())}
_UNITS |= {word: 10 * value for value, word in enumerate(_TENS.split(), start=2)}
GROUPS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
_PARTS |= {"eighth": 8, "ninth": 9, "tenth": 10}
_PARTS |= {f"{word}s": value for word, value in _PARTS.items() if word not in ("half", "halves")}
_MOST_LETTERS = 100
_SIGN = re.compile(r"(?:minus|negative)\s+")
_AND_PART = re.compile(r"(.+?) and (?:a |(\S+) )(\S+)")

WORDS = frozenset({*_UNITS, *GROUPS, "hundred", "dozen"})
"""The words that a whole number is made of."""


def parse_numeral(words: str) -> str | None:
    r"""A number in words, as digits or as `\frac{}{}`; None if the words are anything else."""
    text = " ".join(words.casefold().replace("-", " ").split())
    sign = _SIGN.match(text)
    value = _value(text[sign.end() :] if sign else text)
    if value is None:
        return None
    below = value.denominator
    written = str(value) if below == 1 else rf"\frac{{{value.numerator}}}{{{below}}}"
    return f"-{written}" if sign else written


def _value(text: str) -> Fraction | None:
    words = text.split()
    if not words:
        return None
    if len(words) > 1 and words[-1] in _PARTS and (match := _AND_PART.fullmatch(text)):
        whole, above = _parse_integer(match[1].split()), 1 if match[2] is None else _UNITS.get(match[2])
        return None if whole is None or above is None else whole + Fraction(above, _PARTS[match[3]])
    if words[-1] in _PARTS:
        above = 1 if words in (["half"], ["a", words[-1]]) else _parse_integer(words[:-1])
        return None if above is None else Fraction(above, _PARTS[words[-1]])
    whole = _parse_integer(words)
    return None if whole is None else Fraction(whole)


def _parse_integer(words: list[str]) -> int | None:
    """An integer; "a" counts as one before hundred, dozen and the like."""
    if words[-1:] == ["dozen"]:
        dozens = _parse_integer(words[:-1] if words[:-1] not in ([], ["a"]) else ["one"])
        return None if dozens is None else 12 * dozens
    if words[:1] == ["a"] and len(words) > 1 and (words[1] in GROUPS or words[1] == "hundred"):
        words = ["one", *words[1:]]
    total, group, last = 0, 0, 10**15  # last: the previous group word; the next must be smaller
    smallest: int | None = None  # of the group: after twenty comes at most nine, after nine nothing
    for position, word in enumerate(words):
        if word == "and":
            if smallest is None or smallest < 100 or position == len(words) - 1:
                return None
        elif word in _UNITS:
            value = _UNITS[word]
            if smallest is not None and (value == 0 or value >= (10 if smallest < 100 else 100) or smallest < 20):
                return None
            group, smallest = group + value, value
        elif word == "hundred":
            if smallest is None or not 0 < group < 20:
                return None
            group, smallest = 100 * group, 100
        elif word in GROUPS and group and GROUPS[word] < last:
            last = GROUPS[word]
            total, group, smallest = total + group * last, 0, 100
        else:
            return None
    return total + group if words and smallest is not None else None


@functools.lru_cache(maxsize=1024)
def replace_leading_numeral(words: str) -> str | None:
    """The text with its leading number in digits: "seven apples" as "7 apples"; None if no number words lead it."""
    parts = words.split(" ")
    if not parts[0][:1].isalpha() or len(words) > _MOST_LETTERS:
        return None
    for end in range(len(parts), 0, -1):
        if (number := parse_numeral(" ".join(parts[:end]))) is not None:
            return " ".join([number, *parts[end:]])
    return None
