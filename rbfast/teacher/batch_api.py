"""What `batch` needs of a batch API. `server_batches` has OpenAI's, `provider_batches` Anthropic's and Gemini's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rbfast.teacher.client import Server, ServerError
from rbfast.teacher.jobs import Job
from rbfast.teacher.providers import Provider

Report = Callable[[str], None]
_POLL = 20.0  # seconds


@dataclass(frozen=True)
class Request:
    """A question as the API's batches take it, in JSON."""

    key: str
    data: bytes


@dataclass(frozen=True)
class Look:
    """What a batch says of itself.

    Attributes:
        done: requests that have a result, of `total`; None if it does not say.
        fault: why it ended badly, None if it runs or ended well.
        said: the API's own words, which `results` may need.
    """

    batch: str
    status: str
    has_ended: bool
    done: int | None = None
    total: int | None = None
    fault: str | None = None
    said: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Result:
    """What became of one request: a reply in the shape of a chat completion, or a status and what was said."""

    key: str
    reply: dict[str, Any] | None
    status: int | None = None
    said: str = ""


class BatchAPI(Protocol):
    """Every method raises ServerError if the API refuses, and hides the key in what it says.

    Attributes:
        url: of the API; a batch belongs to one.
        most_requests, most_bytes: of one batch.
    """

    most_requests: int
    most_bytes: int

    @property
    def teacher(self) -> Server | Provider: ...
    @property
    def url(self) -> str: ...

    def request(self, job: Job) -> Request:
        """The job's question, with the options that the API takes."""

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        """What a batch of these is made from, and found by later. In JSON, without a key."""

    def create(self, ticket: dict[str, Any], requests: Sequence[Request]) -> str:
        """The id of a new batch. Raises BrokenOff if it may or may not exist now."""

    def find(self, ticket: dict[str, Any], report: Report) -> str | None:
        """The id of the batch that was made of a ticket, if there is one."""

    def look(self, batch: str) -> Look:
        """How a batch stands."""

    def results(self, look: Look) -> Iterator[Result]:
        """What became of each request of a batch that has ended, in any order."""


def finished(api: BatchAPI, batch: str, report: Report) -> Look:
    """The batch once it has ended, well or not."""
    while True:
        look = api.look(batch)
        report(f"batch {batch}: {look.status}" + (f", {look.done} of {look.total}" if look.total is not None else ""))
        if look.has_ended:
            return look
        time.sleep(_POLL)


def parse_line(line: str | bytes, key: str, where: str, teacher: Server | Provider) -> dict[str, Any]:
    """The object in a line of a batch's results. Raises ServerError for one that does not say whose it is."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get(key), str):
        text = line if isinstance(line, str) else line.decode("utf-8", "replace")
        raise ServerError(f"{where} holds no result but {teacher.hide(text)[:200]!r}")
    return found
