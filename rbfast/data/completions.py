"""The student's completion for a trace, in its own chat template: text, roles and tokens.

```python
written = render_reply(trace, tokenizer)                  # of Qwen3: "<think>\\n..\\n</think>\\n\\n\\\\boxed{4}"
ids, offsets = tokenize_reply(written, tokenizer)             # without the end-of-turn token
```
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rbfast.data.chat_template import default_instruction
from rbfast.data.instruction import Instruction
from rbfast.data.spans import ANSWER, Span, split_spans
from rbfast.data.thinking import ThinkingFormat, added_tokens, thinking_format
from rbfast.data.trace import Trace, TraceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RenderedReply:
    """A reply in pieces, without the end-of-turn token.

    Attributes:
        pieces: (text, whether it comes from the trace). Only the template's own text may contain special tokens.
        roles: the role of each character, int64 [characters].
        thought, answer: their character ranges [start, end).
    """

    pieces: tuple[tuple[str, bool], ...]
    roles: np.ndarray
    thought: tuple[int, int]
    answer: tuple[int, int]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def render_reply(
    trace: Trace, tokenizer: PreTrainedTokenizerBase, instruction: Instruction | None = None
) -> RenderedReply:
    """The completion of a trace. The instruction (None: the tokenizer's default) says how the answer is marked.

    Raises TraceError if the reasoning contains the tag that would end the thinking.
    """
    template, instruction = thinking_format(tokenizer), instruction or default_instruction(tokenizer)
    answer = instruction.write(trace.answer, after_thinking=template.thinks)
    return _render(template, trace.thought(), trace.thought_spans(), answer)


def render_earlier_reply(
    turn: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, opening: str, whole: str
) -> RenderedReply | None:
    """The completion of an earlier assistant turn; None if it is empty or the template cannot render it.

    Args:
        opening: the prompt of that turn.
        whole: the rendered conversation up to and including the turn.
    """
    template, text = thinking_format(tokenizer), turn["content"]
    if not text.strip():
        return None
    if (thought := turn.get("reasoning", "")).strip():
        return _render(template, thought, split_spans(thought), text)
    if not template.thinks:
        opener, _, _, text, tail = template.pieces("", text)
        cut = turn["content"].index(text)
    elif whole.startswith(opening) and text.strip() in whole[len(opening) :]:  # a turn without a thought
        opener, text, tail = whole[len(opening) :].partition(text.strip())
        tail, cut = template.tail, turn["content"].index(text)
    else:
        return None
    pieces = [(opener, False), (text, True), (tail, False)]
    return _with_roles(split_spans(turn["content"]), pieces, len(opener), cut, len(text))


def _render(template: ThinkingFormat, thought: str, spans: Sequence[Span], answer: str) -> RenderedReply:
    cut = len(thought) - len(thought.lstrip())
    if not template.thinks:
        opener, _, _, body, tail = template.pieces("", f"{thought}\n\n{answer}")
        cut = cut if template.trims else 0
        return _with_roles(spans, [(opener, False), (body, True), (tail, False)], len(opener), cut, len(thought) - cut)
    try:
        opener, kept, closer, answer, tail = template.pieces(thought, answer)
    except ValueError as error:
        raise TraceError(f"reasoning: {error}; leave the trace out") from None
    pieces = [(opener, False), (kept, True), (closer, False), (answer, True), (tail, False)]
    return _with_roles(spans, pieces, len(opener), cut, len(kept))


def _with_roles(
    tiles: Sequence[Span], pieces: Sequence[tuple[str, bool]], start: int, cut: int, length: int
) -> RenderedReply:
    """Join the pieces of a reply and give each character its role.

    Args:
        tiles: the spans of the thought in the trace.
        pieces: the template's text and the trace's text, in order.
        start: the offset of the thought in the joined pieces. The text before it gets the thought's first role.
        cut, length: the part of the trace's thought that is written: `length` characters from `cut` on. The text after
            it gets the role ANSWER.
    """
    spans = np.array(tiles, dtype=np.int64)
    role_of = np.repeat(spans[:, 2], spans[:, 1] - spans[:, 0])[cut : cut + length]
    end = sum(len(text) for text, _ in pieces)
    roles = np.concatenate([np.full(start, role_of[0]), role_of, np.full(end - start - length, ANSWER)])
    tail = len(pieces[-1][0])
    answer = len(pieces[-2][0]) if len(pieces) > 3 else end - tail - start - length
    return RenderedReply(tuple(pieces), roles, (start, start + length), (end - tail - answer, end - tail))


def tokenize_reply(written: RenderedReply, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], np.ndarray]:
    """The token ids of a reply, and the character range of each, [tokens, 2].

    A tag that the template writes becomes a special token if the tokenizer has one for it. A special token that is
    spelled out in the trace stays text.
    """
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    at, adds_blank = 0, thinking_format(tokenizer).adds_blank
    for text, number in _split_added_tokens(written, tokenizer):
        if number is not None:
            ids.append(number)
            offsets.append((at, at + len(text)))
        else:
            skipped = int(adds_blank and text.startswith(" "))  # the tokenizer adds its own
            found = tokenizer(
                text[skipped:],
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            ids += found.input_ids
            offsets += [(at + skipped + start, at + skipped + end) for start, end in found.offset_mapping]
        at += len(text)
    return ids, np.array(offsets, dtype=np.int64).reshape(-1, 2)


def _split_added_tokens(written: RenderedReply, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int | None]]:
    """Split a reply at the template's added tokens: (text, None) between them, (token, id) for each."""
    numbers = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    pattern = added_tokens(tokenizer)
    text = ""
    for piece, is_text in written.pieces:
        at = 0
        for match in pattern.finditer(piece) if pattern and not is_text else ():
            text += piece[at : match.start()]
            if text:
                yield text, None
            yield match[0], numbers[match[0]]
            text, at = "", match.end()
        text += piece[at:]
    if text:
        yield text, None
