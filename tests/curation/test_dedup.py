"""Which problems count as duplicates, and which copy is kept."""

import time

import numpy as np
import pytest

from rbfast.curation import text
from rbfast.curation.dedup import SIGNATURE, _components, agreement_key, duplicates, mix_history


def keepers(items: list[tuple[str, str]], preference: list[float] | None = None) -> list[int]:
    """The index of the copy that is kept for each (problem, answer) pair, from columns computed as in curation."""
    packed = text.pack(problem for problem, _ in items)
    rows, _ = text.shingles(packed, 5)
    keys = np.array([agreement_key(*item) for item in items], dtype=np.uint64)
    likes = np.array(preference or [0.0] * len(items))
    return duplicates(text.fingerprints(packed), text.minhash(rows, SIGNATURE), keys, likes).tolist()


LONG = (
    "A farmer keeps 12 cows and 31 hens on a field by the river, and every morning before the sun is up he counts all "
    "the legs he can see from the gate. On market days he sells a few of the hens, but today is no market day, and it "
    "rains so hard that none of the animals would leave the dry barn where they sleep at night if he let them. {}"
)


def test_notations_of_one_problem_are_duplicates_whatever_the_answer() -> None:
    assert keepers([("Find $\\frac12+x$.", "1"), ("find \\(\\dfrac{1}{2} + x\\)", "2"), ("Find $x$.", "1")]) == [
        0,
        0,
        2,
    ]


def test_preferred_duplicate_is_kept_and_the_first_of_equals() -> None:
    items = [("One plus one?", "2")] * 3 + [("Two?", "2")]
    assert keepers(items, [0.1, 0.5, 0.5, 0.0]) == [1, 1, 1, 3]


def test_reworded_problem_is_a_duplicate_if_the_answers_agree() -> None:
    texts = [LONG.format("How many legs does he count?"), LONG.format("How many legs will he count?")]
    assert keepers([(texts[0], "110"), (texts[1], "110"), (texts[1], "108")]) == [0, 0, 0]  # 2 is a copy of 1
    assert keepers([(texts[0], "110"), (texts[1], "108")]) == [0, 1]
    assert keepers([(texts[0], "110"), (texts[0].replace("a few", "the few"), "110")]) == [0, 0]


@pytest.mark.parametrize(("old", "new"), [("12 cows", "14 cows"), ("by the river", "by river b"), ("hens", "pigs")])
def test_changed_numbers_or_words_make_a_different_problem(old: str, new: str) -> None:
    problem = LONG.format("How many legs does he count?")
    assert keepers([(problem, "110"), (problem.replace(old, new), "110")]) == [0, 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Calculate (8 - 3) * 2", "Calculate 8 - 3 * 2"),
        ("Solve $|x-3|=5$.", "Solve $x-3=5$."),
        ("Find $f'(2)$.", "Find $f(2)$."),
        ("Find $5!$.", "Find $5$."),
        (LONG.format("How many is $|x-3|$?"), LONG.format("How many is $x-3$?")),
        (LONG.format("How many is 9!?"), LONG.format("How many is 9?")),
        (LONG.format("How many is 9%?"), LONG.format("How many is 9?")),
        (LONG.format("How many is $9 * 4$?"), LONG.format("How many is $9 - 4$?")),
        (LONG.format("Is $\\lnot p$ true?"), LONG.format("Is $p$ true?")),
    ],
)
def test_changed_signs_make_a_different_problem(one: str, other: str) -> None:
    assert keepers([(one, "4"), (other, "4")]) == [0, 1]


def test_problems_without_words_have_no_duplicates() -> None:
    assert keepers([("?", "1"), ("!", "1"), ("", "1")]) == [0, 1, 2]
    assert keepers([]) == []
    assert mix_history(np.array([5, 0], dtype=np.uint64), np.array([0, 7], dtype=np.uint64)).tolist() == [0, 7]


def test_long_chains_are_joined_in_a_few_rounds() -> None:
    items = np.random.default_rng(0).permutation(100_000)
    links = np.stack([items[:-1], items[1:]], axis=1)
    start = time.process_time()
    groups = _components(len(items), np.delete(links, 49_999, axis=0))
    assert time.process_time() - start < 5  # one link a round would take minutes
    for chain in (items[:50_000], items[50_000:]):
        assert (groups[chain] == chain.min()).all()


def test_chain_of_duplicates_keeps_one_item() -> None:
    """b is a rewording of a, and c a copy of b: all three are duplicates, though a and c do not match directly."""
    texts = [LONG.format("How many legs does he count?"), LONG.format("How many legs will he count?")]
    assert keepers([(texts[0], "110"), (texts[1], "110"), (texts[1], "9")], [0.0, 0.0, 1.0]) == [2, 2, 2]


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("{1, 2}", "\\{1, 2\\}", True),
        ("$5", "\\$5", True),
        ("x_1", "x1", True),
        ("{1, 2}", "(1, 2)", False),
        ("~p", "p", False),
    ],
)
def test_answers_agree_if_they_differ_only_in_notation(one: str, other: str, is_same: bool) -> None:
    assert (agreement_key("What is it?", one) == agreement_key("What is it?", other)) is is_same
