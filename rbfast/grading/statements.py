r"""The readings of a final statement, mathematics or a sentence: the texts that may be its answer.

```python
readings("There are **184** legs in total.")      # [.., "184"]
readings("x=2, x=3")                               # ["x=2, x=3"]: no part of it is the answer
```

A statement without a sentence is read only as a whole. The readings of a sentence are the text after its last verb or
sign, its marked parts, or its only number, if no other word could change their meaning.
"""

from __future__ import annotations

import re

from rbfast.grading.exact import exact_value
from rbfast.grading.moments import MONTHS, is_moment
from rbfast.grading.numerals import WORDS
from rbfast.grading.units import CURRENCY_SIGNS, OTHER_VALUE, unit_of

_WORD = re.compile(r"(?<![\\\w{])[A-Za-z]{2,}(?![\w({}])")
_JOINING = {"and", "or"}
_TEXT = re.compile(r"\\text(?:bf|rm|it)?\{([^{}]*)\}")
_MARKED = re.compile(
    r"\*\*(.+?)\*\*|\"([^\"]+)\"|`([^`]+)`|\$([^$]+)\$|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]|(?<!\w)'([^']+)'(?!\w)"
)
_BETWEEN = re.compile(r"[\s,;$*]*(?:and|or)?\s*")
_VERB = re.compile(
    r"\b(?<!not )(?<!n't )(?<!never )(?<!cannot )"
    r"(?:is|are|was|equals|be|makes|gives|has|have)\b(?:\s+(?:exactly|therefore|thus|then|equal to))?\s*"
)
_COLON = re.compile(r":\**\s+")
_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")
_THEREFORE = re.compile(r"\b(?:so|thus|hence|therefore|then|giving|gives|total)\b", re.IGNORECASE)
_OPENING = re.compile(r"^(?:so|thus|hence|therefore|then|finally)[,:]?\s+", re.IGNORECASE)
_LIST = re.compile(r"(?:^|(?<=\s))\[.*\]", re.DOTALL)
_PLAIN_NUMBER = re.compile(
    rf"[-\u2212]?\\?[{CURRENCY_SIGNS}]?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)?(?:\.\d+)?(?:/\d+)?%?|\d{{1,2}}:[0-5]\d"
)
_PLAIN_WORD = re.compile(r"(?:[^\W\d_]+(?:-[^\W\d_]+)*(?:['’]s?)?)?")
_LABEL_WORDS = """
question problem exercise example step part case chapter section page line figure table version room number no option
choice
"""
_LABELS = MONTHS.union(_LABEL_WORDS.split())  # a number right after one of these is a label
_VERDICT = re.compile(r"(yes|no|true|false)\b[,.;:!]", re.IGNORECASE)
_CHOSEN = re.compile(r"(?:\\text(?:bf)?\{)?\(([A-J])\)[}~\s\\]+(?=[^\s}])")
_SHARED = re.compile(
    r"\s*(\S+(?: [A-Za-z]{2,})+?) (?:on|across|among|from|for) (?:the |its |all )?(?=\S*\d)\S+ [A-Za-z]+\.?"
)
_LEFT_EDGE = re.compile(r"[\s*_`$\"]*")
_RIGHT_EDGE = re.compile(r"[\s*_`$\".。°]*")
_CALCULATED = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculator annotations
_PRICE = re.compile(  # a currency sign after the number; not a dollar, which may close a formula
    rf"(?<![\w.,{CURRENCY_SIGNS}])(\d[\d,.]*(?<=\d))\s?([{CURRENCY_SIGNS.replace('$', '')}])(?!\d)"
)
# Words that change a number only if they are beside it.
_NEARBY_WORDS = """
and to times more less fewer greater than most least before after over under above below by without between out
"""
_NEARBY = frozenset(_NEARBY_WORDS.split())
_ANYWHERE = OTHER_VALUE - _NEARBY
_DENYING = {"not", "isn't", "aren't", "wasn't", "cannot", "can't", "never", "nor", "than", "least", "most"}
_SECOND_THOUGHTS = {"But", "Wait", "Actually", "However", "Hmm"}  # at the start of a sentence
# The result of a calculation, and the text after it: `14 + 16 = 30 apples in all`.
_COMPUTED = re.compile(
    rf"[\d)]%?(?: [A-Za-z]+)? ?[-+*/×÷xX\u2212\u2013] ?[{CURRENCY_SIGNS}]?(?:[\d,]*\.)?\d[\d,]*%?\)*(?: ?[A-Za-z]+)?"
    r" ?= ?"
    rf"(?P<number>[-\u2212]?[{CURRENCY_SIGNS}]?[\d,.]*\d%?)(?P<rest>(?:[ ,;.:!]|[a-z]{{2}})[^\d=]*|)\Z"
)
_PICKED = re.compile(
    r"(?i:(?:the )?(?:(?:answer|option|choice) )?)\(?(?P<one>[A-J])\)? (?i:is (?:the )?(?:correct|right|best)"
    r"(?: (?:answer|option|choice|one))?)[.!]?"
    r"|(?i:(?:it's|(?:i|we)(?:'d| would|'ll| will)? (?:choose|pick|select|go with)) (?:(?:answer|option|choice) )?)"
    r"\(?(?P<other>[A-J])\)?[.!]?"
)
# A short answer (the limit keeps this linear) and a remark: a reason, a contrast, or a sentence without another value.
_REMARK = re.compile(
    r"(?P<said>.{1,1000}?)"
    r"(?:,? (?:because|since) .+|, (?:and )?not .+|,? (?:rather than|instead of) .+|[.。!] (?P<more>[A-Z]\D*))",
    re.DOTALL,
)


