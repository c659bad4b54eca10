"""Store a teacher's replies: each is written to the file and charged to the budget as soon as it arrives."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from rbfast.teacher.budget import Budget
from rbfast.teacher.chat_reply import is_cut
from rbfast.teacher.jobs import Job
from rbfast.utils.files import Journal
from rbfast.utils.records import check_shape

_REPLY = {"key": str, "text": str, "thinking": str, "finish_reason": (str, NoneType), "logprobs": list}
_REPLY |= {"prompt_tokens": int, "completion_tokens": int}
_ONLY_ON_DISK = ("message", "usage")  # as they were sent: the message holds the text and the thinking again


@dataclass(frozen=True)
class _LogprobsOnDisk:
    """The log-probs of a reply, read from disk on each iteration: in memory they would take megabytes."""

    journal: Journal
    offset: int

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.journal.read_at(self.offset)["logprobs"])


class ReplyStore:
    """The replies in a file, charged to `budget`.

    From the stored replies to `jobs`, the budget learns by how much replies exceed their limits.

    Raises:
        ValueError: the file contains something else.
    """

    def __init__(self, path: Path, budget: Budget, jobs: Sequence[Job]) -> None:
        self.budget = budget
        self._journal = Journal(path)
        self._replies: dict[str, dict[str, Any]] = {}
        self._whole: dict[str, dict[str, Any]] = {}  # replies that were not cut, by their jobs' `unlimited`
        self._warned: set[str] = set()
        for where, offset, record in self._journal.read_with_offsets():
            check_shape(record, _REPLY, f"{where}: expected a teacher's reply; choose another folder")
            self._keep(record, offset)
        for job in jobs:
            if (record := self._replies.get(job.key)) is not None:
                budget.learn(job.worst_case(), record["prompt_tokens"], record["completion_tokens"])

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, job: Job) -> dict[str, Any] | None:
        """The reply to a job, or an uncut reply to the same request with another token limit; None if there is none."""
        return self._replies.get(job.key) or self._whole.get(job.unlimited)

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs without a reply; one of those that send the same request."""
        return list({job.key: job for job in jobs if self.get(job) is None}.values())

    def has(self, key: str) -> bool:
        return key in self._replies

    def add(self, record: dict[str, Any], worst: tuple[int, int] | None = None, *, sync: bool = True) -> None:
        """Store a reply and charge it to the budget. `worst`: the tokens that its request allowed, if known. `sync`:
        wait until it is on disk; otherwise call `sync` after the last reply."""
        self._keep(record, self._journal.append([record], sync=sync))
        if worst is not None:
            self.budget.learn(worst, record["prompt_tokens"], record["completion_tokens"])
        if record.get("hides_thinking"):
            self._warn(
                "the teacher counts thinking tokens but sends no thinking: traces contain only the text after it. If "
                "the server sends thinking on request, request it with --extra-body"
            )
        if is_cut(record["finish_reason"]):
            self._warn(
                "a reply was cut at the token limit: it is paid for but gives no trace. If many are, stop and raise "
                "max_tokens (--max-tokens), or the server's context if that is shorter: complete replies are not "
                "requested again"
            )

    def sync(self) -> None:
        """Wait until all replies are on disk."""
        self._journal.sync()

    def _keep(self, record: dict[str, Any], offset: int) -> None:
        record = {name: value for name, value in record.items() if name not in _ONLY_ON_DISK}
        if record["logprobs"]:
            record = record | {"logprobs": _LogprobsOnDisk(self._journal, offset)}
        self._replies[record["key"]] = record
        if isinstance(unlimited := record.get("unlimited"), str) and not is_cut(record["finish_reason"]):
            self._whole[unlimited] = record
        self.budget.pay(record["prompt_tokens"], record["completion_tokens"])

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)
