"""An OpenAI-compatible server (vLLM, SGLang, llama.cpp, a vendor's): requests, and what to do when they fail.

```python
server = Server("http://localhost:8000/v1", "my-model")          # the key, if any, from RBFAST_API_KEY
reply = server.ask("/chat/completions", {"messages": [...]})     # a dict; retries if a server is busy or breaks off
```
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

_KEYS = ("RBFAST_API_KEY", "OPENAI_API_KEY")
_BUSY = {408, 409, 429, 500, 502, 503, 504}
_SHOWN = 500  # characters of a refusal
LONGEST_PAUSE = 30.0  # seconds, however long a pause the server wants
_Read = TypeVar("_Read")


class ServerError(RuntimeError):
    """A server that does not answer as requested. `partial` is what it had written, `status` its reply."""

    def __init__(self, message: str, status: int | None = None, partial: Any = None):
        super().__init__(message)
        self.status, self.partial = status, partial


class Retries:
    """Requests that were retried: how many in all, and how many wait now. Threads share it."""

    def __init__(self) -> None:
        self.made = self.waiting = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple]:
        return Retries, ()  # a copied server has sent nothing yet

    def pause(self, seconds: float) -> None:
        """Waits before a request is retried."""
        with self._lock:
            self.made, self.waiting = self.made + 1, self.waiting + 1
        try:
            time.sleep(seconds)
        finally:
            with self._lock:
                self.waiting -= 1


@dataclass(frozen=True)
class Server:
    """Where to ask.

    Args:
        url: up to `/v1`.
        model: as the server names it.
        timeout: seconds without a byte.
        retries: of a request that the server refused for now, or broke off, before it is given up.
        pause: seconds before the first of them; doubled each time.
        temperature, top_p, seed: sent with every request that does not set its own; None is not sent.

    Attributes:
        retried: the retries so far.
    """

    url: str
    model: str
    timeout: float = 120.0
    retries: int = 4
    pause: float = 1.0
    temperature: float | None = 0.0
    top_p: float | None = None
    seed: int | None = 0
    retried: Retries = field(default_factory=Retries, repr=False, init=False, compare=False)
    _key: str | None = field(default=None, repr=False, init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username is not None or parts.query:  # it is shown in messages, which a key must never reach
            raise ValueError(f"url must look like http://host:8000/v1, without a key in it; set {_KEYS[0]} instead")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must look like http://host:8000/v1, got {self.url!r}")
        object.__setattr__(self, "_key", _key_of_environment())

    def post(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        """The reply to a request, whose body is still to be read; retries if the server is busy."""
        return self._insist(path, body, lambda response: response)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The whole reply; also retries if the server breaks off or sends no JSON object."""
        return self._insist(path, body, _whole)

    def _insist(self, path: str, body: dict[str, Any], read: Callable[[http.client.HTTPResponse], _Read]) -> _Read:
        """What `read` makes of the first good reply. Raises ServerError after too many bad ones, or a final one."""
        sent = {"model": self.model, "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed} | body
        data = json.dumps({name: value for name, value in sent.items() if value is not None}).encode()
        for attempt in range(self.retries + 1):
            status, wait = None, ""
            try:
                response = self._send(path, data)
                status = response.status
                if status == 200:
                    return read(response)
                refusal, wait = self._refusal(response), response.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException) as error:
                refusal, status = f"{type(error).__name__}: {error}", None
            if status is not None and status not in _BUSY:
                break
            if attempt < self.retries:
                seconds = float(wait) if wait.isdecimal() else self.pause * 2**attempt
                self.retried.pause(min(LONGEST_PAUSE, seconds))
        raise ServerError(f"{self.url}{path} said {status or 'nothing'}: {refusal}", status)

    def _send(self, path: str, data: bytes) -> http.client.HTTPResponse:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # The response closes the connection when it is closed itself.
        headers["Connection"] = "close"
        connection.request("POST", parts.path.rstrip("/") + path, data, headers)
        return connection.getresponse()

    def _refusal(self, response: http.client.HTTPResponse) -> str:
        """What the server says, in short; a server may repeat the key it was sent."""
        with closing(response):
            said = response.read(_SHOWN + len(self._key or "")).decode("utf-8", "replace")
        return self._hide(said)[:_SHOWN].strip() or response.reason

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "*" * len(self._key)) if self._key else text

    def events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """The JSON objects of a server-sent stream; IncompleteRead if it ends before it says so."""
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except (ValueError, RecursionError):
                raise http.client.IncompleteRead(data) from None
            if not isinstance(event, dict):
                raise http.client.HTTPException(f"expected JSON objects, got {type(event).__name__}")
            if "error" in event:
                raise ServerError(f"the server broke off: {self._hide(str(event['error']))}")
            yield event
        raise http.client.IncompleteRead(b"")


def _key_of_environment() -> str | None:
    """The first key that is set. Raises ValueError for one that no request can carry, and does not show it."""
    for name in _KEYS:
        key = os.environ.get(name, "").strip()  # a key read from a file ends in a line break
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{name} must hold printable ASCII characters only; set it again")
        if key:
            return key
    return None


def _whole(response: http.client.HTTPResponse) -> dict[str, Any]:
    with closing(response):
        data = response.read()
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        raise http.client.IncompleteRead(data[:200]) from None
    if not isinstance(reply, dict):
        raise http.client.HTTPException(f"expected a JSON object, got {type(reply).__name__}")
    return reply
