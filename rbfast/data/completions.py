"""What a student writes for a trace, in its own template: text, roles and tokens.

```python
written = written_for(trace, tokenizer)                  # of Qwen3: "<think>\\n..\\n</think>\\n\\n\\\\boxed{4}"
ids, offsets = tokens_of(written, tokenizer)             # without the end of turn
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
class Written:
    """A reply in pieces, up to the token that ends the turn.

    Attributes:
        pieces: a text, and whether it is the trace's; only the template's own text may hold special tokens.
        roles: of each character, int64 [characters].
        thought, answer: their characters [start, end).
    """

    pieces: tuple[tuple[str, bool], ...]
    roles: np.ndarray
    thought: tuple[int, int]
    answer: tuple[int, int]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def written_for(trace: Trace, tokenizer: PreTrainedTokenizerBase, instruction: Instruction | None = None) -> Written:
    """What the student writes; the answer is marked as the instruction says (None: the tokenizer's default).

    Raises TraceError if the reasoning holds the mark that would end the thinking.
    """
    found, asked = thinking_format(tokenizer), instruction or default_instruction(tokenizer)
    answer = asked.write(trace.answer, after_thinking=found.thinks)
    return _turn(found, trace.thought(), trace.thought_spans(), answer)


def earlier_turn(
    turn: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, opening: str, whole: str
) -> Written | None:
    """What the student writes for an earlier assistant's turn; None if it is empty, or its template shows no such turn.

    Args:
        opening: the prompt of that turn.
        whole: the template's text of the conversation with the turn.
    """
    found, said = thinking_format(tokenizer), turn["content"]
    if not said.strip():
        return None
    if (thought := turn.get("reasoning", "")).strip():
        return _turn(found, thought, split_spans(thought), said)
    if not found.thinks:
        opener, _, _, said, tail = found.pieces("", said)
        cut = turn["content"].index(said)
    elif whole.startswith(opening) and said.strip() in whole[len(opening) :]:  # a turn without a thought
        opener, said, tail = whole[len(opening) :].partition(said.strip())
        tail, cut = found.tail, turn["content"].index(said)
    else:
        return None
    pieces = [(opener, False), (said, True), (tail, False)]
    return _tiled(split_spans(turn["content"]), pieces, len(opener), cut, len(said))


def _turn(found: ThinkingFormat, thought: str, spans: Sequence[Span], said: str) -> Written:
    cut = len(thought) - len(thought.lstrip())
    if not found.thinks:
        opener, _, _, body, tail = found.pieces("", f"{thought}\n\n{said}")
        cut = cut if found.trims else 0
        return _tiled(spans, [(opener, False), (body, True), (tail, False)], len(opener), cut, len(thought) - cut)
    try:
        opener, kept, closer, said, tail = found.pieces(thought, said)
    except ValueError as error:
        raise TraceError(f"reasoning: {error}; leave the trace out") from None
    pieces = [(opener, False), (kept, True), (closer, False), (said, True), (tail, False)]
    return _tiled(spans, pieces, len(opener), cut, len(kept))


def _tiled(tiles: Sequence[Span], pieces: Sequence[tuple[str, bool]], start: int, cut: int, length: int) -> Written:
    """A reply of these pieces, each character with its role.

    Args:
        tiles: the roles of the thought as the trace has it.
        pieces: the thought, or what is there in its place, and the template's text around it.
        start: where the thought stands in the joined pieces. What comes before it has its first role.
        cut, length: the characters of the trace's thought that are written: `length` of them from `cut` on. All that
            follows them is the answer.
    """
    spans = np.array(tiles, dtype=np.int64)
    role_of = np.repeat(spans[:, 2], spans[:, 1] - spans[:, 0])[cut : cut + length]
    end = sum(len(text) for text, _ in pieces)
    roles = np.concatenate([np.full(start, role_of[0]), role_of, np.full(end - start - length, ANSWER)])
    tail = len(pieces[-1][0])
    said = len(pieces[-2][0]) if len(pieces) > 3 else end - tail - start - length
    return Written(tuple(pieces), roles, (start, start + length), (end - tail - said, end - tail))


def tokens_of(written: Written, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], np.ndarray]:
    """The tokens of a reply, and the characters of each, [tokens, 2]. A tag that the template writes is its own token
    if the tokenizer has one. A special token that the trace spells out stays text."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    at, adds_blank = 0, thinking_format(tokenizer).adds_blank
    for text, number in _runs(written, tokenizer):
        if number is not None:
            ids.append(number)
            offsets.append((at, at + len(text)))
        else:
            skipped = int(adds_blank and text.startswith(" "))  # the tokenizer adds it again
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


def _runs(written: Written, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int | None]]:
    """The longest texts between the template's own added tokens, and those tokens with their ids."""
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
