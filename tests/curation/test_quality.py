"""Flaws and quality marks of real traces from four models and of made-up ones."""

import json
import random
import re

import numpy as np
import pytest
from real_inputs import data_path

from rbfast.curation.quality import Quality, find_flaw, quality, repeated_shares
from rbfast.data.trace import Trace

QWEN = "qwen3_think_onoff/qwen3-8b__think-on.jsonl"


def thinking(name: str, field: str) -> list[tuple[str, bool]]:
    """(thinking, whether it finished) of each row of a file."""
    with data_path(name).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row[field], row.get("done_reason", "stop") == "stop") for row in rows if row[field]]


def flaw_of(reasoning: str, problem: str = "What is it?", answer: str = "7") -> str | None:
    return find_flaw(Trace(problem, reasoning, answer), float(repeated_shares([reasoning])[0]))


@pytest.mark.parametrize(
    ("name", "field", "count"),
    [
        (QWEN, "thinking", 189),
        ("r1_math500_traces/math500_deepseek_r1.jsonl", "reasoning_trace", 20),
        ("r1_math500_traces/pilot_math500_qwen7b.jsonl", "reasoning_trace", 19),
        ("r1_math500_traces/pilot_math500_llama8b.jsonl", "reasoning_trace", 20),
    ],
)
def test_finished_thinking_has_no_flaw(name: str, field: str, count: int) -> None:
    whole = [text for text, finished in thinking(name, field) if finished]
    assert len(whole) == count
    assert [flaw_of(text) for text in whole] == [None] * count


def test_thinking_truncated_by_the_limit_is_flagged_as_looping() -> None:
    """Five thoughts of Qwen3-8B hit the token limit, and all loop. Six more runs hit it in the reply that followed."""
    with data_path(QWEN).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    cut = [row["thinking"] for row in rows if row["done_reason"] == "length" and not row["content"]]
    assert len(cut) == 5
    assert all((flaw_of(text) or "").startswith("looping") for text in cut)


