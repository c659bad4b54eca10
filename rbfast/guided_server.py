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
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from rbfast.guide import Event, Guide, Phase, Row
from rbfast.server import LONGEST_PAUSE, Server, ServerError
from rbfast.trace import INSTRUCTION


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
            time.sleep(min(LONGEST_PAUSE, server.pause * 2**failures))
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
        for chunk in server.events(response):
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
    reply = server.ask("/chat/completions", body)
    try:
        choice = reply["choices"][0]
        answer = choice["message"].get("content") or ""
        thinking = choice["message"].get("reasoning_content") or ""
    except (LookupError, TypeError, AttributeError) as error:
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
