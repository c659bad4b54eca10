"""Curation from end to end: what is kept, what is dropped and why; reproducible output."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiments.teacher_results import traces_from_results
from real_inputs import data_path

import rbfast
from rbfast.cli.main import main
from rbfast.curation import curate, text
from rbfast.curation.assess import Assessor, verify_answer
from rbfast.curation.curate import CurateConfig, Weights, _difficulties, _known_rates, ranks, read_pass_rates
from rbfast.curation.decontaminate import Decontaminator
from rbfast.data.readers import read_traces, write_traces
from rbfast.data.trace import Trace, TraceError

FILES = ("reason1k.jsonl", "dropped.jsonl", "datasheet.json", "datasheet.html")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(problem: str, **fields: Any) -> dict[str, Any]:
    return {"problem": problem, "reasoning": f"Let me see. {problem} So it is 7.", "answer": "7", **fields}


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A pool with a row for each outcome, and an evaluation set."""
    pool = [
        row("What is the sum of the first three primes after two?", domain="numbers", id="kept"),
        row("what is the sum of the first $3$ primes after two?", domain="numbers"),
        row("What is the sum of the first three primes after 2?", domain="numbers"),
        row("What is the sum of the first three primes after two", domain="numbers", id="copy"),
        {"problem": "No reasoning?", "answer": "1"},
        row("Was this cut?", finish_reason="length"),
        row("Is this a loop?", reasoning="and so on it goes " * 200),
        row("A train leaves at noon and drives 60 miles an hour for 3 hours. How far is it then?"),
        row("A train leaves at noon and drives 75 miles an hour for 8 hours. How far is it then?"),
        row("Which is the wrong one of these?", reference="8"),
        row("Which is the right one of these?", reference="7.0", domain="<b>$x$"),
        "no object",
    ]
    evaluations = [
        {"question": "A train leaves at noon and drives $60$ miles an hour for $3$ hours. How far is it then?"}
    ]
    return write_rows(tmp_path / "pool.jsonl", pool), write_rows(tmp_path / "eval.jsonl", evaluations)


def test_only_the_row_with_an_invalid_unicode_id_is_dropped(tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row("Which is odd?", id="\ud800"), row("Which is even?", id="good")])
    rbfast.curate([pool], tmp_path / "out", CurateConfig(size=1))
    assert [trace.id for trace in read_traces(tmp_path / "out" / "reason1k.jsonl")] == ["good"]
    (dropped,) = rows_of(tmp_path / "out" / "dropped.jsonl")
    assert dropped["id"] == "\ud800" and "half a surrogate pair" in dropped["reason"]


def test_every_item_is_kept_or_dropped_with_a_reason(small: tuple[Path, Path], tmp_path: Path) -> None:
    pool, evaluations = small
    result = rbfast.curate([pool], tmp_path / "out", CurateConfig(size=3, against=[evaluations]))
    kept, dropped = read_traces(tmp_path / "out" / "reason1k.jsonl"), rows_of(tmp_path / "out" / "dropped.jsonl")
    assert [stage.name for stage in result.stages] == ["clean", "decontaminate", "dedup", "score", "select"]
    assert [stage.given for stage in result.stages] == [12, 8, 6, 5, 4]
    assert result.selected == len(kept) == 3
    by_line = {int(record["where"].rpartition(":")[2]): record for record in dropped}
    assert len(by_line) == 9
    assert by_line[4] | {"duplicate_of": f"{pool}:1", "id": "copy"} == by_line[4]
    assert by_line[5]["reason"].startswith("not a trace: reasoning: expected this field")
    assert by_line[6]["reason"] == "truncated: its finish_reason is length"
    assert by_line[7]["reason"].startswith("looping")
    assert by_line[8]["reason"] == "holds an evaluation problem"
    assert by_line[8]["matched"]["where"] == f"{evaluations}:1"
    assert by_line[8]["matched"]["share"] == 1.0
    assert by_line[9]["reason"] == "an evaluation problem with other numbers"
    assert (by_line[10]["stage"], by_line[10]["reason"]) == ("score", "wrong answer")
    assert (by_line[10]["answer"], by_line[10]["reference"]) == ("7", "8")
    assert by_line[12]["reason"].startswith("not a trace: expected an object")
    stages = Counter(record["stage"] for record in dropped)
    assert stages == {s.name: s.given - s.kept for s in result.stages if s.given != s.kept}
    assert {trace.id for trace in kept} <= {"kept", f"{pool}:2", f"{pool}:3", f"{pool}:11"}
    assert any(trace.domain == "<b>$x$" for trace in kept)  # small domains are represented
    assert all(0 <= trace.difficulty <= 1 for trace in kept)


