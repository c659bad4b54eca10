"""Hard answer pairs, judged in every use: problems of a file, replies of a teacher, rows of a pool and votes."""

import json
import random

import pytest
from answer_pairs import RIGHT, WRONG

pytest.importorskip("math_verify")

from rbfast.curation.assess import verify_answer
from rbfast.data.answers import extract_answer
from rbfast.data.trace import Trace
from rbfast.grading.grade import Problem, answer_key, grade
from rbfast.grading.tasks import load_problems
from rbfast.inference.vote import majority
from rbfast.teacher.solutions import read_questions, trace_of

PAIRS = [(*pair, True) for pair in RIGHT] + [(*pair, False) for pair in WRONG]
NOT_BARE = (r"\boxed", "<answer>", "9^{9", ":\n")
BARE = [pair for pair in PAIRS if pair[1] and not any(mark in pair[1] for mark in NOT_BARE)]


def completion(written: str) -> str:
    marked = any(mark in written for mark in (r"\boxed", "<answer>")) or "is" in written.split()
    return written if marked else rf"Some steps, then \boxed{{{written}}}"


def write_rows(path, pairs) -> str:
    rows = [{"problem": f"p{i}", "answer": answer} for i, (answer, _, _) in enumerate(pairs)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def misjudged(pairs, verdicts) -> list[tuple[str, str, bool]]:
    return [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not pair[2]]


@pytest.mark.slow
def test_completions_for_a_file_of_problems_are_graded(tmp_path):
    problems = load_problems(write_rows(tmp_path / "pairs.jsonl", PAIRS), None, seed=0)
    verdicts = [grade(problem, completion(pair[1])) == 1.0 for problem, pair in zip(problems, PAIRS, strict=True)]
    assert misjudged(PAIRS, verdicts) == []


def test_replies_of_a_teacher_are_verified(tmp_path):
    questions = read_questions(write_rows(tmp_path / "pairs.jsonl", BARE))
    replies = [
        {"finish_reason": "stop", "text": f"Steps.\n<answer>{written}</answer>", "thinking": "", "key": "k"}
        for _, written, _ in BARE
    ]
    verdicts = [trace_of(q, reply, "teacher").verified for q, reply in zip(questions, replies, strict=True)]
    assert misjudged(BARE, verdicts) == []


def test_rows_are_verified_by_their_reference():
    traces = [Trace(problem="p", reasoning="Some steps.", answer=written) for _, written, _ in BARE]
    verdicts = [verify_answer(trace, {"reference": pair[0]}) for trace, pair in zip(traces, BARE, strict=True)]
    assert misjudged(BARE, verdicts) == []


@pytest.mark.parametrize(
    ("answers", "winner", "votes"),
    [
        ([r"\boxed{14}", r"\boxed{16}", r"\boxed{14}", "<answer>16 legs</answer>", "So it has $16$ legs"], "16", 3),
        ([r"\boxed{1}", r"\boxed{\frac{1}{\sqrt{3}}}", r"\boxed{\frac{\sqrt{3}}{3}}"], r"\frac{1}{\sqrt{3}}", 2),
        ([r"\boxed{x=2, x=3}", r"\boxed{3, 2}", r"\boxed{(3, 2)}"], "x=2, x=3", 2),
        ([r"\boxed{0.5}", r"\boxed{\frac12}", "Nothing to see."], "0.5", 2),
        ([r"\boxed{12}", r"\boxed{1,2}", r"\boxed{1,2}"], "1,2", 2),
        ([r"\boxed{5 m}", r"\boxed{5 cm}", r"\boxed{500 cm}"], "5 m", 2),
        ([r"\boxed{x+2y=6}", r"\boxed{2x+y=6}", r"\boxed{2x+4y=12}"], "x+2y=6", 2),
        ([r"\boxed{0.25}", r"\boxed{\frac{1}{4}}", r"\boxed{25\%}"], "0.25", 3),
        ([r"\boxed{March 5}", r"\boxed{5}", r"\boxed{5 March}"], "March 5", 2),
        ([r"\boxed{B}", r"\boxed{C. 7}", r"\boxed{B. 12}", r"\boxed{(B) 12}"], "b", 3),
    ],
)
def test_equal_answers_vote_together(answers, winner, votes):
    vote = majority([answer_key(answer) for answer in answers])
    assert (vote.answer, vote.votes) == (winner, votes)


def test_numbers_vote_without_a_judge(monkeypatch):
    monkeypatch.setattr("rbfast.grading.math_equality.judge", lambda kind: pytest.fail("the judge was asked"))
    keys = [answer_key(rf"\boxed{{{number}}}") for number in (7, 8, "7.0", r"\frac{14}{2}", 9, "7 cats")]
    assert majority(keys) == ("7", 4, 6)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"$x = \boxed{2}$ or $x = \boxed{3}$", "2, 3"),
        ("\\[\\boxed{2}\\]\nand\n\\[\\boxed{3}\\]", "2, 3"),
        (r"\boxed{2}. No: \boxed{3}", "3"),
        (r"\boxed{3}, that is \boxed{3}", "3"),
        (r"\boxed{5} and then \boxed{broken", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"<answer>It is \boxed{4}</answer>", "4"),
        (r"\fbox{4}", "4"),
    ],
)
def test_answer_is_extracted_from_boxes(text, answer):
    assert extract_answer(text) == answer


def test_noise_is_wrong_but_never_an_error(monkeypatch):
    monkeypatch.setattr("rbfast.grading.math_equality._ExpressionComparer.__call__", lambda self, left, right: False)
    pieces = [*r"{}()[],;=xy2!-^_%$&|:/'\." + "½²√٣\x00\u200b\n", r"\frac{", r"\pm ", r"\le ", r"\cup ", r"\boxed{"]
    pieces += ["1,234", "3.5", "1e9999", r"\text{", " and ", r"\\", r"\begin{pmatrix}", r"\langle", r"\overline{", "cm"]
    source = random.Random(0)
    for _ in range(1000):
        text = "".join(source.choices(pieces, k=12))
        assert grade(Problem("file", "q", "77", {}), text) == 0.0
        answer_key(text)
    for text in ("(" * 5000 + ")" * 5000, "a " * 20_000, "1" * 50_000, r"\frac{" * 3000, "((" * 240 + "))" * 240):
        assert grade(Problem("file", "q", "77", {}), rf"\boxed{{{text}}}") == 0.0
