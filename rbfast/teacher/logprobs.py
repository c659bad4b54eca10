"""Score existing traces with a local teacher: its top-k log-probs at each trained token.

```python
with SignalStore(folder, teacher="my-teacher", k=32, vocabulary=len(tokenizer)) as store:
    refused = add_local_logprobs(teacher, teacher_tokenizer, traces, tokenizer, store)
```

The teacher reads its own prompt and the student's completion. If both tokenizers are the same, every trained token gets
the teacher's top k. Different tokenizers are an error unless `align=True`: then only the tokens that both share get it.
`server_logprobs` does the same with a served teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rbfast import ops
from rbfast.data.chat_template import default_instruction, end_of_turn, format_prompt
from rbfast.data.completions import RenderedReply, render_reply, tokenize_reply
from rbfast.data.encoding import IGNORE, Example, encode_all
from rbfast.data.instruction import Instruction
from rbfast.data.signal_store import SignalStore
from rbfast.data.trace import Trace
from rbfast.loss.teacher_signal import Dense
from rbfast.models.student import final_hidden, head_of
from rbfast.teacher.align import byte_spans, spellings, student_ids, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
NOTHING_SHARED = "the two tokenizers share no token of the completion"
# Tokens per forward pass of a local teacher, and bytes of logits at a time.
_TOKENS, _TOKENS_ON_GPU = 2048, 16384
_CHUNK_BYTES, _CHUNK_BYTES_ON_GPU = 2**26, 2**29


class TokenizersDiffer(ValueError):
    """The teacher's tokenizer differs from the student's."""


@dataclass(frozen=True)
class PendingTrace:
    """A trace that has no log-probs yet: its example, and the student's tokens of its completion."""

    trace: Trace
    example: Example
    written: list[int]  # without the end of turn
    reply: RenderedReply  # the text of these tokens
    instruction: Instruction

    @property
    def first(self) -> int:
        """The row of the first trained token."""
        return len(self.example.input_ids) - len(self.written) - 2


def pending_traces(
    traces: Iterable[Trace],
    tokenizer: PreTrainedTokenizerBase,
    store: SignalStore,
    max_tokens: int,
    instruction: Instruction | None = None,
) -> tuple[list[PendingTrace], list[tuple[Trace, str]]]:
    """The traces that `store` lacks, and the traces that cannot be encoded, with the reason."""
    tasks, refused = [], []
    instruction = instruction or default_instruction(tokenizer)
    for trace in traces:
        examples, left_out = encode_all([trace], tokenizer, max_tokens=max_tokens, instruction=instruction)
        refused += left_out
        for example in examples:
            if example not in store:
                written = example.labels[example.labels != IGNORE][:-1].tolist()
                reply = render_reply(trace, tokenizer, instruction)
                tasks.append(PendingTrace(trace, example, written, reply, instruction))
    return tasks, refused


@torch.no_grad()
def add_local_logprobs(
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    tokenizer: PreTrainedTokenizerBase,
    store: SignalStore,
    *,
    align: bool = False,
    max_tokens: int = 4096,
    instruction: Instruction | None = None,
    progress: Progress | None = None,
) -> list[tuple[Trace, str]]:
    """Add the top k of every trace that `store` lacks. Logits are fp32, and exist for a few tokens at a time.

    Returns:
        The traces that got no log-probs, with the reason.

    Raises:
        TokenizersDiffer: the two tokenizers are not the same and `align` is False.
    """
    same = teacher_tokenizer.get_vocab() == tokenizer.get_vocab()
    if not same and not align:
        raise TokenizersDiffer(
            f"the teacher's tokenizer has other tokens than the student's ({len(teacher_tokenizer)} and "
            f"{len(tokenizer)}): use align=True (--align) to score only the tokens with the same boundaries in both"
        )
    vocabulary = head_of(teacher).weight.shape[0]
    mapped = _mapping(teacher_tokenizer, tokenizer, same, vocabulary)
    tasks, refused = pending_traces(traces, tokenizer, store, max_tokens, instruction)
    read = _reader(teacher_tokenizer, tokenizer, same)
    done = 0
    for batch in _batches(tasks, _TOKENS if teacher.device.type == "cpu" else _TOKENS_ON_GPU):
        readings, unread = _read_all(batch, read)
        refused += unread
        if readings:
            refused += _add_batch(teacher, readings, mapped, store)
        done += len(batch)
        if progress:
            progress(done, len(tasks))
    return refused


