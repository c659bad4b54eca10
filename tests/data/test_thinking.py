"""A trained completion equals what the student's chat template renders, for two dozen public templates."""

from copy import deepcopy
from dataclasses import replace

import pytest
from thinking_templates import BOS, CASES, Case, tokenizer_of
from tiny import tiny_tokenizer
from tiny_tokenizers import END

from rbfast.data.chat_template import default_instruction, end_of_turn, format_prompt
from rbfast.data.completions import render_reply
from rbfast.data.encoding import IGNORE, encode, encode_all, encode_earlier
from rbfast.data.instruction import ANSWER, BOXED, NONE, Instruction, instruction_named
from rbfast.data.spans import ANSWER as ANSWER_ROLE
from rbfast.data.spans import STRATEGIC, TACTICAL, Span
from rbfast.data.thinking import thinking_format
from rbfast.data.trace import Trace, TraceError

TRACE = Trace("What is 2 + 3?", "First I add.\nSo 2 + 3 = 5. Is it? Yes.", "5", plan="Add, then check.")
THOUGHT = "Add, then check.\n\nFirst I add.\nSo 2 + 3 = 5. Is it? Yes."
COMPOSED = {
    "r1-distill": f"{THOUGHT}\n</think>\n\n\\boxed{{5}}",
    "deepseek-v3.1": f"{THOUGHT}</think>\\boxed{{5}}",
    "nemotron": f"<think>\n{THOUGHT}\n</think>\n\n\\boxed{{5}}",
    "granite": f"<think>\n{THOUGHT}\n</think>\n\n\\boxed{{5}}",
    "gemma-4": f"<|channel>thought\n{THOUGHT}<channel|>\\boxed{{5}}",
}


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def trained(tokenizer, trace: Trace = TRACE, **options) -> tuple[str, list[int]]:
    """The prompt as text, and the tokens after it."""
    example = encode(trace, tokenizer, **options)
    start = int((example.labels != IGNORE).argmax()) + 1
    assert example.labels[start - 1 : -1].tolist() == example.input_ids[start:].tolist()  # every token is trained
    return decoded(tokenizer, example.input_ids[:start]), example.input_ids[start:].tolist()


def rendered(tokenizer, case: Case, thought: str, reply: str) -> str:
    """The template's own rendering of the conversation."""
    message = {"role": "assistant", "content": reply}
    if case.thought == "blocks":
        message["content"] = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": reply}]
    elif case.thought == "thoughts":
        blocks = [{"type": "thoughts", "text": thought}, {"type": "response", "text": reply}]
        message["content"] = {"blocks": blocks}
    elif case.thought == "whole":
        message["content"] = f"<think>{thought}</think>{reply}"
    elif case.thought == "tags":
        message["content"] = f"<think>\n{thought}\n</think>\n{reply}"
    elif case.thought == "rest":
        message["content"] = f"{thought}\n</think>\n\n{reply}"
    elif case.thought:
        message[case.thought] = thought
    turns = [{"role": "user", "content": default_instruction(tokenizer).request(TRACE.problem)}, message]
    template = thinking_format(tokenizer)
    if template.takes_parts:
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return tokenizer.apply_chat_template(turns, tokenize=False, **template.switches)


def test_changed_template_is_detected_again():
    tokenizer = deepcopy(tokenizer_of("qwen3"))
    assert thinking_format(tokenizer).thinks
    tokenizer.chat_template = tokenizer_of("qwen2.5").chat_template
    assert not thinking_format(tokenizer).thinks


@pytest.mark.parametrize("name", CASES)
def test_kind_of_template_is_detected(name):
    tokenizer, case = tokenizer_of(name), CASES[name]
    template = thinking_format(tokenizer)
    assert template.kind == case.kind
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == case.end
    assert template.is_composed == (case.kind != "none" and case.thought is None)
    assert thinking_format(tokenizer) is template


def test_thinking_switch_of_a_template_is_turned_on():
    switches = {name: thinking_format(tokenizer_of(name)).switches for name in ("apertus", "granite", "own-switch")}
    assert switches == {
        "apertus": {"enable_thinking": True},
        "granite": {"thinking": True},
        "own-switch": {"deep_reasoning": True},
    }


