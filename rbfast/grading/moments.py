r"""Compare dates, times of day, durations and ratios, whose signs between numbers are not operators.

```python
same_moment("3:45 p.m.", "15:45")              # True
same_moment("March 5, 2024", "5 March")        # True: a missing year agrees with any
same_moment("3:4:5", "6:8:10")                 # True
same_moment("2 h 30 min", "150 minutes")       # True
same_moment("3:4", "0.75")                     # None: only one of them is of this kind
```
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from itertools import pairwise

from rbfast.grading.notation import without_text_command
from rbfast.grading.units import unit_of

_MONTH_NAMES = "january february march april may june july august september october november december"
_DAY_NAMES = "monday tuesday wednesday thursday friday saturday sunday"
_MONTHS, _DAYS = _MONTH_NAMES.split(), _DAY_NAMES.split()
MONTHS = frozenset({*_MONTHS, *(name[:3] for name in _MONTHS), "sept"})
"""The names of months, in lower case."""
_NUMBERS = {name: place for names in (_MONTHS, _DAYS) for place, name in enumerate(names, start=1)}
_NUMBERS |= {name[:3]: place for name, place in _NUMBERS.items()} | {"sept": 9, "tues": 2, "thur": 4, "thurs": 4}
_DAY, _MONTH = (rf"(?:{'|'.join(f'{n}|{n[:3]}' for n in names)}|sept|tues|thurs?)\.?" for names in (_DAYS, _MONTHS))
_WEEKDAY = rf"(?:(?P<weekday>{_DAY}),? )?(?:the )?"
_NTH, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?:,? (?P<year>\d{4}))?"
_DATES = (
    re.compile(rf"{_WEEKDAY}(?P<month>{_MONTH}) {_NTH}{_YEAR}"),
    re.compile(rf"{_WEEKDAY}{_NTH}(?: of)? (?P<month>{_MONTH}){_YEAR}"),
    re.compile(r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)"),
    re.compile(r"(?P<first>\d{1,2})/(?P<second>\d{1,2})/(?P<year>\d{4})"),  # day/month or month/day
)
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))? ?([ap])\.? ?m|(\d{1,2}):([0-5]\d)")
_NUMBER = r"\d{1,100}(?:\.\d{1,100})?"  # Python refuses to parse thousands of digits
_RATIO = re.compile(rf"{_NUMBER}(?:(?::| to ){_NUMBER})+")
_TIMED = re.compile(rf"({_NUMBER}) ?([a-z]+)\.?")
_DURATION = re.compile(rf"{_TIMED.pattern}(?: (?:and )?{_TIMED.pattern})*")


def same_moment(one: str, other: str) -> bool | None:
    """Whether two dates, times of day, durations or ratios are the same; None if they are not of the same kind.

    Two texts like 3:45 and 1:15 are compared as times, not as ratios. Two durations are compared here if one has
    several units.
    """
    left, right = _plain(one), _plain(other)
    dates = _parse_date(left), _parse_date(right)
    if dates[0] or dates[1]:
        return _dates_agree(*dates)
    times = _parse_time(left), _parse_time(right)
    if times[0] and times[1]:
        return not times[0].isdisjoint(times[1])
    durations = _parse_duration(left), _parse_duration(right)
    if durations[0] and durations[1] and len(durations[0]) + len(durations[1]) > 2:
        return sum(durations[0]) == sum(durations[1])
    ratios = _parse_ratio(left), _parse_ratio(right)
    return ratios[0] == ratios[1] if ratios[0] and ratios[1] else None


def is_moment(text: str) -> bool:
    """Whether a text is a date, a time of day, a duration in several units or a ratio."""
    return same_moment(text, text) is not None


@functools.lru_cache(maxsize=1024)
def _plain(text: str) -> str:
    words = without_text_command(text).replace(r"\colon", ":").casefold()
    return re.sub(r"\s*:\s*", ":", " ".join(words.replace("~", " ").split())).strip(" .")


def _parse_date(text: str) -> dict[str, int]:
    """The parts of a date by name; empty if the text is not a date."""
    match = next(filter(None, (pattern.fullmatch(text) for pattern in _DATES)), None)
    if match is None:
        return {}
    parts = {name: part.rstrip(".") for name, part in match.groupdict().items() if part}
    return {name: _NUMBERS.get(part) or int(part) for name, part in parts.items()}


def _dates_agree(one: dict[str, int], other: dict[str, int]) -> bool:
    shared = one.keys() & other.keys()
    return bool({"day", "second"} & shared) and all(one[name] == other[name] for name in shared)


def _parse_time(text: str) -> set[int]:
    """The minutes of the day that a time may mean; empty if the text is not a time."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        return set()
    hour, minute = int(match[1] or match[4]), int(match[2] or match[5] or 0)
    if match[3]:
        return {(hour % 12 + 12 * (match[3] == "p")) * 60 + minute} if 1 <= hour <= 12 else set()
    return {(hour % 12 + half) * 60 + minute for half in (0, 12)} if 1 <= hour <= 12 else {(hour % 24) * 60 + minute}


def _parse_duration(text: str) -> list[Fraction]:
    """The seconds of each part of a duration, the larger units first; empty if the text is not a duration."""
    parts = _TIMED.findall(text) if _DURATION.fullmatch(text) else []
    units = [unit_of(word) for _, word in parts]
    sizes = [unit.size for unit in units if unit and unit.dimension == "time"]
    if len(sizes) < len(parts) or any(size <= next_size for size, next_size in pairwise(sizes)):
        return []
    return [Fraction(number) * size for (number, _), size in zip(parts, sizes, strict=True)]


def _parse_ratio(text: str) -> tuple[Fraction, ...]:
    """The parts of a ratio divided by the first; empty if the text is not a ratio."""
    parts = [Fraction(part) for part in re.split(":| to ", text)] if _RATIO.fullmatch(text) else [Fraction(0)]
    return tuple(part / parts[0] for part in parts) if parts[0] else ()
