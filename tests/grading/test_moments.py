"""Dates, times of day, durations and ratios, and texts that are none of these."""

import pytest

from rbfast.grading.moments import is_moment, same_moment


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("March 5, 2024", "5th of March", True),
        ("2024-03-05", "Tuesday, March 5, 2024", True),
        ("05/03/2024", "5/3/2024", True),
        ("05/03/2024", "03/05/2024", False),
        ("05/03/2024", "March 5, 2024", False),
        ("March 5, 2024", "March 5, 2023", False),
        ("March 5", "5", False),
        (r"3:45 \text{ p.m.}", "15:45", True),
        ("12:30 AM", "0:30", True),
        ("12:00 AM", "12:00 PM", False),
        ("3:45", "1:15", False),
        ("2:3", "10:15", True),
        ("1:2:3", "2 : 4 : 6", True),
        ("1:2:3", "1:2", False),
        ("3:4", r"\frac{3}{4}", None),
        ("2 hours 30 minutes", "150 minutes", True),
        ("2 hours and 30 minutes", "2.5 hours", True),
        ("2h 30min", r"2\text{ hours }30\text{ min}", True),
        ("1 day 1 hour 1 s", "90001 seconds", True),
        ("2 hours 30 minutes", "151 minutes", False),
        ("2 hours 30 minutes", "2 hours", False),
        ("2 hours 30 minutes", "150", None),
        ("2 hours 30 minutes", "2.5", None),
        ("30 minutes 2 hours", "150 minutes", None),
        ("2 hours, 30 minutes", "150 minutes", None),
        ("2 hours 30 m", "150 minutes", None),
        ("2 hours", "120 minutes", None),
        ("13 PM", "13", None),
        ("2 to 1 odds", "2", None),
    ],
)
def test_same_moment(one, other, same):
    assert same_moment(one, other) is same
    assert same_moment(other, one) is same


def test_is_moment():
    assert [is_moment(text) for text in ("3:4", "noon", "5", "3/4", "May", "5 min")] == [True, *[False] * 5]