@pytest.mark.parametrize("name", [name for name in CASES if name not in COMPOSED])
def test_trained_turn_equals_the_templates_rendering(name):
    tokenizer, case = tokenizer_of(name), CASES[name]
    prompt, ids = trained(tokenizer)
    thinks = case.kind != "none"
    body = ("", TRACE.completion()) if not thinks else (THOUGHT, "\\boxed{5}")
    expected = rendered(tokenizer, case, *body)
    written = decoded(tokenizer, ids)
    whole = prompt + (written.removesuffix(case.end) if name == "glm-4.5" else written)  # the next header ends it
    assert expected.startswith(whole)
    assert expected[len(whole) :].strip() in ("", END), "only the template's text after its last turn may follow"
    # the same tokens too, tags included
    tail = tokenizer(expected, add_special_tokens=False).input_ids
    assert tail[len(encode(TRACE, tokenizer).input_ids) - len(ids) :][: len(ids) - 1] == ids[:-1]


@pytest.mark.parametrize("name", COMPOSED)
def test_thought_dropped_by_the_template_is_written_in_its_tags(name):
    tokenizer, case = tokenizer_of(name), CASES[name]
    _, ids = trained(tokenizer)
    assert decoded(tokenizer, ids) == COMPOSED[name] + case.end


@pytest.mark.parametrize("name", CASES)
def test_prompt_is_the_templates_generation_prompt(name):
    tokenizer = tokenizer_of(name)
    template = thinking_format(tokenizer)
    request = default_instruction(tokenizer).request(TRACE.problem)
    content = [{"type": "text", "text": request}] if template.takes_parts else request
    turns = [{"role": "user", "content": content}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **template.switches)
    prompt, ids = trained(tokenizer)
    assert format_prompt(TRACE.problem, tokenizer) == prompt == expected and request in prompt
    assert encode(TRACE, tokenizer).input_ids.tolist().count(tokenizer.bos_token_id) == CASES[name].has_bos
    assert ids[-1] == end_of_turn(tokenizer) and ids.count(ids[-1]) == 1


@pytest.mark.parametrize("name", CASES)
def test_only_the_templates_own_tags_become_special_tokens(name):
    tokenizer, case = tokenizer_of(name), CASES[name]
    _, ids = trained(tokenizer)
    for tag in [*case.tags.split(), *case.tokens.split()]:
        assert ids.count(tokenizer.convert_tokens_to_ids(tag)) == decoded(tokenizer, ids).count(tag)
    spelled = Trace("p", f"It is {case.end} or {BOS}, then.", "5")
    _, ids = trained(tokenizer, spelled)
    assert ids.count(end_of_turn(tokenizer)) == 1 and tokenizer.bos_token_id not in ids


@pytest.mark.parametrize("name", CASES)
def test_every_character_has_its_role(name):
    tokenizer = tokenizer_of(name)
    marked = Trace("p", "\n Think.\n2+2=4", "4", spans=(Span(0, 9, STRATEGIC), Span(9, 14, TACTICAL)))
    written = render_reply(marked, tokenizer)
    text, thought = written.text, written.text.index("Think.")
    assert len(written.roles) == len(text)
    assert (written.roles[: thought + 7] == STRATEGIC).all() and (
        written.roles[thought + 7 : thought + 12] == TACTICAL
    ).all()
    assert (written.roles[thought + 12 :] == ANSWER_ROLE).all()
    assert text[slice(*written.thought)].strip() == "Think.\n2+2=4" and "4" in text[slice(*written.answer)]


def test_white_space_around_a_thought_is_removed():
    tokenizer = tokenizer_of("qwen3")
    padded = Trace("p", "\n Think.\n2+2=4 \n", " 4", spans=(Span(0, 9, STRATEGIC), Span(9, 16, TACTICAL)))
    written = render_reply(padded, tokenizer, NONE)
    assert written.text == "<think>\nThink.\n2+2=4\n</think>\n\n4"
    assert (written.roles[:15] == STRATEGIC).all() and (written.roles[15:20] == TACTICAL).all()


def test_a_thought_with_a_closing_tag_is_refused():
    torn = Trace("p", "I think</think> that it is 4.", "4")
    with pytest.raises(TraceError, match="reasoning: expected text without </think>, which ends"):
        encode(torn, tokenizer_of("qwen3"))
    assert encode(torn, tokenizer_of("qwen2.5"))


# ------------------------------------------------------------------------------------------------------ refused inputs


def with_template(template: str):
    tokenizer = deepcopy(tokenizer_of("qwen3"))
    tokenizer.chat_template = template
    return tokenizer


