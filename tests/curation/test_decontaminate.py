"""Decontamination: pairs confirmed by people, changed numbers and names, paraphrases and edge cases."""

import csv
import json
import pickle
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from real_inputs import data_path

from rbfast.curation import text
from rbfast.curation.decontaminate import (
    Decontaminator,
    Evaluation,
    Match,
    Thresholds,
    contaminated,
    join_shared,
    read_evaluations,
    strongest_matches,
)
from rbfast.curation.instructions import without_instructions
from rbfast.data.trace import TraceError


@pytest.fixture(scope="module")
def math500() -> list[Evaluation]:
    return read_evaluations([data_path("math500/math500_test.jsonl")])


@pytest.fixture(scope="module")
def s1k() -> list[str]:
    with data_path("s1k_questions/s1k_questions.json").open(encoding="utf-8") as file:
        return [row["problem"] for row in json.load(file)]


def confirmed() -> set[tuple[int, int]]:
    """(index in s1K, index in MATH-500) of the pairs that people confirmed."""
    with data_path("decontam_audit/s1_confirmed.csv").open(encoding="utf-8", newline="") as file:
        return {(int(row["train_id"][-4:]), int(row["math500_id"][-4:])) for row in csv.DictReader(file)}


def test_only_confirmed_pairs_are_flagged(s1k: list[str], math500: list[Evaluation]) -> None:
    flagged = {(index, match.item) for index, match in enumerate(contaminated(s1k, math500)) if match}
    assert len(confirmed()) == 4
    assert flagged == confirmed()  # the target allows two others
    with data_path("s1k_questions/s1_ngram_hits.jsonl").open(encoding="utf-8") as file:
        assert len({json.loads(line)["train_id"] for line in file}) == 185  # flagged by any shared 8-gram


def test_confirmed_pairs_are_far_above_the_threshold(s1k: list[str], math500: list[Evaluation]) -> None:
    """The four share 0.93 or more of their problem, the next less than 0.4: the threshold is not tuned to them."""
    matches = contaminated(s1k, math500, thresholds=Thresholds(text=0.2, template=1.0, variant=1.0))
    shares = sorted((match.share for match in matches if match), reverse=True)
    assert shares[3] > 0.9
    assert shares[4] < 0.4


def change_digits(problem: str, rng: random.Random) -> str:
    return re.sub(r"\d", lambda digit: str((int(digit[0]) + rng.randrange(1, 10)) % 10), problem)


def test_changed_numbers_are_reported_by_the_template_tier(math500: list[Evaluation]) -> None:
    rng = random.Random(0)
    pool = [change_digits(item.problem, rng) for item in math500]
    thresholds = Thresholds(text=1.0)
    matches = contaminated(pool, math500, thresholds=thresholds)
    assert all(matches)
    changed = [(index, match) for index, match in enumerate(matches) if match and match.tier == "template"]
    drawing = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
    plain = [drawing.sub("", item.problem) for item in math500]
    assert [index for index, _ in changed] == [index for index, text in enumerate(plain) if re.search(r"\d", text)]
    assert len(changed) == 460
    own = sum(math500[match.item].problem == math500[index].problem for index, match in changed)
    assert own >= 0.99 * len(changed)  # two problems of the set share a template


def test_changed_numbers_may_differ_in_length() -> None:
    evaluations = [Evaluation("e:1", "A farm has 3 cows and 12 hens. How many legs do they have in all?")]
    pool = ["A farm has 45 cows and 7 hens. How many legs do they have in all?", "How many legs have 3 dogs?"]
    match, other = contaminated(pool, evaluations)
    assert match == Match(0, "template", 1.0)
    assert other is None


def test_short_problems_are_matched() -> None:
    evaluations = [Evaluation("e:1", "Compute $\\sin 60^\\circ$."), Evaluation("e:2", "What is $5!$?")]
    matches = contaminated(["compute \\(\\sin(60°)\\)", "Compute $\\cos 60^\\circ$.", "", "Solve x."], evaluations)
    assert [match and (match.item, match.tier) for match in matches] == [(0, "text"), None, None, None]


