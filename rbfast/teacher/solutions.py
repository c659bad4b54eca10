"""A teacher asked for solutions over an OpenAI-compatible server: many at a time, within a budget, never twice.

```python
server = Server("https://api.example.com/v1", "their-model", temperature=0.7)      # the key from RBFAST_API_KEY
taught = teach(server, read_questions("problems.jsonl"), "taught/", samples=2, max_cost=5.0, prices=Prices(3, 15))
```

The folder holds `replies.jsonl` (every reply as it came, at once), and at the end `traces.jsonl`, `failed.jsonl` (what
is no trace, and why) and `teach.json` (counts, tokens, cost). The same call resumes from the replies that are there.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import NoneType
from typing import Any

from rbfast.data.answers import extract_answer
from rbfast.data.formats import AUTO, FormatOptions, question_of
from rbfast.data.readers import read_rows, write_traces
from rbfast.data.trace import Trace, TraceError
from rbfast.grading.grade import Problem, grade
from rbfast.grading.tasks import load_problems
from rbfast.teacher.client import Server, ServerError
from rbfast.utils.files import Journal, write_text
from rbfast.utils.records import check

REPLIES, TRACES, FAILED, SUMMARY = "replies.jsonl", "traces.jsonl", "failed.jsonl", "teach.json"
SYSTEM = (
    "Solve the user's problem so that a student can learn from it. First write a short plan between <plan> and "
    "</plan>: what kind of problem it is, and which steps lead to the answer. Then carry the plan out step by step, "
    "with every calculation written out, and check the result. End with the final answer alone between <answer> and "
    "</answer>."
)

_REPLY = {"key": str, "text": str, "thinking": str, "finish_reason": (str, NoneType), "logprobs": list}
_REPLY |= {"prompt_tokens": int, "completion_tokens": int}
_PLAN = re.compile(r"\s*<plan>(.*?)</plan>\s*", re.DOTALL | re.IGNORECASE)
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_ANSWER = re.compile(r"\s*<answer>", re.IGNORECASE)
_HOPELESS = {401, 402, 403, 404}  # the next question would be refused too
_MOST_FAILURES = 8  # in a row
_LONGEST_SILENCE = 1.0  # seconds, even if a server asks for a longer pause


@dataclass(frozen=True)
class Question:
    """A problem to ask. `known` holds its answer, if there is one to verify the teacher's with."""

    text: str
    known: Problem | None = None
    domain: str | None = None
    source: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, read and written, in the currency of `max_cost`."""

    read: float = 0.0
    written: float = 0.0

    def cost(self, read: int, written: int) -> float:
        return (read * self.read + written * self.written) / 1e6


@dataclass(frozen=True)
class Taught:
    """What came of it. `open` questions were not sent, or not answered: the same call sends them again."""

    traces: list[Trace]
    replies: list[dict[str, Any]]  # one for each trace
    failed: int
    open: int
    reason: str | None  # why some are open
    read: int
    written: int
    cost: float

    def summary(self) -> dict[str, Any]:
        """For `teach.json`."""
        counts = {name: getattr(self, name) for name in ("failed", "open", "reason", "read", "written", "cost")}
        return {"traces": len(self.traces)} | counts


def read_questions(
    source: str | Path, n: int | None = None, seed: int = 0, options: FormatOptions = AUTO
) -> list[Question]:
    """The problems of a JSONL, JSON or Parquet file or hub dataset of any shape in docs/formats.md, in their order; or
    `n` of a reasoning-gym generator. Each once.

    Raises:
        ValueError: no such source, a row without a problem, or no rows.
    """
    name = str(source)
    if Path(name).suffix not in (".jsonl", ".json", ".parquet") and "/" not in name:
        problems = load_problems(name, 50 if n is None else n, seed)
        return [Question(problem.question, problem, problem.task) for problem in problems]
    found: dict[str, Question] = {}
    for where, row in read_rows(source):
        question = _question(row, where, options)
        found.setdefault(question.text, question)
        if n is not None and len(found) == n:
            break
    if not found:
        raise ValueError(f"{source}: expected at least one problem, got none")
    return list(found.values())


def _question(row: Any, where: str, options: FormatOptions) -> Question:
    try:
        fields = question_of(row, options)
    except TraceError as error:
        raise ValueError(f"{where}: {error}") from None
    text, answer = fields["problem"], fields.get("answer")
    if not text.strip():
        raise ValueError(f"{where}: problem: expected text, got {text!r}")
    known = None
    if answer is not None:
        stated = extract_answer(answer) or answer.strip()
        known = Problem("", text, stated, {})
    return Question(text, known, **{name: fields[name] for name in ("domain", "source", "id") if name in fields})


def teach(
    server: Server,
    questions: Sequence[Question],
    out: str | Path,
    *,
    samples: int = 1,
    max_tokens: int = 4096,
    top_logprobs: int = 0,
    concurrency: int = 8,
    prices: Prices = Prices(),
    max_cost: float | None = None,
    max_total_tokens: int | None = None,
    system: str = SYSTEM,
    progress: Callable[[int, int, str], None] | None = None,
) -> Taught:
    """Asks for `samples` solutions of each question and turns the replies into traces.

    Args:
        max_tokens: of one reply.
        top_logprobs: candidates to ask for at each token, 0 for none; kept in `replies.jsonl`.
        concurrency: questions under way at a time.
        max_cost, max_total_tokens: nothing is sent that could exceed them, however long the reply; replies of
            earlier calls in this folder count.
        progress: called with (replies there, replies wanted, a few words on the cost and on retries), with
            every reply and every second.

    Raises:
        ValueError: an option out of range, or a folder whose replies cannot be read.
        ServerError: the server refuses every question (a wrong key or model), or has failed several times in a row;
            what had come is kept.
    """
    for name, value in (("samples", samples), ("max_tokens", max_tokens), ("concurrency", concurrency)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if max_cost is not None and prices == Prices():
        raise ValueError("max_cost needs the prices of a million tokens, got none")
    out = Path(out)
    body = {"max_tokens": max_tokens, "stream": False}
    if top_logprobs:
        body |= {"logprobs": True, "top_logprobs": top_logprobs}
    jobs = [_Job(question, sample, server, system, body) for question in questions for sample in range(samples)]
    purse = _Purse(prices, max_cost, max_total_tokens)
    journal = Journal(out / REPLIES)
    replies = {}
    for where, record in journal.read():
        check(record, _REPLY, f"{where}: expected a teacher's reply, choose another folder")
        replies[record["key"]] = record
        purse.pay(record["prompt_tokens"], record["completion_tokens"])
    todo = [job for job in jobs if job.key not in replies]
    wanted = len(replies) + len(todo)

    def report() -> None:
        if progress:
            progress(len(replies), wanted, purse.words() + _retries(server))

    reason = _ask_all(todo, journal, replies, purse, concurrency, report)
    return _collect(jobs, replies, purse, reason, out, server.model)


@dataclass(frozen=True)
class _Job:
    """One reply to get. Its key names everything that the reply depends on."""

    question: Question
    sample: int
    server: Server
    system: str
    options: dict[str, Any]
    key: str = field(init=False)

    def __post_init__(self) -> None:
        asked = [self.server.model, self.server.temperature, self.body()]
        digest = blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16)
        object.__setattr__(self, "key", digest.hexdigest())

    def body(self) -> dict[str, Any]:
        turns = [{"role": "system", "content": self.system}] if self.system else []
        seed = None if self.server.seed is None else self.server.seed + self.sample
        turns.append({"role": "user", "content": self.question.text})
        return {"messages": turns, "seed": seed, **self.options}

    def worst(self) -> tuple[int, int]:
        """Tokens read and written, at most: no token is shorter than a byte, and a turn has a few of its own."""
        return len(self.system.encode()) + len(self.question.text.encode()) + 64, self.options["max_tokens"]

    def ask(self) -> dict[str, Any]:
        """The record of a reply."""
        reply = self.server.ask("/chat/completions", self.body())
        try:
            return self._record(reply)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ServerError(f"{self.server.url} sent no chat completion: {error!r:.200}") from error

    def _record(self, reply: dict[str, Any]) -> dict[str, Any]:
        choice = reply["choices"][0]
        message, usage = choice["message"], reply.get("usage") or {}
        texts = {"text": message.get("content") or "", "thinking": message.get("reasoning_content") or ""}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
            text.encode()  # half a surrogate pair could not be written down
        read, written = self.worst()
        top = (choice.get("logprobs") or {}).get("content") or []
        return {
            "key": self.key,
            "problem": self.question.text,
            "sample": self.sample,
            **texts,
            "finish_reason": choice.get("finish_reason"),
            # A server that does not count is taken to have used all it was allowed.
            "prompt_tokens": _counted(usage.get("prompt_tokens"), read),
            "completion_tokens": _counted(usage.get("completion_tokens"), written),
            "logprobs": [[_latin(token), [[_latin(c), c["logprob"]] for c in token["top_logprobs"]]] for token in top],
        }


def _counted(said: Any, most: int) -> int:
    return said if type(said) is int and said >= 0 else most


def _latin(token: dict[str, Any]) -> str:
    """A token's bytes as JSON can hold them, a letter for each."""
    raw = token.get("bytes")
    return (bytes(raw) if raw is not None else token["token"].encode()).decode("latin-1")


