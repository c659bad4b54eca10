"""Log-probs from a served teacher: for existing traces, if it can score prompts, or from its own replies.

```python
with SignalStore(folder, teacher="my-teacher", k=32, vocabulary=len(tokenizer)) as store:
    refused = add_server_logprobs(server, traces, tokenizer, store)     # vLLM's prompt_logprobs, or echo with logprobs
    reason = add_reply_logprobs(trace, reply, tokenizer, store)         # those in the reply
```
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rbfast.data.chat_template import format_prompt
from rbfast.data.encoding import IGNORE, Example
from rbfast.data.instruction import Instruction
from rbfast.data.signal_store import SignalStore, example_key
from rbfast.data.trace import Trace
from rbfast.teacher.align import Piece, align, byte_spans, ids_by_bytes, shared_length, spellings, token_bytes
from rbfast.teacher.client import REFUSED, Server, ServerError
from rbfast.teacher.logprobs import NOTHING_SHARED, PendingTrace, Progress, TokenizersDiffer, pending_traces, try_to_add
from rbfast.teacher.prompt_scores import BY_IDS, DIALECTS, Dialect, PromptScorer
from rbfast.teacher.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Row = tuple[int, list[int], list[float]]  # row of the example, ids, log-probs
_Result = tuple[np.ndarray, np.ndarray, np.ndarray] | str | ServerError


def add_server_logprobs(
    server: Server,
    traces: Sequence[Trace],
    tokenizer: PreTrainedTokenizerBase,
    store: SignalStore,
    *,
    dialect: Dialect = "vllm",
    align: bool = False,
    max_tokens: int = 4096,
    instruction: Instruction | None = None,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> list[tuple[Trace, str]]:
    """Add the top k of every trace that `store` lacks. The server scores the traces as prompts.

    Args:
        dialect: how the server scores prompts, see `prompt_scores`.
        align: the server's tokenizer may differ from the student's. The server then gets plain text, without the
            student's chat template; otherwise the student's token ids, or in dialect "echo" its prompt.

    Returns:
        The traces that got no log-probs, with the reason.

    Raises:
        TokenizersDiffer: the server's tokens differ from the student's and `align` is False.
        ServerError: no answer after all retries, an answer without log-probs, or a refusal while neither this call
            nor an earlier one has scored a trace.
    """
    reader = _Reader(server, tokenizer, store.k, store.k, dialect, align)
    tasks, refused = pending_traces(traces, tokenizer, store, max_tokens, instruction)
    jobs = [_Job(task.example, partial(reader.read, task)) for task in tasks]
    for number, reason in _score_all(jobs, server, store, concurrency, progress):
        trace = tasks[number].trace
        refused.append((trace, f"{trace.name}: {reason}"))
    return refused


def add_example_logprobs(
    server: Server,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    store: SignalStore,
    *,
    dialect: Dialect = "vllm",
    concurrency: int = 8,
    progress: Progress | None = None,
) -> list[tuple[Example, str]]:
    """Add log-probs of the labels of examples that `store` lacks, by token ids (dialect "vllm" or "sglang"): the top
    `store.k - 1`, and the label itself if it is not among them.

    Returns:
        The examples that got no log-probs, with the reason.

    Raises:
        TokenizersDiffer: the server's tokens differ from the student's.
        ServerError: no answer after all retries, or one without log-probs.
    """
    reader = _ExampleReader(server, tokenizer, store.k - 1, dialect)
    missing = list({example_key(example): example for example in examples if example not in store}.values())
    jobs = [_Job(example, partial(reader.read_ids, example, "a completion")) for example in missing]
    refused = _score_all(jobs, server, store, concurrency, progress, is_checked=True)
    return [(missing[number], str(reason)) for number, reason in refused]


def check_scores(
    server: Server, example: Example, tokenizer: PreTrainedTokenizerBase, k: int, dialect: Dialect = "vllm"
) -> None:
    """Score an example, to find out whether `add_example_logprobs` can use the server. Raises as that does."""
    result = _ExampleReader(server, tokenizer, k, dialect).read_ids(example, "a prompt")
    if not isinstance(result, tuple):
        raise result if isinstance(result, ServerError) else ServerError(f"{server.url}: {result}")


class _Job(NamedTuple):
    """An example to score, and the function that requests its log-probs."""

    example: Example
    read: Callable[[], _Result]


def _score_all(
    jobs: Sequence[_Job],
    server: Server,
    store: SignalStore,
    concurrency: int,
    progress: Progress | None,
    is_checked: bool = False,
) -> list[tuple[int, str | ServerError]]:
    """Run the jobs and add their log-probs to `store`. Returns which jobs (by number) got none, with the reason.

    Raises the refusal if the server refuses all of the first jobs, unless it is known to score (`is_checked`).
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")
    refused: list[tuple[int, str | ServerError]] = []
    queue = iter(enumerate(jobs))
    done, refusal, scores = 0, None, is_checked or len(store) > 0
    while batch := list(islice(queue, 4 * concurrency)):
        ended: dict[int, _Result] = {}
        error: BaseException | None = None
        stop = Event()
        workers = Workers(lambda numbered: numbered[1].read(), batch, concurrency)
        try:
            with closing(workers.ended(server.retried, stop)) as results:
                for (number, _), future in results:
                    if (fault := future.exception()) is not None:
                        error = error or fault
                        stop.set()
                        continue
                    ended[number] = future.result()
                    done += 1
                    if progress:
                        progress(done, len(jobs))
        finally:  # after Ctrl-C too: keep the replies that are paid for
            for number, job in batch:
                if number not in ended:
                    continue
                reason = _add_result(store, job.example, ended[number])
                if reason is None:
                    scores = True
                else:
                    refused.append((number, reason))
                    refusal = reason if isinstance(reason, ServerError) else refusal
            store.flush()
        if not scores:
            error = error or refusal
        if error is not None:
            raise error
    return refused