def test_datasheet_page_escapes_text_from_the_pool(small: tuple[Path, Path], tmp_path: Path) -> None:
    rbfast.curate([small[0]], tmp_path / "out", CurateConfig(size=3, against=[small[1]]))
    page = (tmp_path / "out" / "datasheet.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    sheet = json.loads((tmp_path / "out" / "datasheet.json").read_text(encoding="utf-8"))
    assert {"domain": "<b>$x$", "before": 1, "eligible": 1, "after": 1} in sheet["domains"]
    assert sheet["contamination"][0]["items"] == {"template": 1, "text": 1}


def test_datasheet_counts_right_wrong_and_unverified_answers(small: tuple[Path, Path], tmp_path: Path) -> None:
    rbfast.curate([small[0]], tmp_path / "out", CurateConfig(size=9, against=[small[1]]))
    counted = json.loads((tmp_path / "out" / "datasheet.json").read_text(encoding="utf-8"))["verified"]
    page = (tmp_path / "out" / "datasheet.html").read_text(encoding="utf-8")
    assert list(counted) == ["right", "wrong", "unverified"]
    assert sum(verdict["before"] for verdict in counted.values()) == 8 and counted["wrong"] == {"before": 1, "after": 0}
    unverified = counted["unverified"]
    assert unverified["before"] >= unverified["after"] > 0
    cells = f'<td class="n">{unverified["before"]}</td><td class="n">{unverified["after"]}</td>'
    assert f"<td>unverified</td>{cells}" in page
    assert "holds an evaluation problem: 1" in page


def test_datasheet_gives_the_full_counts_of_shortened_lists(tmp_path: Path) -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]
    texts = [" ".join(f"{word}{number}" for word in words) for number in range(85)]
    evaluations = write_rows(tmp_path / "against.jsonl", [{"problem": problem} for problem in texts[:60]])
    pool = write_rows(tmp_path / "pool.jsonl", [row(problem, domain=f"d{at % 25}") for at, problem in enumerate(texts)])
    sheet = rbfast.curate([pool], tmp_path / "out", CurateConfig(against=[evaluations], keep_templates=True)).datasheet
    page = (tmp_path / "out" / "datasheet.html").read_text(encoding="utf-8")
    assert (len(sheet["contamination"]), sheet["evaluation_problems_matched"]) == (50, 60)
    assert "Evaluation problems matched: 60 of 60" in page and "These 50 are matched most" in page
    assert "the 20 largest of 25" in page and len(sheet["domains"]) == 25


@pytest.mark.parametrize("source", ["", "reason1k.jsonl", "dropped.jsonl", "datasheet.json"])
def test_output_that_overlaps_the_pool_is_refused(source: str, small: tuple[Path, Path]) -> None:
    folder = small[0].parent
    path = write_rows(folder / (source or "reason1k.jsonl"), [row("What is it?")])
    with pytest.raises(ValueError, match="the output would overlap the pool"):
        rbfast.curate([small[1], folder / source], folder)
    assert len(rows_of(path)) == 1


