"""The shapes in which people hold traces: each read as it is, broken rows named, what is ambiguous asked for.

`formats/` has one file per shape, written by hand, that all say the same thing.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from rbfast.cli.main import main
from rbfast.curation.curate import CurateConfig, curate
from rbfast.data.answers import stated_answer, without_answer
from rbfast.data.conversations import split_thinking
from rbfast.data.formats import FormatOptions, interpret, question_of
from rbfast.data.readers import TraceReader, read_traces
from rbfast.data.trace import Trace, TraceError
from rbfast.grading.tasks import load_problems
from rbfast.teacher.solutions import read_questions

SHAPES = Path(__file__).parent / "formats"
QUESTION, THOUGHT = "What is 20 + 22?", "Add them: 20 + 22 = 42."
SYSTEM = "Your role is to think at length before you answer."
PLAIN: dict[str, Any] = {"problem": QUESTION, "reasoning": THOUGHT, "answer": "42"}

# What differs from PLAIN, and as what the row is read.
GOLDEN: dict[str, tuple[dict[str, Any], str]] = {
    "native": ({"id": "7", "domain": "arithmetic"}, "native traces"),
    "s1k": ({"domain": "math", "source": "made/by_hand"}, "s1K trajectories"),
    "s1k_1_1": (
        {"domain": "math", "source": "made/by_hand", "teacher": "deepseek", "verified": True},
        "s1K trajectories",
    ),
    "limo": ({"reasoning": f"{THOUGHT}\n\n**Final Answer**\n\n\\boxed{{42}}"}, "problems with solutions"),
    "openthoughts_114k": ({"system": SYSTEM}, "OpenThoughts conversations"),
    "openthoughts_metadata": (
        {"domain": "math", "source": "made", "teacher": "deepseek"},
        "problems with deepseek_reasoning",
    ),
    "openthoughts_3": ({"domain": "math", "source": "made", "difficulty": 3}, "conversations"),
    "bespoke_stratos": (
        {"problem": f"Return your final response within \\boxed{{}}. {QUESTION}", "system": SYSTEM},
        "OpenThoughts conversations",
    ),
    "mixture_of_thoughts": ({"source": "made"}, "conversations"),
    "am_deepseek_r1": ({"source": "made"}, "conversations"),
    "messages_reasoning_content": ({}, "conversations"),
    "messages_reasoning": ({"system": SYSTEM}, "conversations"),
    "messages_thinking": ({}, "conversations"),
    "messages_think_content": ({}, "conversations"),
    "messages_think_role": ({}, "conversations"),
    "claude_blocks": ({}, "conversations"),
    "lone_closing_tag": ({}, "conversations"),
    "harmony": ({}, "conversations"),
    "messages_as_lists": ({}, "conversations"),
    "messages_as_json": ({}, "conversations"),
    "llama_nemotron": (
        {"domain": "math", "teacher": "their-model", "system": "detailed thinking on"},
        "prompts with completions",
    ),
    "numinamath_cot": ({"reasoning": f"{THOUGHT} So it is $\\boxed{{42}}$.", "source": "made"}, "conversations"),
    "gsm8k": ({}, "problems with solutions"),
    "math": ({"reasoning": f"{THOUGHT} So it is $\\boxed{{42}}$.", "domain": "Algebra"}, "problems with solutions"),
    "instruction_output": (
        {"problem": "Add the numbers.\n\n20, 22", "reasoning": f"{THOUGHT}\nThe answer is 42."},
        "prompts with completions",
    ),
    "prompt_completion": ({}, "prompts with completions"),
    "prompt_completion_turns": ({"system": SYSTEM}, "prompts with completions"),
    "openai_batch": ({"teacher": "their-model-1", "id": "r-1"}, "OpenAI batch rows"),
    "anthropic_batch": ({"teacher": "their-model", "id": "r-1", "system": SYSTEM}, "Anthropic batch rows"),
    "medical_o1": ({"answer": "The sum is 42."}, "problems with Complex_CoT"),
    "deepmath": ({"domain": "Addition", "teacher": "r1", "difficulty": 1.5}, "problems with generations"),
    "openmathreasoning": ({"domain": "has_answer_extracted", "teacher": "their-model"}, "prompts with completions"),
    "rationale": ({}, "problems with rationale"),
}


def row_of(name: str) -> Any:
    return json.loads((SHAPES / f"{name}.jsonl").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_shape_is_read_as_it_is(name: str) -> None:
    changes, said = GOLDEN[name]
    reader = TraceReader(SHAPES / f"{name}.jsonl")
    assert list(reader) == [Trace.from_dict(PLAIN | changes)]
    assert reader.summary() == f"reads 1 row as {said}"


def test_every_right_generation_that_is_whole_is_a_trace() -> None:
    reader = TraceReader(SHAPES / "openr1_math.jsonl")
    about = {"domain": "Algebra", "source": "made", "verified": True}
    second = PLAIN | {"reasoning": "Add it all: 20 + 22 = 42."}
    assert [trace.to_dict() for trace in reader] == [PLAIN | about | {"id": "u-1/1"}, second | about | {"id": "u-1/3"}]
    assert reader.summary() == "reads 1 row as OpenR1 generations"


def test_every_shape_here_is_tested() -> None:
    assert {path.stem for path in SHAPES.glob("*.jsonl")} == {*GOLDEN, "openr1_math"}


@pytest.mark.parametrize("verdicts", [{"correctness_llama": [False] * 4, "correctness_math_verify": [False] * 4}, None])
def test_with_no_right_generation_the_first_is_taken(verdicts: Any) -> None:
    row = row_of("openr1_math")
    row |= verdicts or {"correctness_llama": None, "correctness_math_verify": None}
    [found] = interpret(row).rows
    assert found["answer"] == "41"
    assert found.get("verified") is (False if verdicts else None)
    assert found.get("reference") == (None if verdicts else "42")


def test_generations_that_were_all_cut_are_no_trace() -> None:
    with pytest.raises(TraceError, match="generations: expected a whole reply, got 4 that were cut"):
        interpret(row_of("openr1_math") | {"finish_reasons": ["length"] * 4})


def test_the_teacher_can_be_chosen_and_has_to_be_without_grades() -> None:
    row = row_of("s1k_1_1")
    for name in ("gemini", "gemini_thinking_trajectory"):
        [found] = interpret(row, FormatOptions(teacher_field=name)).rows
        assert (found["teacher"], found["answer"], found["verified"]) == ("gemini", "41", False)
    with pytest.raises(TraceError, match="expected a field of the teacher 'claude', got gemini_thinking_trajectory, "):
        interpret(row, FormatOptions(teacher_field="claude"))
    ungraded = row | {"gemini_grade": None, "deepseek_grade": None}
    with pytest.raises(TraceError, match=r"gemini_thinking_trajectory and deepseek_.*--teacher-field gemini"):
        interpret(ungraded)
    neither = row | {"deepseek_grade": "No"}
    assert interpret(neither).rows[0]["verified"] is False


# ----------------------------------------------------------------------------------------------------- broken, unclear


def conversation(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "expected an object with problem, reasoning, answer, got str 'text'"),
        ({}, "problem: expected this field, got no fields"),
        ({"a": "1", "b": "2"}, "problem: expected this field, got a, b; name the fields with --map problem=FIELD"),
        ({"problem": "p", "answer": "42"}, "reasoning: expected this field, got problem, answer; name the fields"),
        ({"question": "p", "solution": "Add."}, r"problems with solutions: answer: .*--map answer=FIELD"),
        ({"question": "p", "solution": "42", "answer": 42}, "reasoning: expected working before the answer, got none"),
        ({"question": "p", "prompt": "q", "output": "\\boxed{1}"}, "question and prompt; .*problem=question"),
        ({"prompt": "p", "response": "a", "output": "b"}, "reply: expected one field .* response and output"),
        ({"prompt": "p", "response": "So.", "answer": "1", "gold": "2"}, "answer: expected one .* answer and gold"),
        (conversation(("user", "p")), "reasoning: expected this field, got messages"),
        (conversation(("user", "p"), ("user", "q"), ("assistant", "b")), "in turn, got user, user, assistant"),
        (conversation(("user", "p"), ("assistant", "a"), ("assistant", "b")), "got user, assistant, assistant"),
        (conversation(("assistant", "a"), ("user", "p")), "in turn, got assistant, user"),
        (conversation(("user", "p"), ("tool", "{}")), "turn 2: expected a role of .*, got 'tool'"),
        (conversation(("user", [{"type": "image_url", "image_url": {}}])), "turn 1: content: .* got image_url"),
        (conversation(("user", "p"), ("assistant", 5)), "turn 2: content: expected text or .* got int 5"),
        (conversation(("user", "p"), ("assistant", "<think>Hm")), "<think> is opened and never closed"),
        (conversation(("user", "p"), ("assistant", "Hello there.")), r"read as conversations: answer: .*neither"),
        (conversation(("user", "p"), ("assistant", "<answer>42</answer>")), "reasoning: expected working"),
        ({"custom_id": "r", "response": {"body": {"choices": [{"message": {}}]}}}, "holds no questions: join it"),
        ({"custom_id": "r", "body": conversation(("user", "p")), "error": {"code": "500"}}, "got the error dict"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_trace_says_what_to_pass(row: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        interpret(row)


@pytest.mark.parametrize(
    "row",
    [
        {"input": QUESTION, "reasoning_content": THOUGHT, "content": "42", "repo_name": "r", "score": 9},
        {"messages": [{"role": "user", "content": QUESTION}], "reasoning": THOUGHT, "answer": "#### 42", "model": None},
        {"conversation": [{"human": QUESTION, "assistant": f"<think>{THOUGHT}</think>42"}], "lang": "en"},
        {"query": QUESTION, "response": f"<think>{THOUGHT}</think> \\boxed{{42}}", "original_question": "Another"},
        {"Problem": QUESTION, "Chain of Thought": THOUGHT, "Final Answer": 42},
        {"question": QUESTION, "steps": [THOUGHT], "final_answer": 42.0},
        {"prompt": QUESTION, "chosen": f"<think>{THOUGHT}</think>42", "rejected": "<think>No.</think>41"},
        {"user": QUESTION, "assistant": f"<Thought>{THOUGHT}</Thought><Output>42</Output>"},
        {"chat": json.dumps([{"from": "user", "value": QUESTION}, {"from": "bot", "value": f"{THOUGHT}</think>42"}])},
        {"prompt": [{"role": "user", "content": QUESTION}], "reply": {"role": "ai", "thought": THOUGHT, "text": "42"}},
        {"question": QUESTION, "context": "", "samples": [{"text": f"<think>{THOUGHT}</think>42"}]},
    ],
)  # fmt: skip
def test_shapes_without_a_name_are_read_by_what_their_fields_mean(row: Any) -> None:
    [found] = interpret(row).rows
    assert {name: found[name] for name in PLAIN} == PLAIN


def test_a_flag_is_not_thinking_and_an_empty_thought_is_none() -> None:
    row = row_of("llama_nemotron") | {
        "reasoning": "off",
        "output": f"<think>\n\n</think>\n\n{THOUGHT} So \\boxed{{42}}.",
    }
    assert interpret(row).rows[0]["reasoning"] == f"{THOUGHT} So \\boxed{{42}}."


def test_fields_and_formats_can_be_named() -> None:
    row = {"q": QUESTION, "work": THOUGHT, "info": {"gold": 42.0}, "prompt": "another"}
    fields = {"problem": "q", "reasoning": "work", "answer": "info.gold"}
    assert interpret(row, FormatOptions(fields=fields)).rows == [PLAIN]
    with pytest.raises(TraceError, match=r"info\.silver: expected this field, got q, work, info, prompt"):
        interpret(row, FormatOptions(fields=fields | {"answer": "info.silver"}))
    both = row_of("numinamath_cot")
    assert interpret(both, FormatOptions("solutions")).name == "problems with solutions"
    with pytest.raises(TraceError, match="reasoning: expected this field, got "):
        interpret(both, FormatOptions("trajectories"))
    with pytest.raises(TraceError, match="reasoning: expected this field, got source, problem"):
        interpret(both, FormatOptions("native"))
    with pytest.raises(ValueError, match=r"format: expected one of native, .*, got 'alpaca'"):
        FormatOptions("alpaca")
    with pytest.raises(ValueError, match=r"map: expected one of problem, .*, got gold"):
        FormatOptions(fields={"gold": "a"})


def test_a_known_answer_and_a_cut_reply_are_passed_on() -> None:
    row = {"prompt": "p", "response": "I add. It is \\boxed{5}.", "answer": 6, "finish_reason": "length"}
    [found] = interpret(row).rows
    assert (found["answer"], found["reference"], found["finish_reason"]) == ("5", "6", "length")


@pytest.mark.parametrize(
    ("text", "answer", "rest"),
    [
        (r"So \boxed{1} or \boxed{\frac{1}{2}}.", r"1, \frac{1}{2}", r"So \boxed{1} or \boxed{\frac{1}{2}}."),
        (r"\boxed{\{1, 2\}} and \boxed{cut", r"\{1, 2\}", r"\boxed{\{1, 2\}} and \boxed{cut"),
        ("2 + 2 = 4\n#### 1,000", "1,000", "2 + 2 = 4"),
        ("Add. <answer> 4 </answer>", "4", "Add."),
        ("<answer>It is \\boxed{4}.</answer>", "4", ""),
        ("Two.\nThe answer is **4**.", "4", "Two.\nThe answer is **4**."),
        ("The answer is not clear.\nGoodbye.", None, "The answer is not clear.\nGoodbye."),
        ("", None, ""),
    ],
)
def test_stated_answers(text: str, answer: str | None, rest: str) -> None:
    assert stated_answer(text) == answer
    assert without_answer(text) == rest


@pytest.mark.parametrize(
    ("reply", "thought", "text"),
    [
        ("<think>a</think>b", "a", "b"),
        ("<thinking>a</thinking>\n<think>c</think>b", "a\n\nc", "b"),
        ("a\n</think>\n\nb<|im_end|>\n", "a", "b"),
        ("[THINK]a[/THINK]b</s>", "a", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "a", "b"),
        ("<Thought>a</Thought><Output>b</Output>", "a", "b"),
        ("The tag <think> opens it.", None, "The tag <think> opens it."),
    ],
)  # fmt: skip
def test_thinking_is_split_from_the_reply(reply: str, thought: str | None, text: str) -> None:
    assert split_thinking(reply) == (thought, text)


# --------------------------------------------------------------------------------------------------------- whole files


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Rows of two shapes between two that cannot be read."""
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