def _add_result(store: SignalStore, example: Example, result: _Result) -> str | ServerError | None:
    """Add the log-probs of an example. Returns None, or why there are none. Logits count as a refusal of the example:
    the server may send them for every one."""
    if not isinstance(result, tuple):
        return result
    reason = try_to_add(store, example, *result)
    return ServerError(reason) if reason else None


class _Reader:
    """Requests the log-probs of one trace, and maps them to the student's tokens.

    Asks for `k` candidates per token, and keeps the best `width`: servers may list the actual token as one more.
    """

    other_tokens = "use align=True (--align) to score only the tokens that both split alike"

    def __init__(
        self, server: Server, tokenizer: PreTrainedTokenizerBase, k: int, width: int, dialect: Dialect, align: bool
    ) -> None:
        self.scorer = PromptScorer(server, k, dialect)
        self.tokenizer, self.width, self.align = tokenizer, width, align
        self.tokens = token_bytes(tokenizer)
        self.ids = ids_by_bytes(tokenizer)

    def read(self, task: PendingTrace) -> _Result:
        """(rows, ids, logprobs) for `SignalStore.add`, or why there are none: a text, or a ServerError if the server
        refuses the trace (it may be too long)."""
        if self.scorer.dialect in BY_IDS and not self.align:
            return self.read_ids(task.example, task.trace.name)
        return self._table(partial(self._by_text, task))

    def read_ids(self, example: Example, name: str) -> _Result:
        """As `read`, by the student's token ids."""
        return self._table(partial(self._by_ids, example, name), "the server sent no candidates for its tokens")

    def _table(self, read_rows: Callable[[], list[_Row]], nothing: str = NOTHING_SHARED) -> _Result:
        try:
            rows = read_rows()
            return _top_k_table(rows, self.width) if rows else nothing
        except TokenizersDiffer:
            raise
        except ServerError as error:
            if error.status not in REFUSED:
                raise
            return error
        except ValueError as error:
            return str(error)
        except (LookupError, TypeError, AttributeError) as error:
            raise ServerError(
                f"{self.scorer.server.url} does not send log-probs in the format of --dialect {self.scorer.dialect} "
                f"({type(error).__name__}: {error}); dialects: {', '.join(DIALECTS)}"
            ) from error

    def _by_ids(self, example: Example, name: str) -> list[_Row]:
        """Score by the student's token ids. The texts that the server shows for them tell whether both agree."""
        ids = example.input_ids.tolist()
        scored = self.scorer.by_ids(ids)
        if len(scored) != len(ids):
            raise TokenizersDiffer(f"{name}: sent {len(ids)} tokens, got log-probs of {len(scored)}")
        rows = []
        for row in np.flatnonzero(example.labels != IGNORE).tolist():
            number, candidates = ids[row + 1], scored[row + 1]
            self._check_same(name, number, next((one.text for one in candidates if one.id == number), None))
            logprobs = {one.id: one.logprob for one in candidates if one.id < len(self.tokens)}
            if any(value > -math.inf for value in logprobs.values()):
                rows.append((row, [*logprobs], [*logprobs.values()]))
        return rows

    def _check_same(self, name: str, number: int, theirs: str | None) -> None:
        written = self.tokens[number] if number < len(self.tokens) else None  # a head may have rows without a token
        ours = "" if written is None else written.decode("utf-8", "replace")
        if not theirs or not ours or "\ufffd" in theirs + ours:
            return  # part of a character (vLLM may show the whole one), or a special token: no text to compare
        if theirs.strip() != ours.strip():  # some servers drop the leading space
            raise TokenizersDiffer(
                f"{name}: token {number} is {theirs!r} to the server and {written!r} to the student: the "
                f"tokenizers differ; {self.other_tokens}"
            )

    def _by_text(self, task: PendingTrace) -> list[_Row]:
        opening = self._plain_prompt(task) if self.align else self._prompt(task)
        text = task.reply.text.encode()
        pieces = self._pieces(opening + task.reply.text)
        shift = len(opening.encode())
        bounds = byte_spans([piece.written for piece in pieces], opening.encode() + text)
        theirs = [(start - shift, end - shift) for start, end in bounds]
        student = byte_spans(spellings(self.tokenizer, task.written), text)
        rows = align(student, theirs, pieces, self.ids)
        if not self.align and len(rows) < len(student):
            raise TokenizersDiffer(
                f"{task.trace.name}: the tokenizers differ: the server and the student share {len(rows)} of "
                f"{len(student)} tokens; use align=True (--align) to score only those"
            )
        return [(task.first + row.token, row.ids, row.logprobs) for row in rows]

    def _prompt(self, task: PendingTrace) -> str:
        trace = task.trace
        return format_prompt(
            trace.problem, self.tokenizer, task.instruction, system=trace.system, turns=trace.turns or ()
        )

    def _plain_prompt(self, task: PendingTrace) -> str:
        """All text before the reply, without the student's chat template."""
        trace, earlier = task.trace, [turn["content"] for turn in task.trace.turns or ()]
        texts = [trace.system, *earlier, task.instruction.request(trace.problem)]
        return "".join(f"{text}\n\n" for text in texts if text)

    def _pieces(self, text: str) -> list[Piece]:
        """The server's tokens of `text`. The first has no candidates, and the reply often lacks its text, which is the
        part of `text` before the other tokens."""
        pieces = self.scorer.by_text(text)
        rest = sum(len(piece.written) for piece in pieces[1:])
        data = text.encode()
        return [Piece(data[: max(0, len(data) - rest)], []), *pieces[1:]]