def _read_all(
    tasks: Sequence[PendingTrace], read: Callable[[PendingTrace], _Reading]
) -> tuple[list[_Reading], list[tuple[Trace, str]]]:
    """The readings of the tasks, and the traces of the tasks that cannot be read, with the reason."""
    readings, unread = [], []
    for task in tasks:
        try:
            readings.append(read(task))
        except ValueError as error:
            unread.append((task.trace, f"{task.trace.name}: {error}"))
    return readings, unread


def _batches(tasks: Iterable[PendingTrace], tokens: int) -> Iterator[list[PendingTrace]]:
    """Group tasks, in order, into batches of at most `tokens` of the student's tokens; a longer task is alone."""
    batch: list[PendingTrace] = []
    size = 0
    for task in tasks:
        length = len(task.example.input_ids)
        if batch and size + length > tokens:
            yield batch
            batch, size = [], 0
        batch.append(task)
        size += length
    if batch:
        yield batch


def _mapping(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, same: bool, vocabulary: int) -> Tensor:
    """The student's id for each id of the teacher, -1 if there is none; int64 [vocabulary]."""
    if same:
        numbers = np.arange(vocabulary)
        return torch.from_numpy(np.where(numbers < len(student), numbers, -1))
    return torch.from_numpy(student_ids(token_bytes(teacher), token_bytes(student), vocabulary))


@dataclass(frozen=True)
class _Reading:
    """A trace as the teacher reads it.

    Attributes:
        ids: the teacher's tokens of its own prompt and of the completion.
        pairs: (a token of the student's completion, the row of `ids` that predicts it).
    """

    task: PendingTrace
    ids: list[int]
    pairs: list[tuple[int, int]]


def _reader(
    teacher_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, same: bool
) -> Callable[[PendingTrace], _Reading]:
    """A function that makes the teacher's reading of a task. It raises ValueError if the tokenizers share no token."""
    same_end = end_of_turn(teacher_tokenizer) == end_of_turn(tokenizer)

    def read(task: PendingTrace) -> _Reading:
        opening = format_prompt(
            task.trace.problem,
            teacher_tokenizer,
            task.instruction,
            system=task.trace.system,
            turns=task.trace.turns or (),
        )
        prompt = teacher_tokenizer(opening, add_special_tokens=False).input_ids
        reply = render_reply(task.trace, teacher_tokenizer, task.instruction)
        if same and reply.text == task.reply.text:
            written = task.written
            shared = [(token, token) for token in range(len(written) + same_end)]
        else:
            written, shared = _shared_tokens(teacher_tokenizer, tokenizer, task, reply)
            if not shared:
                raise ValueError(NOTHING_SHARED)
        return _Reading(task, prompt + written, [(ours, len(prompt) - 1 + theirs) for ours, theirs in shared])

    return read