def test_a_source_without_a_trace_is_given_up_after_100_rows(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    row = json.dumps(conversation(("user", "Hi"), ("assistant", "Hello.")))
    path.write_text(f"{row}\n" * 100 + "x" * 10**6)
    message = r"chat\.jsonl:1: read as conversations: answer: .*\(and none of the first 100 rows is read\)"
    with pytest.raises(TraceError, match=message):
        read_traces(path, on_error="skip")
    with pytest.raises(
        TraceError, match=r"chat\.jsonl: none of the first 100 rows is a trace, the first: read as conv"
    ):
        curate([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_curate_reads_any_shape_alike(mixed: Path, tmp_path: Path) -> None:
    pool = [mixed, *sorted(SHAPES.glob("*.jsonl"))]
    result = curate(pool, tmp_path / "out", CurateConfig(size=50))
    assert result.formats[mixed] == ["problems with solutions", "s1K trajectories"]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    reasons = {entry["where"]: entry["reason"] for entry in dropped}
    assert reasons[f"{mixed}:2"].startswith(f"not a trace: {mixed}:2, column 8: expected JSON")
    several = [where for where in reasons if where.startswith(f"{SHAPES / 'openr1_math.jsonl'}:1 (")]
    assert several and all(reasons[where] == "the same problem" for where in several)
    assert len(dropped) + result.selected == 5 + len(GOLDEN) + 2
    assert {trace.answer for trace in read_traces(tmp_path / "out" / "reason1k.jsonl")} <= {"42", "The sum is 42."}


def test_convert_lists_what_it_could_not_read_and_goes_on(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_datasets_makes_lists_of_spans(tmp_path: Path) -> None:
    spans = {"start": [0, 9], "end": [9, 23], "role": ["strategic", "tactical"]}
    listed = [[0, 9, "strategic"], [9, 23, "tactical"]]
    assert Trace.from_dict(PLAIN | {"spans": spans}) == Trace.from_dict(PLAIN | {"spans": listed})


# ----------------------------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize("name", [*GOLDEN, "openr1_math"])
def test_the_question_of_every_shape_is_found(name: str) -> None:
    found = question_of(row_of(name))
    assert found["problem"] == GOLDEN.get(name, ({}, ""))[0].get("problem", QUESTION)
    assert found.get("answer", "42") == "42"


def test_teach_and_eval_take_problems_of_these_shapes(tmp_path: Path) -> None:
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


def test_a_question_after_other_turns_is_not_asked_alone():
    with pytest.raises(TraceError, match="expected a question alone, got one after 2 turns"):
        question_of(conversation(("user", "1+1?"), ("assistant", "2"), ("user", "And twice that?")))


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ("hello", "expected .*role.* got str 'hello'"),
        ([{"role": "assistant", "content": "a"}], "expected the role user in turn 1, got str 'assistant'"),
        ([{"role": "user", "content": "a"}], "expected a reply to every question"),
        ([{"role": "user", "content": 3}], "content of turn 1: expected a string, got int 3"),
    ],
)
def test_turns_of_another_form_are_named(turns, fault):
    with pytest.raises(TraceError, match=f"^turns: {fault}"):
        Trace.from_dict(PLAIN | {"turns": turns})
