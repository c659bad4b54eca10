r"""Parse the form of an answer: one value, or several in a list, a tuple, a set, an interval, a union.

```python
parse_form("x=2, x=3")             # Collection((Value("2", "x"), Value("3", "x")), "")
parse_form(r"x\le 3")              # Collection((Value(r"-\infty"), Value("3")), "(]", "x")
parse_form(r"2\pm\sqrt{3}")        # Collection((Value(r"2+\sqrt{3}"), Value(r"2-\sqrt{3}")), "")
```
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeAlias

from rbfast.data.answers import closing_brace
from rbfast.grading.exact import exact_value
from rbfast.grading.notation import without_text_command
from rbfast.grading.numerals import parse_numeral


@dataclass(frozen=True)
class Value:
    """One value, and its name (`x` in `x = 2`). `equation` is the whole text if it had an equals sign."""

    text: str
    name: str = ""
    equation: str = ""
    named_only: bool = True  # left of the equals sign is only a name, so the value alone can be compared


@dataclass(frozen=True)
class Collection:
    """Several values. `brackets` is "()", "[]", "(]", "[)" or "{}", "" for a bare list, "u" for a union."""

    items: tuple[Form, ...]
    brackets: str
    name: str = ""


@dataclass(frozen=True)
class Alternatives:
    """A value written twice, as in `22/7 ≈ 3.14`."""

    items: tuple[Form, ...]


Form: TypeAlias = Value | Collection | Alternatives

_NAME = (
    r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\^\{-1\}(?=\())?'*|\\(?:overline|angle|triangle|vec|text)\s*\{?[A-Za-z' ]*\}?)"
)
_IDENTIFIER = re.compile(
    rf"{_NAME}(?:\([^()]*\))?|\|{_NAME}\||\\text\{{[^{{}}]*\}}|[A-Za-z][A-Za-z ,'*]*|\([a-zA-Z](?:,\s*[a-zA-Z])+\)"
)
_AND_OR = re.compile(r"(?:,\s*)?(?:\\text\{\s*(and|or)\s*\}|(?<![a-zA-Z\\])(and|or)(?![a-zA-Z]))\s*")
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?|f\(x\)")
_RELATION = re.compile(r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|<|>")
_MATRIX = re.compile(r"\\begin\{([pbvB]?matrix|array)\}(?:\{[lcr|]+\})?(.*)\\end\{\1\}", re.DOTALL)
_EQUALS = re.compile(r"(?<![<>!:\\])=(?!=)|\\approx(?![a-zA-Z])|\\equiv(?![a-zA-Z])|\\sim(?:eq)?(?![a-zA-Z])")
_REALS = re.compile(r"\\mathbb\s*\{?R\}?|(?:all|any)? ?reals?(?: numbers?)?|all real", re.IGNORECASE)
_NOTHING = re.compile(r"\\emptyset|\\\{\s*\\\}|no (?:real )?solutions?|none|the empty set|empty set", re.IGNORECASE)
_MOST_NESTED = 20  # brackets within brackets
_EXCLUDED = re.compile(
    r"(?P<name>[a-zA-Z]) *\\ne(?![a-zA-Z]) *(?P<value>[^,;]+)"
    r"|\\mathbb\{?R\}? *(?:\\setminus|\\backslash|-) *\\\{(?P<values>[^{}]+)\\\}"
)
_COMMA = re.compile("[,;]")
_OPEN, _CLOSE = "([{", ")]}"


def parse_form(text: str) -> Form:
    """The form of an answer that `normalize` returned."""
    text = text.strip()
    if bracket_depth(text) > _MOST_NESTED:
        return Value(text)
    words = without_text_command(text).strip()
    if _REALS.fullmatch(words):
        return Collection((Value(r"-\infty"), Value(r"\infty")), "()")
    if _NOTHING.fullmatch(words):
        return Collection((), "{}")
    if words[:1].isalpha() and (number := parse_numeral(words)) is not None:
        return Value(number)
    if (excluded := _parse_exclusion(text)) is not None:
        return excluded
    if match := re.match(rf"({_NAME}|\([^()]*\))\s*\\in(?![a-zA-Z])\s*", text):
        return parse_form(text[match.end() :])
    return _parse_union(text) or _parse_list(text) or _parse_bracketed(text) or _parse_single(text)


def _parse_exclusion(text: str) -> Collection | None:
    r"""`x \ne 3` and `\mathbb{R} \setminus \{3\}` as a union of intervals."""
    match = _EXCLUDED.fullmatch(text)
    if match is None:
        return None
    ends = [part.strip() for part in (match["values"] or match["value"]).split(",")]
    values = [exact_value(end) for end in ends]
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(ends):
        return None
    ends = [end for _, end in sorted(zip(numbers, ends, strict=True))]
    edges = [r"-\infty", *ends, r"\infty"]
    pieces = tuple(Collection((Value(low), Value(high)), "()") for low, high in pairwise(edges))
    return Collection(pieces, "u", match["name"] or "")


def bracket_depth(text: str) -> int:
    """The greatest nesting depth of brackets."""
    return max(accumulate((letter in _OPEN) - (letter in _CLOSE) for letter in text), default=0)


def _parse_union(text: str) -> Form | None:
    parts = split_outside_brackets(text, re.compile(r"\\cup(?![a-zA-Z])"))
    return Collection(tuple(map(parse_form, parts)), "u") if len(parts) > 1 else None


def _parse_list(text: str) -> Form | None:
    joined = _AND_OR.sub(lambda match: "; " if (match[1] or match[2]) == "and" else " \x02 ", text)
    parts = [part for part in split_outside_brackets(joined, re.compile(r"[,;\x02\n]|\\\\(?!\w)")) if part.strip()]
    if len(parts) < 2:
        return None
    return _collect([parse_form(part) for part in parts], disjoint="\x02" in joined)


def _collect(forms: list[Form], *, disjoint: bool) -> Form:
    """A list without brackets. The two sides of one interval become the interval, several intervals a union."""
    intervals = [form for form in forms if isinstance(form, Collection) and form.name]
    if len(intervals) == len(forms):
        return (None if disjoint else _merge_half_lines(intervals)) or Collection(
            tuple(intervals), "u", intervals[0].name
        )
    name = ""
    items: list[Form] = []
    for form in forms:
        flat = form.items if isinstance(form, Collection) and form.brackets == "" else (form,)
        for item in flat:
            if isinstance(item, Value):  # in `x = 2, 3` the name applies to both
                name = item.name or name
                item = replace(item, name=name) if not item.equation and name else item
            items.append(item)
    return Collection(tuple(items), "")


def _merge_half_lines(intervals: list[Collection]) -> Collection | None:
    if len(intervals) != 2:
        return None
    low = next((form for form in intervals if form.items[1] == Value(r"\infty")), None)
    high = next((form for form in intervals if form.items[0] == Value(r"-\infty")), None)
    if low is None or high is None or low.name != high.name:
        return None
    (start, _), (_, end) = low.items, high.items
    ends = [exact_value(item.text) if isinstance(item, Value) else None for item in (start, end)]
    if ends[0] is not None and ends[1] is not None and ends[0] >= ends[1]:
        return None
    return Collection((start, end), low.brackets[0] + high.brackets[1], low.name)


def _parse_bracketed(text: str) -> Form | None:
    if match := _MATRIX.fullmatch(text):
        cells = [cell.strip() for cell in re.split(r"\\\\|&", match[2])]
        if "&" in match[2] and "\\\\" in match[2].strip().rstrip("\\"):
            return None  # more than a vector
        return Collection(tuple(map(parse_form, cells)), "()") if len(cells) > 1 else None
    for opening, end, brackets in ((r"\{", r"\}", "{}"), (r"\langle", r"\rangle", "()")):
        if text.startswith(opening) and text.endswith(end):
            return _parse_inside(text[len(opening) : -len(end)], brackets)
    if (
        text.startswith("{")
        and closing_brace(text, 0) == len(text) - 1
        and len(split_outside_brackets(text[1:-1], _COMMA)) > 1
    ):
        return _parse_inside(text[1:-1], "{}")  # a set whose braces lost their backslash
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]" and matching_bracket(text, 0) == len(text) - 1:
        return _parse_inside(text[1:-1], text[0] + text[-1])
    return None


def _parse_inside(text: str, brackets: str) -> Form | None:
    if brackets == "{}" and (match := re.match(rf"\s*{_NAME}(?:\s*\\in\s*\\mathbb\{{R\}})?\s*[:|]\s*", text)):
        return parse_form(text[match.end() :])
    parts = split_outside_brackets(text, _COMMA)
    if len(parts) < 2:
        inner = parse_form(text)
        if brackets == "()" and not isinstance(inner, Value):
            return inner
        return Collection((inner,), brackets) if brackets in ("{}", "[]") else None
    forms = tuple(map(parse_form, parts))
    if brackets != "{}":
        return Collection(forms, brackets)
    listed = _collect(list(forms), disjoint=False)
    return replace(listed, brackets="{}") if isinstance(listed, Collection) else listed


def _parse_single(text: str) -> Form:
    if (interval := _parse_interval(text)) is not None:
        return interval
    parts = split_outside_brackets(text, _EQUALS)
    if len(parts) > 1 and all(part.strip() for part in parts[1:]):
        return _parse_equation(text, [part.strip() for part in parts])
    if r"\pm" in text or r"\mp" in text:
        signs = (("+", "-"), ("-", "+"))
        return Collection(tuple(Value(_with_signs(text, plus, minus)) for plus, minus in signs), "")
    return Value(_strip_brackets(text))


def _with_signs(text: str, plus: str, minus: str) -> str:
    text = re.sub(r"\\pm(?![a-zA-Z])\s*", plus, text)
    return re.sub(r"\\mp(?![a-zA-Z])\s*", minus, text).strip().removeprefix("+")


def _strip_brackets(text: str) -> str:
    while text.startswith("(") and text.endswith(")") and matching_bracket(text, 0) == len(text) - 1 and len(text) > 3:
        text = text[1:-1].strip()
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    return text.removeprefix("+").strip()


def _parse_equation(text: str, parts: list[str]) -> Form:
    r"""The value of `x = .. = value`; either side of `value \approx 3.14`."""
    if _IDENTIFIER.fullmatch(parts[-1]) and exact_value(parts[0]) is not None and len(parts) == 2:
        parts = parts[::-1]  # 5 = x
    left = parts[0]
    name = left if _IDENTIFIER.fullmatch(left) else ""
    name_recurs = len(parts) > 2 and any(
        re.search(rf"(?<![a-zA-Z]){re.escape(name or '=')}(?![a-zA-Z])", p) for p in parts[1:]
    )
    is_answer = not name_recurs and (bool(name) or _is_answer_equation(left))
    equation = "" if r"\approx" in text or (len(parts) > 2 and is_answer) else text
    approximated = split_outside_brackets(text, re.compile(r"\\approx(?![a-zA-Z])"))
    values = [parts[-1]]
    if len(approximated) > 1 and (before := split_outside_brackets(approximated[0], _EQUALS)[-1].strip()) != name:
        values.append(before)
    if not is_answer:
        return Value(text, equation=text, named_only=False)
    return _named([parse_form(value) for value in values], name, equation)


def _named(values: list[Form], name: str, equation: str) -> Form:
    forms: list[Form] = []
    for form in values:
        if isinstance(form, Value):
            forms.append(replace(form, name=name, equation=equation, named_only=bool(name)))
        elif isinstance(form, Collection) and form.brackets == "" and name:
            forms.append(
                replace(form, items=tuple(replace(i, name=name) if isinstance(i, Value) else i for i in form.items))
            )
        else:
            forms.append(form)
    return forms[0] if len(forms) == 1 else Alternatives(tuple(forms))


def _is_answer_equation(left: str) -> bool:
    """Whether the right side of an equation is an answer: the left is a calculation or has several letters (`x+y = 5`).

    `2x = 5` and `x^2 = 4` are only steps towards `x`.
    """
    letters = set(re.findall(r"[a-zA-Z]", re.sub(r"\\text\{[^{}]*\}|\\[a-zA-Z]+", " ", left))) - {"i"}
    return (
        len(letters) != 1
        or re.match(r"\s*\\(?:sin|cos|tan|log|ln|angle|overline|det|sec|csc|cot|lfloor|lceil)", left) is not None
    )


def _parse_interval(text: str) -> Collection | None:
    parts = [part.strip() for part in split_outside_brackets(text, _RELATION)]
    signs = _RELATION.findall(text)
    if len(parts) != len(signs) + 1 or len(signs) not in (1, 2):
        return None
    if len(signs) == 1:
        left, right = parts
        if _VARIABLE.fullmatch(left) and not _VARIABLE.fullmatch(right.lstrip("-")):
            return _half_line(left, signs[0], right)
        if _VARIABLE.fullmatch(right) and not _VARIABLE.fullmatch(left.lstrip("-")):
            return _half_line(right, _flip(signs[0]), left)
        return None
    low, name, high = parts
    if signs[0] in (">", r"\ge"):
        low, high, signs = high, low, [_flip(sign) for sign in reversed(signs)]
    if not _VARIABLE.fullmatch(name) or not all(sign in ("<", r"\le") for sign in signs):
        return None
    brackets = ("[" if signs[0] == r"\le" else "(") + ("]" if signs[1] == r"\le" else ")")
    return Collection((parse_form(low), parse_form(high)), brackets, name)


def _flip(sign: str) -> str:
    return {">": "<", r"\ge": r"\le", "<": ">", r"\le": r"\ge"}[sign]


def _half_line(name: str, sign: str, end: str) -> Collection:
    if sign in ("<", r"\le"):
        return Collection((Value(r"-\infty"), parse_form(end)), "(]" if sign == r"\le" else "()", name)
    return Collection((parse_form(end), Value(r"\infty")), "[)" if sign == r"\ge" else "()", name)


def matching_bracket(text: str, start: int) -> int | None:
    """The index where the bracket at `start` closes, or None. Round and square brackets may close each other, as in
    half-open intervals."""
    depth, position = 0, start
    while position < len(text):
        if text[position] == "\\":
            if text[position + 1 : position + 2] in ("{", "}"):
                depth += 1 if text[position + 1] == "{" else -1
            position += 2
            continue
        depth += (text[position] in _OPEN) - (text[position] in _CLOSE)
        if depth == 0:
            return position
        position += 1
    return None


def split_outside_brackets(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at the separators outside all brackets; one part, the whole text, if a bracket is not closed."""
    parts, last, position = [], 0, 0
    while position < len(text):
        if match := separator.match(text, position):
            parts.append(text[last:position])
            last = position = match.end()
            continue
        opens = text[position] in _OPEN or text.startswith(r"\{", position) or text.startswith(r"\langle", position)
        if opens or text.startswith(r"\begin", position):
            end = _end_of_group(text, position)
            if end is None:
                return [text]
            position = end
        position += 2 if text.startswith("\\", position) and not text.startswith("\\\\", position) else 1
    return [*parts, text[last:]]


def _end_of_group(text: str, position: int) -> int | None:
    if text[position] == "{":
        return closing_brace(text, position)
    for opening, end in ((r"\langle", r"\rangle"), (r"\begin", r"\end")):
        if text.startswith(opening, position):
            closed = text.find(end, position)
            return None if closed < 0 else closed + len(end) - 1
    return matching_bracket(text, position)
