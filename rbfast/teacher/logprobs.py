"""Log-probs of a teacher for traces that exist: by a local model, or by a server that scores prompts.

```python
with SignalStore(folder, teacher="my-teacher", k=32, vocabulary=len(tokenizer)) as store:
    refused = score_locally(teacher, teacher_tokenizer, traces, tokenizer, store)
    refused = score_on_server(server, traces, tokenizer, store)     # vLLM's prompt_logprobs, or echo with logprobs
```

The teacher reads its own prompt and the student's completion. Where both tokenize alike, every trained token gets its
top k; where they do not, that is an error unless `align=True`, and then the tokens that both share get theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from rbfast import ops
from rbfast.data.encoding import IGNORE, INSTRUCTION, Example, encode_all, end_of_turn, format_prompt
from rbfast.data.signal_store import SignalStore
from rbfast.data.trace import Trace
from rbfast.loss.teacher_signal import Dense
from rbfast.models.student import final_hidden, head_of
from rbfast.teacher.align import Piece, align, ids_by_bytes, places, student_ids, token_bytes
from rbfast.teacher.client import Server, ServerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
Dialect = Literal["vllm", "echo"]
DIALECTS = ("vllm", "echo")
_NOTHING_SHARED = "the two tokenizers share no token of it"
# Tokens that a local teacher reads together, and the bytes of its logits at a time.
_TOKENS, _TOKENS_ON_GPU = 2048, 16384
_CHUNK_BYTES, _CHUNK_BYTES_ON_GPU = 2**26, 2**29


class TokenizersDiffer(ValueError):
    """The teacher cuts a text into other tokens than the student."""


@dataclass(frozen=True)
class _Task:
    """A trace to score: its example, and the student's tokens of its completion."""

    trace: Trace
    example: Example
    written: list[int]  # without the end of turn

    @property
    def first(self) -> int:
        """The row of the first trained token."""
        return len(self.example.input_ids) - len(self.written) - 2

    @property
    def name(self) -> str:
        return self.trace.id or repr(self.trace.problem[:40])


def _tasks(
    traces: Iterable[Trace], tokenizer: PreTrainedTokenizerBase, store: SignalStore, max_tokens: int
) -> tuple[list[_Task], list[tuple[Trace, str]]]:
    """What is still to be scored, and the traces that cannot be, with the reason."""
    tasks, refused = [], []
    for trace in traces:
        examples, left_out = encode_all([trace], tokenizer, max_tokens=max_tokens)
        refused += left_out
        for example in examples:
            if example not in store:
                tasks.append(_Task(trace, example, example.labels[example.labels != IGNORE][:-1].tolist()))
    return tasks, refused


# A local model