_BOLD = re.compile(r"(?<!\S)\*\*([^*]+)\*\*(?![^\s.,;:!%])")
_BOLD_FIRST = re.compile(r"\*\*(?P<said>[^*]+)\*\*(?P<rest>[.,;:!] (?!and )[A-Za-z].*| \([A-Za-z]{2}[^()]*\)\.?)")


def readings(statement: str) -> list[str]:
    """The texts that a person may take for the answer of a final statement, most literal first."""
    statement = _PRICE.sub(r"\2\1", _CALCULATED.sub("", statement)).strip()
    texts = [statement]
    if whole := _TEXT.fullmatch(statement):
        texts.append(whole[1])
    for line in _candidate_lines(texts[-1]):
        for written in dict.fromkeys((line, _BOLD.sub(r"\1", line))):
            texts += _line_readings(written)
    texts.append(_BOLD.sub(r"\1", statement))
    for written in _LIST.findall(statement[: statement.rfind("]") + 1]):  # each "[" has an end: linear
        texts += [written, str([item.strip(" '\"") for item in written[1:-1].split(",")])]
    stripped = [_without_edges(reading) for reading in texts]
    numbers = [str(int(number)) for number in map(_whole_number, stripped) if number is not None]
    return [reading for reading in dict.fromkeys((*texts, *stripped, *numbers)) if reading.strip()]


def _without_edges(text: str) -> str:
    """The text without the marks and spaces around it. Linear: a looping model may write a line of dots."""
    text = text[_LEFT_EDGE.match(text).end() :]  # type: ignore[union-attr]
    return text[: len(text) - _RIGHT_EDGE.match(text[::-1]).end()]  # type: ignore[union-attr]


def _whole_number(text: str) -> str | None:
    """The digits of an integer written with grouped digits or zeros after the point: some verifiers read neither."""
    match = re.fullmatch(r"(-?(?:\d{1,3}(?:,\d{3})+|\d+))(?:\.0+)?", text)
    return match[1].replace(",", "") if match and len(text) < 400 else None


def _candidate_lines(statement: str) -> list[str]:
    """The lines that may hold the answer: the only one; the first and the last if any line is a sentence."""
    lines = [line.strip() for line in statement.splitlines() if line.strip()]
    if len(lines) < 2 or any(map(is_sentence, lines)):
        return list(dict.fromkeys(lines[:1] + lines[-1:]))
    return []


def is_sentence(line: str) -> bool:
    return len([word for word in _WORD.findall(line) if word not in _JOINING]) > 1


def _line_readings(line: str) -> list[str]:
    line = _OPENING.sub("", line)
    if is_moment(_without_edges(line)):
        return [line]
    texts = [line]
    if label := _COLON.split(line)[1:]:
        texts.append(label[-1])
    if verdict := _VERDICT.match(line):
        texts.append(verdict[1])
    if (answer := _before_remark(line)) is not None:
        texts.append(answer)
    if picked := _PICKED.fullmatch(line):
        texts.append(picked["one"] or picked["other"])
    if chosen := _CHOSEN.match(line):
        texts.append(line[chosen.end() :])
    if (tail := _after_equals(line)) is not None:
        texts.append(tail)
    texts += filter(None, (_only_number(line), _computed(line), _bold_first(line)))
    if is_sentence(line):
        texts += _marked_parts(line) + [part for part in _VERB.split(line)[-1:] if part != line]
        if shared := _SHARED.fullmatch(line):
            texts.append(shared[1])
    return texts


