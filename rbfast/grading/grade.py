"""Grading: whether the final answer of a completion is the expected one.

```python
grade(problem, completion.text, truncated=completion.truncated)    # 1.0 is correct
```
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rbfast.data.answers import extract_answer, lacks_answer, marked_answer, without_thinking
from rbfast.data.thinking_marks import without_marks
from rbfast.grading.judge import judge
from rbfast.grading.math_equality import equals_any, is_number, key
from rbfast.grading.statements import readings
from rbfast.utils.packages import import_optional


@dataclass(frozen=True)
class Problem:
    """A question with its answer, and the system prompt that came with it. `entry` is what the task's own verifier
    needs, empty if answers are compared.
    """

    task: str
    question: str
    answer: str
    entry: dict[str, Any]
    system: str | None = None


_WHOLE = re.compile(r".*(?:\n|</answer>)", re.DOTALL | re.IGNORECASE)
_EXCLAIMED = re.compile(r"[-$*]*[\d,.]*\d\**!\**")
_DISPLAYED = re.compile(r"(?:\\\[[^\[\]]*\\\]|\$\$[^$]*\$\$)$")


def _statement(text: str, truncated: bool) -> str:
    """What a completion answers: what it marks, else its last line; nothing if it leaves its answer empty.

    If the limit cut it, only what it marks before its last whole line or tag ends.
    """
    if truncated:
        whole = _WHOLE.match(text)
        return (extract_answer(whole[0]) if whole else None) or ""
    stated = extract_answer(text)
    if stated and _EXCLAIMED.fullmatch(stated) and not marked_answer(without_thinking(text)):
        return f"It is {stated}"  # a sentence, whose last sign may be no factorial
    return stated or ("" if lacks_answer(text) else _last_line(text))


def _last_line(text: str) -> str:
    """The last line; all of a formula that is displayed over several; of a code fence its last line."""
    said = without_tags(without_thinking(text)).strip().removesuffix("\n```").rstrip()
    shown = _DISPLAYED.search(said)
    return shown[0] if shown else said.rpartition("\n")[2]


def without_tags(text: str) -> str:
    """A part of a completion for people: no marks of thinking or answer, and no white space around it."""
    return without_marks(text).strip()


def grade(problem: Problem, completion: str, *, truncated: bool = False) -> float:
    """The score of a completion: 1.0 is correct, less may be partial credit of a task's own verifier.

    The answer is what `extract_answer` finds, else the last line, unless the completion leaves its answer empty. It
    counts if any plain reading of it (`readings`) is equal to the expected one (`math_equality`), or passes the
    verifier; the rule is the same for every author.

    Args:
        truncated: the limit cut the completion: what stands after its last whole line or tag is no answer, and only a
            marked answer counts.
    """
    found = readings(_statement(completion, truncated))
    if not problem.entry:
        return float(equals_any(problem.answer, found))
    verifier = _verifier(problem)
    return max(map(verifier, found), default=0.0)


def _verifier(problem: Problem) -> Callable[[str], float]:
    reasoning_gym()
    verifier = judge("reasoning-gym")
    return lambda reading: verifier.ask([problem.task, problem.entry, reading]) or 0.0


def reasoning_gym() -> Any:
    """The package. Raises ImportError, with what to do, if it cannot be imported."""
    return import_optional("reasoning_gym", "problems of generated tasks", install="reasoning-gym")


def answer_key(text: str, *, truncated: bool = False) -> str | None:
    """What a vote counts: the final answer of a completion, the same text for equal numbers; None if it has none.

    Args:
        truncated: as for `grade`.
    """
    keys = [key(reading) for reading in readings(_statement(text, truncated))]
    if keys and len(keys[0]) == 1:  # a choice, whatever is said of it
        return keys[0]
    return next(filter(is_number, keys), keys[0] if keys else "") or None
