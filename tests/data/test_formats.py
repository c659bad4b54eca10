"""Reading every trace format, and the errors for broken or ambiguous rows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from trace_shapes import GOLDEN, PLAIN, QUESTION, SHAPES, THOUGHT, conversation, row_of

from rbfast.data.answers import stated_answer, without_answer
from rbfast.data.conversations import split_thinking
from rbfast.data.formats import FormatOptions, interpret, question_of
from rbfast.data.readers import TraceReader
from rbfast.data.trace import Trace, TraceError


@pytest.mark.parametrize("name", GOLDEN)
def test_every_format_is_recognised(name: str) -> None:
    changes, format_name = GOLDEN[name]
    reader = TraceReader(SHAPES / f"{name}.jsonl")
    assert list(reader) == [Trace.from_dict(PLAIN | changes)]
    assert reader.summary() == f"reads 1 row as {format_name}"


def test_every_correct_complete_generation_is_a_trace() -> None:
    reader = TraceReader(SHAPES / "openr1_math.jsonl")
    about = {"domain": "Algebra", "source": "made", "verified": True}
    second = PLAIN | {"reasoning": "Add it all: 20 + 22 = 42."}
    assert [trace.to_dict() for trace in reader] == [PLAIN | about | {"id": "u-1/1"}, second | about | {"id": "u-1/3"}]
    assert reader.summary() == "reads 1 row as OpenR1 generations"


def test_every_format_file_is_tested() -> None:
    assert {path.stem for path in SHAPES.glob("*.jsonl")} == {*GOLDEN, "openr1_math"}


@pytest.mark.parametrize("verdicts", [{"correctness_llama": [False] * 4, "correctness_math_verify": [False] * 4}, None])
def test_first_generation_is_used_if_none_is_marked_correct(verdicts: Any) -> None:
    row = row_of("openr1_math")
    row |= verdicts or {"correctness_llama": None, "correctness_math_verify": None}
    [trace] = interpret(row).rows
    assert trace["answer"] == "41"
    assert trace.get("verified") is (False if verdicts else None)
    assert trace.get("reference") == (None if verdicts else "42")


def test_row_with_only_truncated_generations_is_refused() -> None:
    with pytest.raises(TraceError, match="generations: expected a complete reply, got 4 truncated"):
        interpret(row_of("openr1_math") | {"finish_reasons": ["length"] * 4})


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({"finish_reason": "length"}, "its finish_reason is length"),
        ({"done_reason": "length"}, "its done_reason is length"),
        ({"stop_reason": "MAX_TOKENS"}, "its stop_reason is MAX_TOKENS"),
        ({"truncated": True}, "its field truncated is true"),
    ],
)
@pytest.mark.parametrize(
    "row", [PLAIN, {"prompt": QUESTION, "completion": "Add. The answer is 42"}], ids=["native", "other"]
)
def test_reply_truncated_by_its_server_is_refused(
    tmp_path: Path, row: dict[str, Any], end: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, [row | end, row])))
    reader = TraceReader(path, skip=True)
    assert len(reader.all()) == 1 and f"truncated: {reason}" in reader.unreadable[0][1]


def test_teacher_field_selects_a_teacher_and_is_required_without_grades() -> None:
    row = row_of("s1k_1_1")
    for name in ("gemini", "gemini_thinking_trajectory"):
        [trace] = interpret(row, FormatOptions(teacher_field=name)).rows
        assert (trace["teacher"], trace["answer"], trace["verified"]) == ("gemini", "41", False)
    with pytest.raises(TraceError, match="expected a field of the teacher 'claude', got gemini_thinking_trajectory, "):
        interpret(row, FormatOptions(teacher_field="claude"))
    ungraded = row | {"gemini_grade": None, "deepseek_grade": None}
    with pytest.raises(TraceError, match=r"gemini_thinking_trajectory and deepseek_.*--teacher-field gemini"):
        interpret(ungraded)
    neither = row | {"deepseek_grade": "No"}
    assert interpret(neither).rows[0]["verified"] is False


# -------------------------------------------------------------------------------------------- broken or ambiguous rows


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
        ({"prompt": "p", "history": [["a", "b"]], "chat_history": [["a", "c"]]}, "history; keep one of them"),
        ({"question": [{"role": "thought", "content": "t"}], "solution": "4"}, "problem: expected text or messages"),
        (conversation(("user", "p")), "reasoning: expected a reply to the last turn or this field, got messages"),
        (conversation(("user", "p"), ("user", "q"), ("assistant", "b")), "the user's first, got user, user, assistant"),
        (conversation(("user", "p"), ("assistant", "a"), ("assistant", "b")), "got user, assistant, assistant"),
        (conversation(("assistant", "a"), ("user", "p")), "the user's first, got assistant, user"),
        (conversation(("user", "p"), ("tool", "{}")), "turn 2: expected a role of .*, got 'tool'"),
        (conversation(("user", [{"type": "image_url", "image_url": {}}])), "turn 1: content: .* got image_url"),
        (conversation(("user", "p"), ("assistant", 5)), "turn 2: content: expected text or .* got int 5"),
        (conversation(("user", "p"), ("assistant", "<think>Hm")), "<think> is never closed: the reply was truncated"),
        (conversation(("user", "p"), ("assistant", "Hello there.")), r"read as conversations: answer: .*neither"),
        (conversation(("user", "p"), ("assistant", "<answer>42</answer>")), "reasoning: expected working"),
        ({"custom_id": "r", "response": {"body": {"choices": [{"message": {}}]}}}, "holds no questions: join it"),
        ({"custom_id": "r", "body": conversation(("user", "p")), "error": {"code": "500"}}, "got the error dict"),
    ],
)  # fmt: skip
def test_error_for_an_unusable_row_says_what_is_wrong(row: Any, message: str) -> None:
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
def test_unknown_formats_are_read_by_field_meaning(row: Any) -> None:
    [trace] = interpret(row).rows
    assert {name: trace[name] for name in PLAIN} == PLAIN


def test_code_after_thinking_is_the_answer_despite_text_beside_it() -> None:
    code = "```python\nprint(1)\n```\nThe loop ends, and the answer is printed."
    for reply, answer in ((code, code), (f"{code} So \\boxed{{1}}.", "1")):
        [trace] = interpret(conversation(("user", QUESTION), ("assistant", f"<think>Hm.</think>{reply}"))).rows
        assert (trace["reasoning"], trace["answer"]) == ("Hm.", answer)


def test_reasoning_flags_and_empty_thoughts_are_not_thinking() -> None:
    row = row_of("llama_nemotron") | {
        "reasoning": "off",
        "output": f"<think>\n\n</think>\n\n{THOUGHT} So \\boxed{{42}}.",
    }
    assert interpret(row).rows[0]["reasoning"] == f"{THOUGHT} So \\boxed{{42}}."


@pytest.mark.parametrize("name", ["problem", "question"])
def test_metadata_of_other_types_is_converted_or_ignored(name: str) -> None:
    about = {"difficulty": "hard", "domain": ["algebra"], "source": {"of": "x"}, "id": 7, "verified": "yes"}
    [trace] = interpret({name: "2+2?", "reasoning": "Add.", "answer": [4], **about}).rows
    assert Trace.from_dict(trace) == Trace("2+2?", "Add.", "4", id="7", verified=True)


@pytest.mark.parametrize("name", ["problem", "question"])
def test_numeric_answer_may_be_of_any_size(name: str) -> None:
    [trace] = interpret({name: "2^1100?", "reasoning": "Double.", "answer": 2**1100, "difficulty": 2**1100}).rows
    assert Trace.from_dict(trace) == Trace("2^1100?", "Double.", str(2**1100))


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


def test_a_native_trace_with_mapped_fields_stays_native() -> None:
    """Read as another format, `turns` would be the conversation, and the spans and the reference would be lost."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    row = PLAIN | {"turns": turns, "spans": [[0, len(THOUGHT), "tactical"]], "reference": "42", "about": {"of": "sums"}}
    [trace] = interpret(row | {"ok": "no"}, FormatOptions(fields={"domain": "about.of", "verdict": "ok"})).rows
    assert trace == row | {"ok": "no", "domain": "sums", "verified": False}