def test_some_random_cuts_are_detected() -> None:
    """A cut is visible if it leaves a sentence or a formula open: measured 0.30 for Qwen3, 0.55 for R1."""
    rng = random.Random(0)
    for name, field, floor in (
        (QWEN, "thinking", 0.25),
        ("r1_math500_traces/math500_deepseek_r1.jsonl", "reasoning_trace", 0.4),
    ):
        whole = [text for text, finished in thinking(name, field) if finished]
        cut = [text[: rng.randrange(len(text) // 2, len(text))] for text in whole]
        assert np.mean([flaw_of(text) is not None for text in cut]) >= floor


@pytest.mark.parametrize(
    ("reasoning", "message"),
    [
        ("So \\[ x = 3", r"inside \\\[ ... \\\]"),
        ("We have \\(x\\) and \\(y", r"inside \\\( ... \\\)"),
        ("```python\nprint(1)", "inside a code fence"),
        ("$$x=1$$ and $$y", r"inside \$\$"),
        ("\\begin{align} x", "inside"),
        ("<think>It is 7.", "its thinking does not end"),
        ("It is 3 *", "ends on '\\*'"),
        ("We have **x** and **", "ends on '\\*'"),
        ("It is $$x$$ so a", "ends on 'a'"),
        ("$$x \\\\[4pt] y$$ and \\[ z", r"inside \\\[ ... \\\]"),
        ("It is 3 +", "ends on '\\+'"),
        ("So it must be the", "ends on 'the'"),
        ("So f(x) ≤", "ends on '≤'"),
        (r"So we have x \le", "ends on"),
        ("It is 3^", r"ends on '\^'"),
        ("So the answer should", "ends on 'should'"),
        ("This gives \\boxed{7", "inside '{'"),
        ("It is the sum of (3 + 4", r"inside '\('"),
        ("The value is $x = 3", r"inside \$ ... \$"),
        ("So, **the answer", "inside bold text"),
        ("One is 1.\nTwo is 2.\nThree is 3.\nFour is 4.\nFive seems odd to me", "no full stop"),
    ],
)
def test_truncated_reasoning_is_flagged(reasoning: str, message: str) -> None:
    flaw = flaw_of(reasoning)
    assert flaw is not None and flaw.startswith("truncated: ")
    assert re.search(message, flaw)


@pytest.mark.parametrize(
    "reasoning",
    [
        "3 cows x4=12\n2 hens x2=4, 12+4=16",
        "It is 7",
        "```\nx\n```",
        "One.\nTwo.\nThree.\nFour.\nThe answer is seven",
        "One.\nTwo.\nThree.\nFour as well",
        "One.\nTwo.\nThree\nFour\nFive.\nSix as well",
        "\\[x=7\\]",
        "So it is\n\n---\n\n**Answer: 670**",
        "One.\nTwo.\nThree.\nFour.\n*Five, to the*",
        "The roots are conjugate, so z = i",
        "Thus x = a",
        "The language is C++",
        "$$\\begin{cases} x \\\\[4pt] y \\end{cases}$$",
        "No solution :(",
        "The interval is [2, 5)",
        "It costs $7",
        "The end of the code is };",
        "The files are in /usr/share/",
        "Yes, they are",
        "1) Two 2) Three",
        "So the final answer is:",
        "Done! 🎉",
        "The period is \\( 2\\pi / 3 ).\n\nSo there are 9 of them.",
        "A tree costs $$60.00.\n\nAll of them cost 210.",
    ],
)
def test_complete_reasoning_is_not_flagged(reasoning: str) -> None:
    assert flaw_of(reasoning) is None


@pytest.mark.parametrize(
    ("reasoning", "answer"), [("The word is the", "the"), ("He got an **A+**", "A+"), ("The sign is *", "*")]
)
def test_reasoning_may_end_on_its_answer(reasoning: str, answer: str) -> None:
    assert flaw_of(reasoning, answer=answer) is None
    assert flaw_of(reasoning.replace("**", ""), answer="7") is not None


def test_unreadable_answers_and_language_changes_are_flagged() -> None:
    assert flaw_of("It is 7.", answer="...") == "unreadable answer: it holds no letter, digit or sign"
    assert flaw_of("It is 7.", answer="\\frac{1}{2") == "unreadable answer: its braces do not balance"
    assert flaw_of("It is \\{1\\}.", answer="\\{1, 2\\}") is None
    assert (flaw_of("所以我们得到答案 7.") or "").startswith("language")
    assert flaw_of("所以我们得到答案 7.", problem="求解 x") is None
    sentence = "The sum of these numbers is even, so {} it is 7."
    assert flaw_of(sentence.format("求")) is None and flaw_of(sentence.format("我们求解")) is not None
    assert flaw_of("Thus α + β ≤ 𝑥, naïve.") is None
    assert flaw_of("aⁿ bⁿ = (ab)ⁿ, ∠A = 45º, ℜ(z) = 1.") is None
    assert flaw_of("サーバーとユーザーのデーター、人々。", problem="計算") is None


@pytest.mark.parametrize("answer", ["] } )", "(())", "✓", "👍", "-", "≤", "{}"])
def test_answers_without_a_letter_are_accepted(answer: str) -> None:
    assert flaw_of("It is that.", answer=answer) is None


def test_translation_is_not_a_change_of_language() -> None:
    assert flaw_of("Good morning is おはよう, so おはよう.", "Translate good morning.", "おはよう") is None


def test_verdicts_of_server_or_verifier_overrule_the_ending() -> None:
    cut = Trace("p", "So it is the", "7")
    assert find_flaw(cut, 0.0) == "truncated: it ends on 'the'"
    assert find_flaw(cut, 0.0, finished=True) is None
    assert find_flaw(Trace("p", "So it is the", "7", verified=True), 0.0) is None
    assert find_flaw(Trace("p", "So it is the", "7", verified=False), 0.0) is not None
    assert find_flaw(Trace("p", "It is an open brace.", "{7", verified=True), 0.0) is None


def test_finished_replies_have_no_flaw() -> None:
    """Qwen3-8B without thinking: the two replies that hit the limit loop, and no other reply has a flaw."""
    with data_path("qwen3_think_onoff/qwen3-8b__think-off.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    items = {
        item["id"]: item for item in json.loads(data_path("qwen3_think_onoff/items.json").read_text(encoding="utf-8"))
    }
    flaws = {row["item_id"]: flaw_of(row["content"], items[row["item_id"]]["prompt"]) for row in rows}
    assert len(flaws) == 200
    assert {item for item, flaw in flaws.items() if flaw} == {r["item_id"] for r in rows if r["done_reason"] != "stop"}


def test_repetition_is_the_share_that_occurred_before() -> None:
    once = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(100))
    assert repeated_shares([once, f"{once} {once}", "", "short"]).tolist() == [0.0, pytest.approx(81 / 181), 0.0, 0.0]
    assert repeated_shares([]).tolist() == []
    assert flaw_of(f"{once} {once}") == "looping: 45% of the reasoning repeats itself"


def test_quality_marks() -> None:
    plain = quality(Trace("p", "x is 3. " * 30, "3"), 0.0)
    checked = quality(Trace("p", "x is 3. Wait, let me check: therefore it holds. " * 30, "3"), 0.0)
    assert plain[:4] == (pytest.approx(90 / 290), 0.0, 0.0, 0.0)
    assert all(0 <= mark <= 1 for mark in checked)
    assert all(better > worse for better, worse in zip(checked[:4], plain[:4], strict=True))
    assert quality(Trace("p", "It is 4.", "3"), 0.0).completeness == 0.5
    assert quality(Trace("p", "It is \\frac{ 1 }{2}.", "\\frac{1}{2}"), 0.0).completeness == 1.0
    for before, after, completeness in ((0, 280, 1.0), (100, 320, 0.5), (2000, 600, 1.0), (2000, 700, 0.5)):
        reasoning = f"{'a' * before} 73. {'b' * after}"  # an answer counts in the last quarter, or 300 characters
        assert quality(Trace("p", reasoning, "73"), 0.0).completeness == completeness
    assert Quality(1, 1, 1, 1, 1, 0).score == pytest.approx(1.0)
    assert Quality(1, 1, 1, 1, 0.5, 0.5).score == pytest.approx(0.25)
    each = [Quality(*(float(at == mark) for at in range(4)), 1, 0).score for mark in range(4)]
    assert each == [0.3, 0.2, 0.25, 0.25]
    short = quality(Trace("p", "Check: it is 3.", "3", plan="Perhaps add."), 0.0)  # counts as a hundred words
    assert short[1:4] == (pytest.approx(1 / 1.5), pytest.approx(1 / 2), 0.0)


def test_thinking_has_higher_marks_than_a_plain_reply() -> None:
    def mean(texts: list[str]) -> np.ndarray:
        return np.mean([quality(Trace("p", text, "1"), 0.0) for text in texts], axis=0)

    think = mean([text for text, finished in thinking(QWEN, "thinking") if finished])
    reply = mean([text for text, _ in thinking("qwen3_think_onoff/qwen3-8b__think-off.jsonl", "content")])
    assert (think[:3] > reply[:3]).all()  # elaboration, verification, exploration