@dataclass
class _Purse:
    """What was spent, and the limits."""

    prices: Prices
    max_cost: float | None
    max_tokens: int | None
    read: int = 0
    written: int = 0

    def pay(self, read: int, written: int) -> None:
        self.read, self.written = self.read + read, self.written + written

    @property
    def cost(self) -> float:
        return self.prices.cost(self.read, self.written)

    def affords(self, jobs: Sequence[_Job]) -> bool:
        """Whether the budget covers all of these if every reply has the maximum length."""
        worst = [job.worst() for job in jobs]
        read, written = self.read + sum(r for r, _ in worst), self.written + sum(w for _, w in worst)
        if self.max_tokens is not None and read + written > self.max_tokens:
            return False
        return self.max_cost is None or self.prices.cost(read, written) <= self.max_cost

    def words(self) -> str:
        cost = f", cost {self.cost:.2f}" if self.prices != Prices() else ""
        return f"{self.read} tokens read, {self.written} written{cost}"


def _ask_all(
    jobs: Sequence[_Job],
    journal: Journal,
    replies: dict[str, Any],
    purse: _Purse,
    concurrency: int,
    report: Callable[[], None],
) -> str | None:
    """Adds what comes to the journal and to `replies`; returns why some jobs stay open, None if none does."""
    queue: deque[_Job] = deque(jobs)
    pending: dict[Future[dict[str, Any]], _Job] = {}
    failures, reason = 0, None
    stopped: BaseException | None = None
    with ThreadPoolExecutor(concurrency) as pool:
        while queue or pending:
            while queue and len(pending) < concurrency and purse.affords([*pending.values(), queue[0]]):
                job = queue.popleft()
                pending[pool.submit(job.ask)] = job
            if not pending:
                reason = f"the budget does not allow another question ({purse.words()} so far)"
                break
            try:
                report()
                done, _ = wait(pending, _LONGEST_SILENCE, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt as interrupt:  # requests under way are paid for: take their replies, send no more
                stopped = interrupt
                queue.clear()
                continue
            for future in done:
                del pending[future]
                found, error = _outcome(future)
                if found is not None:
                    failures = 0
                    journal.append([found])
                    replies[found["key"]] = found
                    purse.pay(found["prompt_tokens"], found["completion_tokens"])
                    continue
                failures, reason = failures + 1, str(error)
                if error and (error.status in _HOPELESS or failures >= max(_MOST_FAILURES, concurrency)):
                    stopped = stopped or error
                    queue.clear()
        report()
    if stopped is not None:
        raise stopped
    return reason


def _retries(server: Server) -> str:
    made, waiting = server.retried.made, server.retried.waiting
    return f", retries: {made} ({waiting} waiting)" if made else ""


def _outcome(future: Future[dict[str, Any]]) -> tuple[dict[str, Any] | None, ServerError | None]:
    try:
        return future.result(), None
    except ServerError as error:
        return None, error


def _collect(
    jobs: Sequence[_Job], replies: dict[str, Any], purse: _Purse, reason: str | None, out: Path, teacher: str
) -> Taught:
    """Writes traces, failures and the summary."""
    traces: list[Trace] = []
    used: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for job in jobs:
        reply = replies.get(job.key)
        if reply is None:
            continue
        try:
            traces.append(trace_of(job.question, reply, teacher, job.sample))
            used.append(reply)
        except TraceError as error:
            failed.append({"problem": job.question.text, "sample": job.sample, "reason": str(error), "key": job.key})
    missing = sum(job.key not in replies for job in jobs)
    why = reason if missing else None
    taught = Taught(traces, used, len(failed), missing, why, purse.read, purse.written, purse.cost)
    write_traces(out / TRACES, traces)
    write_text(out / FAILED, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in failed))
    write_text(out / SUMMARY, json.dumps(taught.summary(), indent=1))
    return taught


def trace_of(question: Question, reply: dict[str, Any], teacher: str, sample: int = 0) -> Trace:
    """The trace in a reply: its plan if it marks one, the thinking or the worked steps, the answer.

    Raises:
        TraceError: it was cut at the limit, states no answer, or has nothing before it.
    """
    if reply["finish_reason"] == "length":
        raise TraceError("the reply was cut at the limit of tokens; raise max_tokens")
    text, thinking = reply["text"], reply["thinking"]
    if match := _THINK.match(text):
        thinking, text = match[1], text[match.end() :]
    answer = extract_answer(text)
    if answer is None:
        raise TraceError("the reply marks no answer")
    plan = _PLAN.match(text)
    worked = text[plan.end() if plan else 0 :]
    tags = list(_ANSWER.finditer(worked))
    steps = worked[: tags[-1].start()] if tags else worked
    verified = None
    if question.known is not None:
        verified = grade(question.known, text) >= 1.0
    return Trace(
        problem=question.text,
        reasoning=(thinking or steps).strip(),
        answer=answer,
        plan=plan[1].strip() or None if plan else None,
        domain=question.domain,
        source=question.source,
        teacher=teacher,
        id=f"{question.id}/{sample}" if question.id else reply["key"],
        verified=verified,
    )
