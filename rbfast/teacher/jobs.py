"""Questions for a teacher, and jobs: a job is one reply to request, with everything that the reply depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Protocol

from rbfast.grading.grade import Problem
from rbfast.teacher.chat_reply import read_chat_reply
from rbfast.teacher.client import Retries, ServerError

CHAT = "/chat/completions"


class Teacher(Protocol):
    """A teacher with a chat API: `client.Server` or `providers.Provider`."""

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
    """A problem to ask, with its own system prompt if it has one. `known` has the reference answer, if there is one, to
    verify the teacher's answer."""

    text: str
    known: Problem | None = None
    domain: str | None = None
    source: str | None = None
    id: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Job:
    """One reply to request.

    Attributes:
        key: a hash of everything that the reply depends on.
        unlimited: the same hash without `max_tokens`, which does not matter for a reply that was not cut.
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
        content: list[Any] = [self.server.model, self.server.temperature, body]
        has_own_seed = self.server.seed is not None and "seed" not in self.options
        if self.server.top_p is not None:
            content.append({"top_p": self.server.top_p})
        if self.sample and not has_own_seed:
            content.append(self.sample)
        return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def body(self) -> dict[str, Any]:
        system = self._systems()
        turns = [{"role": "system", "content": system}] if system else []
        seed = None if self.server.seed is None else self.server.seed + self.sample
        turns.append({"role": "user", "content": self.question.text})
        return {"messages": turns, "seed": seed, **self.options}

    def with_limit(self, max_tokens: int) -> Job:
        """The same job with another token limit."""
        return replace(self, options=self.options | {"max_tokens": max_tokens})

    def worst_case(self) -> tuple[int, int]:
        """Upper bounds on the tokens (read, written): a token has at least one byte, and a turn adds a few tokens."""
        read = f"{self._systems()}{self.question.text}"
        return len(read.encode()) + 64, self.options["max_tokens"]

    def _systems(self) -> str:
        """The system prompt: how to answer, then the problem's own system prompt."""
        return "\n\n".join(text for text in (self.system, self.question.system) if text)

    def ask(self) -> dict[str, Any]:
        """Send the job and return the record of its reply."""
        return self.record(self.server.ask(CHAT, self.body()))

    def record(self, reply: Mapping[str, Any]) -> dict[str, Any]:
        """The record of a reply. Raises ServerError if it is not a chat completion."""
        record = reply_record(
            reply, key=self.key, problem=self.question.text, sample=self.sample, worst=self.worst_case()
        )
        return record | {"unlimited": self.unlimited}


def reply_record(
    reply: Mapping[str, Any], *, key: str, problem: str | None, sample: int | None, worst: tuple[int, int]
) -> dict[str, Any]:
    """The record of a reply in `replies.jsonl`. Token counts that the server does not report are set to the worst case.

    Raises:
        ServerError: the reply is not a chat completion.
    """
    try:
        parsed = read_chat_reply(reply)
    except ValueError as error:
        raise ServerError(f"the server sent no chat completion: {error!s:.300}") from error
    return {
        "key": key,
        "problem": problem,
        "sample": sample,
        "text": parsed.text,
        "thinking": parsed.thinking,
        "fault": parsed.fault,
        "finish_reason": parsed.finish_reason,
        "prompt_tokens": worst[0] if parsed.read is None else parsed.read,
        "completion_tokens": worst[1] if parsed.written is None else parsed.written,
        "hides_thinking": parsed.hides_thinking,
        "message": parsed.message,
        "usage": parsed.usage,
        "logprobs": parsed.logprobs,
    }