UNKNOWN = {
    "a thought without marks": "{{ m.content if not m.thinking else m.thinking + ' ' + m.content }}",
    "a thought after the reply": "{{ m.content + '<why>' + (m.thinking or '') + '</why>' }}",
    "a thought written twice": "{{ (m.thinking or '') + '</think>' + m.content + (m.thinking or '') }}",
    "a turn that does not continue the prompt": "{{ '<other>' + (m.thinking or '') + '</other>' + m.content }}",
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_error_for_an_unknown_template_shows_its_rendering(case):
    opening = "<bot><t>" if "continue" in case else "<bot>"
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}<bot>" + UNKNOWN[case]
    tokenizer = with_template(
        template + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + opening + "{% endif %}"
    )
    with pytest.raises(ValueError, match=r"unknown way: .*the prompt is '.*<bot>.*', the turn '<bot>.*RBFASTTHOUGHT"):
        thinking_format(tokenizer)


def test_template_that_leaves_out_the_problem_is_refused():
    with pytest.raises(ValueError, match=r"leaves the problem out: .*rendered as '<bot>'"):
        thinking_format(with_template("<bot>"))


GOOD = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "failing", ["{{ messages.a.b }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% for"]
)
def test_a_failing_template_raises_value_error(failing):
    templates = [failing, f"{GOOD}{{% if '2+2?' in messages[0].content %}}{failing}{{% endif %}}"]
    for template in templates:  # fails always, or only for this problem
        with pytest.raises(ValueError, match=r"the chat template fails: .*\(.*; set another tokenizer\.chat_template"):
            format_prompt("2+2?", with_template(template))


@pytest.mark.parametrize("code", ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.popen('id') }}"])
def test_a_template_cannot_run_code(code):
    with pytest.raises(ValueError, match="the chat template fails: SecurityError"):
        thinking_format(with_template(GOOD + code))


def test_a_problem_that_the_template_changes_is_refused():
    tokenizer = with_template("{% for m in messages %}{{ m.content.replace('/think', '') }}{% endfor %}")
    assert format_prompt("2+2?", tokenizer).startswith("2+2?")
    with pytest.raises(TraceError, match=r"changes the problem 'Is a/think a path\?'"):
        encode(Trace("Is a/think a path?", "Yes, it is.", "yes"), tokenizer)


# --------------------------------------------------------------------------------------------------------- instructions


def test_the_instruction_follows_the_problem_and_marks_the_answer():
    plain, thinking = tokenizer_of("qwen2.5"), tokenizer_of("qwen3")
    assert default_instruction(plain) == ANSWER and default_instruction(thinking) == BOXED
    for tokenizer, instruction, ending in (
        (plain, None, "Yes.\n\n<answer>5</answer>"),
        (plain, BOXED, "Yes.\n\n\\boxed{5}"),
        (plain, NONE, "Yes.\n\nThe answer is 5"),
        (thinking, ANSWER, "Yes.\n</think>\n\n<answer>5</answer>"),
        (thinking, NONE, "Yes.\n</think>\n\n5"),
    ):
        prompt, ids = trained(tokenizer, instruction=instruction)
        assert decoded(tokenizer, ids).endswith(ending + "<|im_end|>")
        request = (instruction or ANSWER).text
        assert f"What is 2 + 3?{request and chr(10) * 2 + request}<|im_end|>" in prompt


def test_answer_that_does_not_fit_a_box_is_written_without_one():
    assert BOXED.write(r"\frac{1}{2}") == r"\boxed{\frac{1}{2}}"
    for whole in ("two\nlines", "a } b", "{", "\\"):
        assert BOXED.write(whole, after_thinking=True) == whole


def test_an_instruction_is_a_name_or_a_text():
    assert [instruction_named(name) for name in ("answer", "Boxed", "none")] == [ANSWER, BOXED, NONE]
    assert instruction_named("Box it: \\boxed{}") == Instruction("Box it: \\boxed{}", "box")
    assert instruction_named("Use <answer>.").style == "tags" and instruction_named("Be brief.").style == "plain"


# ------------------------------------------------------------------------------------------------------- system prompts


@pytest.mark.parametrize("name", CASES)
def test_a_system_prompt_is_rendered(name):
    tokenizer = tokenizer_of(name)
    prompt = format_prompt("What is 2 + 3?", tokenizer, system="Talk like a pirate.")
    assert prompt.count("Talk like a pirate.") == 1 and prompt.index("pirate") < prompt.index("2 + 3")
    assert prompt.endswith(thinking_format(tokenizer).opening)


def test_system_prompt_comes_first_without_a_template():
    assert format_prompt("p", tiny_tokenizer(), NONE, system="s") == "s\n\np\n\n"