@torch.no_grad()
def score_locally(
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    tokenizer: PreTrainedTokenizerBase,
    store: SignalStore,
    *,
    align: bool = False,
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[tuple[Trace, str]]:
    """Adds the top k of every trace that `store` lacks; logits are fp32 and exist for a few tokens at a time.

    Returns:
        the traces that got none, with the reason.

    Raises:
        TokenizersDiffer: the two tokenizers are not the same and `align` is False.
    """
    same = teacher_tokenizer.get_vocab() == tokenizer.get_vocab()
    if not same and not align:
        raise TokenizersDiffer(
            f"the teacher's tokenizer has other tokens than the student's ({len(teacher_tokenizer)} and "
            f"{len(tokenizer)}); with align=True (--align) the tokens that both cut alike are scored"
        )
    vocabulary = head_of(teacher).weight.shape[0]
    mapped = _mapping(teacher_tokenizer, tokenizer, same, vocabulary)
    tasks, refused = _tasks(traces, tokenizer, store, max_tokens)
    read = _reader(teacher_tokenizer, tokenizer, same)
    done = 0
    for batch in _batches(tasks, _TOKENS if teacher.device.type == "cpu" else _TOKENS_ON_GPU):
        readings = []
        for task in batch:
            try:
                readings.append(read(task))
            except ValueError as error:
                refused.append((task.trace, f"{task.name}: {error}"))
        if readings:
            _score_batch(teacher, readings, mapped, store)
        done += len(batch)
        if progress:
            progress(done, len(tasks))
    return refused


def _batches(tasks: Iterable[_Task], tokens: int) -> Iterator[list[_Task]]:
    """Tasks in their order, of so many of the student's tokens together, or one that has more."""
    batch: list[_Task] = []
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
    """The student's id of each of the teacher's, -1 where there is none; [vocabulary]."""
    if same:
        numbers = np.arange(vocabulary)
        return torch.from_numpy(np.where(numbers < len(student), numbers, -1))
    return torch.from_numpy(student_ids(token_bytes(teacher), token_bytes(student), vocabulary))


@dataclass(frozen=True)
class _Reading:
    """A trace as the teacher reads it.

    Attributes:
        ids: the teacher's tokens of its own prompt and of the completion.
        pairs: a token of the student's completion, and the row of `ids` that says what comes there.
    """

    task: _Task
    ids: list[int]
    pairs: list[tuple[int, int]]


def _reader(
    teacher_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, same: bool
) -> Callable[[_Task], _Reading]:
    """How the teacher reads a task. The function raises ValueError for one of which it shares no token."""
    same_end = end_of_turn(teacher_tokenizer) == end_of_turn(tokenizer)

    def read(task: _Task) -> _Reading:
        opening = format_prompt(task.trace.problem, teacher_tokenizer)
        prompt = teacher_tokenizer(opening, add_special_tokens=False).input_ids
        if same:
            written = task.written
            shared = [(token, token) for token in range(len(written) + same_end)]
        else:
            written, shared = _shared_tokens(teacher_tokenizer, tokenizer, task)
            if not shared:
                raise ValueError(_NOTHING_SHARED)
        return _Reading(task, prompt + written, [(ours, len(prompt) - 1 + theirs) for ours, theirs in shared])

    return read


def _score_batch(teacher: PreTrainedModel, readings: Sequence[_Reading], mapped: Tensor, store: SignalStore) -> None:
    """Adds the top k of traces read together, packed without padding."""
    lengths = [len(reading.ids) for reading in readings]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(teacher.device)
    ids = torch.tensor([list(chain.from_iterable(reading.ids for reading in readings))], device=teacher.device)
    starts = [0, *accumulate(lengths)]
    rows = [start + row for reading, start in zip(readings, starts, strict=False) for _, row in reading.pairs]
    hidden = final_hidden(teacher, ids, positions)[torch.tensor(rows, device=teacher.device)]
    top_ids, logprobs = (found.cpu() for found in _top_k(teacher, hidden, store.k, mapped >= 0))
    counts = [len(reading.pairs) for reading in readings]
    for reading, found, values in zip(readings, mapped[top_ids].split(counts), logprobs.split(counts), strict=True):
        at = np.array([reading.task.first + ours for ours, _ in reading.pairs])
        store.add(reading.task.example, at, found.numpy(), values.numpy())


def _shared_tokens(
    teacher_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, task: _Task
) -> tuple[list[int], list[tuple[int, int]]]:
    """The teacher's tokens of the completion, and (student's token, teacher's token) where both are the same bytes."""
    completion = task.trace.completion()
    written = teacher_tokenizer(completion, add_special_tokens=False, split_special_tokens=True).input_ids
    ours, theirs = token_bytes(tokenizer), token_bytes(teacher_tokenizer)
    text = completion.encode()
    at = {place: token for token, place in enumerate(places([theirs[number] for number in written], text))}
    student = places([ours[number] for number in task.written], text)
    return written, [(token, at[place]) for token, place in enumerate(student) if place in at]


def _top_k(teacher: PreTrainedModel, hidden: Tensor, k: int, is_known: Tensor) -> tuple[Tensor, Tensor]:
    """ids and natural log-probs [n, k] of hidden states [n, H], from fp32 logits.

    Only ids that are known, bool [V], are candidates: a head has rows that are no token, and another tokenizer's tokens
    need not be the student's. The log-probs are over all of the head's rows.
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


# A server


def score_on_server(
    server: Server,
    traces: Sequence[Trace],
    tokenizer: PreTrainedTokenizerBase,
    store: SignalStore,
    *,
    dialect: Dialect = "vllm",
    align: bool = False,
    max_tokens: int = 4096,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> list[tuple[Trace, str]]:
    """Adds the top k of every trace that `store` lacks, as `server` reads it as a prompt.

    Args:
        dialect: "vllm" asks for `prompt_logprobs`; "echo" for the prompt back with `logprobs`, as OpenAI's completions.
        align: the server's tokenizer may differ from the student's. It is then shown plain text, without the student's
            chat template; else the student's own token ids (vllm) or its prompt (echo).

    Returns:
        the traces that got none, with the reason.

    Raises:
        TokenizersDiffer: the server reads other tokens than the student and `align` is False.
        ServerError: no answer after all retries, or one without log-probs.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}")
    reader = _Reader(server, tokenizer, store.k, dialect, align)
    tasks, refused = _tasks(traces, tokenizer, store, max_tokens)
    queue = iter(tasks)
    with ThreadPoolExecutor(concurrency) as pool:
        done = 0
        while batch := list(islice(queue, 4 * concurrency)):
            for task, found in zip(batch, pool.map(reader.read, batch), strict=True):
                done += 1
                if isinstance(found, str):
                    refused.append((task.trace, f"{task.name}: {found}"))
                else:
                    store.add(task.example, *found)
                if progress:
                    progress(done, len(tasks))
            store.flush()  # what was paid for is kept
    return refused


