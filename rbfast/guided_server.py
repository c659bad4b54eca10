"""Guided inference over an OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...).

```python
server = Server("http://localhost:8000/v1", "my-model")          # the key, if any, from RBFAST_API_KEY
solution = solve(server, prompt, guide)                          # completions: interventions, budget
solution = chat(server, problem, guide)                          # chat only: the budget is asked for, and checked
```

A completion is streamed and read by the same `Row` as in a batch. An order closes the stream; the next request goes on
from what is left of the text, which the server's prefix cache has read already.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rbfast.guide import Event, Guide, Phase, Row
from rbfast.trace import INSTRUCTION

_KEYS = ("RBFAST_API_KEY", "OPENAI_API_KEY")
_BUSY = {408, 409, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 30.0  # seconds, whatever the server asks for


@dataclass(frozen=True)
class ServerSolution:
    """What a server wrote: the text, its cost in tokens as far as the server says it, the interventions."""

    text: str
    thinking: str
    answer: str
    tokens: int
    truncated: bool
    events: tuple[Event, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A record for `json.dumps`."""
        return asdict(self)


class ServerError(RuntimeError):
    """A server that does not answer, or not as it was asked. `partial` is what it had written, `status` its reply."""

    def __init__(self, message: str, status: int | None = None, partial: ServerSolution | None = None):
        super().__init__(message)
        self.status, self.partial = status, partial