@pytest.mark.parametrize("row", [PLAIN, {"question": QUESTION, "thinking": THOUGHT, "answer": "42"}])
def test_a_plan_can_be_mapped(row: dict[str, Any]) -> None:
    [trace] = interpret(row | {"outline": "Add."}, FormatOptions(fields={"plan": "outline"})).rows
    assert trace["plan"] == "Add."


def test_known_answer_and_finish_reason_are_kept() -> None:
    row = {"prompt": "p", "response": "I add. It is \\boxed{5}.", "answer": 6, "finish_reason": "length"}
    [trace] = interpret(row).rows
    assert (trace["answer"], trace["reference"], trace["finish_reason"]) == ("5", "6", "length")
    [solved] = interpret({"question": "p", "answer": "I add.\n#### 5"}).rows
    assert solved["answer"] == "5" and "reference" not in solved  # an answer cannot verify itself


@pytest.mark.parametrize(
    ("text", "answer", "rest"),
    [
        (r"So \boxed{1} or \boxed{\frac{1}{2}}.", r"1, \frac{1}{2}", r"So \boxed{1} or \boxed{\frac{1}{2}}."),
        (r"\boxed{\{1, 2\}} and \boxed{cut", r"\{1, 2\}", r"\boxed{\{1, 2\}} and \boxed{cut"),
        ("2 + 2 = 4\n#### 1,000", "1,000", "2 + 2 = 4"),
        ("Add. <answer> 4 </answer>", "4", "Add."),
        ("<answer>It is \\boxed{4}.</answer>", "4", ""),
        ("Two.\nThe answer is **4**.", "4", "Two.\nThe answer is **4**."),
        ("Halve it.\nThe answer is .5.", ".5", "Halve it.\nThe answer is .5."),
        ("The answer is 0.333...", "0.333...", "The answer is 0.333..."),
        ("The answer is $5$ and $6$.", "$5$ and $6$", "The answer is $5$ and $6$."),
        ("The answer is **$2*3$ km.**", "$2*3$ km", "The answer is **$2*3$ km.**"),
        ("The answer is not clear.\nGoodbye.", None, "The answer is not clear.\nGoodbye."),
        ("", None, ""),
    ],
)
def test_stated_answer_and_the_text_without_it(text: str, answer: str | None, rest: str) -> None:
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
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>c<|end|>"
            "<|start|>assistant<|channel|>commentary<|message|>d<|end|>"
            "<|start|>assistant<|channel|>final<|message|>b<|return|>",
            "a\n\nc\n\nd",
            "b",
        ),
        ("analysisa.assistantcommentaryc.assistantanalysisd.assistantfinalb", "a.\n\nc.\n\nd.", "b"),
        ("commentarya.assistantanalysisc.assistantfinalb", "a.\n\nc.", "b"),
        ("<Thought>a</Thought><Output>b</Output>", "a", "b"),
        ("The tag <think> opens it.", None, "The tag <think> opens it."),
    ],
)  # fmt: skip
def test_thinking_is_split_from_the_reply(reply: str, thought: str | None, text: str) -> None:
    assert split_thinking(reply) == (thought, text)