@pytest.mark.parametrize("short", ["Simplify $\\sqrt{242}$.", "Evaluate $\\log_264$.", "Compute $\\dbinom{31}{28}$."])
def test_short_problems_match_after_a_preamble_or_before_options(short: str, math500: list[Evaluation]) -> None:
    preamble = "You are a helpful assistant. Please solve the following math problem carefully and show all the work."
    [index] = [index for index, item in enumerate(math500) if item.problem == short]
    pool = [
        f"{preamble}\n\nProblem: {short}",
        f"{short}\n\nA) 1\nB) 2\nC) 3",
        f"{short.rstrip('.')} (A) 1 (B) 2 (C) 3",
        f"{preamble} {short.rstrip('.')}",
        f"{short} Then add the digits of what you found.",
    ]
    others = [f"{short.rstrip('.')} + 3.", f"{preamble} {short.replace('2', '3')}", "Find $x$."]
    found = contaminated([*pool, *others], math500)
    assert found == [Match(index, "text", 1.0)] * len(pool) + [None] * len(others)


def test_common_endings_are_not_a_match() -> None:
    evaluations = [
        Evaluation(f"e:{i}", asked) for i, asked in enumerate(("Find $x$.", "Solve for $x$.", "5!", "What is 50%?"))
    ]
    pool = ["Let $2x = 6$. Solve for $x$.", "Let $2x = 6$. Find $x$.", "The last factor is 5!", "What is 50% of 80?"]
    assert contaminated(pool, evaluations) == [None] * len(pool)
    assert contaminated(["Half is a share. What is 50%?", "Find x."], evaluations) == [
        Match(3, "text", 1.0),
        Match(0, "text", 1.0),
    ]


def test_matches_of_short_and_long_problems_are_combined() -> None:
    long = "A farm has 3 cows and 12 hens. How many legs do they have in all?"
    evaluations = [Evaluation("e:1", long), Evaluation("e:2", "Compute $5!$.")]
    matches = contaminated(["Compute $5!$.", long, f"{long} Compute $5!$.", "", "Now compute $5!$."], evaluations)
    assert [match and match.item for match in matches] == [1, 0, 0, None, 1]


def test_doubled_backslashes_are_read_as_single_ones(math500: list[Evaluation]) -> None:
    doubled = [item.problem.replace("\\", "\\\\") for item in math500]
    matches = contaminated(doubled, math500)
    assert [match and match.item for match in matches] == list(range(len(math500)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Calculate (8 - 3) * 2", "Calculate 8 - 3 * 2"),
        ("Solve $|x-3|=5$.", "Solve $x-3=5$."),
        ("Find $f'(2)$.", "Find $f(2)$."),
        ("What is $5!$?", "What is $5$?"),
    ],
)
def test_lookalike_problems_do_not_match(one: str, other: str) -> None:
    assert contaminated([one, other], [Evaluation("e:1", one)])[1] is None
    assert contaminated([one, other], [Evaluation("e:1", other)])[0] is None


SET = [
    "A reflection takes $\\begin{pmatrix} 5 \\\\ 0 \\end{pmatrix}$ to $\\begin{pmatrix} 4 \\\\ 3 \\end{pmatrix}.$ "
    "Which vector does the reflection take $\\begin{pmatrix} -2 \\\\ 3 \\end{pmatrix}$ to?",
    "Mikka wants to order a pizza with two different toppings. He has 8 different toppings to choose from. How many "
    "different pizzas could he order?",
    "Find the equation of the plane containing the points $(0,-1,-1),$ $(-4,4,4),$ and $(4,5,1).$  Enter your answer "
    "in the form \\[Ax + By + Cz + D = 0,\\]where $A,$ $B,$ $C,$ $D$ are integers such that $A > 0.$",
    "Solve for x: 3x + 5 = 20. Express your answer as a common fraction.",
    "In $\\triangle PQR$, we have $PQ = QR = 34$ and $PR = 32$. Find the length of median $\\overline{QM}$.",
    "Let $x,$ $y,$ and $z$ be positive real numbers such that $xyz = 2.$  Find the minimum value of "
    "\\[x^4 + 4y^2 + 4z^4.\\]",
]


@pytest.mark.parametrize(
    ("problem", "item", "tier"),
    [
        (SET[0].replace("5 \\", "-\\frac{1}{2} \\").replace("-2 ", "1,000 "), 0, "template"),
        (f"Return your final response within \\boxed{{}}. {SET[0]}", 0, "text"),
        ("Sarah wants to order a pizza with 2 different toppings. She has 9 different toppings to choose from. "
         "How many different pizzas could she order?", 1, "variant"),
        ("Solve for x: 7x + 9 = -44", 3, "template"),
        ("In triangle $ABC$ we have $AB = BC = 25$ and $AC = 14$. Find the length of the median $BM$.", 4, "renamed"),
        ("Let $a, b, c$ be positive real numbers with $abc = 3$. Find the minimum value of $a^4 + 4b^2 + 4c^4$.", 5,
         "renamed"),
    ],
)  # fmt: skip
def test_problem_with_other_numbers_names_or_a_clause_is_matched(problem: str, item: int, tier: str) -> None:
    others = ["Find the area of a circle of radius three.", "How many different primes are there below one hundred?"]
    match = contaminated([problem, *others], [Evaluation("e", asked) for asked in SET])[0]
    assert match is not None
    assert (match.item, match.tier) == (item, tier)