class _Reader:
    """Asks for the log-probs of one trace, and finds the student's tokens in the reply."""

    def __init__(
        self, server: Server, tokenizer: PreTrainedTokenizerBase, k: int, dialect: Dialect, align: bool
    ) -> None:
        self.server, self.tokenizer, self.k, self.dialect, self.align = server, tokenizer, k, dialect, align
        self.tokens = token_bytes(tokenizer)
        self.ids = ids_by_bytes(self.tokens)

    def read(self, task: _Task) -> tuple[np.ndarray, np.ndarray, np.ndarray] | str:
        """rows, ids, logprobs for `SignalStore.add`; or why there are none."""
        if self.dialect == "vllm" and not self.align:
            return _table(self._by_ids(task), self.k)
        try:
            found = self._by_text(task)
        except TokenizersDiffer:
            raise
        except ValueError as error:
            return str(error)
        return _table(found, self.k) if found else _NOTHING_SHARED

    def _by_ids(self, task: _Task) -> list[tuple[int, list[int], list[float]]]:
        """The server is given the student's ids; what it calls them shows whether they are its own."""
        ids = task.example.input_ids.tolist()
        choice = self._ask({"prompt": ids, "prompt_logprobs": self.k, "add_special_tokens": False})
        scored = choice["prompt_logprobs"]
        if len(scored) != len(ids):
            raise TokenizersDiffer(f"{task.name}: {len(ids)} tokens were sent, the server scored {len(scored)}")
        found = []
        for row in range(task.first, len(ids) - 1):
            number, top = ids[row + 1], scored[row + 1]
            self._check_same(task, number, (top.get(str(number)) or {}).get("decoded_token"))
            known = [(int(n), entry["logprob"]) for n, entry in top.items() if int(n) < len(self.tokens)]
            found.append((row, [n for n, _ in known], [value for _, value in known]))
        return found

    def _check_same(self, task: _Task, number: int, theirs: str | None) -> None:
        written = self.tokens[number]
        if theirs is None or not theirs or "\ufffd" in theirs or written is None:
            return  # part of a character, or a special token: it has no text to compare
        if theirs.strip() != written.decode("utf-8", "replace").strip():  # some decode without the opening blank
            raise TokenizersDiffer(
                f"{task.name}: token {number} is {theirs!r} to the server and {written!r} to the student: the "
                "tokenizers differ; with align=True (--align) the tokens that both cut alike are scored"
            )

    def _by_text(self, task: _Task) -> list[tuple[int, list[int], list[float]]]:
        opening = (
            f"{task.trace.problem}\n\n{INSTRUCTION}\n\n"
            if self.align
            else format_prompt(task.trace.problem, self.tokenizer)
        )
        text = task.trace.completion().encode()
        pieces = self._pieces(opening + task.trace.completion())
        shift = len(opening.encode())
        spelled = places([piece.written for piece in pieces], opening.encode() + text)
        theirs = [(start - shift, end - shift) for start, end in spelled]
        student = places([self.tokens[number] for number in task.written], text)
        rows = align(student, theirs, pieces, self.ids)
        if not self.align and len(rows) < len(student):
            raise TokenizersDiffer(
                f"{task.name}: the server cuts the text into other tokens than the student: it shares {len(rows)} of "
                f"{len(student)}; with align=True (--align) those are scored"
            )
        return [(task.first + row.token, row.ids, row.logprobs) for row in rows]

    def _pieces(self, text: str) -> list[Piece]:
        """The tokens of `text` as the server cuts it; the first one's candidates, and often its text, are not said."""
        if self.dialect == "vllm":
            choice = self._ask({"prompt": text, "prompt_logprobs": self.k, "return_token_ids": True})
            pieces = list(_vllm_pieces(choice))
        else:
            choice = self._ask({"prompt": text, "echo": True, "logprobs": self.k})
            pieces = list(_echo_pieces(choice["logprobs"]))[: choice["prompt_tokens"]]
        rest = sum(len(piece.written) for piece in pieces[1:])
        data = text.encode()
        return [Piece(data[: max(0, len(data) - rest)], []), *pieces[1:]]

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        wanted = "prompt_logprobs" if self.dialect == "vllm" else "logprobs"
        reply = self.server.ask("/completions", {"max_tokens": 1} | body)
        choice = (reply.get("choices") or [{}])[0]
        # vLLM puts them beside the choice, or above it.
        found = choice.get(wanted) or reply.get(wanted)
        if not found:
            raise ServerError(
                f"{self.server.url} sends no {wanted}: it does not score prompts this way; dialects: "
                f"{', '.join(DIALECTS)}"
            )
        # One token is generated, because some servers refuse to generate none.
        counted = (reply.get("usage") or {}).get("prompt_tokens", -1)
        return choice | {wanted: found, "prompt_tokens": counted}


