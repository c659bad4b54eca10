r"""What a final statement says: the plain readings of one line, be it mathematics or a sentence.

```python
readings("There are **184** legs in total.")      # [.., "184"]
readings("x=2, x=3")                               # ["x=2, x=3"]: no part of it is the answer
```

A statement without a sentence in it is read as a whole only. Of a sentence, what its last verb or sign introduces, its
marked parts, or the one number in it count, if no other word could change their meaning.
"""

from __future__ import annotations

import re

from rbfast.grading.exact import exact
from rbfast.grading.moments import MONTHS, is_moment
from rbfast.grading.units import OTHER_VALUE, unit_of

_WORD = re.compile(r"(?<![\\\w{])[A-Za-z]{2,}(?![\w({}])")
_JOINING = {"and", "or"}
_TEXT = re.compile(r"\\text(?:bf|rm|it)?\{([^{}]*)\}")
_MARKED = re.compile(
    r"\*\*(.+?)\*\*|\"([^\"]+)\"|`([^`]+)`|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|(?<!\w)'([^']+)'(?!\w)"
)
_BETWEEN = re.compile(r"[\s,;$*]*(?:and|or)?\s*")
_VERB = re.compile(
    r"\b(?:is|are|was|equals|be|makes|gives|has|have)\b(?:\s+(?:exactly|therefore|thus|then|equal to))?\s*"
)
_COLON = re.compile(r":\**\s+")
_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")
_THEREFORE = re.compile(r"\b(?:so|thus|hence|therefore|then|giving|gives|total)\b", re.IGNORECASE)
_OPENING = re.compile(r"^(?:so|thus|hence|therefore|then|finally)[,:]?\s+", re.IGNORECASE)
_LIST = re.compile(r"(?:^|(?<=\s))\[.*\]", re.DOTALL)
_PLAIN_NUMBER = re.compile(r"[-\u2212]?\\?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?%?|\d{1,2}:[0-5]\d")
_PLAIN_WORD = re.compile(r"(?:[^\W\d_]+(?:-[^\W\d_]+)*(?:['’]s?)?)?")
_LABEL_WORDS = """
question problem exercise example step part case chapter section page line figure table version room number no option
choice
"""
_LABELS = MONTHS.union(_LABEL_WORDS.split())  # a number right after one of them is a name
_VERDICT = re.compile(r"(yes|no|true|false)\b[,.;:!]", re.IGNORECASE)
_CHOSEN = re.compile(r"(?:\\text(?:bf)?\{)?\(([A-J])\)[}~\s\\]+(?=[^\s}])")
_SHARED = re.compile(
    r"\s*(\S+(?: [A-Za-z]{2,})+?) (?:on|across|among|from|for) (?:the |its |all )?\S*\d\S* [A-Za-z]+\.?"
)
_EDGES = re.compile(r"^[\s*_`$\"]+|[\s*_`$\".。°]+$")
_CALCULATED = re.compile(r"<<[^<>\n]*>>")  # by GSM8K's calculator, beside the value
# A short answer, and what is said of it: its reason, what it is not, a sentence without another value.
_REMARK = re.compile(
    r"(?P<said>.+?)"
    r"(?:,? (?:because|since) .+|, (?:and )?not .+|,? (?:rather than|instead of) .+|[.。!] (?P<more>[A-Z]\D*))",
    re.DOTALL,
)


_BOLD = re.compile(r"(?<!\S)\*\*([^*]+)\*\*(?![^\s.,;:!])")


def readings(statement: str) -> list[str]:
    """The ways a person would read one final statement, most literal first."""
    statement = _CALCULATED.sub("", statement).strip()
    found = [statement]
    if whole := _TEXT.fullmatch(statement):
        found.append(whole[1])
    for line in _lines(found[-1]):
        found += _of_line(line)
    found.append(_BOLD.sub(r"\1", statement))
    for written in _LIST.findall(statement):
        found += [written, str([item.strip(" '\"") for item in written[1:-1].split(",")])]
    stripped = [_EDGES.sub("", reading) for reading in found]
    numbers = [str(int(number)) for number in map(_whole_number, stripped) if number is not None]
    return [reading for reading in dict.fromkeys((*found, *stripped, *numbers)) if reading.strip()]