def test_formulas_of_a_common_form_alone_are_not_a_variant() -> None:
    evaluations = [Evaluation("e", "Solve the system $2x + 3y = 12$, $5x - 4y = 7$ for $x$ and $y$.")]
    asked = "Given that $7x + {}y = 1$ and $6x - 9y = 5$, for $x$ and $y$ what holds?"
    for number in (8, 3):  # with 3 it shares a few tokens as they are, "x + 3y ="
        assert contaminated([asked.format(number), "How many primes are there?"], evaluations) == [None, None]


def test_strongest_match_is_by_tier_then_share_then_order() -> None:
    small, large, equal = Match(0, "variant", 0.6), Match(1, "variant", 0.9), Match(2, "variant", 0.9)
    copied, template = Match(3, "text", 0.5), Match(4, "template", 1.0)
    matches = [small, large, None, large, copied, template, None, large, equal]
    assert strongest_matches(matches, np.array([2, 4, 1, 0, 2])) == [large, copied, None, None, large]


WORDS = [letter * 3 for letter in "abcdefghijklmnopqrstuvwx"]


def sentence_of(words: list[str], first: int | None) -> str:
    """The words as text; if `first` is given, every fourth word is a number: `first` plus its position."""
    return " ".join(word if first is None or n % 4 < 3 else str(first + n) for n, word in enumerate(words))


@pytest.mark.parametrize(
    ("shared", "numbers", "tier"), [(14, None, "text"), (13, None, None), (20, 50, "template"), (19, 50, None)]
)
def test_match_needs_half_the_text_or_four_fifths_of_the_template(shared: int, numbers, tier: str | None) -> None:
    """The problem has 20 shingles; its first 14 words hold 10 of them."""
    evaluation = Evaluation("e", sentence_of(WORDS, numbers and 10))
    others = "while some other people over there talk about quite different things that matter to them alone"
    [match] = contaminated([f"{sentence_of(WORDS[:shared], numbers)} {others}"], [evaluation])
    assert (match and match.tier) == tier


def test_instructions_on_how_to_answer_are_ignored() -> None:
    asked = SET[2].partition("Enter")[2]
    problem = f"A sphere touches three given planes and two lines. Find the plane of its centre. Enter{asked}"
    assert contaminated([problem], [Evaluation("e", asked) for asked in SET]) == [None]
    assert without_instructions("Find $x$ in $2x = 7$. Express your answer as a decimal like 1.5.").strip() == (
        "Find $x$ in $2x = 7$."
    )
    preamble = "You are a helpful math assistant. Please solve the following problem:\n\n"
    assert without_instructions(f"{preamble}Find $x$ in $2x = 7$.").strip() == "Find $x$ in $2x = 7$."
    for kept in (
        "Solve the following system of equations: $x + y = 3$, $x - y = 1$.",
        "You are given a triangle. Find its area.",
    ):
        assert without_instructions(kept) == kept
    for kept in ("Write your answer.", "List all the primes below 9.", "Which letter comes first?"):
        assert without_instructions(kept) == kept


@pytest.mark.parametrize("gap", ["\n", " \n", "\t"])
def test_instructions_after_a_long_gap_are_left_out_in_linear_time(gap: str) -> None:
    problem = "Find $x$ in $2x = 7$."
    start = time.process_time()
    kept = without_instructions(f"{problem}{gap * 50_000}\nEnter your answer in a box.{gap * 50_000}Thanks")
    assert time.process_time() - start < 2
    assert kept.split() == [*problem.split(), "Thanks"]


def test_common_openings_are_not_a_match(s1k: list[str], math500: list[Evaluation]) -> None:
    pool = [
        "In triangle $ABC$, $AB = 13$, $BC = 14$, and $CA = 15$. Find the radius of the incircle of triangle $ABC$.",
        "Let $x$, $y$, and $z$ be positive real numbers such that $x + y + z = 1$. Find the maximum value of $xyz^2$.",
        "Let $P(x)$ be a monic polynomial of degree 4 with roots 1, 2, 3 and 4. Find $P(0)$.",
        "How many positive three-digit integers have digits that add to 10?",
        "Find the number of ordered pairs $(a, b)$ of positive integers such that $ab = 72$.",
    ]
    assert contaminated([*pool, *s1k], math500)[: len(pool)] == [None] * len(pool)