@pytest.mark.parametrize("reference", [8, math.nan, "8 \ud83d"])
def test_any_reference_of_a_wrong_answer_is_written(reference: Any, tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row("What is it?", verified=False, reference=reference)])
    rbfast.curate([pool], tmp_path / "out")
    (dropped,) = rows_of(tmp_path / "out" / "dropped.jsonl")
    assert (dropped["answer"], dropped["reference"]) == ("7", str(reference).replace("\ud83d", "?"))


def test_template_matches_can_be_kept(small: tuple[Path, Path], tmp_path: Path) -> None:
    result = rbfast.curate([small[0]], tmp_path / "out", CurateConfig(size=9, against=[small[1]], keep_templates=True))
    assert result.stages[1].dropped == {"holds an evaluation problem": 1}
    sheet = json.loads((tmp_path / "out" / "datasheet.json").read_text(encoding="utf-8"))
    assert sheet["contamination"][0]["items"] == {"template": 1, "text": 1}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(texts)]


def test_turns_and_system_prompts_are_decontaminated(tmp_path: Path) -> None:
    train = "A train leaves at noon and drives 60 miles an hour for 3 hours. How far is it then?"
    pool = [
        row("Are you sure?", turns=turns(train, "180 miles.")),
        row("Can you solve it?", turns=turns("Invent a problem.", train)),
        row("How many primes are below ten?", system=f"Answer briefly. For example: {train} 180 miles."),
        row("How many primes are below nine?", turns=turns(train.replace("60", "75").replace("3", "8"), "225 miles.")),
        row("How many primes are below six?", turns=turns("Do you know trains?", "Yes."), system="Answer briefly."),
    ]
    evaluations = write_rows(tmp_path / "eval.jsonl", [{"problem": train}])
    config = CurateConfig(against=[evaluations])
    result = rbfast.curate([write_rows(tmp_path / "pool.jsonl", pool)], tmp_path / "out", config)
    assert result.stages[1].dropped == {"holds an evaluation problem": 3, "an evaluation problem with other numbers": 1}
    assert [trace.problem for trace in read_traces(tmp_path / "out" / "reason1k.jsonl")] == [pool[-1]["problem"]]


def test_conversations_are_duplicates_if_turns_and_problem_match(tmp_path: Path) -> None:
    check = "Are you sure? Please check your work."
    pool = [
        row(check, turns=turns("What is $2 + 5$?", "It is 7.")),
        row(check, turns=turns("What is 2+5?", "it is 7")),
        row(check, turns=turns("What is 3 + 4?", "It is 7.")),
        row(check, turns=turns("Invent a sum and do it.", "3 + 4 is 7.")),
        row(check, turns=turns("Invent a sum and do it.", "2 + 5 is 7.")),
        row(check, turns=turns("What is 2 + 5?", "It is 7.", check, "Yes, it is 7.")),
        row(check),
        row("are you sure? please check your work."),
    ]
    result = rbfast.curate([write_rows(tmp_path / "pool.jsonl", pool)], tmp_path / "out")
    assert result.stages[2].dropped == {"the same problem": 2}
    copies = {rec["where"].rpartition(":")[2]: rec for rec in rows_of(tmp_path / "out" / "dropped.jsonl")}
    assert {line: rec["duplicate_of"].rpartition(":")[2] for line, rec in copies.items()} == {"2": "1", "8": "7"}


@pytest.mark.parametrize(
    ("plain", "better", "kept"), [(None, None, "better"), (True, None, "plain"), (None, False, "plain")]
)
def test_duplicates_keep_a_right_trace_then_the_better_one(tmp_path: Path, plain, better, kept: str) -> None:
    """A trace with a wrong answer ranks last."""
    pool = [row("Two and five?", id="plain", verified=plain), row("Two and five?", id="better", verified=better)]
    pool[1]["reasoning"] = "Perhaps add first. Then check: therefore it is 7."
    rbfast.curate([write_rows(tmp_path / "pool.jsonl", pool)], tmp_path / "out")
    assert [trace.id for trace in read_traces(tmp_path / "out" / "reason1k.jsonl")] == [kept]


