"""The demo's families of problems: verified traces, disjoint splits, correct arithmetic."""

import re

import pytest
from tiny import tiny_tokenizer

from rbfast.data.encoding import encode
from rbfast.data.spans import STRATEGIC
from rbfast.demo.worked_families import FAMILIES, make_traces, split
from rbfast.grading.grade import grade
from rbfast.grading.tasks import load_problems

pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("family", FAMILIES)
def test_traces_are_verified_distinct_and_deterministic(family):
    traces = make_traces(family, 40, seed=0)
    assert len({trace.problem for trace in traces}) == len(traces) == 40
    assert make_traces(family, 40, seed=0) == traces
    assert {trace.problem for trace in make_traces(family, 40, seed=1)} != {trace.problem for trace in traces}
    keys = {problem.question: problem for problem in load_problems(family, 80, seed=0)}
    for trace in traces:
        assert trace.plan and trace.verified and trace.source == f"reasoning-gym:{family}"
        assert grade(keys[trace.problem], trace.completion()) == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_held_out_problems_are_disjoint(family):
    traces, problems = split(family, train=60, held_out=60, seed=0)
    assert not {trace.problem for trace in traces} & {problem.question for problem in problems}


def test_excluded_problems_are_replaced():
    # A generator with few questions: short sums of single digits recur, so some drawn questions are excluded.
    drawn = make_traces("chain_sum", 60, seed=0)
    excluded = {trace.problem for trace in drawn[10:20]}
    kept = make_traces("chain_sum", 60, seed=0, exclude=excluded)
    assert kept[:10] == drawn[:10] and kept[10:50] == drawn[20:60] and len(kept) == 60


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_of_arithmetic_is_right(family):
    checked = 0
    for trace in make_traces(family, 40, seed=3):
        # `38+40=78, +7=85` continues from 78.
        whole = re.sub(r"(?<==)(-?\d+), (?=[-+]\d+=)", r"\1, \1", trace.reasoning)
        for clause in re.split(r", |: |\n", re.sub(r"\b(?!x\b)[A-Za-z]+\b(?![=*]| =)", "", whole)):
            sides = [side for side in clause.split("=") if re.fullmatch(r"[-+x/() \d]*\d[-+x/() \d]*", side)]
            if len(sides) < 2:
                continue
            values = {eval(side.replace("x", "*")) for side in sides}  # digits, operators and brackets only
            assert len(values) == 1, trace.reasoning
            checked += 1
    arithmetic = {"chain_sum", "leg_counting", "simple_geometry"}
    assert checked > 40 or family not in arithmetic


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_is_labelled_strategic(family):
    trace = make_traces(family, 1, seed=0)[0]
    example = encode(trace, tiny_tokenizer())
    strategic = example.labels[example.roles == STRATEGIC]
    assert trace.plan in tiny_tokenizer().decode(strategic.tolist())


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"family must be one of aiw, .* got 'chess'"):
        make_traces("chess", 1, seed=0)
