"""Grading: the final answer of a completion, and whether it is the expected one.

```python
extract_answer(r"thus \\boxed{\\frac{1}{2}}")                      # "\\frac{1}{2}"
grade(problem, completion.text, truncated=completion.truncated)    # 1.0 is correct
```
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rbfast.grading.judge import judge
from rbfast.grading.math_equality import equals_any, is_number, key
from rbfast.grading.notation import closing
from rbfast.grading.statements import readings
from rbfast.utils.packages import need


@dataclass(frozen=True)
class Problem:
    """A question with its answer. `entry` is what the task's own verifier needs, empty if answers are compared."""

    task: str
    question: str
    answer: str
    entry: dict[str, Any]


_WHOLE = re.compile(r".*(?:\n|</answer>)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<answer>(.*?)(?=</answer>|<answer>|\Z)", re.DOTALL | re.IGNORECASE)
# What ends the thinking of a completion, whichever template it was written in.
_THOUGHT = re.compile(
    r".*(?:</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]|<\|/think\|>|<channel\|>"
    r"|<\|channel\|>final<\|message\|>)",
    re.DOTALL,
)
_MARKS = re.compile(
    r"</?(?:think|answer|seed:think)>|\[/?THINK\]|<\|channel\|>(?:analysis|final)<\|message\|>|<\|end\|>"
    r"|<\|start\|>assistant|<\|channel>thought|<channel\|>",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####\s*(\S.*)")
_PHRASE = re.compile(r"\banswer\b[^.\n:=]{0,60}?(?:\bis\b|:|=)[*_:\s]*(\S.*)", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{|\d)")
# What may stand between two boxes of one answer: `\boxed{2}$ and $x = \boxed{3}`.
_JOINT = re.compile(
    r"(?:[\s$,;&.*]|\\[()\[\],;!]|\\(?:quad|qquad)|\\text\{\s*(?:,\s*)?(?:and|or)?\s*\}|\b(?:and|or)\b"
    r"|[a-zA-Z](?:_\{?\w\}?)?\s*=)*"
)


def extract_answer(text: str) -> str | None:
    """The final answer a completion states, or None if it marks none.

    Looked for in this order, the last one of its kind: `<answer>..</answer>` (closed or not), a balanced `\\boxed{}`
    (or several that are listed: `\\boxed{2}` and `\\boxed{3}`), `#### ..`, `answer is ..` / `Answer: ..`. Of a
    completion that closes its thinking, what follows it counts alone.
    """
    text = without_thinking(text)
    tagged = [match.strip() for match in _TAG.findall(text)]
    # A student that repeats the instruction writes "between <answer> and </answer>": that "and" is no answer.
    if answer := next((tag for tag in reversed(tagged) if tag and tag != "and"), None):
        return _last_boxed(answer) or answer
    if answer := _last_boxed(text):
        return answer
    for pattern in (_HASHES, _PHRASE):
        if matches := pattern.findall(text):
            return matches[-1].strip()
    return None


def without_thinking(text: str) -> str:
    """What a completion says after its thinking; all of it if it closes none, or says nothing after it."""
    closed = _THOUGHT.match(text)
    said = text[closed.end() :] if closed else ""
    return said if said.strip() else text


def _last_line(text: str) -> str:
    return without_thinking(text).strip().rpartition("\n")[2]


def without_tags(text: str) -> str:
    """A part of a completion for people: no marks of thinking or answer, and no white space around it."""
    return _MARKS.sub("", text).strip()


def _last_boxed(text: str) -> str | None:
    """What the last box holds that closes; of boxes that are listed, all."""
    boxes = [(match.start(), *_content(text, match.end())) for match in _BOX.finditer(text)]
    closed = [(start, content.strip(), end) for start, content, end in boxes if content.strip()]
    if not closed:
        return None
    first, content, _ = closed[-1]
    listed = [content]
    for start, content, end in reversed(closed[:-1]):
        if start >= first or end > first:
            continue  # a box around the others
        if not _JOINT.fullmatch(text[end:first]):
            break
        first = start
        listed.insert(0, content)
    return ", ".join(dict.fromkeys(listed))


def _content(text: str, start: int) -> tuple[str, int]:
    if text[start] != "{":
        return text[start], start + 1
    end = closing(text, start)
    return ("", start) if end is None else (text[start + 1 : end], end + 1)


def grade(problem: Problem, completion: str, *, truncated: bool = False) -> float:
    """The score of a completion: 1.0 is correct, less may be partial credit of a task's own verifier.

    The answer is what `extract_answer` finds, else the last line. It counts if any plain reading of it (`readings`) is
    equal to the expected one (`math_equality`), or passes the verifier; the rule is the same for every author.

    Args:
        truncated: the limit cut the completion: what stands after its last whole line or tag is no answer, and only a
            marked answer counts.
    """
    if truncated:
        whole = _WHOLE.match(completion)
        statement = (extract_answer(whole[0]) if whole else None) or ""
    else:
        statement = extract_answer(completion) or _last_line(completion)
    found = readings(statement)
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
    return need("reasoning_gym", "problems of generated tasks", install="reasoning-gym")


def answer_key(text: str) -> str | None:
    """What a vote counts: the final answer of a completion, the same text for equal numbers; None if it has none."""
    statement = extract_answer(text) or _last_line(text)
    keys = [key(reading) for reading in readings(statement)]
    return next(filter(is_number, keys), keys[0] if keys else "") or None