def _add_batch(
    teacher: PreTrainedModel, readings: Sequence[_Reading], mapped: Tensor, store: SignalStore
) -> list[tuple[Trace, str]]:
    """Score several traces in one forward pass, packed without padding, and add their top k to the store.

    Returns the traces whose log-probs the store refuses, with the reason.
    """
    lengths = [len(reading.ids) for reading in readings]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(teacher.device)
    ids = torch.tensor([list(chain.from_iterable(reading.ids for reading in readings))], device=teacher.device)
    starts = [0, *accumulate(lengths)]
    rows = [start + row for reading, start in zip(readings, starts, strict=False) for _, row in reading.pairs]
    hidden = final_hidden(teacher, ids, positions, lengths)
    hidden = hidden[torch.tensor(rows, device=hidden.device)]
    top_ids, logprobs = (table.cpu() for table in _top_k(teacher, hidden, store.k, mapped >= 0))
    counts = [len(reading.pairs) for reading in readings]
    refused = []
    for reading, ids_of_rows, values in zip(
        readings, mapped[top_ids].split(counts), logprobs.split(counts), strict=True
    ):
        at = np.array([reading.task.first + ours for ours, _ in reading.pairs])
        if reason := try_to_add(store, reading.task.example, at, ids_of_rows.numpy(), values.numpy()):
            refused.append((reading.task.trace, f"{reading.task.trace.name}: {reason}"))
    return refused


def try_to_add(
    store: SignalStore, example: Example, rows: np.ndarray, ids: np.ndarray, logprobs: np.ndarray
) -> str | None:
    """Add the log-probs of an example. Returns why the store refuses them (logits, NaN), else None."""
    try:
        store.add(example, rows, ids, logprobs)
    except ValueError as error:
        return str(error)
    return None


def _shared_tokens(
    teacher_tokenizer: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    task: PendingTrace,
    reply: RenderedReply,
) -> tuple[list[int], list[tuple[int, int]]]:
    """The teacher's tokens of its own reply, and the pairs (student's token, teacher's token) with the same bytes."""
    written, _ = tokenize_reply(reply, teacher_tokenizer)
    whole = reply.text == task.reply.text
    at = {place: token for token, place in enumerate(_places(teacher_tokenizer, written, reply, whole)) if place}
    student = _places(tokenizer, task.written, task.reply, whole)
    return written, [(token, at[place]) for token, place in enumerate(student) if place in at]


def _places(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], reply: RenderedReply, whole: bool
) -> list[tuple[int, int, int] | None]:
    """The byte range of each token: (0, start, end) in the reply if both replies are the same text (`whole`).

    Otherwise (part, start, end) within the thought (0) or the answer (1), or None for a token in neither: each model
    puts its own tags around them.
    """
    spans = byte_spans(spellings(tokenizer, ids), reply.text.encode())
    if whole:
        return [(0, start, end) for start, end in spans]
    parts = [[len(reply.text[:edge].encode()) for edge in part] for part in (reply.thought, reply.answer)]
    return [
        next(((n, start - a, end - a) for n, (a, b) in enumerate(parts) if a <= start and end <= b), None)
        for start, end in spans
    ]


def _top_k(teacher: PreTrainedModel, hidden: Tensor, k: int, is_known: Tensor) -> tuple[Tensor, Tensor]:
    """The top-k ids and natural log-probs [n, k] of hidden states [n, H], from fp32 logits.

    Only ids in `is_known`, bool [V], are candidates: a head may have rows without a token, and the student may lack a
    token. The log-probs are normalised over all rows of the head.
    """
    head = head_of(teacher)
    signal = Dense(hidden, head.weight, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap)
    k = min(k, int(is_known.sum()))
    unknown = ~is_known.to(hidden.device)
    memory = _CHUNK_BYTES if hidden.device.type == "cpu" else _CHUNK_BYTES_ON_GPU
    step = max(1, memory // (4 * len(head.weight)))
    ids, values = [], []
    for part in torch.arange(len(hidden), device=hidden.device).split(step):
        logits = torch.empty(len(part), len(head.weight), device=hidden.device)
        signal.write_logits_(logits, part, ops.head_forward_)
        total = logits.logsumexp(1, keepdim=True)
        best = logits.masked_fill_(unknown, -torch.inf).topk(k)
        values.append(best.values - total)
        ids.append(best.indices)
    return torch.cat(ids), torch.cat(values)
