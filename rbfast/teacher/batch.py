"""Send jobs through batch APIs (OpenAI's, Anthropic's, Gemini's), which answer within a day at half the price.

`batch.json` identifies the batch from before it is created until its replies are on disk. So if the process is killed,
the next call finds the batch, and nothing is requested twice.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rbfast.teacher.batch_api import BatchAPI, BatchStatus, Report, Request, wait_for_end
from rbfast.teacher.client import INVALID, IncompleteReply, Server, ServerError, call_with_retries
from rbfast.teacher.jobs import Job, Teacher, reply_record
from rbfast.teacher.provider_batches import AnthropicBatches, GeminiBatches
from rbfast.teacher.providers import Provider
from rbfast.teacher.reply_store import ReplyStore
from rbfast.teacher.server_batches import ServerBatches
from rbfast.utils.files import write_text
from rbfast.utils.records import check_present_fields, read_json

BATCH = "batch.json"
_STATE = {"url": str, "ticket": dict, "batch": str}
_OF_PROVIDERS: dict[str, Callable[[Provider], BatchAPI]] = {"anthropic": AnthropicBatches, "gemini": GeminiBatches}
_TOO_MANY = 429  # the only retryable status after which the batch cannot exist


def batches_of(teacher: Teacher) -> BatchAPI:
    """The batch API of a teacher. Raises ValueError if it has none that we support."""
    if isinstance(teacher, Server):
        return ServerBatches(teacher)
    if isinstance(teacher, Provider) and teacher.provider in _OF_PROVIDERS:
        return _OF_PROVIDERS[teacher.provider](teacher)
    name = teacher.provider if isinstance(teacher, Provider) else type(teacher).__name__
    raise ValueError(
        f"no batch API for the provider {name!r}: leave out --batch, or use the provider {' or '.join(_OF_PROVIDERS)}, "
        "or a server with OpenAI's batch API"
    )


def ask_in_batches(
    teacher: Teacher, jobs: Sequence[Job], store: ReplyStore, folder: Path, report: Report
) -> str | None:
    """Send jobs in batches, as the budget allows, and store their replies. Returns why some jobs stay open.

    Args:
        report: called with the state of the batch after every poll.

    Raises:
        ServerError: the server has no batch API, or refuses a batch.
        ValueError: no batch API for this teacher, or the folder's batch belongs to another server.
    """
    api = batches_of(teacher)
    by_key = {job.key: job for job in jobs}
    refused: dict[str, str] = {}
    left_over = _find_left_over(api, folder, report) or {}
    batch = left_over.get("batch")
    if (limit := left_over.get("max_tokens")) is not None:  # may differ from this call's
        by_key |= {job.key: job for job in (job.with_limit(limit) for job in jobs)}
    while True:
        requests: list[Request] = []
        if batch is None:
            queue = [job for job in store.missing(jobs) if job.key not in refused]
            if not queue:
                return next(iter(refused.values()), None)
            requests = _affordable_requests(api, queue, store)
            if not requests:
                return f"the budget does not allow another question ({store.budget.describe()} so far)"
            batch = _create(api, requests, queue[0].options["max_tokens"], folder, report)
        refused |= _collect(api, wait_for_end(api, batch, report), requests, by_key, store)
        store.sync()  # all replies at once: until `batch.json` is removed, they can be downloaded again
        (folder / BATCH).unlink()
        batch = None


def _find_left_over(api: BatchAPI, folder: Path, report: Report) -> dict[str, Any] | None:
    """The state of the batch that an interrupted call left. If that batch was never created, removes `batch.json`."""
    state = read_json(folder / BATCH, _STATE)
    if state is None:
        return None
    check_present_fields(state, {"max_tokens": int}, str(folder / BATCH))
    if state["url"] != api.url:
        raise ValueError(f"{folder / BATCH} is a batch of {state['url']}: use that server, or another folder")
    batch = state["batch"] or api.find(state["ticket"], report)
    if batch is None:
        (folder / BATCH).unlink()
        return None
    return _write(folder, state | {"batch": batch})


def _affordable_requests(api: BatchAPI, queue: Sequence[Job], store: ReplyStore) -> list[Request]:
    """The first jobs that fit into one batch and into the budget, even with the longest replies, as requests."""
    worst = [job.worst_case() for job in queue[: api.most_requests]]
    covered = bisect_left(range(len(worst)), True, key=lambda n: not store.budget.can_afford(worst[: n + 1]))
    chosen: list[Request] = []
    size = 0
    for job in queue[:covered]:
        request = api.request(job)
        size += len(request.data) + 1
        if size > api.most_bytes:
            break
        chosen.append(request)
    return chosen


def _create(api: BatchAPI, requests: Sequence[Request], max_tokens: int, folder: Path, report: Report) -> str:
    """Create a batch and return its id. A retry first looks for the batch: it may exist although no reply arrived."""
    ticket = api.prepare(requests)
    state = _write(folder, {"url": api.url, "ticket": ticket, "batch": "", "max_tokens": max_tokens})
    may_exist = False

    def attempt() -> str:
        nonlocal may_exist
        if may_exist and (batch := api.find(ticket, report)):
            return batch
        try:
            return api.create(ticket, requests)
        except IncompleteReply as error:
            may_exist |= error.status != _TOO_MANY
            raise

    batch = call_with_retries(api.teacher.retried, api.teacher.retries, attempt)
    _write(folder, state | {"batch": batch})
    return batch


def _write(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    write_text(folder / BATCH, json.dumps(state))
    return state


def _collect(
    api: BatchAPI, state: BatchStatus, requests: Sequence[Request], jobs: dict[str, Job], store: ReplyStore
) -> dict[str, str]:
    """Store the replies of a batch. Returns why the other jobs have none, by key.

    Args:
        requests: the requests of the batch, if this call created it.
        jobs: all jobs of this call, by key; both with this call's token limit and with that of the batch.
    """
    refused: dict[str, str] = {}
    invalid: list[tuple[Job, dict[str, Any], str]] = []
    for result in api.results(state):
        key = result.key
        if store.has(key):
            continue
        if result.reply is not None:
            try:
                _add(store, key, jobs.get(key), result.reply)
            except ServerError as error:
                refused[key] = str(error)
            continue
        outcome = f"returned {result.status}" if result.status else "sent no reply"
        refused[key] = f"{api.url} {outcome} in a batch: {result.refusal}"
        if result.status in INVALID and key in jobs:
            invalid.append((jobs[key], api.teacher.full_body(jobs[key].body()), result.refusal))
    if state.fault is not None:
        refused = {job.key: state.fault for job in store.missing(list(jobs.values()))} | refused
    silent = [request.key for request in requests if not store.has(request.key)]
    refused = {key: f"the batch {state.batch} of {api.url} has no reply to this request" for key in silent} | refused
    for job, sent, refusal in invalid:
        if api.teacher.connection.parameter_filter.learn(refusal, sent):
            refused.pop(job.key, None)  # it is sent again without the parameter
    return refused


def _add(store: ReplyStore, key: str, job: Job | None, reply: dict[str, Any]) -> None:
    """Store a reply, even without a job (from an earlier call with other options): it is paid for."""
    if job is not None:
        store.add(job.record(reply), job.worst_case(), sync=False)
    else:
        store.add(reply_record(reply, key=key, problem=None, sample=None, worst=(0, 0)), sync=False)
