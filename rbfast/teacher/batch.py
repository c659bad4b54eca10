"""Questions asked by a server's batch API (OpenAI's: files and batches), which answers within a day at half the price.

The folder's `batch.json` names the batch from before it exists until its replies are on disk: a call that was killed
finds it again, and nothing is asked twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rbfast.teacher.client import BrokenOff, Server, ServerError, insist, is_busy
from rbfast.teacher.jobs import CHAT, Job, record_of
from rbfast.teacher.reply_store import ReplyStore
from rbfast.utils.files import write_text
from rbfast.utils.records import read_json

BATCH = "batch.json"
_STATE = {"url": str, "file": str, "batch": str}
_MOST_REQUESTS, _MOST_BYTES = 50_000, 190_000_000  # of one batch
_RUNNING = {"validating", "in_progress", "finalizing", "cancelling"}
_POLL = 20.0  # seconds
_INVALID = (400, 422)
Report = Callable[[str], None]


def ask_in_batches(server: Server, jobs: Sequence[Job], store: ReplyStore, folder: Path, report: Report) -> str | None:
    """Adds what comes to the store, batch after batch as the budget allows; returns why some jobs stay open.

    Args:
        report: called with the state of the batch at every look.

    Raises:
        ServerError: the server has no batches, or refuses one.
        ValueError: the folder's batch is of another server.
    """
    known = {job.key: job for job in jobs}
    refused: dict[str, str] = {}
    batch = _left_over(server, folder)
    while True:
        if batch is None:
            queue = [job for job in store.missing(jobs) if job.key not in refused]
            if not queue:
                return next(iter(refused.values()), None)
            chosen = _affordable(server, queue, store)
            if not chosen:
                return f"the budget does not allow another question ({store.purse.words()} so far)"
            batch = _create(server, _upload(server, chosen, folder), folder)
        refused |= _collect(server, _finished(server, batch, report), known, store)
        (folder / BATCH).unlink()
        batch = None


def _left_over(server: Server, folder: Path) -> str | None:
    """The batch of an earlier call that did not see its end."""
    state = read_json(folder / BATCH, _STATE)
    if state is None:
        return None
    if state["url"] != server.url:
        raise ValueError(f"{folder / BATCH} is a batch of {state['url']}: name that server, or another folder")
    return str(state["batch"]) or _create(server, state["file"], folder, may_exist=True)


def _affordable(server: Server, queue: Sequence[Job], store: ReplyStore) -> list[Job]:
    """The first of these that one batch holds and the budget covers, however long their replies."""
    chosen: list[Job] = []
    worst: list[tuple[int, int]] = []
    size = 0
    for job in queue[:_MOST_REQUESTS]:
        worst.append(job.worst())
        size += len(_line(server, job))
        if size > _MOST_BYTES or not store.purse.affords(worst):
            break
        chosen.append(job)
    return chosen


def _line(server: Server, job: Job) -> bytes:
    request = {"custom_id": job.key, "method": "POST", "url": f"/v1{CHAT}", "body": server.sent(job.body())}
    return json.dumps(request, ensure_ascii=False).encode() + b"\n"


def _upload(server: Server, jobs: Sequence[Job], folder: Path) -> str:
    """Uploads the requests; the file is written down before a batch is made of it."""
    data = b"".join(_line(server, job) for job in jobs)
    with server.errors("/files"):
        file = server.client().files.create(
            file=("rbfast.jsonl", data), purpose="batch", extra_headers=server.headers()
        )
    _write(server, folder, file.id, "")
    return file.id


def _create(server: Server, file: str, folder: Path, may_exist: bool = False) -> str:
    """The id of the file's batch. Where an earlier request may have made it unheard, it is looked for first."""

    def attempt() -> str:
        nonlocal may_exist
        found = _batch_of(server, file) if may_exist else None
        may_exist = True
        return found or _create_once(server, file)

    try:
        batch = insist(server.retried, server.retries, attempt)
    except BrokenOff as error:
        raise ServerError(str(error), error.status) from None
    _write(server, folder, file, batch)
    return batch


def _batch_of(server: Server, file: str) -> str | None:
    with server.errors("/batches"):
        recent = server.client().batches.list(limit=100, extra_headers=server.headers()).data
    return next((batch.id for batch in recent if batch.input_file_id == file), None)


def _create_once(server: Server, file: str) -> str:
    try:
        with server.errors("/batches"):
            # Without the SDK's retries: each could make another batch.
            once = server.client().with_options(max_retries=0)
            return once.batches.create(
                input_file_id=file,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                extra_headers=server.headers(),
            ).id
    except ServerError as error:
        if error.status is None or is_busy(error.status):
            raise BrokenOff(str(error), error.status) from None
        raise


def _write(server: Server, folder: Path, file: str, batch: str) -> None:
    write_text(folder / BATCH, json.dumps({"url": server.url, "file": file, "batch": batch}))


def _finished(server: Server, batch: str, report: Report) -> Any:
    """The batch once it has ended, well or not."""
    while True:
        with server.errors(f"/batches/{batch}"):
            found = server.client().batches.retrieve(batch, extra_headers=server.headers())
        counts = found.request_counts
        done = f", {counts.completed + counts.failed} of {counts.total}" if counts else ""
        report(f"batch {batch}: {found.status}{done}")
        if found.status not in _RUNNING:
            return found
        time.sleep(_POLL)


def _collect(server: Server, batch: Any, known: dict[str, Job], store: ReplyStore) -> dict[str, str]:
    """Adds the replies of a batch to the store; returns why others have none, by key."""
    refused: dict[str, str] = {}
    invalid: list[tuple[Job, dict[str, Any], str]] = []
    for line in _lines(server, batch):
        key, response = str(line.get("custom_id")), line.get("response") or {}
        if store.has(key):
            continue
        body, status = response.get("body"), response.get("status_code")
        if status == 200 and isinstance(body, dict) and not line.get("error"):
            try:
                _add(store, key, known.get(key), body)
            except ServerError as error:
                refused[key] = str(error)
            continue
        said = server.hide(json.dumps(line.get("error") or body, ensure_ascii=False, default=str))
        refused[key] = f"{server.url}{CHAT} said {status or 'nothing'} in a batch: {said}"
        if status in _INVALID and key in known:
            invalid.append((known[key], server.sent(known[key].body()), said))
    for job, sent, said in invalid:
        if server.connection.manners.learn(said, sent):
            del refused[job.key]  # it is asked again without the parameter
    if batch.status != "completed":
        faults = "; ".join(str(fault.message) for fault in (batch.errors and batch.errors.data) or [])
        why = server.hide(f"the batch {batch.id} has the status {batch.status}{': ' + faults if faults else ''}")
        refused = {job.key: why for job in store.missing(list(known.values()))} | refused
    return refused


def _add(store: ReplyStore, key: str, job: Job | None, reply: dict[str, Any]) -> None:
    """A reply to a question of an earlier call with other options is kept too: it is paid for."""
    if job is not None:
        store.add(job.record(reply), job.worst())
    else:
        store.add(record_of(reply, key=key, problem=None, sample=None, worst=(0, 0)))


def _lines(server: Server, batch: Any) -> Iterator[dict[str, Any]]:
    for file in filter(None, (batch.output_file_id, batch.error_file_id)):
        with server.errors(f"/files/{file}/content"):
            text = server.client().files.content(file, extra_headers=server.headers()).text
        for line in filter(str.strip, text.split("\n")):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise ServerError(f"{server.url}/files/{file} holds no reply but {server.hide(line)[:200]!r}")
            yield found
