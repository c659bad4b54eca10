r"""Whether two mathematical answers are equal, by math-verify in a process that can be killed.

```python
equal(r"\frac{14}{3}", "14/3")             # True
```
"""

from __future__ import annotations

import importlib.util
import re

from rbfast.grading.judge import TIME_LIMIT, judge

_ROOT = re.compile(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\w+))")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")


def equal(expected: str, statement: str, time_limit: float = TIME_LIMIT) -> bool:
    """Whether a statement is the expected answer: the same words, or mathematics that math-verify finds equal.

    Raises:
        ImportError: math-verify is not installed.
    """
    expected, statement = _plain(expected), _plain(statement)
    if not expected or not statement:
        return False
    if _words(expected) == _words(statement):
        return True
    require()
    return bool(judge("math-verify").ask([f"${expected}$", [f"${statement}$", statement]], time_limit))


def require() -> None:
    """Raises ImportError, with what to do, where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("mathematical answers are graded by the package math-verify: pip install math-verify")


def _plain(text: str) -> str:
    """Without dollars around it and a full stop behind it, and with roots that are signs as LaTeX."""
    text = re.sub(r"^[\s$*]+|[\s$*.]+$", "", text)
    return _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2] or match[3]}}}", text)


def _words(text: str) -> str:
    text = _TEXT.sub(r"\1", text).replace("\\left", "").replace("\\right", "").replace("dfrac", "frac")
    return re.sub(r"\\[ ,;!]|\s+", "", text).casefold()
