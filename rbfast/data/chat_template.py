"""A problem in a model's chat template, and how a turn ends: the same in training and at inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbfast.data.instruction import ANSWER, BOXED, Instruction, write_instruction
from rbfast.data.thinking import render, thinking_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def default_instruction(tokenizer: PreTrainedTokenizerBase) -> Instruction:
    """The default instruction: BOXED if the chat template renders thinking, else ANSWER."""
    return BOXED if thinking_format(tokenizer).thinks else ANSWER


def format_prompt(
    problem: str,
    tokenizer: PreTrainedTokenizerBase,
    instruction: Instruction | None = None,
    *,
    system: str | None = None,
    turns: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The prompt that asks for a solution, special tokens included: tokenise it with `add_special_tokens=False`.

    Args:
        instruction: what follows the problem; None for the tokenizer's default.
        system: the system prompt; None for the instruction's. If the template has no system role, the first turn opens
            with the prompt.
        turns: earlier messages, {"role": "user" or "assistant", "content": ..}.

    Raises:
        ValueError: the template fails, or the rendered prompt does not contain the problem or does not end as the
            template's prompts do.
    """
    instruction = instruction or default_instruction(tokenizer)
    request, system = instruction.request(problem), instruction.system if system is None else system
    messages = [*({"role": turn["role"], "content": turn["content"]} for turn in turns), _user_message(request)]
    if tokenizer.chat_template is None:
        return _render_without_template(tokenizer, system, messages)
    prompt = render_conversation(tokenizer, messages, system, open_reply=True)
    if not prompt.endswith(opening := thinking_format(tokenizer).opening):
        raise ValueError(
            f"the prompt of {problem[:60]!r} should end with {opening!r}, got {prompt[-80:]!r}: its text switches the "
            "chat template's thinking mode; leave the problem out"
        )
    if request.strip() not in prompt:
        raise ValueError(
            f"the chat template changes the problem {problem[:60]!r}: the prompt ends with {prompt[-200:]!r}; leave "
            "the problem out or set another tokenizer.chat_template"
        )
    return prompt


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], system: str | None, open_reply: bool
) -> str:
    """The text that the chat template renders for a system prompt and messages."""
    template = thinking_format(tokenizer)
    without = render(tokenizer, messages, open_reply, template.switches, template.takes_parts)
    if not system:
        return without
    try:
        with_system = [{"role": "system", "content": system}, *messages]
        prompt = render(tokenizer, with_system, open_reply, template.switches, template.takes_parts)
        if prompt != without:
            return prompt
    except ValueError:  # the template has no system role
        pass
    first, *rest = messages
    merged = [{**first, "content": f"{system}\n\n{first['content']}"}, *rest]
    return render(tokenizer, merged, open_reply, template.switches, template.takes_parts)


def _render_without_template(tokenizer: PreTrainedTokenizerBase, system: str | None, messages: Sequence[Any]) -> str:
    opens_with_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    texts = [*([system] if system else []), *(message["content"] for message in messages)]
    return f"{tokenizer.bos_token if opens_with_bos else ''}" + "".join(f"{text}\n\n" for text in texts)


def _user_message(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def write_prompt(folder: str | Path, tokenizer: PreTrainedTokenizerBase, instruction: Instruction) -> None:
    """Write prompt.json: the instruction, and the chat template's arguments. `saved_instruction` reads it."""
    template = thinking_format(tokenizer)
    about = {"thinking": template.kind, "chat_template_kwargs": dict(template.switches), "stop": template.end}
    write_instruction(folder, instruction, about)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends an assistant's turn: the added token in the chat template, else the eos token."""
    end = thinking_format(tokenizer).end
    if end is None:
        raise ValueError("no token ends a turn, neither in the chat template nor as eos token; set tokenizer.eos_token")
    return end