def _before_remark(line: str) -> str | None:
    """A short answer without the remark after it, unless the remark may retract it."""
    match = _REMARK.fullmatch(line)
    if match is None or is_sentence(match["said"]):
        return None
    words = {word.lower() for word in re.findall(r"[A-Za-z']+", match["more"] or "")} - {"i"}
    return match["said"] if words.isdisjoint(OTHER_VALUE | {"but", "actually", "wait"}) else None


def _after_equals(line: str) -> str | None:
    """The text after the last equals sign, unless the line is a list of equations or a single equation."""
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


def _marked_parts(line: str) -> list[str]:
    """The last part in bold, quotes or dollar signs, with the parts joined to it by a comma or "and", unless the words
    beside it deny or change it."""
    parts = list(_MARKED.finditer(line))
    if not parts:
        return []
    run = [parts[-1]]
    for part in reversed(parts[:-1]):
        if not _BETWEEN.fullmatch(line[part.end() : run[0].start()]):
            break
        run.insert(0, part)
    if _is_denied(line[: run[0].start()], line[run[-1].end() :]):
        return []
    return [", ".join(next(filter(None, part.groups())) for part in run)]


def _is_denied(before: str, following: str) -> bool:
    """Whether the words beside a marked part say that it is not the answer, or not the whole answer."""
    last = re.findall(r"[\w']+", before.lower())[-2:]
    first = re.findall(r"[A-Za-z']+", re.sub(r"^ (?:is|are|was|were) ", " ", following))[:1]
    return not _DENYING.isdisjoint(last) or (following[:1] == " " and _may_change_number(first))


def _bold_first(line: str) -> str | None:
    """The bold part that opens a line, unless the text after it may retract or continue it."""
    match = _BOLD_FIRST.fullmatch(line)
    if match is None or _MARKED.search(match["rest"]):
        return None
    words = re.findall(r"[A-Za-z']+", match["rest"])
    return None if _may_change_number(words) or not {"but", "maybe", "perhaps"}.isdisjoint(words) else match["said"]


def _computed(line: str) -> str | None:
    """The result of a calculation in a sentence, with its unit if that is a measure."""
    match = _COMPUTED.search(line)
    if match is None or not is_sentence(line):
        return None
    words = re.findall(r"[A-Za-z']+", match["rest"])
    return None if _may_change_number(words) or words[:1] in (["and"], ["to"]) else _with_unit(match["number"], words)


def _may_change_number(words: list[str]) -> bool:
    """Whether words that are not beside a number may change it."""
    return any(word in _SECOND_THOUGHTS or word.lower() in _ANYWHERE for word in words if word != "I")


def _with_unit(number: str, following: list[str]) -> str:
    """A number, with the word after it if that is a unit of measure."""
    unit = "".join(following[:1])
    return f"{number} {unit}" if unit_of(unit) and exact_value(number) is not None else number


def _only_number(line: str) -> str | None:
    """The only number in a sentence of words, with its unit if that is a measure."""
    if re.search(r"!\s*[$\\]", line):
        return None  # a factorial
    tokens = [_without_edges(token).strip(",;:!?()") for token in line.split()]
    numbers = [i for i, token in enumerate(tokens) if any(letter.isdigit() for letter in token)]
    if len(numbers) != 1:
        return None
    at = numbers[0]
    number = tokens.pop(at)
    if not _PLAIN_NUMBER.fullmatch(number) or not all(_PLAIN_WORD.fullmatch(t) or unit_of(t) for t in tokens):
        return None
    before, following = tokens[:at], tokens[at:]
    if (before and before[-1].lower() in _LABELS) or _may_change_number(
        [part for token in tokens for part in token.split("-")]
    ):
        return None
    if "I" in before or not any(len(word) > 1 for word in tokens) or not _stands_alone(before, following):
        return None
    return f"{number} {following[0]}" if ":" in number and following else _with_unit(number, following)


def _stands_alone(before: list[str], following: list[str]) -> bool:
    """Whether no word beside a number changes it: "more than 5", "5 or 6", "5 feet and six inches"."""
    beside = {word.lower() for word in before[-2:]}
    beside |= {word.lower() for word in following[:1]} - {"more", "less", "fewer"}
    goes_on = following[1:2] == ["and"] and not WORDS.union({"a"}).isdisjoint(following[2:3])
    return beside.isdisjoint(_NEARBY) and not goes_on