def _vllm_pieces(choice: dict[str, Any]) -> Iterator[Piece]:
    numbers = choice.get("prompt_token_ids") or [None] * len(choice["prompt_logprobs"])
    for number, top in zip(numbers, choice["prompt_logprobs"], strict=True):
        # The first token has no candidates; of the others, the one that was written comes first.
        if top is None:
            yield Piece(b"", [])
            continue
        written = top[str(number)] if number is not None else next(iter(top.values()))
        yield Piece(
            str(written["decoded_token"]).encode(),
            [(str(entry["decoded_token"]).encode(), entry["logprob"]) for entry in top.values()],
        )


def _echo_pieces(said: dict[str, Any]) -> Iterator[Piece]:
    for token, top in zip(said["tokens"], said["top_logprobs"], strict=True):
        yield Piece(token.encode(), [(other.encode(), value) for other, value in (top or {}).items()])


def _table(found: Sequence[tuple[int, list[int], list[float]]], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rows [n], ids and logprobs [n, k]: the best k of each row, for servers list the written token besides them."""
    rows = np.array([row for row, _, _ in found])
    table = np.zeros((len(found), k), dtype=np.int64), np.full((len(found), k), -np.inf)
    for i, (_, ids, values) in enumerate(found):
        best = np.argsort(-np.array(values), kind="stable")[:k]
        table[0][i, : len(best)], table[1][i, : len(best)] = np.array(ids)[best], np.array(values)[best]
    return rows, *table


# A server that wrote the trace itself


def keep_reply(
    trace: Trace, reply: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, store: SignalStore
) -> str | None:
    """Adds what a reply of `teach` says of its own tokens to `store`, as far as the trace repeats its text.

    Returns:
        why there is nothing to add, else None.
    """
    tasks, refused = _tasks([trace], tokenizer, store, max_tokens=2**31)
    if not tasks:
        return refused[0][1] if refused else None
    [task], tokens = tasks, token_bytes(tokenizer)
    pieces = [Piece(_raw(token), [(_raw(other), value) for other, value in top]) for token, top in reply["logprobs"]]
    text, completion = reply["text"].encode(), trace.completion().encode()
    start = text.find(trace.reasoning.encode())
    if start < 0 or not pieces:
        return "the reply has no log-probs of the reasoning"
    # The trace is the reply from here on, until the answer is written another way.
    opening = completion.index(trace.reasoning.encode(), len((trace.plan or "").encode()))
    shared = _shared_length(text[start:], completion[opening:])
    try:
        theirs = [(a - start + opening, b - start + opening) for a, b in places([p.written for p in pieces], text)]
        ours = places([tokens[number] for number in task.written], completion)
    except ValueError as error:
        return str(error)
    rows = [
        (task.first + row.token, row.ids, row.logprobs)
        for row in align(ours, theirs, pieces, ids_by_bytes(tokens))
        if opening <= ours[row.token][0] and ours[row.token][1] <= opening + shared
    ]
    if not rows:
        return _NOTHING_SHARED
    store.add(task.example, *_table(rows, store.k))
    return None


def _shared_length(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _raw(letters: str) -> bytes:
    return letters.encode("latin-1")
