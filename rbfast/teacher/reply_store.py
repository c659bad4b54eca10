"""The replies of a teacher: each on disk and paid for as soon as it is there."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from rbfast.teacher.budget import Purse
from rbfast.teacher.jobs import Job
from rbfast.utils.files import Journal
from rbfast.utils.records import check

_REPLY = {"key": str, "text": str, "thinking": str, "finish_reason": (str, NoneType), "logprobs": list}
_REPLY |= {"prompt_tokens": int, "completion_tokens": int}


class ReplyStore:
    """The replies in a file and what they cost. Those to `jobs` show how far the teacher passes what it is allowed.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path, purse: Purse, jobs: Sequence[Job]) -> None:
        self.purse = purse
        self._journal = Journal(path)
        self._found: dict[str, dict[str, Any]] = {}
        self._warned = False
        for where, record in self._journal.read():
            check(record, _REPLY, f"{where}: expected a teacher's reply, choose another folder")
            self._found[record["key"]] = record
            purse.pay(record["prompt_tokens"], record["completion_tokens"])
        for job in jobs:
            if (record := self.get(job)) is not None:
                purse.learn(job.worst(), record["prompt_tokens"], record["completion_tokens"])

    def __len__(self) -> int:
        return len(self._found)

    def get(self, job: Job) -> dict[str, Any] | None:
        return self._found.get(job.key)

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if job.key not in self._found]

    def has(self, key: str) -> bool:
        return key in self._found

    def add(self, record: dict[str, Any], worst: tuple[int, int] | None = None) -> None:
        """Keeps and pays a reply. `worst`: the tokens that its request allowed, if they are known."""
        self._journal.append([record])
        self._found[record["key"]] = record
        self.purse.pay(record["prompt_tokens"], record["completion_tokens"])
        if worst is not None:
            self.purse.learn(worst, record["prompt_tokens"], record["completion_tokens"])
        if record.get("hides_thinking") and not self._warned:
            self._warned = True
            warnings.warn(
                "the teacher counts tokens of thinking, but sends none: traces hold only what it writes after; servers "
                "that send it on request take it from --extra-body",
                stacklevel=3,
            )