@dataclass(frozen=True)
class Server:
    """Where to ask.

    Args:
        url: up to `/v1`.
        model: as the server names it.
        timeout: seconds without a byte.
        retries: of a request that the server refused for now, or broke off, before it is given up.
        pause: seconds before the first of them; doubled each time.
    """

    url: str
    model: str
    timeout: float = 120.0
    retries: int = 4
    pause: float = 1.0
    temperature: float = 0.0
    seed: int = 0
    _key: str | None = field(default=None, repr=False, init=False)

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ValueError(f"url must look like http://host:8000/v1, got {self.url!r}")
        object.__setattr__(self, "_key", next(filter(None, map(os.environ.get, _KEYS)), None))

    def post(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        """The reply to a request, whose body is still to be read; busy servers are asked again."""
        body = {"model": self.model, "temperature": self.temperature, "seed": self.seed} | body
        for attempt in range(self.retries + 1):
            try:
                response = self._send(path, body)
                if response.status == 200:
                    return response
                refusal, status = _refusal(response), response.status
                wait = response.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException) as error:
                refusal, status, wait = f"{type(error).__name__}: {error}", None, ""
            if status is not None and status not in _BUSY:
                break
            if attempt < self.retries:
                time.sleep(min(_LONGEST_PAUSE, float(wait) if wait.isdigit() else self.pause * 2**attempt))
        raise ServerError(f"{self.url}{path} said {status or 'nothing'}: {refusal}", status)

    def _send(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # The response closes the connection when it is closed itself.
        headers["Connection"] = "close"
        connection.request("POST", parts.path.rstrip("/") + path, json.dumps(body).encode(), headers)
        return connection.getresponse()


def _refusal(response: http.client.HTTPResponse) -> str:
    with closing(response):
        return response.read(500).decode("utf-8", "replace").strip() or response.reason


def solve(
    server: Server,
    prompt: str,
    guide: Guide,
    *,
    count: Callable[[str], int] | None = None,
    listen: Callable[[str, str], None] | None = None,
) -> ServerSolution:
    """A guided completion of `prompt`, which carries the model's own special tokens.

    Args:
        count: tokens of a text, by the model's tokenizer. Without it a streamed piece counts as one token where the
            server does not say how many it is, and what is put in as one token a byte, which is never too few.
        listen: called with (kind, text) for each piece: `think`, `answer` or the kind of an intervention.

    Raises:
        ServerError: no answer after all retries, or more tokens than were asked for; `partial` holds what there is.
    """
    row = Row(guide, count or (lambda text: len(text.encode())), end_cost=0)
    hear = listen or (lambda kind, text: None)
    if order := row.start():
        hear(order.kind, order.text)
    failures = 0
    while row.phase is not Phase.DONE:
        before = row.spent
        try:
            _one_stream(server, prompt + row.thinking + row.answer, row, count, hear)
        except ServerError as error:
            raise ServerError(str(error), error.status, _solution(row)) from error
        except (OSError, http.client.HTTPException) as error:
            failures = 0 if row.spent > before else failures + 1
            if failures > server.retries:
                reason = f"{server.url} broke off {failures} times: {type(error).__name__}: {error}"
                raise ServerError(reason, partial=_solution(row)) from error
            time.sleep(min(_LONGEST_PAUSE, server.pause * 2**failures))
    return _solution(row)


def _solution(row: Row) -> ServerSolution:
    text = row.thinking + row.answer
    return ServerSolution(text, row.thinking, row.answer, row.spent, not row.finished, tuple(row.events))


def _one_stream(
    server: Server, text: str, row: Row, count: Callable[[str], int] | None, hear: Callable[[str, str], None]
) -> None:
    """Lets the model write until an order, or the end of what was asked for."""
    allowed, before, reason = row.left, row.spent, None
    body = {"prompt": text, "max_tokens": allowed, "stream": True, "stream_options": {"include_usage": True}}
    with closing(server.post("/completions", body)) as response:
        for chunk in _events(response):
            _check(server, allowed, (chunk.get("usage") or {}).get("completion_tokens", 0))
            for choice in chunk.get("choices", [])[:1]:
                reason = choice.get("finish_reason") or reason
                piece = choice.get("text") or ""
                if not piece:
                    continue
                tokens = _tokens(choice, piece, count)
                _check(server, allowed, row.spent - before + tokens)
                phase = row.phase.value
                order = row.write(piece, tokens)
                hear(phase, piece)
                if order or row.phase is Phase.DONE:
                    return hear(order.kind, order.text) if order and order.text else None
    if reason is None:
        raise http.client.IncompleteRead(b"")
    # "length" though fewer pieces came than tokens were asked for: pieces of several tokens; the share is used up.
    order = row.write("", row.left) if reason == "length" else row.write("", 0, ended=True)
    if order and order.text:
        hear(order.kind, order.text)


def _tokens(choice: dict[str, Any], piece: str, count: Callable[[str], int] | None) -> int:
    said = (choice.get("logprobs") or {}).get("tokens")
    return len(said) if said else count(piece) if count else 1


def _check(server: Server, allowed: int, written: int) -> None:
    if written > allowed:
        raise ServerError(f"{server.url} ignores max_tokens: at most {allowed} were asked for, {written} came")


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent stream; IncompleteRead where it ends before it says so."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise http.client.IncompleteRead(data) from None
        if "error" in event:
            raise ServerError(f"the server broke off: {event['error']}")
        yield event
    raise http.client.IncompleteRead(b"")


def chat(server: Server, problem: str, guide: Guide) -> ServerSolution:
    """An answer by a server that only chats: nothing can be put in, so the budget is asked for and checked.

    Raises:
        ServerError: no answer after all retries, a reply that is none, no token count, or one above the budget.
    """
    body = {
        "messages": [{"role": "user", "content": f"{problem}\n\n{INSTRUCTION}"}],
        "max_tokens": guide.budget,
        "stream": False,
    }
    with closing(server.post("/chat/completions", body)) as response:
        try:
            reply = json.loads(response.read())
            choice = reply["choices"][0]
            answer = choice["message"].get("content") or ""
            thinking = choice["message"].get("reasoning_content") or ""
        except (ValueError, LookupError, TypeError, http.client.HTTPException) as error:
            raise ServerError(f"{server.url} sent no chat completion: {type(error).__name__}: {error}") from error
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    solution = ServerSolution(thinking + answer, thinking, answer, tokens or 0, choice.get("finish_reason") == "length")
    if tokens is None or tokens > guide.budget:
        raise ServerError(
            f"{server.url} did not honour the budget: at most {guide.budget} tokens were asked for, it says "
            f"{'nothing of how many' if tokens is None else tokens} it wrote",
            partial=solution,
        )
    return solution


def solve_or_chat(server: Server, problem: str, prompt: str, guide: Guide, **options: Any) -> ServerSolution:
    """`solve`, or `chat` where the server has no completions (404, 405, 501)."""
    try:
        return solve(server, prompt, guide, **options)
    except ServerError as error:
        if error.status not in (404, 405, 501):
            raise
        return chat(server, problem, guide)
