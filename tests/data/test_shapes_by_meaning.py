"""Unknown formats, read by the meanings of their fields: API rows, options, verdicts, rendered text."""

import json
from typing import Any

import pytest
from trace_shapes import PLAIN, QUESTION, SYSTEM, THOUGHT, conversation

from rbfast.data.answers import stated_answer
from rbfast.data.choices import chosen_option, options_in_fields, parse_options
from rbfast.data.conversations import parse_turns, split_content
from rbfast.data.formats import interpret, question_of
from rbfast.data.trace import Trace, TraceError

SAID = "It is \\boxed{42}."
TAGGED = f"<think>{THOUGHT}</think>{SAID}"
WRONG = TAGGED.replace("42", "41")
ASKED: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
REPLIED = [{"role": "assistant", "content": TAGGED}]
EARLIER = {"turns": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
CHATML = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
GEMINI_ASKED = {"role": "user", "parts": [{"text": QUESTION}]}
GEMINI_SAID = {"role": "model", "parts": [{"text": THOUGHT, "thought": True}, {"text": SAID}]}
GEMINI_SYSTEM = {"parts": [{"text": SYSTEM}]}
OUTPUT = [
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": THOUGHT}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": SAID}]},
]
CLAUDE_SAID = [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": SAID}]
BEDROCK = [{"reasoningContent": {"reasoningText": {"text": THOUGHT}}}, {"text": SAID}]

SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemini": ({"contents": [GEMINI_ASKED, GEMINI_SAID], "systemInstruction": GEMINI_SYSTEM}, {"system": SYSTEM}),
    "gemini batch": (
        {
            "request": {"contents": [GEMINI_ASKED], "systemInstruction": GEMINI_SYSTEM},
            "response": {"candidates": [{"content": GEMINI_SAID, "finishReason": "STOP"}], "modelVersion": "g-1"},
        },
        {"system": SYSTEM, "teacher": "g-1"},
    ),
    "responses": ({"input": QUESTION, "output": OUTPUT, "instructions": SYSTEM}, {"system": SYSTEM}),
    "responses batch": (
        {
            "custom_id": "7",
            "body": {"input": QUESTION, "instructions": SYSTEM},
            "response": {"body": {"output": OUTPUT}},
        },
        {"system": SYSTEM, "id": "7"},
    ),
    "claude's request and response": (
        {
            "request": {"system": [{"type": "text", "text": SYSTEM}], "messages": ASKED},
            "response": {"content": CLAUDE_SAID, "stop_reason": "end_turn"},
        },
        {"system": SYSTEM},
    ),
    "bedrock": (
        {"system": [{"text": SYSTEM}], "messages": [*ASKED, {"role": "assistant", "content": BEDROCK}]},
        {"system": SYSTEM},
    ),
    "messages with channels": (
        {
            "messages": [
                *ASKED,
                {"role": "assistant", "channel": "analysis", "content": THOUGHT},
                {"role": "assistant", "channel": "final", "content": SAID},
            ]
        },
        {},
    ),
    "author fields": ({"messages": [{"author": {"role": "user"}, "content": {"parts": [QUESTION]}}, *REPLIED]}, {}),
    "a list of messages": ([*ASKED, *REPLIED], {}),
    "pairs of messages": ({"conversation": [["Hi", "Hello"], [QUESTION, TAGGED]]}, EARLIER),
    "history": ({"instruction": QUESTION, "input": "", "output": TAGGED, "history": [["Hi", "Hello"]]}, EARLIER),
    "preference": ({"chosen": [*ASKED, *REPLIED], "rejected": [*ASKED, {"role": "assistant", "content": WRONG}]}, {}),
    "preferred output": (
        {
            "input": {"messages": ASKED},
            "preferred_output": REPLIED,
            "non_preferred_output": [{"role": "assistant", "content": "41"}],
        },
        {},
    ),
    "nested objects": (
        {"doc_id": 1, "doc": {"question": QUESTION, "answer": "#### 42"}, "resps": [[TAGGED]]},
        {},
    ),
    "messages under an unknown name": ({"problem": QUESTION, "solution": "Add.", "rewritten": [*ASKED, *REPLIED]}, {}),
    "a reply under an unknown name": ({"question": QUESTION, "combined": TAGGED, "note": "x"}, {}),
    "a reply as JSON": ({"prompt": QUESTION, "response": json.dumps({"thought": THOUGHT, "final_answer": "42"})}, {}),
    "a reply as an object": ({"prompt": QUESTION, "response": {"content": SAID, "reasoning_content": THOUGHT}}, {}),
    "analysis and final": (
        {"developer": SYSTEM, "user": QUESTION, "analysis": THOUGHT, "final": SAID},
        {"system": SYSTEM},
    ),
    "camel case": ({"userPrompt": QUESTION, "ReasoningTrace": THOUGHT, "modelAnswer": SAID}, {}),
    "names with a prefix": (
        {"question": QUESTION, "model_reasoning": THOUGHT, "model_answer": SAID, "model_name": "M"},
        {"teacher": "M"},
    ),
    "single letters": ({"q": QUESTION, "cot": THOUGHT, "a": 42}, {}),
    "chinese": ({"问题": QUESTION, "思考": THOUGHT, "答案": "42"}, {}),
    "a prompt that repeats the problem": (
        {"problem": QUESTION, "prompt": f"{QUESTION} Box it.", "response": TAGGED},
        {},
    ),
    "native names, tagged": ({"problem": QUESTION, "reasoning": f"<think>{THOUGHT}</think>", "answer": SAID}, {}),
    "native names, a thinking switch": ({"problem": QUESTION, "reasoning": "on", "answer": TAGGED}, {}),
    "steps": ({"problem": QUESTION, "steps": [{"text": THOUGHT}], "answer": "42"}, {}),
    "chatml": (
        {"text": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{CHATML}{TAGGED}<|im_end|>\n"},
        {"system": SYSTEM},
    ),
    "s1 tokenized": (
        {
            "question": QUESTION,
            "text": f"{CHATML}<|im_start|>think\n{THOUGHT}\n<|im_start|>answer\n{SAID}<|im_end|>",
        },
        {},
    ),
    "a rendered prompt": (
        {
            "prompt": f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜><think>\n",
            "completion": f"{THOUGHT}\n</think>\n{SAID}",
        },
        {},
    ),
    "alpaca's text": ({"text": f"Do it.\n\n### Instruction:\n{QUESTION}\n\n### Response:\n{TAGGED}"}, {}),
    "alpaca's text with an input": (
        {"text": f"### Instruction:\nSolve it.\n\n### Input:\n{QUESTION}\n\n### Response:\n{TAGGED}"},
        {"problem": f"Solve it.\n\n{QUESTION}"},
    ),
    "a problem with headings like alpaca's": (
        {"problem": f"{QUESTION}\n### Input: 1\n### Input: 2", "response": TAGGED},
        {"problem": f"{QUESTION}\n### Input: 1\n### Input: 2"},
    ),
    "a thought beside tags": (
        {
            "messages": [
                *ASKED,
                {"role": "assistant", "reasoning_content": THOUGHT, "content": f"<think>A.</think>{SAID}"},
            ]
        },
        {},
    ),
}


@pytest.mark.parametrize("fence", ["{}", "```json\n{}\n```", "```\n{}\n```\n"])
def test_a_long_reply_may_be_json_too(fence):
    thought = f"{THOUGHT} " + "So 42. " * 2000
    reply = fence.format(json.dumps({"reasoning": thought, "answer": "42"}, indent=2))
    assert interpret({"prompt": QUESTION, "response": reply}).rows[0]["reasoning"] == thought.strip()


def test_a_reply_with_json_within_is_text():
    reply = '```json\n{"reasoning": "Add.", "answer": "42"}\n```\nSo it is \\boxed{42}.'
    assert interpret({"prompt": QUESTION, "response": reply}).rows[0]["reasoning"] == reply


@pytest.mark.parametrize("name", SHAPES)
def test_unknown_format_is_read(name: str) -> None:
    row, changes = SHAPES[name]
    assert [Trace.from_dict(trace) for trace in interpret(row).rows] == [Trace.from_dict(PLAIN | changes)]


@pytest.mark.parametrize(
    "reply",
    [
        f"<seed:think>{THOUGHT}</seed:think>{SAID}",
        f"<|channel>thought\n{THOUGHT}<channel|>{SAID}",
        f"<|inner_prefix|>{THOUGHT}<|inner_suffix|>{SAID}",
        f"<|START_THINKING|>{THOUGHT}<|END_THINKING|><|START_RESPONSE|>{SAID}<|END_RESPONSE|>",
        f"Here is my thought process:\n{THOUGHT}\n\nHere is my response:\n{SAID}",
        f"<deep_think>{THOUGHT}</deep_think>42",
        f"{THOUGHT}<|END_THINKING|>42",
    ],
)
def test_thinking_marks_of_many_models_are_recognised(reply: str) -> None:
    assert interpret({"prompt": QUESTION, "response": reply}).rows == [PLAIN]


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"label": False}, False),
        ({"label": 0}, None),
        ({"reward": 1.0}, True),
        ({"r1_correctness": "False"}, False),
        ({"judgement": "right"}, True),
        ({"verifier_score": 0.4}, None),
    ],
)
def test_verdict_field_applies_to_the_only_reply(fields: dict[str, Any], verdict: bool | None) -> None:
    assert interpret({"prompt": QUESTION, "completion": TAGGED, **fields}).rows[0].get("verified") is verdict