def test_boilerplate_weighs_little() -> None:
    ask = "Please reason step by step, and put your final answer within a box at the very end of your reply."
    evaluations = [
        Evaluation(f"e:{i}", f"{words} {ask}") for i, words in enumerate(("add the odd primes up to nine", "b"))
    ]
    evaluations += [Evaluation(f"f:{i}", f"unlike the others number {'x' * i} {ask}") for i in range(20)]
    pool = [f"{words} {ask}" for words in ("what colour has the sky over the sea", "add the odd primes up to nine")]
    matches = contaminated(pool, evaluations)
    assert matches[0] is None
    assert matches[1] is not None and matches[1].item == 0


def test_matches_do_not_depend_on_parts_or_threads(s1k: list[str], math500: list[Evaluation]) -> None:
    index = pickle.loads(pickle.dumps(Decontaminator(math500)))
    parts = [s1k[:1], s1k[1:400], [], s1k[400:]]
    found = join_shared([index.find(text.pack(part), part, threads=n) for n, part in enumerate(parts, start=1)])
    verdicts = index.judge(found, text.fingerprints(text.pack(s1k)), threads=2)
    assert verdicts == contaminated(s1k, math500, threads=1)


def test_many_copies_in_the_pool_are_all_flagged() -> None:
    most = SET[0][: int(0.7 * len(SET[0]))]
    pool = [most] * 500 + ["Find the area of the triangle."] * 20
    assert all(contaminated(pool, [Evaluation("e", asked) for asked in SET])[:500])


def test_empty_evaluations_or_pool_give_no_matches(math500: list[Evaluation]) -> None:
    assert contaminated(["What is 1 + 1?"], []) == [None]
    assert contaminated([], math500) == []


def letters(problems: list[str]) -> np.ndarray:
    return np.array([[problem.lower().count(chr(97 + i)) for i in range(26)] for problem in problems], dtype=float)


def test_embedding_finds_paraphrases() -> None:
    evaluations = [Evaluation("e:1", "silent night"), Evaluation("e:2", "zebra crossing")]
    pool = ["listen thing", "tricycles", ""]
    matches = contaminated(pool, evaluations, embed=letters)
    assert matches[0] is not None and matches[0][:2] == (0, "paraphrase") and matches[0].share == pytest.approx(1.0)
    assert matches[1:] == [None, None]
    assert contaminated(["silent night"], evaluations, embed=letters) == [Match(0, "text", 1.0)]
    assert contaminated(pool, evaluations) == [None] * 3
    whole = contaminated(["silent night"], evaluations, thresholds=Thresholds(text=1.0))
    assert whole == [Match(0, "text", 1.0)]
    lax = contaminated(["silent"], evaluations, embed=letters, thresholds=Thresholds(paraphrase=0.85))
    assert lax == [Match(0, "paraphrase", pytest.approx(9 / 102**0.5))]
    assert [match and match.item for match in contaminated(["silent", "silent ni"], evaluations, embed=letters)] == [
        None,
        0,
    ]
    with pytest.raises(ValueError, match=r"embed must return finite numbers \[2, d\], one row per text, got \[2\]"):
        contaminated(pool, evaluations, embed=lambda problems: np.ones(len(problems)))


def test_evaluation_files_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"question": "One?"}\n\n{"prompt": "Two?", "answer": 2}\n')
    assert read_evaluations([path]) == [Evaluation(f"{path}:1", "One?"), Evaluation(f"{path}:3", "Two?")]
    path.write_text('{"text": "One?"}\n')
    with pytest.raises(TraceError, match=r"set\.jsonl:1: expected a text under problem, question, prompt"):
        read_evaluations([path])
    path.write_text('{"question": "One?"}\n')
    (empty := tmp_path / "empty.jsonl").touch()
    with pytest.raises(TraceError, match=r"empty\.jsonl: expected at least one problem, got none"):
        read_evaluations([path, empty])


@pytest.mark.parametrize("threshold", [0.0, 1.5, float("nan")])
def test_invalid_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="template must lie in"):
        Thresholds(template=threshold)


def test_benchmarks_have_the_same_names_as_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(*where: object, split: str, **_: object) -> list[dict[str, str]]:
        calls.append((*where, split))
        return [{"problem": f"Problem {len(calls)}?", "answer": "1"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    evaluations = read_evaluations(["math-500", "aime24", "owner/name"])
    assert calls == [
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("owner/name", None, "test"),
    ]
    assert [evaluation.problem for evaluation in evaluations] == ["Problem 1?", "Problem 2?", "Problem 3?"]
