"""The client of an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a vendor's), built on the `openai` SDK.

```python
server = Server("http://localhost:8000/v1", "my-model")          # the key, if any, from RBFAST_API_KEY
reply = server.ask("/chat/completions", {"messages": [...]})     # a dict; retries if the server is busy or breaks off
with closing(server.stream("/completions", body)) as events:     # dicts, as they come
    ...
```
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakSet

from rbfast.teacher.parameters import ParameterFilter

if TYPE_CHECKING:
    import openai

_KEYS = ("RBFAST_API_KEY", "OPENAI_API_KEY")
INVALID = (400, 422)  # statuses of an invalid request
REFUSED = (*INVALID, 413)  # statuses of a refusal that concerns this request alone
NO_SUCH_PATH = (404, 405, 501)
SHOWN = 500  # characters of a refusal shown in messages
CONNECTING = 10.0  # seconds to connect
PATIENCE = 600.0  # seconds that a teacher may be busy or unreachable after it has answered
_LONGEST_PAUSE = 120.0  # seconds, as in the SDK
_Result = TypeVar("_Result")


class ServerError(RuntimeError):
    """A server did not answer as requested. `status`: its HTTP status; `partial`: what it wrote before; `pause`: the
    seconds it asks to wait."""

    def __init__(
        self, message: str, status: int | None = None, partial: Any = None, *, pause: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.partial, self.pause = status, partial, pause


class Unreachable(ServerError):
    """No connection to the server could be made."""


class IncompleteReply(Exception):
    """A reply is incomplete or malformed, and a retry may succeed. `pause`: seconds to wait, if known."""

    def __init__(self, message: str, status: int | None = None, pause: float | None = None):
        super().__init__(message)
        self.status, self.pause = status, pause


def is_busy(status: int | None) -> bool:
    """Whether a later request may succeed after this status; the SDK's rule."""
    return status in (408, 409, 429) or (status is not None and 500 <= status < 600)


class Retries:
    """Counts retries (`made`), and tracks which requests wait for one. Thread-safe; each thread has one request."""

    def __init__(self) -> None:
        self.made = 0
        self._lock = threading.Lock()
        self._waiting: set[threading.Thread] = set()
        self._given_up: WeakSet[threading.Thread] = WeakSet()

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a retry."""
        return len(self._waiting)

    def is_waiting(self, thread: threading.Thread) -> bool:
        """Whether the request of a thread waits for a retry."""
        return thread in self._waiting

    def give_up(self, thread: threading.Thread) -> None:
        """Stop retrying the request of a thread."""
        with self._lock:
            self._given_up.add(thread)

    def mark_waiting(self) -> None:
        """Record that this thread's request failed and waits for a retry."""
        with self._lock:
            self._waiting.add(threading.current_thread())

    def mark_retried(self) -> None:
        """Record that this thread's request is being retried. Raises ServerError if it was given up."""
        with self._lock:
            if threading.current_thread() in self._given_up:
                raise ServerError("the request was given up")
            self.made += 1
            self._waiting.discard(threading.current_thread())

    def mark_done(self) -> None:
        """Record that this thread's request has ended, successfully or not."""
        with self._lock:
            self._waiting.discard(threading.current_thread())


def call_with_retries(retried: Retries, retries: int, attempt: Callable[[], _Result]) -> _Result:
    """Call `attempt` and return its result. Retry with growing pauses if it raises IncompleteReply.

    Raises:
        ServerError: the last retry raised IncompleteReply too.
    """
    try:
        for number in range(retries):
            try:
                return attempt()
            except IncompleteReply as error:
                retried.mark_waiting()
                time.sleep(min(_LONGEST_PAUSE, pause_after(number) if error.pause is None else error.pause))
                retried.mark_retried()
        return attempt()
    except IncompleteReply as error:
        raise ServerError(str(error), error.status, pause=error.pause) from None
    finally:
        retried.mark_done()