@pytest.mark.parametrize(
    "row",
    [
        {"responses": [WRONG, TAGGED], "rewards": [0.0, 1.0]},
        {"samples": [{"text": WRONG, "correct": False}, {"text": TAGGED, "correct": True}]},
        {"samples": [{"messages": [*ASKED, *REPLIED], "passed": True}]},
    ],
)
def test_any_kind_of_verdict_selects_the_correct_generation(row: Any) -> None:
    assert interpret({"problem": QUESTION, **row}).rows == [PLAIN | {"verified": True}]


def test_separate_thought_belongs_to_the_next_reply_only() -> None:
    messages = [("user", "1+1?"), ("thought", "Add."), ("assistant", "2"), ("user", "Sure?"), ("assistant", "Yes.")]
    turns = parse_turns([{"role": role, "content": text} for role, text in messages])
    assert turns is not None and [turn.thought for turn in turns] == [None, "Add.", None, None]
    assert split_content([{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "2"}]) == (None, "2")
    twice = [{"role": "thought", "content": "Add."}, {"role": "assistant", "content": "2", "reasoning": "Check."}]
    assert [turn.thought for turn in parse_turns(twice) or ()] == ["Add.\n\nCheck."]


@pytest.mark.parametrize("role", ["thought", "thinking", "reasoning", "Thought"])
@pytest.mark.parametrize(
    "fields",
    [
        {"content": CLAUDE_SAID[:1]},
        {"thinking": THOUGHT},
        {"summary": THOUGHT},
        {"thinking": THOUGHT, "summary": "42."},
    ],
)
def test_a_message_of_any_thinking_role_may_hold_blocks(role: str, fields: dict[str, Any]) -> None:
    [trace] = interpret([*ASKED, {"role": role, **fields}, {"role": "assistant", "content": SAID}]).rows
    assert trace["reasoning"] == THOUGHT


