"""Learn which parameters a server refuses: leave them out or rename them, with a warning, and send the request again.

```python
allowed = ParameterFilter()
body = allowed.fit({"model": "m", "temperature": 0.7, "max_tokens": 100})        # without refused parameters
again = allowed.learn("Unsupported parameter: 'temperature'", body)               # True: fit the body and send it again
```
"""

import re
import threading
import warnings
from collections.abc import Mapping
from typing import Any

_LIMIT, _NEWER_LIMIT = "max_tokens", "max_completion_tokens"
_OPTIONAL = ("temperature", "top_p", "seed")  # may be left out
# How servers refuse a parameter, or all values but its default; not how they refuse a value out of range.
_REFUSAL = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|not (?:be )?(?:permitted|allowed|accepted|available)"
    r"|forbidden|extra (?:inputs|fields)|not accept|deprecated|only (?:the default|be set)|cannot be (?:used|set)"
    r"|(?:not a valid|invalid) (?:parameter|field|argument)|does(?: not|n't) (?:allow|take|have)"
    r"|incompatible|no longer",
    re.IGNORECASE,
)


class ParameterFilter:
    """The parameters that a server has refused. Thread-safe."""

    def __init__(self) -> None:
        self._dropped: set[str] = set()
        self._takes_newer_limit = False
        self._lock = threading.Lock()

    def fit(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body without refused parameters."""
        fitted = {name: value for name, value in body.items() if name not in self._dropped}
        if self._takes_newer_limit and _LIMIT in fitted:
            fitted[_NEWER_LIMIT] = fitted.pop(_LIMIT)
        return fitted

    def learn(self, refusal: str, sent: Mapping[str, Any]) -> bool:
        """Learn from a refusal. Returns whether `fit` now changes the body; warns about a dropped parameter."""
        if not _REFUSAL.search(refusal):
            return False
        with self._lock:
            if _LIMIT in sent and _names(_NEWER_LIMIT, refusal):
                self._takes_newer_limit = True
                return True
            refused = [name for name in _OPTIONAL if name in sent and _names(name, refusal)]
            shown = " ".join(refusal.split())[:200]
            for name in refused:
                if name not in self._dropped:
                    warnings.warn(f"the server refuses {name}: requests are sent without it ({shown!r})", stacklevel=2)
            self._dropped.update(refused)
        return bool(refused)


def _names(parameter: str, refusal: str) -> bool:
    return re.search(rf"(?<![\w-]){parameter}(?![\w-])", refusal) is not None
