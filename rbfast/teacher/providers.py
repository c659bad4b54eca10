"""A provider with its own API (Anthropic, Gemini, ...), through `litellm` (the extra `teachers`).

```python
teacher = Provider("anthropic", "claude-sonnet-4-5", temperature=None)      # the key from ANTHROPIC_API_KEY
reply = teacher.ask("/chat/completions", {"messages": [...], "max_tokens": 8000, "reasoning_effort": "high"})
```
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rbfast.teacher.client import (
    INVALID,
    SHOWN,
    IncompleteReply,
    RequestSettings,
    ServerError,
    call_with_retries,
    hide,
    is_busy,
    retry_after,
)
from rbfast.utils.packages import import_optional

if TYPE_CHECKING:
    import httpx

_OWN_KEY = "RBFAST_API_KEY"
_DELAY = re.compile(r'"retryDelay": ?"(\d+(?:\.\d+)?)s"')  # in Google's errors, in place of a header
_NAME_OF_KEY = re.compile("KEY$|SECRET|TOKEN|JWT$")  # AIMLAPI_KEY, SCW_SECRET_KEY, AWS_BEARER_TOKEN_BEDROCK, ...
# A placeholder question: the provider's URL, headers and reply format do not depend on the question.
_PLACEHOLDER: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]}
_PLACEHOLDER |= {"temperature": None, "top_p": None, "seed": None}


class _CaughtRequest(BaseException):
    """Carries a caught request. Not an Exception: litellm would turn that into one of its own errors."""

    def __init__(self, request: httpx.Request) -> None:
        self.request = request


@dataclass(frozen=True)
class Provider(RequestSettings):
    """A model of a provider, with the interface of `client.Server` for chats.

    Args:
        provider: as litellm names it: anthropic, gemini, bedrock, ...
        name: the model, as the provider names it.
        url: the URL of a host other than the provider's.
        timeout, retries, temperature, top_p, seed: see `RequestSettings`.

    Raises:
        ImportError: litellm is not installed.
        ValueError: the provider is unknown.
    """

    provider: str
    name: str
    url: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        providers = sorted(str(getattr(name, "value", name)) for name in _litellm().provider_list)
        if self.provider not in providers:
            near = difflib.get_close_matches(self.provider, providers, 3) or ["anthropic", "gemini", "mistral"]
            raise ValueError(f"unknown provider {self.provider!r}: use one that litellm knows, like {', '.join(near)}")

    @property
    def model(self) -> str:
        return f"{self.provider}/{self.name}"

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply in the format of a chat completion. `path` is ignored (all are chats). Raises ServerError."""
        return call_with_retries(self.retried, self.retries, lambda: self._once(body))

    def request(self, body: Mapping[str, Any] = _PLACEHOLDER) -> httpx.Request:
        """The request that `ask` would send, in the provider's own format, with the key. Raises ServerError."""

        def catch(request: httpx.Request) -> Any:
            raise _CaughtRequest(request)

        try:
            self._once(body, catch)
        except _CaughtRequest as caught:
            return caught.request
        except IncompleteReply as error:
            raise ServerError(str(error), error.status) from None
        raise ServerError(f"cannot catch the requests that litellm sends to {self.provider}")

    def read(self, reply: Any) -> dict[str, Any]:
        """Convert a reply in the provider's own format to what `ask` returns. Raises ServerError if it is not one."""
        import httpx

        try:
            return self._once(_PLACEHOLDER, lambda request: httpx.Response(200, json=reply))
        except IncompleteReply as error:
            raise ServerError(str(error), error.status) from None

    def _once(
        self, body: Mapping[str, Any], answer: Callable[[httpx.Request], httpx.Response] | None = None
    ) -> dict[str, Any]:
        """One request without retries. If `answer` is given, it replies in place of the provider."""
        import openai

        litellm, parameter_filter = _litellm(), self.connection.parameter_filter
        options = self._options() | ({"client": _client(answer)} if answer else {})
        while True:
            sent = self.full_body(body)
            try:
                return litellm.completion(model=self.model, **options, **sent).model_dump()
            except openai.APIError as error:  # litellm's errors are subclasses
                status = getattr(error, "status_code", None)
                refusal = self.hide(str(error))[:SHOWN]
                if status in INVALID and parameter_filter.learn(refusal, sent):
                    continue
                message = f"{self.model} {f'returned {status}' if status else 'did not answer'}: {refusal}"
                if is_busy(status) or isinstance(error, openai.APIConnectionError):
                    headers = getattr(error, "litellm_response_headers", None)
                    raise IncompleteReply(message, status, pause_in(headers or {}, str(error))) from None
                raise ServerError(message, status) from None

    def _options(self) -> dict[str, Any]:
        # No retries by litellm: it does not pause before them.
        options: dict[str, Any] = {"timeout": self.timeout, "num_retries": 0, "max_retries": 0}
        options |= {"api_base": self.url} if self.url else {}
        own = os.environ.get(_OWN_KEY, "").strip()
        return options | ({"api_key": own} if own else {})

    def hide(self, text: str) -> str:
        """The text with every key masked that may have been sent to the provider."""
        return hide(text, _keys())


def _client(answer: Callable[[httpx.Request], httpx.Response]) -> Any:
    """A client for litellm; `answer` answers its requests."""
    import httpx
    from litellm.llms.custom_httpx.http_handler import HTTPHandler

    return HTTPHandler(client=httpx.Client(transport=httpx.MockTransport(answer)))


def _litellm() -> Any:
    # Without this, importing litellm downloads a table of prices.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm: Any = import_optional("litellm", "providers with an API of their own", "'rbfast[teachers]'")
    litellm.suppress_debug_info = True  # it would print to stdout
    # Warnings about litellm's own types.
    warnings.filterwarnings("ignore", message=".*`ReadOnly` qualifier", category=UserWarning)
    return litellm


def _keys() -> list[str]:
    """Every key that may have been sent to a provider."""
    secrets = (value.strip() for name, value in os.environ.items() if _NAME_OF_KEY.search(name))
    return [key for key in secrets if len(key) >= 8]


def pause_in(headers: Mapping[str, str], error: str) -> float | None:
    """The seconds that the provider asks to wait, in a header or in the error; None if it does not say."""
    delay, pause = _DELAY.search(error), retry_after(headers)
    return float(delay[1]) if pause is None and delay else pause