def test_only_questions_count_towards_the_rarity_of_shingles() -> None:
    conversation = row("Are you sure?", turns=turns("What is 2 + 5?", "It is 7."), system="Be brief.")
    questions = text.fingerprints(text.pack(["Are you sure?", "What is 2 + 5?"])).tolist()
    part = Assessor(Decontaminator([]))([("", conversation)])
    assert part.prompt_fingerprints.tolist() == [questions[0], questions[1], questions[0], questions[0]]


@pytest.fixture(scope="module")
def claude(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real pool: Claude's correct completions, several for each problem."""
    folder = tmp_path_factory.mktemp("pool")
    traces, _ = traces_from_results(data_path("reasoning_gym_claude35"), "claude-3.5-sonnet")
    write_traces(folder / "pool.jsonl", traces)
    return folder / "pool.jsonl"


@pytest.mark.slow
def test_real_pool_gives_the_same_bytes_for_any_number_of_processes(claude: Path, tmp_path: Path, monkeypatch) -> None:
    against = [data_path("math500/math500_test.jsonl")]
    result = rbfast.curate([claude], tmp_path / "one", CurateConfig(size=100, against=against, seed=3))
    monkeypatch.setattr("rbfast.curation.pool.CHUNK", 100)
    monkeypatch.setattr("rbfast.curation.text.cores", lambda: 5)
    rbfast.curate([claude], tmp_path / "two", CurateConfig(size=100, against=against, seed=3, processes=3))
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert result.selected == 100
    kept = read_traces(tmp_path / "one" / "reason1k.jsonl")
    assert len({trace.problem for trace in kept}) == 100
    assert len({trace.domain for trace in kept}) == 10
    assert len(kept) + len(rows_of(tmp_path / "one" / "dropped.jsonl")) == len(read_traces(claude))


def test_finish_reason_stop_overrules_the_truncation_check(tmp_path: Path) -> None:
    rows = [row("Stop?", reasoning="So it is the", finish_reason="stop"), row("Cut?", reasoning="So it is the")]
    result = rbfast.curate([write_rows(tmp_path / "pool.jsonl", rows)], tmp_path / "out", CurateConfig(size=1))
    assert result.selected == 1
    assert rows_of(tmp_path / "out" / "dropped.jsonl")[0]["reason"] == "truncated: it ends on 'the'"


@pytest.mark.parametrize(
    ("ending", "is_complete"),
    [
        ("\n#### 25", True),
        ("\n<answer>25</answer>", True),
        ("\n\\boxed{25}", True),
        ("\n$\\boxed{25}$.", True),
        ("\n<answer>25</answer>\nBut the", False),
        ("\n<answer>2", False),
        ("\nThis is \\boxed{25}, since the", False),
    ],
)
def test_solution_is_complete_if_it_ends_in_a_marked_answer(tmp_path: Path, ending: str, is_complete: bool) -> None:
    working = "A can is 25 cents here.\nIt is 50 there.\nThat is more.\nSo it is 50 - 25 = 25 more expensive per can"
    rows = [{"question": "How much more is a can?", "answer": working + ending}, row("Is there another?")]
    result = rbfast.curate([write_rows(tmp_path / "pool.jsonl", rows)], tmp_path / "out")
    assert result.stages[0].dropped == ({} if is_complete else {"truncated": 1})


def test_empty_results_and_missing_sources_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row("Cut?", truncated=True)])
    assert main(["curate", str(pool), "-o", str(tmp_path / "out"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["selected"] == 0
    assert rows_of(tmp_path / "out" / "dropped.jsonl")[0]["reason"] == "truncated: its field truncated is true"
    assert (tmp_path / "out" / "datasheet.html").exists()
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="expected at least one trace"):
        rbfast.curate([empty], tmp_path / "out")
    with pytest.raises(TraceError, match="there is no such file"):
        rbfast.curate([tmp_path / "absent.jsonl"], tmp_path / "out")
    with pytest.raises(TraceError, match=r"math500: .* one of math-500, .*; there is no such file"):
        rbfast.curate([pool], tmp_path / "out", CurateConfig(against=["math500"]))


@pytest.mark.parametrize("rows_later", [1, 3])
def test_a_pool_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch, rows_later: int) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row("One?"), row("Two?")])
    fetch = curate._fetch

    def fetch_and_change(*arguments: Any) -> Any:
        rows = fetch(*arguments)
        write_rows(pool, [row(f"{number}?") for number in range(rows_later)])
        return rows

    monkeypatch.setattr(curate, "_fetch", fetch_and_change)
    with pytest.raises(ValueError, match="the pool changed while it was read: it no longer has 2 rows"):
        rbfast.curate([pool], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_command_line(small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = write_rows(tmp_path / "rates.jsonl", [{"problem": "Which is the right one of these?", "correct": True}])
    common = ["curate", str(small[0]), "-o", str(tmp_path / "out"), "--against", str(small[1]), "--size", "2"]
    assert main([*common, "--pass-rates", str(rates)]) == 0
    out, err = capsys.readouterr()
    assert "2 traces in" in out and "decontaminate: 8 in, 6 out" in out
    assert "Pass rates for 1 of 4 traces" in out
    assert "Pass rates for 1 of 4 traces" in (tmp_path / "out" / "datasheet.html").read_text(encoding="utf-8")
    assert main([*common, "--pass-rates", str(rates), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pass_rates"] == {"known": 1, "of": 4}
    assert re.findall(r"(assessing|fetching|writing) .* (\d+/\S+)", err) == [
        (stage, "12/12") for stage in ("assessing", "fetching", "writing")
    ]
    assert main([*common[:-1], "0"]) == 2
    assert "size and processes must be at least 1, got 0 and 1" in capsys.readouterr().err
    bad = write_rows(tmp_path / "bad.jsonl", [{"problem": "One?"}])
    assert main([*common, "--pass-rates", str(bad)]) == 2
    assert "bad.jsonl:1: expected a record of `rbfast eval -o`" in capsys.readouterr().err
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert main([*common, "--pass-rates", str(empty)]) == 2
    assert "empty.jsonl: expected records of `rbfast eval -o`, got none" in capsys.readouterr().err
    others = write_rows(tmp_path / "others.jsonl", [{"problem": "Something else?", "correct": False}])
    assert main([*common, "--pass-rates", str(others)]) == 2
    assert "none of the 4 traces to choose from has one of the 1 pass rates given" in capsys.readouterr().err


def shorter_is_better(trace: Trace) -> float:
    return -float(len(trace.reasoning))


def test_measures_are_pluggable(tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row(f"Say {word}?") for word in ("a", "abcdefgh", "abcd")])
    only = Weights(difficulty=0, quality=1, verified=0)
    rbfast.curate([pool], tmp_path / "out", CurateConfig(size=1, quality=shorter_is_better, weights=only, processes=2))
    sheet = json.loads((tmp_path / "out" / "datasheet.json").read_text(encoding="utf-8"))
    assert sheet["settings"]["weights"] == {"difficulty": 0, "quality": 1, "verified": 0}
    assert sheet["quality"]["edges"][-1] < 0
    result = rbfast.curate([pool], tmp_path / "none", CurateConfig(verify=lambda trace, row: False))
    assert result.stages[3].dropped == {"wrong answer": 3}
    with pytest.raises(ValueError, match="quality must return a finite number for every trace, got nan"):
        rbfast.curate([pool], tmp_path / "nan", CurateConfig(quality=lambda trace: math.nan))


@pytest.mark.parametrize(("weight", "kept"), [(0.75, "better"), (1.25, "right")])
def test_a_right_answer_counts_twice_as_much_as_an_unverified_one(tmp_path: Path, weight: float, kept: str) -> None:
    """The quality ranks of the two traces differ by a half, whatever the scale."""
    pool = [row("Which is the longer question?", id="right", verified=True), row("What is it?", id="better")]
    weights = Weights(difficulty=0, quality=1, verified=weight)
    config = CurateConfig(size=1, quality=shorter_is_better, weights=weights)
    rbfast.curate([write_rows(tmp_path / "pool.jsonl", pool)], tmp_path / "out", config)
    assert [trace.id for trace in read_traces(tmp_path / "out" / "reason1k.jsonl")] == [kept]


def test_difficulty_is_the_miss_rate_else_the_field_else_the_length() -> None:
    rows = [("", row(f"Problem {word}?", **more)) for word, more in (
        ("one", {}), ("two", {"difficulty": 9}), ("three three three", {}), ("four", {"difficulty": 4}),
    )]  # fmt: skip
    part = Assessor(Decontaminator([]))(rows)
    alive = np.ones(4, dtype=bool)
    values = _difficulties(part, _known_rates(part, {"problem  one?": 0.75}), alive)  # the same tokens
    assert values.tolist() == [0.25, 0.75, 0.875, 0.25]
    with pytest.raises(ValueError, match=r"pass rates must lie in \[0, 1\], got 3"):
        _known_rates(part, {"Problem one?": 3.0})


def test_ranks() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [0.75, 0.125, 0.75, 0.375]
    assert ranks(np.array([])).tolist() == []


@pytest.mark.parametrize(
    ("fields", "is_truncated"),
    [
        ({"finish_reason": "MAX_TOKENS"}, True),
        ({"stop_reason": "model_length"}, True),
        ({"finish_reason": "content_filter"}, True),
        ({"finish_reason": "max_completion_tokens"}, True),
        ({"truncated": "true"}, True),
        ({"finish_reason": ["stop"], "truncated": []}, False),
        ({"reasoning": "So it is the", "finish_reason": "STOP"}, False),
        ({"reasoning": "So it is the", "finish_reason": "completed"}, False),
    ],
)
def test_truncation_is_recognised_in_the_fields_of_any_server(fields: dict[str, Any], is_truncated: bool) -> None:
    [flaw] = Assessor(Decontaminator([]))([("p.jsonl:1", row("What?", **fields))]).flaws
    assert (flaw or "").startswith("truncated: ") == is_truncated


def test_pass_rates_are_means_over_tries(tmp_path: Path) -> None:
    tries = [("One?", True), ("One?", False), ("Two?", True)]
    path = write_rows(tmp_path / "eval.jsonl", [{"problem": p, "correct": c, "score": 1.0} for p, c in tries])
    assert read_pass_rates(path) == {"One?": 0.5, "Two?": 1.0}


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({}, None),
        ({"verified": True, "reference": "8"}, True),
        ({"verified": False}, False),
        ({"reference": "7"}, True),
        ({"reference": 7}, True),
        ({"reference": "8"}, False),
        ({"reference": "1 + 6 = 7\n#### 7"}, True),
        ({"reference": "We add the six to the one. So there are seven of them."}, None),
        ({"reference": "1 2\n3 4"}, False),
        ({"reference": ""}, None),
        ({"reference": "N/A"}, None),
        ({"reference": math.nan}, None),
        ({"answer": "\\frac{3}{4}", "reference": "0.75"}, True),
        ({"answer": "\\frac12", "reference": "The half: $\\boxed{\\dfrac{1}{2}}$"}, True),
        ({"answer": "3/4", "reference": "0.75"}, True),
        ({"answer": "3/5", "reference": "0.75"}, False),
        ({"answer": "1+x^2", "reference": "$x^2 + 1$"}, True),
        ({"answer": "(1,2]", "reference": "(1, 2]"}, True),
        ({"answer": "Ann and Bob", "reference": "ann and bob"}, True),
    ],
)
def test_answers_are_verified(fields: dict[str, Any], verdict: bool | None) -> None:
    given = row("What?", **fields)
    assert verify_answer(Trace.from_dict(given), given) is verdict


def test_several_processes_need_module_level_functions(tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row("Write 7.")])
    with pytest.raises(ValueError, match="quality, difficulty, verify and embed must be functions of a module"):
        rbfast.curate([pool], tmp_path / "out", CurateConfig(quality=lambda trace: 1.0, processes=2))


