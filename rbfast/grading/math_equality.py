r"""Decide whether two final answers are equal: the same value, the same words, or the same form of equal values.

```python
equal(r"\frac{14}{3}", "14/3")             # True
equal("2", r"\frac{\pi}{2}")               # False: the whole answer counts, not the digits in it
equal(r"(-\infty, 3]", "x ≤ 3")            # True
```

Numbers are compared here, exactly. Answers with roots, letters or functions are parsed by math-verify and compared in a
process that can be killed.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import NamedTuple

from rbfast.grading.exact import exact_value
from rbfast.grading.forms import Alternatives, Collection, Form, Value, parse_form
from rbfast.grading.judge import judge
from rbfast.grading.moments import is_moment, same_moment
from rbfast.grading.notation import normalize, without_text_command
from rbfast.grading.numerals import replace_leading_numeral
from rbfast.grading.units import CURRENCIES, Unit, mark_symbol, same_dimension, split_unit

log = logging.getLogger(__name__)

Same = Callable[[str, str], bool]
"""Whether two expressions in LaTeX have the same value."""

_LEAST_DIGITS = 6  # that a rounded decimal needs to equal the exact number
_MOST_LETTERS = 1000  # longer answers are compared as plain text
_MOST_QUESTIONS = 100  # to the grading process, per verdict
_MOST_ITEMS = 50  # of a set, which is compared in any order
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_SPACED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d,/]| ?/)")
_DECIMAL = re.compile(r"-?(\d*)\.(\d+)(?:\.\.\.)?")
_PERCENT = re.compile(r"\s*(?:%|(?:\\text\{\s*)?per ?cent(?:age)?\s*\}?)(?: points?)?$")
_BASE = re.compile(r"\(?([0-9A-F]+)\)?_\{?(\d+)\}?")
_SUBSCRIPT = re.compile(r"[a-zA-Z]_\{?\d")
_NUMBERED = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z])(\d+)")
_CONNECTIVE = re.compile(r"(?P<and>∧|\\(?:land|wedge)(?![a-zA-Z]))|∨|\\(?:lor|vee)(?![a-zA-Z])")
_RELATION = re.compile(r"[=<>≤≥≠∈]|\\(?:leq?|geq?|neq?|lt|gt|in|[lg]eqslant)(?![a-zA-Z])")
_CHOICE = re.compile(
    r"\(([A-Ja-j])\)|([A-Ja-j])[.):]?"
    r"|(?:\(([A-J])\)[,:]?|([A-J])[.):]|([A-J])(?= \([A-Za-z]{2}))\s+(?P<said>[\w$(\\].*)"
)
# Several choices: in a row, which is in order (`AB` is not the product `BA`), or in a list.
_IN_A_ROW = re.compile("(?=..)A?B?C?D?E?F?G?H?I?J?")
_CHOICES = re.compile(r"\(?[A-J]\)?(?:(?:[,;、]? ?(?:and )?)\(?[A-J]\)?)+")
# Text after a choice that retracts it or makes it one of several, rather than the option's text.
_HEDGE = re.compile(
    r"(?:or|and|nor)\s+\(?[A-J]\b|\(?[A-J][).]|but\b|(?:maybe|wrong|incorrect|false)\b"
    r"|(?!(?i:both|either|neither|all|none|only)\b).*(?:\b(?:or|and)\b|[,/])\s*\([A-J]\)"
    r"|(?i:(?:is|are|was|must be) (?:\w+ )?(?:wrong|incorrect|false|ruled out))"
    r"|(?i:(?:(?:is|are|was) not|isn't|not|cannot be|can't be|(?:may|might|could|would)(?: not)? be) (?:\w+ )?"
    r"(?:correct|right|true|this|that|it|the answer)\b)"
)
_NOT_WORDS = re.compile(r"[\\\d+^_=<>*/|$%()\[\]{}!]|(?<![^\W\d_]{2})-|-(?![^\W\d_]{2})|'(?![a-z])")


class _ExpressionComparer:
    """Compares expressions with math-verify. After a timeout all further comparisons are false.

    Without math-verify only plain expected answers can be graded.
    """

    def __init__(self, expected: str) -> None:
        self._expected, self._left = expected, _MOST_QUESTIONS

    def __call__(self, left: str, right: str) -> bool:
        self._left -= 1
        if self._left < 0:
            return False
        if not _is_installed() and is_plain(self._expected):
            _warn_of_expressions()
            return False
        require_math_verify()
        verdict = judge("math-verify").ask([left, right])
        if verdict is None:
            self._left = 0
        return bool(verdict)


def equal(expected: str, statement: str) -> bool:
    """Whether a statement is the expected answer.

    Raises:
        ImportError: the expected answer is not plain, and math-verify, which it needs, is not installed.
    """
    return equals_any(expected, [statement])


def equals_any(expected: str, statements: Sequence[str]) -> bool:
    """Whether one of several readings of a statement is the expected answer; see `equal`."""
    same = _ExpressionComparer(expected)
    wanted, found = _parse_money(expected), _parse_money(statements[0]) if statements else None
    if wanted and found:
        return _equal_quantities(wanted, found)  # €5 is not $5, but other readings may leave out the currency
    return any(_equal_statements(expected, statement, same) for statement in statements)


def _equal_statements(expected: str, statement: str, same: Same) -> bool:
    if max(len(expected), len(statement)) > _MOST_LETTERS:
        return " ".join(expected.split()) == " ".join(statement.split()) != ""
    left, right = normalize(expected), normalize(statement)
    left, right = _with_subscripts(left, right), _with_subscripts(right, left)
    left, right = mark_symbol(left, right), mark_symbol(right, left)
    if not left or not right:
        return False
    if left == right or _plain_words(left) == _plain_words(right) != "":
        return True
    if _choice_letters(left) == _choice_letters(right) != set():
        return True
    if (moment := same_moment(left, right)) is not None:
        return moment
    joined = _connectives(expected), _connectives(statement)
    if all(joined) and (joined[0] != joined[1] or len(set(joined[0])) > 1):
        return False
    return any(
        _equal(parse_form(wanted), parse_form(found), same)
        for wanted in _without_separators(left)[:1]
        for found in _without_separators(right)
    ) or (left != _without_separators(left)[0] and _equal(parse_form(left), parse_form(right), same))


def _with_subscripts(text: str, other: str) -> str:
    """`x1` as `x_{1}`, if only the other text has subscripts."""
    if "_" in text or _SUBSCRIPT.search(other) is None:
        return text
    return _NUMBERED.sub(r"\1_{\2}", text)


def _connectives(text: str) -> list[str]:
    """The connectives of a logical formula; none if they join a list of relations: `x < 2 ∨ x > 5`."""
    matches = [] if _RELATION.search(text) else _CONNECTIVE.finditer(text)
    return ["and" if match["and"] else "or" for match in matches]


def require_math_verify() -> None:
    """Raise ImportError, which says how to install it, if math-verify is not installed."""
    if not _is_installed():
        raise ImportError("mathematical answers are graded by the package math-verify: pip install math-verify")


def _is_installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


@cache
def _warn_of_expressions() -> None:
    log.warning("math-verify is not installed, so no expression equals a number or words: pip install math-verify")


def is_plain(answer: str) -> bool:
    """Whether an answer is a number, with or without a unit, or words: these are compared without math-verify."""
    if len(answer) > _MOST_LETTERS:
        return True
    text = _without_separators(normalize(answer))[0]
    words = _plain_words(text)
    return _parse_quantity(text) is not None or bool(_choice_letter(text)) or (words != "" and not _are_products(words))


def equality_key(statement: str) -> str:
    """A text that is the same for equal answers: numbers by value, words without case, anything else normalized.

    A number with a unit of measure, a percent sign or an equation with letters is only normalized.
    """
    if len(statement) > _MOST_LETTERS:
        return " ".join(statement.split()).casefold()
    text = _without_separators(normalize(statement))[0]
    if choice := _choice_letter(text):
        return choice
    form = parse_form(text)
    if isinstance(form, Value) and (form.named_only or not _has_letters(form.equation)) and not is_moment(text):
        quantity = _parse_quantity(form.text)
        if quantity is not None and quantity.base is None and not (quantity.unit or quantity.percent):
            return _format_fraction(quantity.value)
    text = re.sub(r"\s+", " ", text)
    return text if _NOT_WORDS.search(without_text_command(text)) else without_text_command(text).casefold()


def is_number(text: str) -> bool:
    """Whether an `equality_key` is a number's. Two numbers are equal only if their keys are."""
    return exact_value(text) is not None and not is_moment(text)


