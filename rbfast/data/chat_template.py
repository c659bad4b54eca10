"""A problem in a model's chat template, and how a turn ends: the same in training and at inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Think step by step, then give the final answer between <answer> and </answer>."


def format_prompt(problem: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt that asks for a solution, special tokens included: tokenise it with `add_special_tokens=False`."""
    request = f"{problem}\n\n{INSTRUCTION}"
    if tokenizer.chat_template is not None:
        return _render(tokenizer, [{"role": "user", "content": request}], open_reply=True)
    opens_with_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return f"{tokenizer.bos_token if opens_with_bos else ''}{request}\n\n"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn: the added token the chat template puts there, else the eos token."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
        after = _render(tokenizer, turns, open_reply=False).rpartition("reply")[2].lstrip()
        first = tokenizer(after, add_special_tokens=False).input_ids[:1]
        if first and first[0] in tokenizer.added_tokens_decoder:
            return first[0]
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token, and its chat template ends no turn; set tokenizer.eos_token")
    return tokenizer.eos_token_id


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], open_reply: bool) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_reply))
