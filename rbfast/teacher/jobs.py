"""What a teacher is asked: a question, and one reply to get, with all that the reply depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

from rbfast.grading.grade import Problem
from rbfast.teacher.chat_reply import read_chat_reply
from rbfast.teacher.client import Retries, ServerError

CHAT = "/chat/completions"


class Teacher(Protocol):
    """Who is asked: `client.Server`, or `providers.Provider`."""

    @property
    def model(self) -> str: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def retried(self) -> Retries: ...
    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Question:
    """A problem to ask, with its own system prompt if it has one. `known` holds its answer, if there is one to verify
    the teacher's with."""

    text: str
    known: Problem | None = None
    domain: str | None = None
    source: str | None = None
    id: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Job:
    """One reply to get.

    Attributes:
        key: names everything that the reply depends on.
        unlimited: the same without `max_tokens`, on which a reply that was not cut does not depend.
    """

    question: Question
    sample: int
    server: Teacher
    system: str
    options: dict[str, Any]
    key: str = field(init=False)
    unlimited: str = field(init=False)

    def __post_init__(self) -> None:
        body = self.body()
        object.__setattr__(self, "key", self._digest(body))
        object.__setattr__(self, "unlimited", self._digest({n: v for n, v in body.items() if n != "max_tokens"}))

    def _digest(self, body: dict[str, Any]) -> str:
        asked: list[Any] = [self.server.model, self.server.temperature, body]
        has_own_seed = self.server.seed is not None and "seed" not in self.options
        if self.server.top_p is not None:
            asked.append({"top_p": self.server.top_p})
        if self.sample and not has_own_seed:
            asked.append(self.sample)
        return blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()

    def body(self) -> dict[str, Any]:
        system = self._systems()
        turns = [{"role": "system", "content": system}] if system else []
        seed = None if self.server.seed is None else self.server.seed + self.sample
        turns.append({"role": "user", "content": self.question.text})
        return {"messages": turns, "seed": seed, **self.options}

    def worst(self) -> tuple[int, int]:
        """Tokens read and written, at most: no token is shorter than a byte, and a turn has a few of its own."""
        read = f"{self._systems()}{self.question.text}"
        return len(read.encode()) + 64, self.options["max_tokens"]

    def _systems(self) -> str:
        """How to answer, and what the problem's own system prompt says."""
        return "\n\n".join(text for text in (self.system, self.question.system) if text)

    def ask(self) -> dict[str, Any]:
        """The record of a reply."""
        return self.record(self.server.ask(CHAT, self.body()))

    def record(self, reply: Mapping[str, Any]) -> dict[str, Any]:
        """What is kept of a reply. Raises ServerError for one that is no chat completion."""
        found = record_of(reply, key=self.key, problem=self.question.text, sample=self.sample, worst=self.worst())
        return found | {"unlimited": self.unlimited}


def record_of(
    reply: Mapping[str, Any], *, key: str, problem: str | None, sample: int | None, worst: tuple[int, int]
) -> dict[str, Any]:
    """What is kept of a reply. A server that does not count is taken to have used all it was allowed.

    Raises:
        ServerError: it is no chat completion.
    """
    try:
        found = read_chat_reply(reply)
    except ValueError as error:
        raise ServerError(f"the server sent no chat completion: {error!s:.300}") from error
    return {
        "key": key,
        "problem": problem,
        "sample": sample,
        "text": found.text,
        "thinking": found.thinking,
        "fault": found.fault,
        "finish_reason": found.finish_reason,
        "prompt_tokens": worst[0] if found.read is None else found.read,
        "completion_tokens": worst[1] if found.written is None else found.written,
        "hides_thinking": found.hides_thinking,
        "message": found.message,
        "usage": found.usage,
        "logprobs": found.logprobs,
    }
