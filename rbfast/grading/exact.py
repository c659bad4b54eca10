r"""Exact rational arithmetic on expressions of numbers: `\frac{1}{2}+3`, `3 1/2`, `2^{10}`, `6!`, `0.\overline{3}`.

```python
exact_value(r"3\frac{1}{2}")       # Fraction(7, 2)
exact_value(r"5\sqrt{3}")          # None: not rational
```

Unlike floats, this never takes two tiny numbers for equal. Unlike LaTeX parsers, it reads `3 1/2` as a mixed number.
"""

from __future__ import annotations

import functools
import math
import re
from fractions import Fraction

_MOST_BITS = 10_000  # of a number; Python refuses to print much longer ones
_TOKEN = re.compile(
    r"\s*(?:(?P<repeating>\d*\.\d*\\overline\{\d+\})|(?P<number>\d+\.?\d*(?:[eE][-+]?\d{1,4})?|\.\d+(?:[eE][-+]?\d{1,4})?)"
    r"|(?P<frac>\\frac\{)|(?P<times>\\cdot|\\times)|(?P<sign>[-+*/^!(){}]))"
)
_MIXED = re.compile(r"\s*(\d+)(?:\s*\\frac\{(\d+)\}\{(\d+)\}| +(\d+) ?/ ?(\d+)(?!\s*[\d.^!/]))(?![\d.])")


class _NotRational(Exception):
    pass


@functools.lru_cache(maxsize=4096)
def exact_value(text: str) -> Fraction | None:
    """The value of an expression; None if it is not rational arithmetic on numbers, or too large."""
    if len(text) > 400 or not any(letter.isdigit() for letter in text):
        return None
    try:
        reader = _Parser(text)
        value = reader.sum()
        return None if text[reader.at :].strip() else value
    except (_NotRational, ZeroDivisionError, RecursionError):
        return None


class _Parser:
    """A recursive-descent parser: sum, product, power, factor."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def take(self, *wanted: str) -> str | None:
        match = _TOKEN.match(self.text, self.at)
        if match is None or match[0].strip() not in wanted:
            return None
        self.at = match.end()
        return match[0].strip()

    def expect(self, wanted: str) -> None:
        if self.take(wanted) is None:
            raise _NotRational

    def sum(self) -> Fraction:
        sign = self.take("+", "-")
        value = self.product()
        value = -value if sign == "-" else value
        while operator := self.take("+", "-"):
            following = self.product()
            value += following if operator == "+" else -following
        return value

    def product(self) -> Fraction:
        value = self.power()
        while True:
            if operator := self.take("*", "/", r"\cdot", r"\times"):
                sign = -1 if self.take("-") else 1
                following = sign * self.power()
                value = _bounded(value / following if operator == "/" else value * following)
            elif self.text[self.at :].lstrip().startswith("("):
                value = _bounded(value * self.power())
            else:
                return value

    def power(self) -> Fraction:
        base = self.factor()
        if self.take("!"):
            base = _factorial(base)
        if not self.take("^"):
            return base
        if self.take("{"):
            exponent = self.sum()
            self.expect("}")
        else:
            sign = -1 if self.take("-") else 1
            exponent = sign * self.power()
        return _power(base, exponent)

    def factor(self) -> Fraction:
        if match := _MIXED.match(self.text, self.at):
            whole, above, below = int(match[1]), int(match[2] or match[4]), int(match[3] or match[5])
            if not 0 < above < below:
                raise _NotRational
            self.at = match.end()
            return Fraction(whole * below + above, below)
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            raise _NotRational
        self.at = match.end()
        kind, token = match.lastgroup, match[0].strip()
        if kind == "number":
            return _number(token)
        if kind == "repeating":
            return _repeating(token)
        if kind == "frac":
            numerator = self.sum()
            self.expect("}")
            self.expect("{")
            denominator = self.sum()
            self.expect("}")
            return numerator / denominator
        if token in "({":
            value = self.sum()
            self.expect(")" if token == "(" else "}")
            return value
        raise _NotRational


def _number(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    return _bounded(Fraction(mantissa + ("0" if mantissa.endswith(".") else "")) * Fraction(10) ** int(exponent or 0))


def _repeating(text: str) -> Fraction:
    fixed, _, period = text.rstrip("}").partition(r"\overline{")
    places = len(fixed.partition(".")[2])
    start = Fraction(fixed + "0" if fixed.endswith(".") else fixed) if fixed != "." else Fraction(0)
    return start + Fraction(int(period), 10**places * (10 ** len(period) - 1))


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= 1000:
        raise _NotRational
    return Fraction(math.factorial(int(value)))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise _NotRational
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent) > _MOST_BITS:
        raise _NotRational
    return Fraction(base ** int(exponent))


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > _MOST_BITS:
        raise _NotRational
    return value