def test_a_verifier_gets_the_fields_of_a_row_in_any_format(tmp_path: Path) -> None:
    given = {"question": "Write 7.", "response": "I write it. The answer is 7", "finish_reason": "stop", "tests": ["7"]}
    pool = write_rows(tmp_path / "pool.jsonl", [given, {**given, "question": "Write 8.", "tests": ["8"]}])
    config = CurateConfig(verify=lambda trace, row: trace.answer in row["tests"] and row["finish_reason"] == "stop")
    rbfast.curate([pool], tmp_path / "out", config)
    assert [kept["problem"] for kept in rows_of(tmp_path / "out" / "reason1k.jsonl")] == ["Write 7."]


def test_invalid_weights_are_refused() -> None:
    for wrong in ({"quality": -1.0}, {"difficulty": 0.0, "quality": 0.0, "verified": 0.0}, {"quality": math.inf}):
        with pytest.raises(ValueError, match="weights must be finite, 0 or more and not all 0"):
            Weights(**wrong)


def test_duplicates_do_not_count_as_eligible(tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row("What is 3 + 4?")] * 6 + [row("How many days has a week?")])
    result = rbfast.curate([pool], tmp_path / "out", CurateConfig(size=1))
    dropped = rows_of(tmp_path / "out" / "dropped.jsonl")
    assert Counter(record["stage"] for record in dropped) == {"dedup": 5, "select": 1}
    assert result.datasheet["domains"] == [{"domain": "unknown", "before": 7, "eligible": 2, "after": 1}]


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_seed_may_be_any_integer(tmp_path: Path, seed: int) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row("What is 3 + 4?"), row("How many days has a week?")])
    assert rbfast.curate([pool], tmp_path / "out", CurateConfig(size=1, seed=seed)).selected == 1


