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
from decimal import Decimal, InvalidOperation
from typing import Any

from rbfast.grading.judge import judge
from rbfast.grading.math_equality import equal
from rbfast.utils.packages import need


@dataclass(frozen=True)
class Problem:
    """A question with its answer.

    `entry` is what the task's own verifier needs, empty where answers are compared; then `mathematical` says that they
    are mathematics, which may be equal and look different.
    """

    task: str
    question: str
    answer: str
    entry: dict[str, Any]
    mathematical: bool = False


_WHOLE = re.compile(r".*(?:\n|</answer>)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<answer>(.*?)(?=</answer>|<answer>|\Z)", re.DOTALL | re.IGNORECASE)
_MARKS = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)
_HASHES = re.compile(r"####\s*(\S.*)")
_PHRASE = re.compile(r"\banswer\b[^.\n:=]{0,60}?(?:\bis\b|:|=)[*_:\s]*(\S.*)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_QUANTITY = re.compile(rf"^\W*({_NUMBER.pattern})(?= [a-zA-Z]{{2,}})")
_LIST = re.compile(r"\[.*\]", re.DOTALL)
_QUOTED = re.compile(r"\*\*(.+?)\*\*|\"([^\"]+)\"|`([^`]+)`|\$([^$]+)\$|(?<!\w)'([^']+)'(?!\w)")


def extract_answer(text: str) -> str | None:
    """The final answer a completion states, or None where it marks none.

    Looked for in this order, the last one of its kind: `<answer>..</answer>` (closed or not), a balanced `\\boxed{}`,
    `#### ..`, `answer is ..` / `Answer: ..`.
    """
    tagged = [match.strip() for match in _TAG.findall(text)]
    # A student that repeats the instruction writes "between <answer> and </answer>": that "and" is no answer.
    for found in (*(tag for tag in reversed(tagged) if tag != "and"), _last_boxed(text)):
        if found:
            return found
    for pattern in (_HASHES, _PHRASE):
        if matches := pattern.findall(text):
            return matches[-1].strip()
    return None


def without_tags(text: str) -> str:
    """A part of a completion for people: no `<think>` or `<answer>`, opened or closed, and no white space around it."""
    return _MARKS.sub("", text).strip()


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position].strip()
    return None


def grade(problem: Problem, completion: str, *, truncated: bool = False) -> float:
    """The score of a completion, by the task's own verifier: 1.0 is correct, less may be partial credit.

    The answer is what `extract_answer` finds, else the last line. It counts when any plain reading of it is correct
    (see `readings`), so that nobody loses on form alone; the rule is the same whoever wrote the completion.

    Args:
        truncated: the limit cut the completion: what stands after its last whole line or tag is no answer, and only a
            marked answer counts.
    """
    if truncated:
        whole = _WHOLE.match(completion)
        statement = (extract_answer(whole[0]) if whole else None) or ""
    else:
        statement = extract_answer(completion) or completion.strip().rpartition("\n")[2]
    score = _scorer(problem)
    best = max(map(score, readings(statement, problem.answer)), default=0.0)
    return float(equal(problem.answer, statement)) if problem.mathematical and best < 1.0 else best


def readings(statement: str, answer: str) -> list[str]:
    """The ways a person would read one final statement, most literal first.

    As it stands; its first and its last line; what follows the last `=` or `:`; its last quoted, bold or maths part;
    its list, as written and with every item quoted; and, where the expected answer is a number, the number a line opens
    with or the only number in it, as written and without zeros after the point.
    """
    lines = [line for line in statement.splitlines() if line.strip()] or [statement]
    found = [statement, lines[0], lines[-1], re.split(r"[=:]\s", lines[-1])[-1], lines[-1].rpartition("=")[2]]
    found += [next(filter(None, match)) for match in _QUOTED.findall(statement)[-1:]]
    for written in _LIST.findall(statement):
        found += [written, str([item.strip(" '\"") for item in written[1:-1].split(",")])]
    if _number(answer) is not None:
        for line in (lines[0], lines[-1]):
            numbers = {number.rstrip(".,") for number in _NUMBER.findall(line)}
            for number in numbers if len(numbers) == 1 else _QUANTITY.findall(line):
                found += [number, _canonical(number)]
    stripped = [re.sub(r"^[\s*_`$\"]+|[\s*_`$\".]+$", "", reading) for reading in found]
    return [reading for reading in dict.fromkeys((*found, *stripped)) if reading]


def _scorer(problem: Problem) -> Callable[[str], float]:
    if not problem.entry:
        return _matches(problem.answer)
    reasoning_gym()
    verifier = judge("reasoning-gym")
    return lambda reading: verifier.ask([problem.task, problem.entry, reading]) or 0.0


def reasoning_gym() -> Any:
    """The package. Raises ImportError, with what to do, where it cannot be imported."""
    return need("reasoning_gym", "problems of generated tasks", install="reasoning-gym")


def _matches(answer: str) -> Callable[[str], float]:
    expected = _number(answer)

    def score(reading: str) -> float:
        if expected is not None and _number(reading) is not None:
            return float(_number(reading) == expected)
        return float(reading.strip().casefold() == answer.strip().casefold())

    return score


def answer_key(text: str) -> str | None:
    """What a vote counts: the final answer of a completion, equal for equal numbers; None where it has none."""
    statement = (extract_answer(text) or text.strip().rpartition("\n")[2]).strip(" \n*$.`")
    if _number(statement) is None:
        return re.sub(r"\s+", " ", statement).casefold() or None
    return _canonical(statement)


def _canonical(number: str) -> str:
    value = _number(number)
    return f"{value.normalize():f}" if value is not None and abs(value.adjusted()) < 30 else number


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text.strip().strip("$%").replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
