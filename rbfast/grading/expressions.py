r"""Whether two expressions have the same value: parsed by math-verify, compared numerically at a few points.

Import this only in the grading process: an expression may be a tower of powers, and evaluating it may never end.

math-verify's own comparison rounds to six decimals, reads `101_2` as 101 and `2 3` as 5, and drops a prime. So we use
only its parser, on texts that it reads correctly. Two values that differ by a billionth are different.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from rbfast.grading.forms import bracket_depth

_DIGITS = 30  # working precision
_EQUAL = sympy.Float("1e-20", _DIGITS)  # relative tolerance
_POINTS = (sympy.Rational(37, 29), sympy.Rational(-41, 53), sympy.Rational(113, 47), sympy.Rational(-151, 61))
_LEAST_DIGITS = 6
_MOST_DIGITS = 5  # of an exponent
_MOST_NESTED = 30
_TOWER = re.compile(r"\d\s*\^\s*\{?\s*(\d+)\s*\^\s*\{?\s*(\d+)(\s*\^\s*\{?\s*\d)?")
_AS_IT_STANDS = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)
_CONFIG = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=_AS_IT_STANDS)]
# What the parser misreads: numbers side by side, text, primes, a base, a percentage, double factorials.
_MISREAD = re.compile(r"\d\s+\d|\\text|'|\d_|%|!!|(?<![a-zA-Z\\])[a-zA-Z]{5,}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\}")
_CONSTANTS = {"i": sympy.I, "e": sympy.E}
_DECIMAL = re.compile(r"-?(\d*)\.(\d+)")
logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns about every text that it cannot parse


def same_value(expected: str, statement: str) -> bool:
    """Whether both can be parsed and have the same value; for equations, whether they are equivalent."""
    left, right = _parse(expected), _parse(statement)
    if left is None or right is None:
        return False
    if isinstance(left, sympy.core.relational.Relational) and type(left) is type(right):
        return _same_relation(left, right)
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return (
            _same_expression(left, right) or _is_rounding(expected, left, right) or _is_rounding(statement, right, left)
        )
    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        return left.shape == right.shape and all(map(_same_expression, left.flat(), right.flat()))
    if isinstance(left, sympy.Expr | sympy.MatrixBase) or isinstance(right, sympy.Expr | sympy.MatrixBase):
        return False
    return bool(verify(left, right, timeout_seconds=None))


@functools.lru_cache(maxsize=512)
def _parse(text: str) -> Any:
    text = text.strip().strip("$").replace("**", "^")
    if _MISREAD.search(_ENVIRONMENT.sub(" ", text)) or _is_too_costly(text):
        return None
    parsed = parse(f"${text}$", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
    if not parsed:
        return None
    expression = parsed[0]
    if isinstance(expression, sympy.MatrixExpr):
        return expression.doit()
    if not isinstance(expression, sympy.Expr):
        return expression
    exact = expression.xreplace({number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)})
    return exact.subs({symbol: _CONSTANTS[symbol.name] for symbol in exact.free_symbols if symbol.name in _CONSTANTS})


def _is_too_costly(text: str) -> bool:
    """Whether parsing would take minutes: a tower of powers, which the parser evaluates, or deeply nested brackets."""
    return bracket_depth(text) > _MOST_NESTED or any(
        higher or min(int(power), 10**9) * math.log10(max(int(base), 1)) > _MOST_DIGITS
        for base, power, higher in _TOWER.findall(text)
    )


def _is_rounding(text: str, decimal: Any, other: Any) -> bool:
    """Whether a text is a decimal of enough digits: the other number, rounded or truncated."""
    match = _DECIMAL.fullmatch(text.strip("$ "))
    if match is None or len((match[1] + match[2]).lstrip("0")) < _LEAST_DIGITS:
        return False
    value = _evaluate(other)
    if value is None or not value.is_real or value * decimal <= 0:
        return False
    left_out = (abs(value) - abs(decimal)) * 10 ** len(match[2])
    return bool(-0.5 <= left_out < 1)


def _same_expression(left: Any, right: Any) -> bool:
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if not symbols:
        return _are_close(_evaluate(left), _evaluate(right))
    return all(_are_close(_evaluate(left.subs(point)), _evaluate(right.subs(point))) for point in _test_points(symbols))


def _test_points(symbols: list[Any]) -> list[dict[Any, Any]]:
    """Test points: distinct values for the symbols, positive and negative."""
    return [
        {symbol: _POINTS[(start + i) % len(_POINTS)] + sympy.Rational(i, 7) for i, symbol in enumerate(symbols)}
        for start in range(len(_POINTS))
    ]


def _evaluate(expression: Any) -> Any:
    value = sympy.N(expression.doit(), _DIGITS)
    return value if value.is_number else None


def _are_close(left: Any, right: Any) -> bool:
    if left is None or right is None:
        return False
    if not (left.is_finite and right.is_finite):
        return bool(left == right) and left is not sympy.nan
    return bool(abs(left - right) <= _EQUAL * max(abs(left), abs(right)))


def _same_relation(left: Any, right: Any) -> bool:
    """Whether left side minus right side is the same up to a constant factor, positive for inequalities."""
    first, second = left.lhs - left.rhs, right.lhs - right.rhs
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    if not symbols or first.free_symbols != second.free_symbols:
        return False
    ratios = []
    for point in _test_points(symbols):
        above, below = _evaluate(first.subs(point)), _evaluate(second.subs(point))
        if not above or not below:
            return False
        ratios.append(above / below)
    signed = isinstance(left, sympy.Eq) or bool(ratios[0] > 0)
    return signed and all(_are_close(ratio, ratios[0]) for ratio in ratios)