def _format_fraction(value: Fraction) -> str:
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    if value.denominator == 1 or below != 1 or value.denominator > 10**12:
        return str(value)
    places = next(n for n in range(64) if (value * 10**n).denominator == 1)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _without_separators(text: str) -> list[str]:
    """The text without the commas that group digits, and the text itself: `100,200` may be two numbers."""
    joined = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    joined = _SPACED.sub(lambda match: match[0].replace(" ", ""), joined)
    return list(dict.fromkeys((joined, text)))


def _equal(expected: Form, found: Form, same: Same) -> bool:
    if isinstance(expected, Alternatives):
        return any(_equal(form, found, same) for form in expected.items)
    if isinstance(found, Alternatives):
        return any(_equal(expected, form, same) for form in found.items)
    if isinstance(expected, Value) and isinstance(found, Value):
        return _equal_values(expected, found, same)
    if isinstance(expected, Value) and isinstance(found, Collection) and found.brackets == "" and found.items:
        return all(_equal(expected, form, same) for form in found.items)  # one value, repeated
    expected, found = _as_collection(expected), _as_collection(found)
    if not _same_name(expected.name, found.name):
        return False
    if expected.brackets == "u" or found.brackets == "u":
        return expected.brackets == found.brackets and _equal_in_any_order(expected.items, found.items, same)
    if expected.brackets and found.brackets and expected.brackets != found.brackets:
        return False
    if expected.brackets == "[]" and not found.brackets and len(found.items) == 2:
        return False  # an interval, which needs its brackets
    if "{}" in (expected.brackets, found.brackets) or (not expected.brackets and not found.brackets):
        return _equal_in_any_order(expected.items, found.items, same)
    return _equal_in_order(_sorted_by_name(expected), _sorted_by_name(found), same)


