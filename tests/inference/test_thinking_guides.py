"""A student trained on its template's own turns, under a guide with that template's markers."""

import pytest
from thinking_templates import CASES, tokenizer_of

from rbfast.data.chat_template import format_prompt
from rbfast.data.encoding import IGNORE, encode
from rbfast.data.instruction import ANSWER, BOXED, NONE
from rbfast.data.thinking import thinking_format
from rbfast.data.trace import Trace
from rbfast.grading.grade import Problem, extract_answer, grade, without_tags
from rbfast.inference.decoding import decode_text
from rbfast.inference.guide import Guide, Limits
from rbfast.inference.tokens import TokenState, Vocabulary, phrases_for

TRACE = Trace("What is 2 + 3?", "First I add.\nSo 2 + 3 = 5. Is it? Yes, $2 + 3 = 5$.", "5", plan="Add, then check.")


def trained(tokenizer, instruction=None) -> list[int]:
    labels = encode(TRACE, tokenizer, instruction=instruction).labels
    return labels[labels != IGNORE].tolist()


def guided(tokenizer, ids, instruction=None, budget=1000) -> TokenState:
    guide = Guide(Limits(budget), phrases_for(tokenizer, instruction))
    state = TokenState(guide, Vocabulary(tokenizer, guide, [thinking_format(tokenizer).end]))
    for token in ids:
        assert not state.done, "the guide ended the turn early"
        state.feed(token)
    return state


@pytest.mark.parametrize("instruction", [None, ANSWER, BOXED, NONE], ids=["default", "answer", "boxed", "none"])
@pytest.mark.parametrize("name", CASES)
def test_trained_completion_needs_no_intervention(name, instruction):
    tokenizer = tokenizer_of(name)
    ids = trained(tokenizer, instruction)
    state = guided(tokenizer, ids, instruction)
    solution = state.solution()
    assert state.done and solution.events == () and not solution.truncated and solution.tokens == len(ids)
    assert list(solution.ids) == ids
    assert without_tags(solution.answer).strip(" }\n").removeprefix("\\boxed{").startswith("5")
    assert "2 + 3 = 5$" in solution.thinking and "2 + 3" not in solution.answer


@pytest.mark.parametrize("instruction", [None, ANSWER, BOXED, NONE], ids=["default", "answer", "boxed", "none"])
@pytest.mark.parametrize("name", CASES)
def test_trained_completion_is_graded_right(name, instruction):
    """Also if the thought states another answer."""
    tokenizer = tokenizer_of(name)
    thought = "The answer is 7.\n\\boxed{7}. No, it is 5." if thinking_format(tokenizer).thinks else "I add them."
    labels = encode(Trace("p", thought, "5"), tokenizer, instruction=instruction).labels
    text = decode_text(tokenizer, labels[labels != IGNORE])
    assert grade(Problem("", "p", "5", {}), text) == 1.0
    assert extract_answer(text) in ("5", None)


@pytest.mark.parametrize("name", CASES)
def test_budget_without_room_for_thinking_still_closes_it(name):
    tokenizer = tokenizer_of(name)
    guide = Guide(Limits(400, reserve=400), phrases_for(tokenizer))
    state = TokenState(guide, Vocabulary(tokenizer, guide, [thinking_format(tokenizer).end]))
    template = thinking_format(tokenizer)
    inserted = tokenizer.decode(list(state.queue), skip_special_tokens=False)
    assert (
        inserted.startswith(template.opener + guide.phrases.wrap_up)
        if template.thinks
        else inserted.startswith(guide.phrases.wrap_up)
    )
    assert inserted.endswith(guide.phrases.close)


def test_template_and_not_vocabulary_decides_the_markers():
    instruct = phrases_for(tokenizer_of("qwen3-2507-instruct"))  # <think> is in its vocabulary, but not in its template
    assert (instruct.close, instruct.finish, instruct.open) == ("<answer>", "</answer>", "")
    thinking = phrases_for(tokenizer_of("qwen3"))
    assert (thinking.close, thinking.finish, thinking.open) == ("</think>", "", "<think>\n")
    assert thinking.probe == "\n\n\\boxed{"
    assert phrases_for(tokenizer_of("qwen3"), ANSWER).probe == "\n\n<answer>"


def test_prompt_opens_thinking_that_is_off_by_default():
    tokenizer = tokenizer_of("qwen3.5-small")
    assert format_prompt("p", tokenizer, NONE).endswith("user\np<|im_end|>\n<|im_start|>assistant\n<think>\n")
