"""Files of any format through curation, conversion and teaching; unreadable rows; earlier turns."""

import json
from pathlib import Path

import pytest
from trace_shapes import GOLDEN, PLAIN, QUESTION, SHAPES, SYSTEM, THOUGHT, conversation, row_of

from rbfast.cli.main import main
from rbfast.curation.curate import CurateConfig, curate
from rbfast.data.formats import FormatOptions, question_of
from rbfast.data.readers import read_traces
from rbfast.data.trace import Trace, TraceError
from rbfast.grading.tasks import load_problems
from rbfast.teacher.solutions import read_questions


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A file with rows of two formats and two unreadable rows."""
    path = tmp_path / "mixed.jsonl"
    rows = [json.dumps(row_of("gsm8k")), '{"torn"]', json.dumps(row_of("s1k")), json.dumps({"prompt": "?"})]
    path.write_text("\n".join([*rows, json.dumps(row_of("gsm8k"))]))
    return path


def test_bad_rows_can_be_skipped_and_are_listed(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TraceError, match=r"mixed\.jsonl:2, column 8: expected JSON"):
        read_traces(mixed)
    unreadable = mixed.with_name("bad.jsonl")
    traces = read_traces(mixed, on_error="skip", unreadable=unreadable)
    assert [trace.answer for trace in traces] == ["42"] * 3
    assert "reads 2 rows as problems with solutions and 1 row as s1K trajectories; 2 rows not read" in caplog.text
    listed = [json.loads(line) for line in unreadable.read_text().splitlines()]
    assert [entry["where"] for entry in listed] == [f"{mixed}:2", f"{mixed}:4"]
    assert listed[1]["reason"] == (
        f"{mixed}:4: reasoning: expected this field, got prompt; "
        "name the fields with --map problem=FIELD,reasoning=FIELD,answer=FIELD"
    )
    with pytest.raises(ValueError, match="on_error: expected"):
        read_traces(mixed, on_error="ignore")  # type: ignore[arg-type]


def test_source_without_traces_is_refused_after_100_rows(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    row = json.dumps(conversation(("user", "Hi"), ("assistant", "Hello.")))
    path.write_text(f"{row}\n" * 100 + "x" * 10**6)
    message = r"chat\.jsonl:1: read as conversations: answer: .*\(none of the first 100 rows can be read\)"
    with pytest.raises(TraceError, match=message):
        read_traces(path, on_error="skip")
    with pytest.raises(
        TraceError, match=r"chat\.jsonl: none of the first 100 rows is a trace, the first: read as conv"
    ):
        curate([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_curate_reads_every_format(mixed: Path, tmp_path: Path) -> None:
    pool = [mixed, *sorted(SHAPES.glob("*.jsonl"))]
    result = curate(pool, tmp_path / "out", CurateConfig(size=50))
    assert result.formats[mixed] == ["problems with solutions", "s1K trajectories"]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    reasons = {entry["where"]: entry["reason"] for entry in dropped}
    assert reasons[f"{mixed}:2"].startswith(f"not a trace: {mixed}:2, column 8: expected JSON")
    generations = [where for where in reasons if where.startswith(f"{SHAPES / 'openr1_math.jsonl'}:1 (")]
    assert generations and all(reasons[where] == "the same problem" for where in generations)
    assert len(dropped) + result.selected == 5 + len(GOLDEN) + 2
    assert {trace.answer for trace in read_traces(tmp_path / "out" / "reason1k.jsonl")} <= {"42", "The sum is 42."}


def test_convert_lists_unreadable_rows_and_continues(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = mixed.with_name("out.jsonl")
    assert main(["convert", str(mixed), "-o", str(out)]) == 0
    assert "reads 2 rows as problems with solutions and 1 row as s1K trajectories" in capsys.readouterr().out
    assert [trace.answer for trace in read_traces(out)] == ["42"] * 3
    assert len((mixed.parent / "out.unreadable.jsonl").read_text().splitlines()) == 2
    assert main(["convert", str(mixed), "-o", str(out), "--format", "trajectories", "--json"]) == 0
    result = {"out": str(out), "traces": 1, "unreadable": 4, "rows": {"s1K trajectories": 1}}
    assert json.loads(capsys.readouterr().out) == result
    assert main(["convert", str(mixed), "-o", str(out), "--map", "problem:q"]) == 2
    assert "map: expected problem=FIELD,answer=FIELD, got 'problem:q'" in capsys.readouterr().err
    assert main(["convert", str(mixed), "-o", str(out), "--map", "answer=gold"]) == 1
    assert "nothing written to" in capsys.readouterr().out and len(list(read_traces(out))) == 1  # of the earlier call


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.parquet", "out.csv", "out.json", "out"])
def test_convert_refuses_other_output_suffixes(mixed: Path, name: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["convert", str(mixed), "-o", str(mixed.with_name(name))])
    assert f"{name}: expected a name that ends in .jsonl" in capsys.readouterr().err
    assert not mixed.with_name(name).exists()


def test_verdicts_survive_conversion_and_curation(tmp_path: Path) -> None:
    steps = "".join(f"They add {n} more boxes to the pile.\n" for n in range(1, 5))
    rows = [
        {"question": QUESTION, "answer": f"{steps}So they have 10 boxes in\n#### 10"},  # `####` marks it as complete
        {"prompt": "What is 2 + 2?", "completion": r"Two and two make 5. It is \boxed{5}", "answer": "4"},
        {"prompt": "What is 3 + 3?", "completion": r"Three and three make 6. It is \boxed{6}", "answer": "6"},
    ]
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["convert", str(path), "-o", str(tmp_path / "pool.jsonl")]) == 0
    chosen = [tmp_path / "0" / "reason1k.jsonl", tmp_path / "1" / "reason1k.jsonl"]
    for number, pool in enumerate([path, tmp_path / "pool.jsonl", *chosen]):
        verdicts = curate([pool], tmp_path / str(number)).datasheet["verified"]
        assert [verdicts[name]["before"] for name in ("right", "wrong", "unverified")] == [1, int(number < 2), 1]
        assert [verdicts[name]["after"] for name in ("right", "wrong", "unverified")] == [1, 0, 1]


def test_spans_may_be_an_object_of_lists(tmp_path: Path) -> None:
    """As `datasets` stores them."""
    spans = {"start": [0, 9], "end": [9, 23], "role": ["strategic", "tactical"]}
    listed = [[0, 9, "strategic"], [9, 23, "tactical"]]
    assert Trace.from_dict(PLAIN | {"spans": spans}) == Trace.from_dict(PLAIN | {"spans": listed})


# ----------------------------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize("name", [*GOLDEN, "openr1_math"])
def test_question_is_read_from_every_format(name: str) -> None:
    question = question_of(row_of(name))
    assert question["problem"] == GOLDEN.get(name, ({}, ""))[0].get("problem", QUESTION)
    assert question.get("answer", "42") == "42"


def test_teach_and_eval_read_problems_in_these_formats(tmp_path: Path) -> None:
    for name in ("math", "limo", "openthoughts_3", "openai_batch"):
        [question] = read_questions(SHAPES / f"{name}.jsonl")
        assert (question.text, question.known.answer if question.known else "42") == (QUESTION, "42")
    for name in ("math", "gsm8k", "am_deepseek_r1", "openmathreasoning"):
        [problem] = load_problems(str(SHAPES / f"{name}.jsonl"), None, 0)
        assert (problem.question, problem.answer) == (QUESTION, "42")
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps([row_of("math")]))
    assert load_problems(str(listed), 1, 0)[0].answer == "42"
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"q": "What?", "gold": 3}))
    options = FormatOptions(fields={"problem": "q", "answer": "gold"})
    [problem] = load_problems(str(path), None, 0, options=options)
    [question] = read_questions(path, options=options)
    assert problem.answer == question.known.answer == "3"  # type: ignore[union-attr]


# -------------------------------------------------------------------------------------------------------- earlier turns


def test_earlier_turns_are_kept_with_their_thoughts(tmp_path):
    turns = [("system", SYSTEM), ("user", "What is 1 + 1?"), ("assistant", "<think>Add.</think>It is 2.")]
    turns += [("user", "And twice that?"), ("assistant", "Twice 2."), ("user", QUESTION)]
    row = conversation(*turns, ("assistant", f"<think>{THOUGHT}</think>\\boxed{{42}}"))
    (tmp_path / "turns.jsonl").write_text(json.dumps(row) + "\n")
    [trace] = read_traces(tmp_path / "turns.jsonl")
    assert (trace.problem, trace.reasoning, trace.answer, trace.system) == (QUESTION, THOUGHT, "42", SYSTEM)
    assert trace.turns == (
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "It is 2.", "reasoning": "Add."},
        {"role": "user", "content": "And twice that?"},
        {"role": "assistant", "content": "Twice 2."},
    )
    (tmp_path / "again.jsonl").write_text(json.dumps(trace.to_dict()) + "\n")
    assert read_traces(tmp_path / "again.jsonl") == [trace]
    as_lists = trace.to_dict() | {
        "turns": {
            "role": [turn["role"] for turn in trace.turns],
            "content": [turn["content"] for turn in trace.turns],
            "reasoning": [turn.get("reasoning") for turn in trace.turns],
        }
    }
    assert Trace.from_dict(as_lists) == trace


def test_problem_of_a_trace_takes_precedence_over_its_messages() -> None:
    row = {"problem": "1+1?", "reasoning": "Add.", "answer": "2"}
    assert question_of(row | conversation(("user", "Solve: 1+1?"), ("assistant", "2")))["problem"] == "1+1?"


@pytest.mark.parametrize(
    ("reference", "answer"),
    [("43", "43"), (43, "43"), ("Add.\n#### 43", "43"), ("It is long. So we leave it out here.", "44")],
)
def test_reference_of_a_trace_is_its_known_answer(reference, answer):
    row = {"problem": "12 + 31?", "reasoning": "Add.", "answer": "44", "reference": reference}
    assert question_of(row) == {"problem": "12 + 31?", "answer": answer}
    assert question_of(row | {"gold": "45"}, FormatOptions(fields={"answer": "gold"}))["answer"] == "45"


def test_question_after_earlier_turns_is_refused():
    with pytest.raises(TraceError, match="expected a question alone, got one after 2 turns"):
        question_of(conversation(("user", "1+1?"), ("assistant", "2"), ("user", "And twice that?")))
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(TraceError, match="expected a question alone, got one after 2 turns"):
        question_of({"problem": "And twice that?", "reasoning": "2 * 2", "answer": "4", "turns": turns})


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hello", "expected .*role.* got str 'hello'"),
        ([{"role": "assistant", "content": "a"}], "expected the role user in turn 1, got str 'assistant'"),
        ([{"role": "user", "content": "a"}], "expected a reply to every question"),
        ([{"role": "user", "content": 3}], "content of turn 1: expected a string, got int 3"),
    ],
)
def test_error_describes_malformed_turns(turns, message):
    with pytest.raises(TraceError, match=f"^turns: {message}"):
        Trace.from_dict(PLAIN | {"turns": turns})
