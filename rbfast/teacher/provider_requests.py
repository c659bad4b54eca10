"""Requests to a provider other than chats (uploads, batches, results), with the address and headers of its chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, TypeVar

from rbfast.teacher.client import (
    CONNECTING,
    SHOWN,
    IncompleteReply,
    ServerError,
    call_with_retries,
    downloaded_lines,
    is_busy,
)
from rbfast.teacher.providers import Provider, pause_in

if TYPE_CHECKING:
    import httpx

_PER_REQUEST = ("host", "content-length", "content-type")  # headers that belong to one request
_Result = TypeVar("_Result")


class ProviderRequests:
    """Sends requests other than chats.

    Attributes:
        chat_url: where litellm sends chats, without the query, which may contain a key.

    Raises:
        ServerError: litellm cannot send requests to the provider (the key is missing, say).
    """

    def __init__(self, provider: Provider) -> None:
        import httpx

        chat = provider.request()
        self.chat_url = str(chat.url.copy_with(query=None))
        self._provider = provider
        self._client = httpx.Client(
            headers={name: value for name, value in chat.headers.items() if name not in _PER_REQUEST},
            timeout=httpx.Timeout(provider.timeout, connect=min(CONNECTING, provider.timeout)),
        )

    def ask(self, method: str, url: str, field: str | None = None, **request: Any) -> dict[str, Any]:
        """The JSON object in a reply, which must have `field`. Retries if the provider is busy. Raises ServerError."""
        return self._with_retries(lambda: self.once(method, url, field, **request))

    def once(self, method: str, url: str, field: str | None = None, **request: Any) -> dict[str, Any]:
        """Like `ask`, without retries. Raises IncompleteReply if it is unknown whether the request arrived."""
        with self._reply(method, url, **request) as response:
            data = response.read()
        try:
            reply = json.loads(data)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or (field and field not in reply):
            text = self._provider.hide(data.decode("utf-8", "replace"))[:SHOWN]
            wanted = f"object with {field}" if field else "object"
            raise IncompleteReply(f"{_without_query(url)} sent no {wanted}: got {text!r}")
        return reply

    def upload(self, url: str, name: str, data: bytes) -> str:
        """Upload lines through Google's file API; returns the file's name."""
        start = {
            "X-Goog-Upload-Protocol": "resumable",
            "X-Goog-Upload-Command": "start",
            "X-Goog-Upload-Header-Content-Length": str(len(data)),
            "X-Goog-Upload-Header-Content-Type": "application/jsonl",
        }
        finish = {"X-Goog-Upload-Offset": "0", "X-Goog-Upload-Command": "upload, finalize"}

        def attempt() -> str:
            with self._reply("POST", url, headers=start, json={"file": {"display_name": name}}) as response:
                upload_url = response.headers.get("x-goog-upload-url")
            if not upload_url:
                raise ServerError(f"{_without_query(url)} sent no upload URL")
            if not self._is_of_api(upload_url):  # every request has the key
                raise ServerError(
                    f"{_without_query(url)} sent an upload URL on another host, {_without_query(upload_url)}: nothing "
                    "was sent there; use the provider's own URL"
                )
            return self.once("POST", upload_url, "file", headers=finish, content=data)["file"]["name"]

        return self._with_retries(attempt)

    def _is_of_api(self, url: str) -> bool:
        """Whether a URL has the scheme, host and port of the API."""
        from httpx import URL

        own, other = URL(self.chat_url), URL(url)
        return (own.scheme, own.host, own.port) == (other.scheme, other.host, other.port)

    def lines(self, url: str) -> Iterator[bytes]:
        """The lines of a file; see `downloaded_lines`."""

        def download(file: IO[bytes]) -> None:
            with self._reply("GET", url) as response:
                file.writelines(response.iter_bytes())

        return downloaded_lines(self._provider, download)

    def _with_retries(self, attempt: Callable[[], _Result]) -> _Result:
        return call_with_retries(self._provider.retried, self._provider.retries, attempt)

    @contextmanager
    def _reply(self, method: str, url: str, **request: Any) -> Iterator[httpx.Response]:
        """A successful reply. Raises IncompleteReply or ServerError, with the key hidden."""
        import httpx

        try:
            with self._client.stream(method, url, **request) as response:
                if not response.is_success:
                    response.read()
                    raise self._refusal(url, response)
                yield response
        except httpx.TransportError as error:
            raise IncompleteReply(f"{_without_query(url)} did not answer: {type(error).__name__}: {error}") from None

    def _refusal(self, url: str, response: httpx.Response) -> Exception:
        status = response.status_code
        refusal = self._provider.hide(response.text)[:SHOWN].strip() or response.reason_phrase
        message = f"{_without_query(url)} returned {status}: {refusal}"
        if is_busy(status):
            return IncompleteReply(message, status, pause_in(response.headers, response.text))
        return ServerError(message, status)


def _without_query(url: str) -> str:
    """A URL for messages, without the query, which may contain credentials."""
    return url.partition("?")[0]
