"""Numbers in words, and words that only look like a number."""

import pytest

from rbfast.grading.numerals import parse_numeral, replace_leading_numeral


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("Twelve", "12"),
        ("forty-five thousand and six", "45006"),
        ("two million three hundred thousand", "2300000"),
        ("twelve hundred", "1200"),
        ("two dozen", "24"),
        ("a hundred", "100"),
        ("a quarter", r"\frac{1}{4}"),
        ("minus three and three quarters", r"-\frac{15}{4}"),
    ],
)
def test_number_words_are_parsed(words, number):
    assert parse_numeral(words) == number


@pytest.mark.parametrize(
    "words",
    [
        "",
        "third",
        "hundred",
        "five six",
        "twenty zero",
        "twenty eleven",
        "one and",
        "hundred two",
        "two of them",
        "minus",
        "a",
    ],
)
def test_other_words_are_not_numbers(words):
    assert parse_numeral(words) is None


def test_leading_numbers_become_digits():
    assert replace_leading_numeral("seven red apples") == "7 red apples"
    assert replace_leading_numeral("two thirds cups") == r"\frac{2}{3} cups"
    assert replace_leading_numeral("apples, seven") is None
    assert replace_leading_numeral("7 apples") is None