def _as_collection(form: Value | Collection) -> Collection:
    return form if isinstance(form, Collection) else Collection((form,), "")


def _sorted_by_name(form: Collection) -> Sequence[Form]:
    """`y=3, x=2` as the pair (2, 3)."""
    names = [item.name for item in form.items if isinstance(item, Value) and item.name]
    if form.brackets or len(set(names)) < len(form.items):
        return form.items
    return sorted(form.items, key=lambda item: item.name if isinstance(item, Value) else "")


def _equal_in_order(expected: Sequence[Form], found: Sequence[Form], same: Same) -> bool:
    return len(expected) == len(found) and all(_equal(e, f, same) for e, f in zip(expected, found, strict=True))


def _equal_in_any_order(expected: Sequence[Form], found: Sequence[Form], same: Same) -> bool:
    if len(expected) != len(found) or len(expected) > _MOST_ITEMS:
        return False
    left = list(found)
    for wanted in expected:
        match = next((form for form in left if _equal(wanted, form, same)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _equal_values(expected: Value, found: Value, same: Same) -> bool:
    if expected.equation and found.equation:
        if expected.name and found.name and _same_name(expected.name, found.name):
            return _equal_texts(expected.text, found.text, same)
        if not expected.name or not found.name or _has_letters(expected.text + found.text):
            return same(expected.equation, found.equation)
        return len(expected.name) > 1 and _equal_texts(expected.text, found.text, same)
    if not _same_name(expected.name, found.name):
        return False
    if expected.equation and not expected.named_only:
        return False
    return _equal_texts(expected.text, found.text, same)


def _same_name(one: str, other: str) -> bool:
    """Whether two names may denote the same value: one is missing, or they are `y` and `f(x)`."""
    return not one or not other or one == other or {one, other} == {"y", "f(x)"}


def _has_letters(text: str) -> bool:
    return re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text)) is not None


class _Quantity(NamedTuple):
    value: Fraction
    unit: Unit | None
    percent: bool
    base: int | None
    places: int | None  # decimal places, if it is written as a decimal


def _equal_texts(expected: str, found: str, same: Same) -> bool:
    if _compact(expected) == _compact(found):
        return True
    if (moment := same_moment(expected, found)) is not None:
        return moment
    left, right = _parse_quantity(expected), _parse_quantity(found)
    if left is not None and right is not None:
        return _equal_quantities(left, right)
    if left is not None and left.base and re.fullmatch("[0-9A-F]+", found):
        return _in_base(found, left.base) == left
    plain = _plain_words(expected), _plain_words(found)
    if all(plain):
        return plain[0] == plain[1] or (
            not _choice_letter(expected) and _are_products(*plain) and same(expected, found)
        )
    if any(plain) and (left or right or not _are_products(*filter(None, plain))):
        return _choice_letter(expected) is not None and _choice_letter(expected) == _choice_letter(found)
    return _equal_expressions(expected, found, same)


def _compact(text: str) -> str:
    """The text without braces around one character and spaces beside a bar. No parser reads `O(n^{2})` or
    `P(A | B)`."""
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", re.sub(r"\s*\|\s*", "|", text))


