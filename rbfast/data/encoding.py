"""Traces as tokens with roles, packed into training batches.

examples, left_out = encode_all(traces, tokenizer, max_tokens=2048)
batch = collate(examples[:8])                            # input_ids, position_ids, labels, roles: [1, T]
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from rbfast.data.chat_template import end_of_turn, format_prompt, render_conversation
from rbfast.data.completions import RenderedReply, render_earlier_reply, render_reply, tokenize_reply
from rbfast.data.instruction import NONE, Instruction
from rbfast.data.spans import ANSWER
from rbfast.data.trace import Trace, TraceError
from rbfast.loss.teacher_signal import TopK, check_top_k

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ROLE = -1
IGNORE = -100


@dataclass
class Example:
    """One tokenised trace: prompt, completion, end of turn.

    Labels are already shifted: `labels[i]` is `input_ids[i + 1]` if that token is trained, else IGNORE. `roles[i]` is
    the role of `labels[i]`, else NO_ROLE. The teacher's top-k for `labels[teacher_rows[j]]` is row j of `teacher_ids`
    and `teacher_logprobs`; a short row is padded with id 0 at log-prob -inf.
    """

    input_ids: np.ndarray  # [n], any integers; `encode` makes int32
    labels: np.ndarray  # [n], as input_ids
    roles: np.ndarray  # [n], any integers; `encode` makes int8
    teacher_ids: np.ndarray | None = None  # int64 or int32 [m, k]
    teacher_logprobs: np.ndarray | None = None  # float32 [m, k]
    teacher_rows: np.ndarray | None = None  # int64 [m]
    id: str | None = None


def encode(
    trace: Trace,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int = 4096,
    instruction: Instruction | None = None,
) -> Example:
    """Tokenise prompt and completion separately, as at inference, and give every trained token its role.

    The completion is what the student's chat template renders for such a turn (`completions`). A token has the role of
    its first non-space character. Special tokens that are spelled out in the completion stay text; in the prompt they
    become tokens, as at inference.

    Args:
        instruction: what the prompt says after the problem, and how the answer is marked; None for the default.

    Raises:
        TraceError: the trace is longer than `max_tokens` (it is never truncated), its signals do not match the tokens,
            or the chat template cannot render it.
        ValueError: the tokenizer has no offsets, no end of turn, or an unknown kind of chat template.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"roles need a fast tokenizer (one that gives offsets), got {type(tokenizer).__name__}")
    end_of_turn(tokenizer)  # raises if there is none
    try:
        opening = format_prompt(trace.problem, tokenizer, instruction, system=trace.system, turns=trace.turns or ())
        written = render_reply(trace, tokenizer, instruction)
    except ValueError as error:
        raise TraceError(f"{trace.name}: {error}") from None
    example = _make_example(opening, written, tokenizer, max_tokens, trace.name, trace.id)
    if trace.signals is not None:
        _add_signals(example, trace.signals, max(len(tokenizer), tokenizer.vocab_size), trace.name)
    return example


def encode_earlier(trace: Trace, tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int = 4096) -> list[Example]:
    """One example for each reply in `trace.turns`, as if it were the last turn, with its own thinking if it has any.

    Skips an empty reply, and a reply without thinking if the template cannot render one. Raises as `encode` does.
    """
    examples, turns = [], trace.turns or ()
    for number in range(1, len(turns), 2):
        where = f"{trace.name}, turn {number + 1}"
        before, question, reply = turns[: number - 1], turns[number - 1], turns[number]
        try:
            opening = format_prompt(question["content"], tokenizer, NONE, system=trace.system, turns=before)
            messages = [{"role": turn["role"], "content": turn["content"]} for turn in (*before, question, reply)]
            whole = render_conversation(tokenizer, messages, trace.system, False) if tokenizer.chat_template else ""
            written = render_earlier_reply(reply, tokenizer, opening, whole)
        except ValueError as error:
            raise TraceError(f"{where}: {error}") from None
        if written is not None:
            examples.append(_make_example(opening, written, tokenizer, max_tokens, where, trace.id))
    return examples


def _make_example(
    opening: str,
    written: RenderedReply,
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    where: str,
    name: str | None,
) -> Example:
    prompt = tokenizer(opening, add_special_tokens=False, verbose=False).input_ids
    tokens, offsets = tokenize_reply(written, tokenizer)
    length = len(prompt) + len(tokens) + 1
    if length > max_tokens:
        raise TraceError(f"{where}: expected at most {max_tokens} tokens, got {length}; raise max_tokens or drop it")
    roles = [*token_roles(written, offsets), ANSWER]
    return example_of(prompt, [*tokens, end_of_turn(tokenizer)], roles, name)


def example_of(
    prompt: Sequence[int], completion: Sequence[int], roles: Sequence[int], name: str | None = None
) -> Example:
    """The example of a prompt and a completion, its end of turn included, with the role of each of its tokens."""
    ids = np.array([*prompt, *completion], dtype=np.int32)
    labels, role_of = np.full_like(ids, IGNORE), np.full_like(ids, NO_ROLE, dtype=np.int8)
    labels[len(prompt) - 1 : -1] = completion
    role_of[len(prompt) - 1 : -1] = roles
    return Example(ids, labels, role_of, id=name)


