"""Grade completions: whether the final answer is the expected one.

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
from rbfast.grading.math_equality import equality_key, equals_any, is_number
from rbfast.grading.statements import readings
from rbfast.utils.packages import import_optional


@dataclass(frozen=True)
class Problem:
    """A question with its answer and its system prompt.

    `entry` is the input of the task's own verifier. If it is empty, the answers are compared.
    """

    task: str
    question: str
    answer: str
    entry: dict[str, Any]
    system: str | None = None


_WHOLE = re.compile(r".*(?:\n|</answer>)", re.DOTALL | re.IGNORECASE)
_EXCLAIMED = re.compile(r"[-$*]*[\d,.]*\d\**!\**")
_DISPLAYED = re.compile(r"(?:\\\[[^\[\]]*\\\]|\$\$[^$]*\$\$)$")


def _final_statement(text: str, truncated: bool) -> str:
    """The answer of a completion: the marked one, else its last line; empty if the completion leaves its answer empty.

    In a truncated completion, only an answer marked in its complete lines and tags counts.
    """
    if truncated:
        whole = _WHOLE.match(text)
        return (extract_answer(whole[0]) if whole else None) or ""
    stated = extract_answer(text)
    if stated and _EXCLAIMED.fullmatch(stated) and not marked_answer(without_thinking(text)):
        return f"It is {stated}"  # a sentence: its "!" need not be a factorial
    return stated or ("" if lacks_answer(text) else _last_line(text))


def _last_line(text: str) -> str:
    """The last line; a whole displayed formula if the text ends in one; the last line inside a final code fence."""
    answer = without_tags(without_thinking(text)).strip().removesuffix("\n```").rstrip()
    formula = _DISPLAYED.search(answer)
    return formula[0] if formula else answer.rpartition("\n")[2]


def without_tags(text: str) -> str:
    """Text for display: without thinking and answer tags, stripped."""
    return without_marks(text).strip()


def grade(problem: Problem, completion: str, *, truncated: bool = False) -> float:
    """The score of a completion: 1.0 is correct; less may be partial credit from a task's own verifier.

    The answer is what `extract_answer` finds, else the last line, unless the completion leaves its answer empty. It is
    correct if any plain reading of it (`readings`) equals the expected answer (`math_equality`) or passes the verifier.
    The rule is the same for every model.

    Args:
        truncated: the completion was cut off by a limit. Only a marked answer in its complete lines and tags counts.
    """
    answers = readings(_final_statement(completion, truncated))
    if not problem.entry:
        return float(equals_any(problem.answer, answers))
    return max(map(_verifier(problem), answers), default=0.0)


def _verifier(problem: Problem) -> Callable[[str], float]:
    import_reasoning_gym()
    verifier = judge("reasoning-gym")
    return lambda reading: verifier.ask([problem.task, problem.entry, reading]) or 0.0


def import_reasoning_gym() -> Any:
    """The `reasoning_gym` package. Raises ImportError that says how to install it."""
    return import_optional("reasoning_gym", "problems of generated tasks", install="reasoning-gym")


def answer_key(text: str, *, truncated: bool = False) -> str | None:
    """The key under which a vote counts a completion's answer, the same for equal numbers; None without an answer.

    Args:
        truncated: as for `grade`.
    """
    keys = [equality_key(reading) for reading in readings(_final_statement(text, truncated))]
    if keys and len(keys[0]) == 1:  # the letter of a choice, whatever follows it
        return keys[0]
    return next(filter(is_number, keys), keys[0] if keys else "") or None
