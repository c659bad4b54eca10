"""Where thinking marks are recognised: opening a reply, closing alone, in grading, display and chat templates."""

from copy import deepcopy

import pytest
from thinking_templates import tokenizer_of

from rbfast.data.answers import extract_answer, without_thinking
from rbfast.data.conversations import opens_with_thinking, split_thinking
from rbfast.data.formats import question_of
from rbfast.data.thinking import thinking_format
from rbfast.data.trace import TraceError
from rbfast.grading.grade import Problem, grade, without_tags

START, ALONE, GRADED, SHOWN, TEMPLATE = "start", "alone", "graded", "shown", "template"
EVERYWHERE = {START, ALONE, GRADED, SHOWN, TEMPLATE}
ONLY_AT_START = "thoughts reason deep_think deepthink scratchpad cot thought_process"
KNOWN = {
    ("<think>", "</think>"): EVERYWHERE,
    ("<thinking>", "</thinking>"): EVERYWHERE,
    ("<thought>", "</thought>"): EVERYWHERE,
    ("<reasoning>", "</reasoning>"): EVERYWHERE,
    ("<seed:think>", "</seed:think>"): EVERYWHERE,
    ("<|think|>", "<|/think|>"): EVERYWHERE,
    ("<|thinking|>", "<|/thinking|>"): EVERYWHERE,
    ("[THINK]", "[/THINK]"): EVERYWHERE,
    ("◁think▷", "◁/think▷"): EVERYWHERE,
    ("<|channel>thought", "<channel|>"): EVERYWHERE,
    ("<|inner_prefix|>", "<|inner_suffix|>"): EVERYWHERE,
    ("<|START_THINKING|>", "<|END_THINKING|>"): EVERYWHERE,
    ("<|begin_of_thought|>", "<|end_of_thought|>"): EVERYWHERE,
    ("<|channel|>analysis<|message|>", "<|end|>"): {START, SHOWN},
    ("<|im_start|>think", "<|im_start|>answer"): {START},
    ("Here is my thought process:", "Here is my response:"): {START},
    **{(f"<{name}>", f"</{name}>"): {START} for name in ONLY_AT_START.split()},
    ("<step>", "</step>"): set(),
}


def places_of(opener: str, closer: str) -> set[str]:
    """The places where a pair of marks is recognised as thinking."""
    whole, rest = f"{opener}a{closer}b", f"a{closer}b"
    recognised = {
        START: split_thinking(whole) == ("a", "b") and opens_with_thinking(whole),
        ALONE: split_thinking(rest) == ("a", "b"),
        GRADED: without_thinking(rest) == "b",
        SHOWN: without_tags(whole) == "ab",
        TEMPLATE: is_found_in_template(opener, closer),
    }
    return {place for place, is_recognised in recognised.items() if is_recognised}


@pytest.mark.parametrize("tag", ["rea\u017foning", "th\u0131nk"])
def test_letters_beyond_ascii_are_no_capitals_of_a_mark(tag):
    assert split_thinking(f"<{tag}>a</{tag}>b") == (None, f"<{tag}>a</{tag}>b")