class _ExampleReader(_Reader):
    """Requests the log-probs of examples by their token ids, without the text of a trace."""

    other_tokens = "use a teacher with the student's tokens"

    def __init__(self, server: Server, tokenizer: PreTrainedTokenizerBase, k: int, dialect: Dialect) -> None:
        super().__init__(server, tokenizer, k, k + 1, dialect, align=False)


def _top_k_table(scored: Sequence[_Row], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rows [n], ids and logprobs [n, k]: the best k of each row. Servers may list the actual token beside them."""
    rows = np.array([row for row, _, _ in scored])
    top_ids, logprobs = np.zeros((len(scored), k), dtype=np.int64), np.full((len(scored), k), -np.inf)
    for i, (_, ids, values) in enumerate(scored):
        best = np.argsort(-np.array(values), kind="stable")[:k]
        top_ids[i, : len(best)], logprobs[i, : len(best)] = np.array(ids)[best], np.array(values)[best]
    return rows, top_ids, logprobs


def add_reply_logprobs(
    trace: Trace,
    reply: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    store: SignalStore,
    instruction: Instruction | None = None,
) -> str | None:
    """Add the log-probs in a reply of `teach` to `store`, up to where the trace's text departs from the reply's.

    Returns:
        Why there is nothing to add, else None.
    """
    tasks, refused = pending_traces([trace], tokenizer, store, 2**31, instruction)
    if not tasks:
        return refused[0][1] if refused else None
    [task] = tasks
    pieces = [  # bytes as Latin-1, as in `ChatReply`
        Piece(token.encode("latin-1"), [(other.encode("latin-1"), value) for other, value in top])
        for token, top in reply["logprobs"]
    ]
    # The reply may list more tokens than its text has: many servers include the thinking and the end of turn.
    listed, completion = b"".join(piece.written for piece in pieces), task.reply.text.encode()
    reasoning = trace.reasoning.strip().encode()
    start = listed.find(reasoning)
    if start < 0:
        return "the reply has no log-probs of the reasoning"
    # From here on, trace and reply have the same text, up to how the answer is marked.
    opening = completion.index(reasoning, len((trace.plan or "").encode()))
    shared = shared_length(listed[start:], completion[opening:])
    theirs = [(a - start + opening, b - start + opening) for a, b in byte_spans([p.written for p in pieces], listed)]
    try:
        ours = byte_spans(spellings(tokenizer, task.written), completion)
    except ValueError as error:
        return str(error)
    rows = [
        (task.first + row.token, row.ids, row.logprobs)
        for row in align(ours, theirs, pieces, ids_by_bytes(tokenizer))
        if opening <= ours[row.token][0] and ours[row.token][1] <= opening + shared
    ]
    if not rows:
        return NOTHING_SHARED
    return try_to_add(store, task.example, *_top_k_table(rows, store.k))
