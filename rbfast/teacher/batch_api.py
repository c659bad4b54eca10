"""The interface of batch APIs. `server_batches` implements OpenAI's, `provider_batches` Anthropic's and Gemini's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rbfast.teacher.client import PATIENCE, Server, ServerError, is_busy
from rbfast.teacher.jobs import Job
from rbfast.teacher.providers import Provider

Report = Callable[[str], None]
_POLL = 20.0  # seconds


@dataclass(frozen=True)
class Request:
    """A job in the API's batch format, as JSON."""

    key: str
    data: bytes


@dataclass(frozen=True)
class BatchStatus:
    """The state of a batch at one poll.

    Attributes:
        done: the number of requests with a result, of `total`; None if the API does not report it.
        fault: why the batch failed; None if it is running or has succeeded.
        response: the API's raw response, which `results` may need.
    """

    batch: str
    status: str
    has_ended: bool
    done: int | None = None
    total: int | None = None
    fault: str | None = None
    response: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Result:
    """The result of one request: a reply in the format of a chat completion, or the status and text of a refusal."""

    key: str
    reply: dict[str, Any] | None
    status: int | None = None
    refusal: str = ""


class BatchAPI(Protocol):
    """A batch API. Every method raises ServerError if the API refuses, with the key hidden in its message.

    Attributes:
        url: the API to which a batch belongs.
        most_requests, most_bytes: the limits of one batch.
    """

    most_requests: int
    most_bytes: int

    @property
    def teacher(self) -> Server | Provider: ...
    @property
    def url(self) -> str: ...

    def request(self, job: Job) -> Request:
        """The job as a request, with the options that the API accepts."""

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        """A ticket to create a batch from and to find it by later: JSON values, without the API key."""

    def create(self, ticket: dict[str, Any], requests: Sequence[Request]) -> str:
        """Create a batch and return its id. Raises IncompleteReply if it is unknown whether the batch exists now."""

    def find(self, ticket: dict[str, Any], report: Report) -> str | None:
        """The id of the batch that was created from a ticket, or None."""

    def poll(self, batch: str) -> BatchStatus:
        """Poll the state of a batch."""

    def results(self, state: BatchStatus) -> Iterator[Result]:
        """The result of each request of a finished batch, in any order."""


def wait_for_end(api: BatchAPI, batch: str, report: Report) -> BatchStatus:
    """Wait until a batch has ended, successfully or not. After the first answered poll, the API may be busy or
    unreachable for ten minutes: polling again costs nothing."""
    answered = None
    while True:
        try:
            state = api.poll(batch)
        except ServerError as error:
            is_away = error.status is None or is_busy(error.status)
            if answered is None or not is_away or time.monotonic() - answered > PATIENCE:
                raise
            report(f"batch {batch}: the teacher is busy or unreachable")
            time.sleep(_POLL)
            continue
        answered = time.monotonic()
        progress = "" if state.total is None else f", {state.done} of {state.total}"
        report(f"batch {batch}: {state.status}{progress}")
        if state.has_ended:
            return state
        time.sleep(_POLL)


def parse_line(line: bytes, key: str, where: str, teacher: Server | Provider) -> dict[str, Any]:
    """The object in a line of a batch's results. Raises ServerError if it has no `key`."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict) or not isinstance(parsed.get(key), str):
        text = teacher.hide(line.decode("utf-8", "replace"))
        raise ServerError(f"{where}: expected a JSON object with {key}, got {text[:200]!r}")
    return parsed
