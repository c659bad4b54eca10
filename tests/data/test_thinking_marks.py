"""Which marks of thinking are known where: at the start of a reply, alone, in a completion, on a screen, in a template."""

from copy import deepcopy

import pytest
from thinking_templates import tokenizer_of

from rbfast.data.answers import extract_answer, without_thinking
from rbfast.data.conversations import is_marked, split_thinking
from rbfast.data.thinking import thinking_format
from rbfast.data.trace import TraceError
from rbfast.grading.grade import without_tags

START, ALONE, GRADED, SHOWN, TEMPLATE = "start", "alone", "graded", "shown", "template"
EVERYWHERE = {START, ALONE, GRADED, SHOWN, TEMPLATE}
KNOWN = {
    ("<think>", "</think>"): EVERYWHERE,
    ("<thinking>", "</thinking>"): EVERYWHERE - {SHOWN},
    ("<thought>", "</thought>"): EVERYWHERE - {SHOWN},
    ("<reasoning>", "</reasoning>"): {START, GRADED, TEMPLATE},
    ("<seed:think>", "</seed:think>"): EVERYWHERE,
    ("<|think|>", "<|/think|>"): EVERYWHERE - {SHOWN},
    ("<|thinking|>", "<|/thinking|>"): {START},
    ("[THINK]", "[/THINK]"): EVERYWHERE,
    ("◁think▷", "◁/think▷"): {START, ALONE, GRADED},
    ("<|channel>thought", "<channel|>"): EVERYWHERE,
    ("<|inner_prefix|>", "<|inner_suffix|>"): EVERYWHERE,
    ("<|START_THINKING|>", "<|END_THINKING|>"): EVERYWHERE,
    ("<|begin_of_thought|>", "<|end_of_thought|>"): {START, ALONE, GRADED},
    ("<|channel|>analysis<|message|>", "<|end|>"): {START, SHOWN},
    ("<|im_start|>think", "<|im_start|>answer"): {START},
    ("Here is my thought process:", "Here is my response:"): {START},
    **{
        (f"<{name}>", f"</{name}>"): {START}
        for name in "thoughts reason deep_think deepthink scratchpad cot thought_process".split()
    },
    ("<step>", "</step>"): set(),
}


def known(opener: str, closer: str) -> set[str]:
    """Where a pair of marks is known as thinking's."""
    whole, rest = f"{opener}a{closer}b", f"a{closer}b"
    found = {
        START: split_thinking(whole) == ("a", "b") and is_marked(whole),
        ALONE: split_thinking(rest) == ("a", "b"),
        GRADED: without_thinking(rest) == "b",
        SHOWN: without_tags(whole) == "ab",
        TEMPLATE: in_template(opener, closer),
    }
    return {place for place, is_known in found.items() if is_known}


def in_template(opener: str, closer: str) -> bool:
    """Whether thinking is found in a template that drops what stands before a closer."""
    tokenizer = deepcopy(tokenizer_of("mistral"))
    tokenizer.chat_template = (
        "{% for m in messages %}<" + "{{ m.role }}>{{ m.content.split('" + closer + "')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = thinking_format(tokenizer)
    assert found.kind in ("none", "reply") and (found.kind == "none" or found.opener.startswith(opener))
    return found.close == closer


@pytest.mark.parametrize("marks", KNOWN, ids=lambda marks: marks[0])
def test_marks_are_known_where_they_are_sure(marks: tuple[str, str]) -> None:
    assert known(*marks) == KNOWN[marks]


@pytest.mark.parametrize("marks", [marks for marks in KNOWN if KNOWN[marks]], ids=lambda marks: marks[0])
def test_a_reply_in_its_marks_is_split_in_any_case(marks: tuple[str, str]) -> None:
    opener, closer = marks
    assert split_thinking(f"{opener.upper()}\na{closer.lower()}\nb") == ("a", "b")
    with pytest.raises(TraceError, match="is opened and never closed"):
        split_thinking(f"{opener}a")


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("a</think>b</think>c", "c"),
        ("a</think>\n ", "a</think>\n "),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>4<|end|>", "4<|end|>"),
        ("a</Think>b", "a</Think>b"),
        ("analysisI add.assistantfinal4", "analysisI add.assistantfinal4"),
        ("<scratchpad>a</scratchpad>4", "<scratchpad>a</scratchpad>4"),
        ("In XML <reason>a</reason> is an element", "In XML <reason>a</reason> is an element"),
        ("a<|end|>b", "a<|end|>b"),
    ],
)
def test_what_follows_the_last_thinking_is_what_a_completion_says(completion: str, said: str) -> None:
    assert without_thinking(completion) == said


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
        ("<|begin_of_solution|>b<|end_of_solution|>", "<|begin_of_solution|>b<|end_of_solution|>"),
        ("<|START_RESPONSE|>b<|END_RESPONSE|>", "b"),
        ("<output>b</output>", "<output>b</output>"),
        ("<solution>b</solution>", "<solution>b</solution>"),
        ("<response>b</response>", "b"),
        ("<|end|><|start|>assistant<|channel|>final<|message|>b", "b"),
        ("an <em>a</em> in <cot> and <|im_end|>", "an <em>a</em> in <cot> and <|im_end|>"),
    ],
)
def test_people_see_no_marks(part: str, shown: str) -> None:
    assert without_tags(part) == shown


def test_an_answer_is_looked_for_after_the_thinking() -> None:
    assert extract_answer("The answer is 3.\n</thought>\nThe answer is 4") == "4"