_CALLED = '{"a": 1}<|call|><|start|>functions.f to=assistant<|channel|>commentary<|message|>4<|end|>'


@pytest.mark.parametrize(
    "call",
    [
        f"<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{_CALLED}",
        f"<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{_CALLED}",
        "<|start|>assistant<|channel|>analysis to=python code<|message|>1 + 1<|call|>",
    ],
)
def test_a_reply_that_calls_a_tool_is_refused(call: str) -> None:
    with pytest.raises(TraceError, match="calls a tool"):
        split_thinking(
            f"<|channel|>analysis<|message|>a<|end|>{call}<|start|>assistant<|channel|>final<|message|>b<|return|>"
        )


@pytest.mark.parametrize("call", ['commentary to=functions.f json{"a": 1}', ' to=functions.fcommentary json{"a": 1}'])
def test_a_tool_call_is_recognised_without_special_tokens(call: str) -> None:
    with pytest.raises(TraceError, match="calls a tool"):
        split_thinking(f"analysisa.assistant{call}assistantfinalb")


def test_map_reaches_fields_inside_json_text() -> None:
    row = {"prompt": "p", "response": "So.", "info": '{"answer": "1", "gold": "2"}'}
    with pytest.raises(TraceError, match=r"info\.answer and info\.gold; choose one with --map answer=info\.answer"):
        interpret(row)
    [trace] = interpret(row, FormatOptions(fields={"answer": "info.gold"})).rows
    assert trace["answer"] == "2"
    dotted = {"prompt": "p", "response": "So.", "extra.info": {"answer": "1", "gold": "2"}}
    [trace] = interpret(dotted, FormatOptions(fields={"answer": "extra.info.gold"})).rows
    assert trace["answer"] == "2"


def test_unreadable_generations_are_not_called_truncated() -> None:
    row = {"problem": "p", "generations": ["<think>a", "<think>b</think>"], "is_reasoning_complete": [False, True]}
    with pytest.raises(TraceError) as unreadable:
        interpret(row)
    assert "truncated" not in str(unreadable.value)


@pytest.mark.parametrize("field", ["image", "images", "image_1", "image2", "Video", "audio"])
def test_row_with_an_image_video_or_sound_is_refused(field: str) -> None:
    question = {"question": "What is in it?"}
    row = question | {"response": "<think>a cat</think>cat"}
    native = {"problem": "What is in it?", "reasoning": "a cat", "answer": "cat"}
    for value in ({"bytes": "..", "path": None}, ["x.png"], "x.png"):
        for fields, read in ((row, interpret), (native, interpret), (question, question_of), (native, question_of)):
            with pytest.raises(TraceError, match=f"^{field}: the row comes with an image, a video or a sound"):
                read(fields | {field: value})
        with pytest.raises(TraceError, match=f"^{field}: the row comes with"):
            question_of({"data": question | {field: value}, "n": 1})
    # Mixed data sets have such values in their rows of text.
    for empty in (None, "", [], {}, False, 0, math.nan, "None", [None], [""], {"bytes": None, "path": ""}):
        assert interpret(row | {field: empty}).rows == interpret(row).rows
        assert question_of(question | {field: empty}) == question_of(question)


@pytest.mark.parametrize("read", [interpret, question_of])
def test_row_nested_too_deep_is_refused(read):
    deep = "Add."
    for _ in range(5000):
        deep = [{"type": "text", "content": deep}]
    row = {"messages": [{"role": "user", "content": deep}, {"role": "assistant", "content": "<answer>1</answer>"}]}
    with pytest.raises(TraceError, match="nested too deep"):
        read(row)