def downloaded_lines(teacher: RequestSettings, download: Callable[[IO[bytes]], None]) -> Iterator[bytes]:
    """The lines that `download` writes to a file, without blank ones. The file is on disk: it may not fit in memory.
    Retries as `call_with_retries` does."""
    with TemporaryFile() as file:

        def attempt() -> None:
            file.seek(0)
            file.truncate()
            download(file)

        call_with_retries(teacher.retried, teacher.retries, attempt)
        file.seek(0)
        yield from filter(bytes.strip, file)


def pause_after(failures: int) -> float:
    """The seconds to wait after this many failures, as in the SDK."""
    return min(8.0, 0.5 * 2**failures)


class Connection:
    """The state that all copies of a Server share: the SDK's client, the retries, and the refused parameters."""

    def __init__(self) -> None:
        self.retried, self.parameter_filter = Retries(), ParameterFilter()
        self._client: openai.OpenAI | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple]:
        return Connection, ()  # another process opens its own connections

    def client(self, make: Callable[[Retries], openai.OpenAI]) -> openai.OpenAI:
        with self._lock:
            self._client = self._client or make(self.retried)
            return self._client


@dataclass(frozen=True, kw_only=True)
class RequestSettings:
    """The request settings of a teacher, for any API.

    If the teacher refuses temperature, top_p or seed, they are left out, with a warning.

    Args:
        timeout: the most seconds without a byte; a reply that is not streamed sends none before it is complete.
        retries: the most retries of a request that was temporarily refused or broken off.
        temperature, top_p, seed: sent with every request that does not set its own; None is not sent.

    Attributes:
        retried: the retries so far.

    Raises:
        ValueError: the timeout is not finite and above 0.
    """

    timeout: float = 600.0
    retries: int = 4
    temperature: float | None = 0.0
    top_p: float | None = None
    seed: int | None = 0
    connection: Connection = field(default_factory=Connection, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be finite and above 0 seconds, got {self.timeout}")

    @property
    def retried(self) -> Retries:
        return self.connection.retried

    def full_body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a request with the common parameters, without those that the teacher refuses."""
        common = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return self.connection.parameter_filter.fit(
            {name: value for name, value in (common | {**body}).items() if value is not None}
        )


@dataclass(frozen=True)
class Server(RequestSettings):
    """A server and the parameters of its requests.

    Args:
        url: up to `/v1`.
        model: as the server names it.
        timeout, retries, temperature, top_p, seed: see `RequestSettings`.
    """

    url: str
    model: str
    _key: str | None = field(default=None, repr=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = urlsplit(self.url)
        if parts.username is not None or parts.query:  # messages show the url, and must never show a key
            raise ValueError(f"url must look like http://host:8000/v1, without a key in it; set {_KEYS[0]} instead")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must look like http://host:8000/v1, got {self.url!r}")
        object.__setattr__(self, "_key", _key_from_environment())

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST a request and return the JSON object of the reply. Also retries if the reply is not a JSON object, or
        contains an error that says the server is busy."""
        return call_with_retries(self.retried, self.retries, lambda: self._whole(path, self._post(path, body)))

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The JSON objects of a server-sent stream, up to its end.

        Raises:
            IncompleteReply: the connection broke, or an event is not a JSON object.
            ServerError: the server refused, or sent an error.
        """
        import openai

        stream = self._post(path, body, stream=True)
        try:
            if "json" in stream.response.headers.get("content-type", ""):
                self._whole(path, stream.response.read())
                raise IncompleteReply(f"{self.url}{path} sent a single object, not a stream")
            for event in stream:
                if not isinstance(event, dict):
                    raise IncompleteReply(f"expected JSON objects, got {type(event).__name__}")
                yield event
        except openai.APIConnectionError as error:
            raise IncompleteReply(_cause(error)) from None
        except openai.APIError as error:
            raise ServerError(f"the server broke off: {self.hide(str(error.body or error.message))}") from None
        except (ValueError, RecursionError):
            raise IncompleteReply("expected JSON objects, got something else") from None
        finally:
            stream.close()

    def full_body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return super().full_body({"model": self.model, **body})

    def client(self) -> openai.OpenAI:
        """The SDK's client, created once."""
        return self.connection.client(self._connect)

    def _connect(self, retried: Retries) -> openai.OpenAI:
        import openai

        def sending(request: Any) -> None:
            if request.headers.get("x-stainless-retry-count", "0") != "0":
                retried.mark_retried()

        def received(response: Any) -> None:
            if is_busy(response.status_code):
                retried.mark_waiting()

        return openai.OpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            timeout=openai.Timeout(self.timeout, connect=min(CONNECTING, self.timeout)),
            max_retries=self.retries,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [sending], "response": [received]}),
        )

    def _post(self, path: str, body: dict[str, Any], stream: bool = False) -> Any:
        """The bytes of a reply, or its stream."""
        import openai

        cast: dict[str, Any] = {"cast_to": bytes}
        if stream:
            cast = {"cast_to": object, "stream": True, "stream_cls": openai.Stream[object]}
        while True:
            sent = self.full_body(body)
            try:
                with self.translated_errors(path):
                    return self.client().post(path, body=sent, options={"headers": self.headers()}, **cast)
            except ServerError as error:
                if error.status not in INVALID or not self.connection.parameter_filter.learn(str(error), sent):
                    raise

    def headers(self) -> dict[str, Any]:
        """Extra headers for the SDK, which omit the Authorization header if there is no key."""
        import openai

        return {} if self._key else {"Authorization": openai.Omit()}

    @contextmanager
    def translated_errors(self, path: str) -> Iterator[None]:
        """Turn the SDK's errors into ServerError, with the key hidden: the server's message may repeat it."""
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            refusal = self.hide(error.response.text)[:SHOWN].strip() or error.response.reason_phrase
            pause = retry_after(error.response.headers)
            message = f"{self.url}{path} returned {error.status_code}: {refusal}"
            raise ServerError(message, error.status_code, pause=pause) from None
        except openai.APIConnectionError as error:
            kind = Unreachable if _cause(error).startswith(("ConnectError", "ConnectTimeout")) else ServerError
            hint = "; raise the timeout" if isinstance(error, openai.APITimeoutError) and kind is ServerError else ""
            raise kind(f"{self.url}{path} did not answer: {_cause(error)}{hint}") from None
        finally:
            self.retried.mark_done()

    def _whole(self, path: str, data: bytes) -> dict[str, Any]:
        try:
            reply = json.loads(data)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            text = self.hide(data.decode("utf-8", "replace"))[:SHOWN]
            raise IncompleteReply(f"{self.url}{path} sent no JSON object: got {text!r}")
        if (error := reply.get("error")) and not reply.get("choices"):
            status = status_in(error)
            message = self.hide(error if isinstance(error, str) else json.dumps(error, ensure_ascii=False))[:SHOWN]
            kind = IncompleteReply if is_busy(status) else ServerError
            raise kind(f"{self.url}{path} sent an error: {message}", status)
        return reply

    def hide(self, text: str) -> str:
        """The text without the key."""
        return hide(text, [self._key or ""])


def hide(text: str, keys: Iterable[str]) -> str:
    """The text with keys masked: a server may repeat the key that was sent to it."""
    for key in filter(None, keys):
        text = text.replace(key, "*" * len(key))
    return text


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds in the Retry-After header, or None."""
    try:
        return max(0.0, float(headers["retry-after"]))
    except (LookupError, ValueError):
        return None


def status_in(error: Any) -> int | None:
    """The HTTP status in the body of an error, or None."""
    if not isinstance(error, dict):
        return None
    codes = (str(error.get(name)) for name in ("code", "status", "status_code"))
    numbers = (int(code) for code in codes if len(code) == 3 and code.isdecimal())
    return next((code for code in numbers if 400 <= code < 600), None)


def _cause(error: Exception) -> str:
    """The cause of an SDK error, in one line."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".rstrip(": ")


def _key_from_environment() -> str | None:
    """The first key that is set. Raises ValueError, without showing the key, if a header cannot contain it."""
    for name in _KEYS:
        key = os.environ.get(name, "").strip()  # a key read from a file ends in a line break
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{name} must contain only printable ASCII characters; set it again")
        if key:
            return key
    return None