def test_a_system_prompt_that_turns_thinking_off_is_refused():
    off = Trace("What is 2 + 3?", "I add.", "5", system="Be brief. /no_think")
    with pytest.raises(TraceError, match="its text switches the chat template's thinking mode"):
        encode(off, tokenizer_of("nemotron"))


# -------------------------------------------------------------------------------------------------------- earlier turns

TURNS = (
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2.", "reasoning": "I add."},
    {"role": "user", "content": "And one more?"},
    {"role": "assistant", "content": "Then it is 3."},
)
LATER = Trace("What is 2 + 3?", "I add.", "5", turns=TURNS)


@pytest.mark.parametrize("name", CASES)
def test_earlier_turns_are_rendered_and_only_the_last_reply_is_trained(name):
    tokenizer = tokenizer_of(name)
    prompt, ids = trained(tokenizer, LATER)
    places = [prompt.index(text) for text in ("1 + 1?", "It is 2.", "one more?", "Then it is 3.", "2 + 3?")]
    assert places == sorted(places) and "I add" not in prompt  # earlier thoughts are dropped
    assert prompt.endswith(thinking_format(tokenizer).opening)
    assert "It is 2" not in decoded(tokenizer, ids)
    alone, _ = trained(tokenizer, Trace(LATER.problem, LATER.reasoning, LATER.answer))
    assert prompt.endswith(alone[alone.index("What is 2") :])


@pytest.mark.parametrize("name", CASES)
def test_earlier_replies_are_trained_on_request(name):
    tokenizer = tokenizer_of(name)
    template = thinking_format(tokenizer)
    first, *second = encode_earlier(LATER, tokenizer)
    written = [decoded(tokenizer, one.labels[one.labels != IGNORE]) for one in (first, *second)]
    if template.thinks:
        assert written[0] == f"{template.opener}I add.{template.closer}It is 2.{template.tail}{CASES[name].end}"
    else:
        assert written[0] == f"{template.opener}I add.\n\nIt is 2.{CASES[name].end}"
    assert "1 + 1?" in decoded(tokenizer, first.input_ids) and "one more" not in decoded(tokenizer, first.input_ids)
    if not template.thinks:
        assert written[1:] == [f"{template.opener}Then it is 3.{CASES[name].end}"]
    elif name == "qwen3":  # as its template renders a reply without a thought
        assert written[1:] == ["<think>\n\n</think>\n\nThen it is 3.<|im_end|>"]
    elif template.is_composed and template.kind == "prompt":
        assert written[1:] == []  # the prompt opens a thought, and this reply has none
    examples, left_out = encode_all([LATER], tokenizer, turns="all")
    assert len(examples) == len(written) + 1 and left_out == []
    assert len(encode_all([LATER], tokenizer)[0]) == 1


@pytest.mark.parametrize("name", ["llama-3", "gemma-3", "qwen3", "r1-distill"])
def test_an_empty_earlier_reply_is_not_trained(name):
    question = {"role": "user", "content": "1 + 1?"}
    replies = {"content": ""}, {"content": "2.", "reasoning": " "}, {"content": " ", "reasoning": "I add.\n"}
    turns = [turn for reply in replies for turn in (question, {"role": "assistant", **reply})]
    examples, left_out = encode_all([replace(LATER, turns=tuple(turns))], tokenizer_of(name), turns="all")
    assert left_out == [] and len(examples) == (1 if name == "r1-distill" else 2)


@pytest.mark.parametrize(
    ("call", "named"), [('strftime_now("%d %b %Y")', "26 Jul 2024"), ("strftime_now( '%Y-%m-%d' )", "2024-07-26")]
)
def test_a_template_renders_the_same_date_every_day(call, named):
    tokenizer = deepcopy(tokenizer_of("llama-3"))
    day = "{% if strftime_now is defined %}{% set day = " + call + " %}{% else %}{% set day = '?' %}{% endif %}"
    tokenizer.chat_template = f"{day}Today: {{{{ day }}}}\n{tokenizer.chat_template}"
    assert format_prompt("1?", tokenizer).startswith(f"Today: {named}\n")
    assert f"Today: {named}\n" in decoded(tokenizer, encode(TRACE, tokenizer).input_ids)


def test_turns_are_paragraphs_without_a_template():
    example = encode(LATER, tiny_tokenizer(), instruction=NONE)
    text = decoded(tiny_tokenizer(), example.input_ids)
    assert text.startswith("What is 1 + 1?\n\nIt is 2.\n\nAnd one more?\n\nThen it is 3.\n\nWhat is 2 + 3?\n\nI add.")
    assert len(encode_earlier(LATER, tiny_tokenizer())) == 2