def test_reply_takes_precedence_over_a_solution() -> None:
    """As in R1-Distill-SFT."""
    row = {"problem": QUESTION, "reannotated_assistant_content": TAGGED, "solution": "By hand it is \\boxed{42}."}
    [trace] = interpret(row).rows
    assert (trace["reasoning"], trace["answer"]) == (THOUGHT, "42")


def test_error_for_unreadable_generations_gives_the_reason() -> None:
    with pytest.raises(TraceError, match="<think> is never closed: the reply was truncated"):
        interpret({"problem": QUESTION, "generations": ["<think>Hm"]})


# --------------------------------------------------------------------------------------------------- multiple choice


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"choices": ["41", "42"], "answer": 1}, "B"),
        ({"choices": {"text": ["41", "42"], "label": ["A", "B"]}, "answerKey": "B"}, "B"),
        ({"options": {"A": "41", "B": "42"}, "answer": "42", "answer_idx": "B"}, "42"),
        ({"options": ["A)41", "B)42"], "correct": "B"}, "B"),
        ({"options": "A ) 41 , B ) 42", "correct": "b"}, "B"),
        ({"options": [{"label": "A", "text": "41"}, {"label": "B", "text": "42"}], "answer": "(B)"}, "B"),
    ],
)
def test_options_become_part_of_the_problem(row: Any, answer: str) -> None:
    problem = f"{QUESTION}\n\nA. 41\nB. 42"
    assert question_of({"question": QUESTION, **row}) == {"problem": problem, "answer": answer}
    [trace] = interpret({"question": QUESTION, "rationale": THOUGHT, **row}).rows
    assert (trace["problem"], trace["reasoning"], trace["answer"]) == (problem, THOUGHT, answer)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"choices": ["8", "2", "24"], "answer": 2}, "C"),
        ({"choices": ["8", "2", "24"], "answer": 2.0}, "C"),
        ({"choices": ["8", "2", "24"], "answer": "2"}, "2"),
        ({"choices": [1, 2, 3], "answer": 2}, "2"),
        ({"opa": "2", "opb": "4", "opc": "1", "cop": 1}, "B"),
        ({"choices": {"text": ["41", "42"], "label": ["1", "2"]}, "answer": 1}, "1"),
    ],
)
def test_number_is_tried_as_an_index_before_an_option_text(row: Any, answer: str) -> None:
    assert question_of({"question": QUESTION, **row})["answer"] == answer