def _whole_number(text: str) -> str | None:
    """A whole number with zeros after the point, or grouped digits: not every verifier reads those."""
    match = re.fullmatch(r"(-?(?:\d{1,3}(?:,\d{3})+|\d+))(?:\.0+)?", text)
    return match[1].replace(",", "") if match and len(text) < 400 else None


def _lines(statement: str) -> list[str]:
    """The lines that may say it all: the only one; the first and the last, if some of them are sentences."""
    lines = [line.strip() for line in statement.splitlines() if line.strip()]
    if len(lines) < 2 or any(map(is_sentence, lines)):
        return list(dict.fromkeys(lines[:1] + lines[-1:]))
    return []


def is_sentence(line: str) -> bool:
    return len([word for word in _WORD.findall(line) if word not in _JOINING]) > 1


def _of_line(line: str) -> list[str]:
    line = _OPENING.sub("", line)
    if is_moment(_EDGES.sub("", line)):
        return [line]
    found = [line]
    if label := _COLON.split(line)[1:]:
        found.append(label[-1])
    if verdict := _VERDICT.match(line):
        found.append(verdict[1])
    if (said := _before_remark(line)) is not None:
        found.append(said)
    if chosen := _CHOSEN.match(line):
        found.append(line[chosen.end() :])
    if (tail := _after_equals(line)) is not None:
        found.append(tail)
    if is_sentence(line):
        found += _marked(line) + [part for part in _VERB.split(line)[-1:] if part != line]
        if shared := _SHARED.fullmatch(line):
            found.append(shared[1])
    if (number := _only_number(line)) is not None:
        found.append(number)
    return found


def _before_remark(line: str) -> str | None:
    """A short answer without the remark that follows it, unless the remark may take it back."""
    match = _REMARK.fullmatch(line)
    if match is None or is_sentence(match["said"]):
        return None
    words = {word.lower() for word in re.findall(r"[A-Za-z']+", match["more"] or "")} - {"i"}
    return match["said"] if words.isdisjoint(OTHER_VALUE | {"but", "actually", "wait"}) else None


def _after_equals(line: str) -> str | None:
    """What the last equals sign introduces, unless it is one of several."""
    parts = re.split(r"(?<![<>!\\])=\s*", line)
    between = "=".join(parts[1:-1])
    left = parts[0]
    if len(parts) < 2 or _SEPARATOR.search(parts[-1]):
        return None
    if len(parts) > 2 and _SEPARATOR.search(between) and not _THEREFORE.search(between):
        return None
    if len(parts) == 2 and not is_sentence(left):
        return None  # an equation: its form says whether its right side is a value
    return parts[-1] if is_sentence(left) or len(parts) > 2 else None


def _marked(line: str) -> list[str]:
    """The last part in bold, quotes or dollars, with those that a comma or an "and" joins to it."""
    parts = list(_MARKED.finditer(line))
    if not parts:
        return []
    run = [parts[-1]]
    for part in reversed(parts[:-1]):
        if not _BETWEEN.fullmatch(line[part.end() : run[0].start()]):
            break
        run.insert(0, part)
    return [", ".join(next(filter(None, part.groups())) for part in run)]


def _only_number(line: str) -> str | None:
    """The one number in a sentence of words, with its unit if that is a measure."""
    tokens = [_EDGES.sub("", token).strip(",;:!?()") for token in line.split()]
    numbers = [i for i, token in enumerate(tokens) if any(letter.isdigit() for letter in token)]
    if len(numbers) != 1:
        return None
    at = numbers[0]
    number = tokens.pop(at)
    if not _PLAIN_NUMBER.fullmatch(number) or not all(map(_PLAIN_WORD.fullmatch, tokens)):
        return None
    before, following = ([*tokens[:at], ""][-2 if at else -1], [*tokens[at:], ""][0])
    changed = OTHER_VALUE - ({"more"} if "than" not in tokens else set())
    if before.lower() in _LABELS or any(not changed.isdisjoint(word.lower().split("-")) for word in tokens):
        return None
    if not any(len(word) > 1 for word in tokens):
        return None
    is_measure = unit_of(following) and exact(number) is not None
    return f"{number} {following}" if is_measure or (":" in number and following) else number
