"""A provider with an API of its own (Anthropic, Gemini, ...), spoken to by `litellm` (the extra `teachers`).

```python
teacher = Provider("anthropic", "claude-sonnet-4-5", temperature=None)      # the key from ANTHROPIC_API_KEY
reply = teacher.ask("/chat/completions", {"messages": [...], "max_tokens": 8000, "reasoning_effort": "high"})
```
"""

from __future__ import annotations

import difflib
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

from rbfast.teacher.client import BrokenOff, Connection, Retries, ServerError, hide, insist, is_busy
from rbfast.utils.packages import need

_OWN_KEY = "RBFAST_API_KEY"
_INVALID = (400, 422)
_SHOWN = 500  # characters of a refusal


@dataclass(frozen=True)
class Provider:
    """A model of a provider, with the interface of `client.Server` for chats.

    Args:
        provider: as litellm names it: anthropic, gemini, bedrock, ...
        model: as the provider names it.
        url: of another host than the provider's.
        timeout, retries, temperature, top_p, seed: see `client.Server`.

    Raises:
        ImportError: litellm is not installed.
        ValueError: an unknown provider.
    """

    provider: str
    name: str
    url: str | None = None
    timeout: float = 600.0
    retries: int = 4
    temperature: float | None = 0.0
    top_p: float | None = None
    seed: int | None = 0
    connection: Connection = field(default_factory=Connection, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = sorted(str(getattr(name, "value", name)) for name in _litellm().provider_list)
        if self.provider not in known:
            near = difflib.get_close_matches(self.provider, known, 3) or ["anthropic", "gemini", "mistral"]
            raise ValueError(f"unknown provider {self.provider!r}: use one that litellm knows, like {', '.join(near)}")

    @property
    def model(self) -> str:
        return f"{self.provider}/{self.name}"

    @property
    def retried(self) -> Retries:
        return self.connection.retried

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The whole reply in the shape of a chat completion; raises ServerError. `path` is always that of chats."""
        try:
            return insist(self.retried, self.retries, lambda: self._once(body))
        except BrokenOff as error:
            raise ServerError(str(error), error.status) from None

    def _once(self, body: dict[str, Any]) -> dict[str, Any]:
        import openai

        litellm, manners = _litellm(), self.connection.manners
        common = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        while True:
            wanted = {name: value for name, value in (common | body).items() if value is not None}
            sent = manners.fit(wanted)
            try:
                return litellm.completion(model=self.model, **self._how(), **sent).model_dump()
            except openai.APIError as error:  # litellm's errors are subclasses
                status = getattr(error, "status_code", None)
                said = hide(str(error), _keys())[:_SHOWN]
                if status in _INVALID and manners.learn(said, sent):
                    continue
                said = f"{self.model} said {status or 'nothing'}: {said}"
                if is_busy(status) or isinstance(error, openai.APIConnectionError):
                    raise BrokenOff(said, status, _pause(error)) from None
                raise ServerError(said, status) from None

    def _how(self) -> dict[str, Any]:
        # Its own retries come without a pause.
        how: dict[str, Any] = {"timeout": self.timeout, "num_retries": 0, "max_retries": 0}
        how |= {"api_base": self.url} if self.url else {}
        own = os.environ.get(_OWN_KEY, "").strip()
        return how | ({"api_key": own} if own else {})


def _litellm() -> Any:
    # Else its import downloads a table of prices.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm: Any = need("litellm", "providers with an API of their own", "'rbfast[teachers]'")
    litellm.suppress_debug_info = True  # it would print to stdout
    # Of its own types, at every first use of one.
    warnings.filterwarnings("ignore", message=".*`ReadOnly` qualifier", category=UserWarning)
    return litellm


def _keys() -> list[str]:
    """Every key that a provider may have been sent."""
    found = (value.strip() for name, value in os.environ.items() if name.endswith(("_API_KEY", "_TOKEN", "_SECRET")))
    return [key for key in found if len(key) >= 8]


def _pause(error: Exception) -> float | None:
    """Seconds that the provider asks to wait, if it says so."""
    headers = getattr(error, "litellm_response_headers", None) or {}
    try:
        return max(0.0, float(headers["retry-after"]))
    except (LookupError, ValueError):
        return None
