"""Ask a teacher for solutions: many at a time, within a budget, each question only once.

```python
server = Server("https://api.example.com/v1", "their-model", temperature=0.7)      # the key from RBFAST_API_KEY
taught = teach(server, read_questions("problems.jsonl"), "taught/", samples=2, max_cost=5.0, prices=Prices(3, 15))
```

Every reply is written to `replies.jsonl` as it arrives. At the end, `traces.jsonl`, `failed.jsonl` (replies that are
not traces, and why) and `teach.json` (counts, tokens, cost) are written. The same call resumes from the stored replies.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rbfast.data import hub
from rbfast.data.answers import final_answer, known_answer
from rbfast.data.formats import AUTO, FormatOptions, question_of
from rbfast.data.readers import read_rows, record_of, write_records
from rbfast.data.replies import split_reply
from rbfast.data.row_files import is_path_of_rows
from rbfast.data.trace import Trace, TraceError
from rbfast.grading.grade import Problem, grade
from rbfast.grading.tasks import load_problems
from rbfast.teacher.asking import ask_all
from rbfast.teacher.batch import BATCH, ask_in_batches
from rbfast.teacher.budget import FREE, Budget, Prices
from rbfast.teacher.chat_reply import fault_of_finish
from rbfast.teacher.client import ServerError
from rbfast.teacher.jobs import Job, Question, Teacher
from rbfast.teacher.reply_store import ReplyStore
from rbfast.utils.files import lock_folder, write_text

REPLIES, TRACES, FAILED, SUMMARY = "replies.jsonl", "traces.jsonl", "failed.jsonl", "teach.json"
SYSTEM = (
    "Solve the user's problem so that a student can learn from it. First write a short plan between <plan> and "
    "</plan>: what kind of problem it is, and which steps lead to the answer. Then carry the plan out step by step, "
    "with every calculation written out, and check the result. End with the final answer alone between <answer> and "
    "</answer>."
)

_PLAN = re.compile(r"\s*<plan>(.*?)</plan>\s*", re.DOTALL | re.IGNORECASE)
_ANSWER = re.compile(r"\s*<answer>", re.IGNORECASE)
_OURS = {"model", "messages", "max_tokens", "max_completion_tokens", "n", "stream"}  # request fields that we set


@dataclass(frozen=True)
class Taught:
    """The result of `teach`. `open` replies were not requested or did not arrive; the same call requests them again."""

    traces: list[Trace]
    replies: list[dict[str, Any]]  # one for each trace
    failed: int
    open: int
    reason: str | None  # why replies are open
    read: int
    written: int
    cost: float
    first_failure: str | None = None  # why the first failed reply is not a trace

    @property
    def verdicts(self) -> dict[str, int]:
        """The number of traces whose answer is right, wrong, or unverified for lack of a known answer."""
        counts = Counter(trace.verified for trace in self.traces)
        return {"right": counts[True], "wrong": counts[False], "unverified": counts[None]}

    def summary(self) -> dict[str, Any]:
        """The content of `teach.json`."""
        counts = {name: getattr(self, name) for name in ("failed", "open", "reason", "read", "written", "cost")}
        return {"traces": len(self.traces)} | self.verdicts | counts


def read_questions(
    source: str | Path, n: int | None = None, seed: int = 0, options: FormatOptions = AUTO
) -> list[Question]:
    """Distinct problems: the first `n` (default: all) of a file, a folder or a hub dataset in any format of
    docs/formats.md; or `n` of a benchmark (default: all) or of a reasoning-gym generator (default: 50).

    Raises:
        ValueError: no such source, a row without a problem, or no rows.
    """
    name = str(source)
    if not is_path_of_rows(name) and "/" not in name:
        problems = load_problems(name, 50 if n is None and name not in hub.BENCHMARKS else n, seed)
        return [Question(problem.question, problem, problem.task) for problem in problems]
    questions: dict[tuple[str, str | None], Question] = {}
    for where, row in read_rows(source):
        question = _question(row, where, options)
        questions.setdefault((question.text, question.system), question)
        if n is not None and len(questions) == n:
            break
    if not questions:
        raise ValueError(f"{source}: expected at least one problem, got none")
    return list(questions.values())


def _question(row: Any, where: str, options: FormatOptions) -> Question:
    try:
        fields = question_of(row, options)
    except TraceError as error:
        raise ValueError(f"{where}: {error}") from None
    text, answer = fields["problem"], fields.get("answer")
    if not text.strip():
        raise ValueError(f"{where}: problem: expected text, got {text!r}")
    stated = None if answer is None else known_answer(answer)
    known = None if stated is None else Problem("", text, stated, {})
    about = {name: fields[name] for name in ("domain", "source", "id", "system") if name in fields}
    return Question(text, known, **about)


def teach(
    server: Teacher,
    questions: Sequence[Question],
    out: str | Path,
    *,
    samples: int = 1,
    max_tokens: int = 4096,
    top_logprobs: int = 0,
    concurrency: int = 8,
    prices: Prices = FREE,
    max_cost: float | None = None,
    max_total_tokens: int | None = None,
    batch: bool = False,
    system: str = SYSTEM,
    extra: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Taught:
    """Ask for `samples` solutions of each question and turn the replies into traces.

    Args:
        max_tokens: the limit of one reply.
        top_logprobs: candidates to request at each token, 0 for none; stored in `replies.jsonl`.
        concurrency: the most concurrent requests.
        max_cost, max_total_tokens: the budget. No request is sent that could exceed it, even with the longest reply;
            replies of earlier calls in this folder count.
        batch: use the batch API of the server or provider: replies come within a day, at its lower prices, which
            `prices` must give.
        extra: more fields of every request, as the server names them (`reasoning_effort`, ...).
        progress: called with (replies stored, replies wanted, a text about cost and retries) at every reply and several
            times a second.

    Raises:
        ValueError: an option is out of range, or the folder's replies cannot be read, or another process uses it.
        ServerError: the server refuses every request (a wrong key or model), or has failed several times in a row. The
            replies so far are kept.
        KeyboardInterrupt: after Ctrl-C, once the pending replies have arrived, or at a second Ctrl-C.
    """
    _check({"samples": samples, "max_tokens": max_tokens, "concurrency": concurrency}, extra or {})
    budget = Budget(prices, max_cost, max_total_tokens)
    out = Path(out)
    body: dict[str, Any] = {"max_tokens": max_tokens, "stream": False, **(extra or {})}
    if top_logprobs:
        body |= {"logprobs": True, "top_logprobs": top_logprobs}
    jobs = [Job(question, sample, server, system, body) for question in questions for sample in range(samples)]
    with lock_folder(out):
        return _teach(server, jobs, out, budget, batch, concurrency, progress)


def _teach(
    server: Teacher,
    jobs: Sequence[Job],
    out: Path,
    budget: Budget,
    batch: bool,
    concurrency: int,
    progress: Callable[[int, int, str], None] | None,
) -> Taught:
    store = ReplyStore(out / REPLIES, budget, jobs)
    todo = store.missing(jobs)
    wanted = len(store) + len(todo)

    def report(state: str = "") -> None:
        if progress:
            progress(len(store), wanted, ", ".join(filter(None, [state, store.budget.describe()])) + _retries(server))

    if not batch and (out / BATCH).exists():
        raise ValueError(f"{out / BATCH}: a batch is under way; use batch=True (--batch), or choose another folder")
    try:
        if batch:
            reason = ask_in_batches(server, jobs, store, out, report)
            report()
        else:
            reason = ask_all(todo, store, concurrency, report)
    except (ServerError, KeyboardInterrupt) as error:
        if len(store):  # the replies are paid for, and the next call may fail too
            _collect(jobs, store, str(error) or "interrupted", out, server.model)
        raise
    return _collect(jobs, store, reason, out, server.model)


def _check(counts: Mapping[str, int], extra: Mapping[str, Any]) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if taken := sorted(_OURS & extra.keys()):
        raise ValueError(f"the extra body cannot set {', '.join(taken)}: leave it out, rbfast sets it")


def _retries(server: Teacher) -> str:
    made, waiting = server.retried.made, server.retried.waiting
    return f", retries: {made} ({waiting} waiting)" if made or waiting else ""


def _collect(jobs: Sequence[Job], store: ReplyStore, reason: str | None, out: Path, teacher: str) -> Taught:
    """Write traces, failures and the summary."""
    traces: list[Trace] = []
    used: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for job in jobs:
        reply = store.get(job)
        if reply is None:
            continue
        try:
            traces.append(trace_of(job.question, reply, teacher, job.sample))
            used.append(reply)
        except TraceError as error:
            failed.append({"problem": job.question.text, "sample": job.sample, "reason": str(error), "key": job.key})
    missing, budget = len(store.missing(jobs)), store.budget
    why = reason if missing else None
    first = failed[0]["reason"] if failed else None
    taught = Taught(traces, used, len(failed), missing, why, budget.read, budget.written, budget.cost, first)
    write_records(out / TRACES, map(record_of, traces, used))
    write_text(out / FAILED, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in failed))
    write_text(out / SUMMARY, json.dumps(taught.summary(), indent=1))
    return taught


def trace_of(question: Question, reply: dict[str, Any], teacher: str, sample: int = 0) -> Trace:
    """The trace in a reply: its plan if it marks one, the thinking or the worked steps, the answer.

    Raises:
        TraceError: the reply was cut, filtered or refused, marks no answer, or has nothing before the answer.
    """
    if fault := fault_of_finish(reply["finish_reason"]) or reply.get("fault"):
        raise TraceError(fault)
    thinking, text, *_ = split_reply(reply["thinking"], reply["text"])
    answer = final_answer(text)
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
        system=question.system,
        plan=plan[1].strip() or None if plan else None,
        domain=question.domain,
        source=question.source,
        teacher=teacher,
        id=f"{question.id}/{sample}" if question.id else reply["key"],
        verified=verified,
    )