def is_found_in_template(opener: str, closer: str) -> bool:
    """Whether the marks are recognised in a template that drops the text before a closer."""
    tokenizer = deepcopy(tokenizer_of("mistral"))
    tokenizer.chat_template = (
        "{% for m in messages %}<" + "{{ m.role }}>{{ m.content.split('" + closer + "')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = thinking_format(tokenizer)
    assert template.kind in ("none", "reply") and (template.kind == "none" or template.opener.startswith(opener))
    return template.close == closer


@pytest.mark.parametrize("marks", KNOWN, ids=lambda marks: marks[0])
def test_marks_are_recognised_where_listed(marks: tuple[str, str]) -> None:
    assert places_of(*marks) == KNOWN[marks]


@pytest.mark.parametrize("marks", [marks for marks in KNOWN if KNOWN[marks]], ids=lambda marks: marks[0])
def test_marks_are_case_insensitive(marks: tuple[str, str]) -> None:
    opener, closer = marks
    assert split_thinking(f"{opener.upper()}\na{closer.lower()}\nb") == ("a", "b")
    with pytest.raises(TraceError, match="is never closed: the reply was truncated"):
        split_thinking(f"{opener}a")


@pytest.mark.parametrize(
    ("completion", "rest"),
    [
        ("a</think>b</think>c", "c"),
        ("a</think>\n ", "a</think>\n "),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>4<|end|>", "4<|end|>"),
        ("a</Think>b", "b"),
        ("analysisI add.assistantfinal4", "4"),
        ("Analysis of the sum: it is 4", "Analysis of the sum: it is 4"),
        ("\n<scratchpad>a</scratchpad>4", "4"),
        ("<scratchpad>a</think>b</scratchpad>c</think>d", "d"),
        ("<cot>a", "<cot>a"),
        ("In XML <reason>a</reason> is an element", "In XML <reason>a</reason> is an element"),
        ("a<|end|>b", "a<|end|>b"),
    ],
)
def test_only_text_after_the_last_thinking_is_graded(completion: str, rest: str) -> None:
    assert without_thinking(completion) == rest


@pytest.mark.parametrize(
    ("reply", "thought", "text"),
    [
        ("a</think>b</think>c", "a", "b</think>c"),
        ("analysisI add.assistantfinal4", "I add.", "4"),
        ("<scratchpad>a</scratchpad>4", "a", "4"),
        ("In XML <reason>a</reason> is an element", None, "In XML <reason>a</reason> is an element"),
        ("a<|end|>b", None, "a<|end|>b"),
        ("<think>a</think><|begin_of_solution|>b<|end_of_solution|>", "a", "b"),
        ("<think>a</think><|START_RESPONSE|>b<|END_RESPONSE|>", "a", "b"),
        ("<think>a</think><output>b</output>", "a", "b"),
        ("<think>a</think><solution>b</solution>", "a", "b"),
        ("<think>a</think><response>b", "a", "b"),
        ("<think>a</think><answer>b</answer>", "a", "<answer>b</answer>"),
        ("<think>a</think>It prints <output>b</output>", "a", "It prints <output>b</output>"),
    ],
)
def test_a_reply_is_split_from_its_thinking(reply: str, thought: str | None, text: str) -> None:
    assert split_thinking(reply) == (thought, text)


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        ("<|begin_of_solution|>b<|end_of_solution|>", "b"),
        ("<|START_RESPONSE|>b<|END_RESPONSE|>", "b"),
        ("<output>b</output>", "<output>b</output>"),
        ("<solution>b</solution>", "b"),
        ("<response>b</response>", "b"),
        ("<|end|><|start|>assistant<|channel|>final<|message|>b", "b"),
        ("an <em>a</em> in <cot> and <|im_end|>", "an <em>a</em> in <cot> and <|im_end|>"),
    ],
)
def test_marks_are_hidden_from_display(part: str, shown: str) -> None:
    assert without_tags(part) == shown


def test_answer_is_read_after_the_thinking() -> None:
    assert extract_answer("The answer is 3.\n</thought>\nThe answer is 4") == "4"


def test_answer_in_solution_marks_is_graded() -> None:
    written = "<|begin_of_thought|>\n2 + 2 = 4\n<|end_of_thought|>\n\n<|begin_of_solution|>\n{}\n<|end_of_solution|>"
    problem = Problem("file", "2 + 2?", "4", {})
    assert grade(problem, written.format(4)) == 1.0
    assert grade(problem, written.format(3)) == 0.0
    assert grade(problem, "<cot>2 + 2 = 4</cot><solution>4</solution>") == 1.0


@pytest.mark.parametrize("opener", ["<think>", "[THINK]", "<|channel>thought", ""])
def test_question_is_read_from_a_prompt_that_opens_the_thinking(opener: str) -> None:
    prompt = f"<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n{opener}\n"
    assert question_of({"prompt": prompt})["problem"] == "2 + 2?"