def _equal_expressions(expected: str, found: str, same: Same) -> bool:
    (wanted, measure), (given, other) = split_unit(expected), split_unit(found)
    if measure and other and measure != other:
        return False
    return same(wanted.removesuffix("%"), given.removesuffix("%"))


def _parse_quantity(text: str) -> _Quantity | None:
    """The number, with its unit, if that is the whole text."""
    text = replace_leading_numeral(without_text_command(text)) or text
    if match := _BASE.fullmatch(without_text_command(text)):
        return _in_base(match[1], int(match[2]))
    percent = _PERCENT.search(text)
    core, unit = (text[: percent.start()], None) if percent else split_unit(text)
    core = core.removesuffix("...").strip()
    value = exact_value(core)
    if value is None:
        return None
    decimal = _DECIMAL.fullmatch(core)
    return _Quantity(value, unit, percent is not None, None, len(decimal[2]) if decimal else None)


def _parse_money(statement: str) -> _Quantity | None:
    """The sum of money, if that is the whole statement."""
    if len(statement) > _MOST_LETTERS:
        return None
    quantity = _parse_quantity(_without_separators(normalize(statement))[0])
    return quantity if quantity and quantity.unit and quantity.unit.dimension in CURRENCIES else None


def _in_base(digits: str, base: int) -> _Quantity | None:
    try:
        return _Quantity(Fraction(int(digits, base)), None, False, base, None)
    except ValueError:
        return None


def _equal_quantities(expected: _Quantity, found: _Quantity) -> bool:
    if expected.base != found.base:
        return _equal_in_base(expected, found)
    if expected.unit and found.unit:
        return same_dimension(expected.unit, found.unit) and (
            expected.value * expected.unit.size == found.value * found.unit.size
        )
    if (expected.unit and found.percent) or (found.unit and expected.percent):
        return False
    if _are_close(expected, found):
        return True
    if expected.percent != found.percent:
        percentage, other = (expected, found) if expected.percent else (found, expected)
        return percentage.value == 100 * other.value
    return False


def _equal_in_base(expected: _Quantity, found: _Quantity) -> bool:
    """Whether numbers with different bases are equal: the answer may omit the base, but not state another one."""
    if found.base is None:
        written = _in_base(str(found.value), expected.base or 10)
        return written is not None and written.value == expected.value
    return False


def _are_close(left: _Quantity, right: _Quantity) -> bool:
    """Whether two values are equal, or one is a decimal of enough digits: the other, rounded or truncated."""
    if left.value == right.value:
        return True
    for decimal, other in ((left, right), (right, left)):
        if decimal.places is not None and other.places is None and _digits(decimal) >= _LEAST_DIGITS:
            left_out = (abs(other.value) - abs(decimal.value)) * 10**decimal.places
            return decimal.value * other.value > 0 and Fraction(-1, 2) <= left_out < 1
    return False


def _digits(decimal: _Quantity) -> int:
    return len(str(abs(decimal.value.numerator * 10 ** (decimal.places or 0) // decimal.value.denominator)))


def _plain_words(text: str) -> str:
    """The words of a text if it consists only of words, else an empty string."""
    if choice := _choice_letter(text):
        return choice
    words = re.sub(r"^([\"'`])(.*)\1$", r"\2", without_text_command(text).strip(" ."))
    if _NOT_WORDS.search(words) or not re.search(r"[^\W\d_]", words):
        return ""
    return re.sub(r"^(?:the|an?) (?=\S)|[\s\-]+", "", words.casefold())


def _choice_letter(text: str) -> str | None:
    """The letter of a choice: `(C)`, `C.`, `(C) 5`."""
    match = _CHOICE.fullmatch(re.sub(r"^(?:[Oo]ption|[Cc]hoice) ", "", without_text_command(text).strip()))
    if match is None or _HEDGE.match((match["said"] or "").removeprefix("(")):
        return None
    return next(filter(None, match.groups())).casefold()


def _choice_letters(text: str) -> set[str]:
    """The letters of several choices: `ACD`, `A, C and D`, `(A), (C)`; empty for anything else."""
    written = without_text_command(text).strip(" .")
    is_list = _CHOICES.fullmatch(written) is not None and not written.isalpha()
    return set(re.findall("[A-J]", written)) if is_list or _IN_A_ROW.fullmatch(written) else set()


def _are_products(*words: str) -> bool:
    """Whether words may be products of variables: `xy` is `yx`, but `no` is not `on`."""
    return all(len(word) == 1 or (len(word) <= 4 and set("xyzabcmnk") >= set(word)) for word in words)
