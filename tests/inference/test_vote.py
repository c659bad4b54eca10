"""Votes: the majority, and when it can no longer change."""

from hypothesis import given
from hypothesis import strategies as st

from rbfast.inference.solver import Solution, vote_of
from rbfast.inference.vote import decided, majority


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=8), st.integers(0, 6), st.data())
def test_decided_vote_cannot_change(answers, running, data):
    if decided(answers, running):
        more = data.draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=running, max_size=running))
        assert majority([*answers, *more]).answer == majority(answers).answer


def test_majority():
    assert majority(["a", None, "b", "b"]) == ("b", 2, 3)
    assert majority(["a", "b"]).answer == "a"  # the first of equals
    assert majority([None]) == (None, 0, 0)
    assert decided(["a", "a", "a"], 2) and not decided(["a", "a"], 2) and not decided([None, None], 0)


def test_sample_truncated_before_its_answer_has_no_vote():
    def sample(text, truncated):
        return Solution(text, "", text, 9, truncated)

    cut = sample("Each cow has 4 legs, so 3 cows have 12", True)
    assert vote_of([cut, cut, sample("<answer>16</answer>", False)]) == ("16", 1, 1)
    assert vote_of([sample("<answer>16</answer>\nTo check this", True)]).answer == "16"
