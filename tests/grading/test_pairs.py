"""Hard pairs through the doors that answers come in by: a file of problems, a teacher's reply, a row with a reference."""

import json

import pytest
from answer_pairs import RIGHT, WRONG

pytest.importorskip("math_verify")

from rbfast.grading.grade import grade
from rbfast.grading.tasks import load_problems


def completion(written: str) -> str:
    marked = any(mark in written for mark in (r"\boxed", "<answer>", "####")) or "is" in written.split()
    return written if marked else rf"Some steps, then \boxed{{{written}}}"


def test_no_wrong_answer_is_right_and_no_right_one_wrong(tmp_path):
    pairs = [(*pair, 1.0) for pair in RIGHT] + [(*pair, 0.0) for pair in WRONG]
    path = tmp_path / "pairs.jsonl"
    rows = [{"problem": f"p{i}", "answer": answer} for i, (answer, _, _) in enumerate(pairs)]
    path.write_text("\n".join(map(json.dumps, rows)))
    problems = load_problems(str(path), None, seed=0)
    scores = [grade(problem, completion(written)) for problem, (_, written, _) in zip(problems, pairs, strict=True)]
    missed = [(answer, written, score) for (answer, written, right), score in zip(pairs, scores, strict=True) if score != right]
    assert missed == []