def test_seed_chooses_among_equal_traces(tmp_path: Path) -> None:
    words = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
    pool = write_rows(tmp_path / "pool.jsonl", [row(f"What is one {word}?") for word in words])

    def chosen(seed: int) -> str:
        rbfast.curate([pool], tmp_path / "out", CurateConfig(size=1, seed=seed))
        return (tmp_path / "out" / "reason1k.jsonl").read_text(encoding="utf-8")

    assert chosen(0) == chosen(0)
    assert len({chosen(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("verdict", ["wrong", 0.5, math.nan])
def test_a_verdict_that_is_not_a_bool_is_refused(tmp_path: Path, verdict: object) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row("What is 1 + 1?")])
    with pytest.raises(ValueError, match="verify must return True, False or None, got"):
        rbfast.curate([pool], tmp_path / "out", CurateConfig(verify=lambda trace, fields: verdict))  # type: ignore[arg-type, return-value]


def test_one_evaluation_set_needs_no_list(tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row("What is 1 + 1?")])
    for against in (pool, str(pool)):
        sheet = rbfast.curate([pool], tmp_path / "out", CurateConfig(against=against)).datasheet  # type: ignore[arg-type]
        assert sheet["settings"]["against"] == [str(pool)] and sheet["evaluation_problems"] == 1


def test_the_datasheet_names_domains_in_any_script(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", [row("What is 1 + 1?", domain="\u4e2d\u6587")])
    rbfast.curate([pool], tmp_path / "out")
    assert "<td>\u4e2d\u6587</td>" in (tmp_path / "out" / "datasheet.html").read_text(encoding="utf-8")
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]