def test_options_in_separate_fields_or_already_in_the_problem() -> None:
    row = {"question": QUESTION, "opa": "40", "opb": "41", "opc": "42", "cop": 2, "exp": ""}
    assert question_of(row) == {"problem": f"{QUESTION}\n\nA. 40\nB. 41\nC. 42", "answer": "C"}
    one = question_of({"question": "Is 41 prime?", "choices": ["41", "42"], "answer": "A"})
    assert one["problem"] == "Is 41 prime?\n\nA. 41\nB. 42"
    assert parse_options(["41"]) is None and options_in_fields({"a": "41", "b": "42"}) is None
    assert chosen_option([2, "9" * 5000], {"A": "41", "B": "42"}) is None
    listed = f"{QUESTION} (A) 41 (B) 42"
    assert question_of({"question": listed, "choices": ["41", "42"], "answer": "B"})["problem"] == listed


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    "row",
    [
        {"reward_model": {"ground_truth": "42", "style": "rule"}},
        {"reward_model": {"ground_truth": '["42"]'}},
        {"verification_info": '{"ground_truth": "42"}'},
        {"verification_info": {"answer": {"value": "42"}}},
        {"ground_truth": ["42"]},
        {"extra_info": {"answer": "Add.\n#### 42", "index": 0}},
    ],
)
def test_known_answer_is_found_in_reward_fields(row: Any) -> None:
    assert question_of({"prompt": ASKED, **row}) == {"problem": QUESTION, "answer": "42"}
    assert interpret({"prompt": ASKED, "response": TAGGED, **row}).rows == [PLAIN | {"reference": "42"}]


@pytest.mark.parametrize(
    "answer", [{"value": 0}, {"value": [0]}, {"value": "", "text": "0"}, {"value": [], "text": "0"}, [0]]
)
def test_zero_is_an_answer(answer: Any) -> None:
    assert question_of({"question": QUESTION, "answer": answer})["answer"] == "0"


def test_a_known_answer_beside_the_question_becomes_the_reference() -> None:
    info = {"reference_answer": "43", "think_content": None}
    messages = [{**ASKED[0], "info": info}, {**REPLIED[0], "info": {"reference_answer": None}}]
    assert interpret({"messages": messages}).rows == [PLAIN | {"reference": "43"}]


def test_heading_is_not_an_answer_and_unmarked_reply_is_kept_whole() -> None:
    reply = "#### 1. Add\nTens first.\n\n#### 2. Check\nIt holds."
    assert stated_answer(reply) is None
    assert stated_answer("Add.\n#### 42\nThe answer is: 42") == "42"
    assert stated_answer("Add.\nFinal Answer: The final answer is $42$. I hope it is correct.") == "42"
    assert stated_answer("Add.\n\n**Final Answer**\n42") == "42"
    traces = interpret({"question": QUESTION, "complex_cot": THOUGHT, "response": reply}).rows
    assert traces == [PLAIN | {"answer": reply}]


def test_errors_for_unmarked_answers_bad_history_and_failed_requests() -> None:
    worked = {"question": QUESTION, "answer": "Add them.\nIt makes forty-two."}
    with pytest.raises(
        TraceError, match=r"answer: expected working that marks its answer .*, got answer without a mark"
    ):
        interpret(worked)
    with pytest.raises(TraceError, match="history: expected turns before the problem, got str 'Hi'; leave the row out"):
        interpret({"prompt": QUESTION, "response": TAGGED, "history": "Hi"})
    with pytest.raises(TraceError, match="got the error dict"):
        interpret({"request": {"messages": ASKED}, "response": None, "error": {"code": 500}})
    unrelated = {"question": QUESTION, "response": TAGGED, "error": "1e-3"}
    assert interpret(unrelated).rows == [PLAIN]
    assert interpret(conversation(("user", QUESTION), ("assistant", TAGGED))).name == "conversations"


@pytest.mark.parametrize("value", ["128", "-3.5", "$\\frac{1}{2}$", "[7, 8, 9]", "(1, 2)", "BCD", "True", 128])
def test_a_solution_that_is_a_value_is_the_known_answer(value: Any) -> None:
    row = {"question": QUESTION, "solution": value, "gemini_thinking_trajectory": THOUGHT, "gemini_attempt": SAID}
    assert question_of(row)["answer"] == str(value)
    [trace] = interpret(row).rows
    assert (trace["answer"], trace["reference"]) == ("42", str(value))


@pytest.mark.parametrize("value", ["None", "N/A", "-", "Trivial.", "See figure 3", "Add 1 and 2.", "", None])
def test_a_solution_in_words_is_not_a_known_answer(value: Any) -> None:
    row = {"question": QUESTION, "solution": value, "gemini_thinking_trajectory": THOUGHT, "gemini_attempt": SAID}
    assert "answer" not in question_of(row)
    assert "reference" not in interpret(row).rows[0]


@pytest.mark.parametrize("value", ["proof", "notfound", "N/A", " nan"])
def test_a_placeholder_is_not_an_answer(value: str) -> None:
    row = {"problem": QUESTION, "answer": value}
    [trace] = interpret({**row, "response": TAGGED}).rows
    assert "reference" not in trace
    with pytest.raises(TraceError, match="answer: expected a marked answer"):
        interpret({**row, "solution": "Add them. That is how it is."})