def token_roles(written: RenderedReply, offsets: np.ndarray) -> np.ndarray:
    """The role of each completion token, int64 [tokens], from its character offsets [tokens, 2]."""
    text = written.text
    blank = np.array([character.isspace() for character in text])
    next_ink = np.minimum.accumulate(np.where(blank, len(text), np.arange(len(text)))[::-1])[::-1]
    start, end = np.minimum(offsets[:, 0], len(text) - 1), offsets[:, 1]
    ink = next_ink[start]
    return written.roles[np.where(ink < end, ink, start)]


def _add_signals(example: Example, signals: Mapping[str, list[list[Any]]], vocabulary: int, where: str) -> None:
    rows = np.flatnonzero(example.labels != IGNORE)
    ids, logprobs = signals["ids"], signals["logprobs"]
    if len(ids) != len(rows):
        raise TraceError(
            f"{where}: signals: expected {len(rows)} rows, one for each trained token, got {len(ids)}; "
            "were they made with another tokenizer?"
        )
    if (largest := max(chain.from_iterable(ids))) >= vocabulary:
        raise TraceError(f"{where}: signals.ids: expected ids below {vocabulary}, the vocabulary, got {largest}")
    width = max(map(len, ids))
    example.teacher_rows = rows
    example.teacher_ids = np.array([row + [0] * (width - len(row)) for row in ids], dtype=np.int64)
    padded = [row + [-math.inf] * (width - len(row)) for row in logprobs]
    example.teacher_logprobs = np.array(padded, dtype=np.float32)


def encode_all(
    traces: Iterable[Trace],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int = 4096,
    instruction: Instruction | None = None,
    turns: Literal["last", "all"] = "last",
) -> tuple[list[Example], list[tuple[Trace, str]]]:
    """Encode every trace that can be encoded. Returns the examples, and the other traces, each with the reason.

    With `turns="all"` the replies of earlier turns become examples too (`encode_earlier`).
    """
    examples: list[Example] = []
    left_out: list[tuple[Trace, str]] = []
    for trace in traces:
        try:
            last = encode(trace, tokenizer, max_tokens=max_tokens, instruction=instruction)
            earlier = encode_earlier(trace, tokenizer, max_tokens=max_tokens) if turns == "all" else []
            examples += [*earlier, last]
        except TraceError as error:
            left_out.append((trace, str(error)))
    return examples, left_out


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Pack examples end to end without padding.

    Returns `input_ids`, `position_ids` (from 0 in each example), `labels` and `roles`, int64 [1, T]. If an example has
    signals: `teacher_ids` int64 [N, k] (-1 is padding), `teacher_logprobs` float32 [N, k], and `teacher_rows` int64
    [N], positions on the T axis. `text_rows` int64: the positions with a label but no signal. `lengths`: a list of the
    examples' lengths. A model tells the examples apart by the restarting positions: pass no attention mask, and
    `use_cache=False`.
    """
    if not examples:
        raise ValueError("collate needs at least one example, got none")
    packed: dict[str, Any] = {
        name: torch.from_numpy(np.concatenate([getattr(example, name) for example in examples])).long()[None]
        for name in ("input_ids", "labels", "roles")
    }
    lengths = [len(example.input_ids) for example in examples]
    packed["position_ids"] = torch.cat([torch.arange(length, device="cpu") for length in lengths])[None]
    is_text = packed["labels"][0] != IGNORE
    packed |= _collate_signals(examples, lengths, is_text)
    if "teacher_rows" in packed:
        is_text[packed["teacher_rows"]] = False
    return packed | {"text_rows": is_text.nonzero().squeeze(1), "lengths": lengths}


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors moved to `device`."""
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def mask_targets_from(batch: dict[str, Any], start: int) -> None:
    """Exclude the tokens from `start` on from training, in place: drop their labels and signals."""
    batch["labels"][:, start:] = IGNORE
    batch["text_rows"] = batch["text_rows"][batch["text_rows"] < start]
    if "teacher_rows" in batch:
        kept = batch["teacher_rows"] < start
        batch |= {name: batch[name][kept] for name in ("teacher_ids", "teacher_logprobs", "teacher_rows")}


def _collate_signals(
    examples: Sequence[Example], lengths: Sequence[int], is_trained: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The signals at the trained positions (`is_trained`, bool [T]).

    Their values are checked here, on the CPU: a check on a GPU would synchronise.
    """
    ids, logprobs, rows = [], [], []
    for example, start in zip(examples, np.cumsum([0, *lengths[:-1]]), strict=True):
        if example.teacher_ids is None or example.teacher_logprobs is None or example.teacher_rows is None:
            continue
        ids.append(example.teacher_ids)
        logprobs.append(example.teacher_logprobs)
        rows.append(example.teacher_rows + start)
    if not rows:
        return {}
    all_ids = torch.from_numpy(_stack_rows(ids, -1)).long()
    all_logprobs = torch.from_numpy(_stack_rows(logprobs, -math.inf))
    all_rows = torch.from_numpy(np.concatenate(rows))
    kept = is_trained[all_rows]
    signal = check_top_k(TopK(all_ids[kept], all_logprobs[kept]))
    return {"teacher_ids": signal.ids, "teacher_logprobs": signal.logprobs, "teacher_rows": all_rows[kept]}


def _stack_rows(blocks: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Concatenate blocks [m_i, k_i] into [sum m_i, max k_i], short rows padded with `fill`."""
    width = max(block.shape[1] for block in blocks)
    padded = [np.pad(block, ((0, 0), (0, width - block.shape[1])), constant_values=fill) for block in blocks]
    return np.concatenate(padded)
