"""Accuracy before and after: problems, greedy completions, each task's own verifier, paired statistics.

```python
problems = load_problems("leg_counting", n=50, seed=7)             # any reasoning-gym generator, or a .jsonl file
before = evaluate(model, tokenizer, problems)
...                                                                # train
after = evaluate(model, tokenizer, problems)
gain = paired_difference([r.correct for r in before], [r.correct for r in after])
```
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.generate import Completion, complete
from rbfast.trace import format_prompt

_REASONING_GYM = "reasoning-gym:"
_Z95 = 1.959963984540054


# ---------------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """A question with its answer; `entry` is what the task's own verifier needs, empty where answers are compared."""

    task: str
    question: str
    answer: str
    entry: dict[str, Any]


def load_problems(task: str, n: int, seed: int, *, exclude: Collection[str] = ()) -> list[Problem]:
    """`n` distinct problems of a task; the same arguments give the same problems on every machine.

    Args:
        task: a reasoning-gym generator at its default difficulty (`leg_counting`, `reasoning-gym:leg_counting`), or a
            `.jsonl` file with the fields `problem` (or `question`) and `answer`, from which `n` lines are drawn.
        exclude: questions to leave out, such as those trained on.

    Raises:
        ValueError: an unknown task, a malformed line, or fewer than `n` problems to be had.
    """
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    if task.endswith(".jsonl"):
        return _sample_file(Path(task), n, seed, exclude)
    return _generate_problems(task.removeprefix(_REASONING_GYM), n, seed, exclude)


def _generate_problems(task: str, n: int, seed: int, exclude: Collection[str]) -> list[Problem]:
    gym = _reasoning_gym()
    if task not in gym.factory.DATASETS:
        raise ValueError(f"task must be a .jsonl file or one of reasoning-gym's generators, got {task!r}")
    # The generators seed item i with seed + i, so neighbouring seeds would share items: spread them first.
    spread = int.from_bytes(hashlib.blake2b(f"{task}:{seed}".encode(), digest_size=4).digest(), "big") >> 1
    tries = 4 * n + 100
    dataset = gym.create_dataset(task, seed=spread, size=tries)
    problems: dict[str, Problem] = {}
    for index in range(tries):
        if len(problems) == n:
            break
        entry = dataset[index]
        question = entry["question"]
        if question not in exclude and question not in problems:
            problems[question] = Problem(task, question, str(entry["answer"]), entry)
    if len(problems) < n:
        raise ValueError(
            f"{task} gave {len(problems)} distinct problems in {tries} draws, {n} were asked for: ask for fewer"
        )
    return list(problems.values())


def _sample_file(path: Path, n: int, seed: int, exclude: Collection[str]) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            problem = _read_problem(line, path, number)
            if problem.question not in exclude:
                problems.setdefault(problem.question, problem)
    if len(problems) < n:
        raise ValueError(f"{path} holds {len(problems)} usable problems, {n} were asked for: ask for fewer")
    return random.Random(seed).sample(list(problems.values()), n)


def _read_problem(line: str, path: Path, number: int) -> Problem:
    where = f"{path}:{number}"
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected one JSON object per line, {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    question = fields.get("problem", fields.get("question"))
    if not isinstance(question, str):
        raise ValueError(f"{where}: problem: expected text (in `problem` or `question`), got {question!r}")
    answer = fields.get("answer")
    if not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: answer: expected text or a number, got {answer!r}")
    text = str(answer)
    return Problem(path.stem, question, extract_answer(text) or text.strip(), {})


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ImportError(
            "problems of generated tasks need the package reasoning-gym: pip install reasoning-gym"
        ) from error
    return reasoning_gym


# ------------------------------------------------------------------------------------------------------------ grading

_WHOLE = re.compile(r".*(?:\n|</answer>)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<answer>(.*?)(?=</answer>|<answer>|\Z)", re.DOTALL | re.IGNORECASE)
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
    return max((_score(score, reading) for reading in readings(statement, problem.answer)), default=0.0)


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


# What a verifier may raise on text that is no answer; anything else is a defect and must be seen.
_UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError, RecursionError)


def _score(score: Callable[[str], float], reading: str) -> float:
    try:
        return float(score(reading))
    except _UNREADABLE:
        return 0.0


def _scorer(problem: Problem) -> Callable[[str], float]:
    if not problem.entry:
        return _matches(problem.answer)
    verifier = _verifier(problem.task)
    return lambda reading: verifier(reading, problem.entry)


@functools.cache
def _verifier(task: str) -> Callable[..., float]:
    return _reasoning_gym().get_score_answer_fn(task)


def _matches(answer: str) -> Callable[[str], float]:
    expected = _number(answer)

    def score(reading: str) -> float:
        if expected is not None and _number(reading) is not None:
            return float(_number(reading) == expected)
        return float(reading.strip().casefold() == answer.strip().casefold())

    return score


def _canonical(number: str) -> str:
    value = _number(number)
    return f"{value.normalize():f}" if value is not None and abs(value.adjusted()) < 30 else number


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text.strip().strip("$%").replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


# --------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Result:
    """A problem, what the model wrote, and its score."""

    problem: Problem
    completion: Completion
    score: float

    @property
    def correct(self) -> bool:
        return self.score >= 1.0

    def to_dict(self) -> dict[str, Any]:
        """A record for `json.dumps`: the whole completion is kept, so that any other rule can grade it later."""
        return {
            "task": self.problem.task,
            "problem": self.problem.question,
            "answer": self.problem.answer,
            "completion": self.completion.text,
            "extracted": extract_answer(self.completion.text),
            "score": self.score,
            "correct": self.correct,
            "tokens": self.completion.tokens,
            "truncated": self.completion.truncated,
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Greedy completions of every problem, graded, in the order of `problems`.

    Args:
        progress: called with (problems done, problems in all) after each batch.
    """
    prompts = [format_prompt(problem.question, tokenizer) for problem in problems]
    completions = complete(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    return [Result(p, c, grade(p, c.text, truncated=c.truncated)) for p, c in zip(problems, completions, strict=True)]


def summarize(results: Sequence[Result]) -> dict[str, float]:
    """`n`, `accuracy` with its 95% interval (`ci_low`, `ci_high`), the share `truncated`, mean `tokens` written."""
    if not results:
        raise ValueError("summarize needs at least one result, got none")
    interval = proportion([result.correct for result in results])
    return {
        "n": len(results),
        "accuracy": interval.mean,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "truncated": sum(result.completion.truncated for result in results) / len(results),
        "tokens": sum(result.completion.tokens for result in results) / len(results),
    }


# --------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval."""

    mean: float
    low: float
    high: float


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Interval:
    """The mean gain over the same problems, in [-1, 1], with a 95% interval.

    The interval is Agresti and Min's for matched proportions (Statistics in Medicine 24, 2005): two pseudo-problems,
    half a loss, half a win and one unchanged, join the data before the normal approximation. So it has a width even
    where every difference is the same, and says next to nothing at n = 1. The mean itself is the plain one.

    Raises:
        ValueError: no problems, unequal lengths, or scores outside [0, 1].
    """
    if not before or len(before) != len(after):
        raise ValueError(f"before and after must score the same problems, got {len(before)} and {len(after)}")
    if not all(0.0 <= score <= 1.0 for score in (*before, *after)):
        raise ValueError("scores must lie in [0, 1]")
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    n = len(differences) + 2
    centre = sum(differences) / n
    spread = _Z95 * math.sqrt(((sum(d * d for d in differences) + 1) / n - centre**2) / n)
    return Interval(sum(differences) / len(differences), max(-1.0, centre - spread), min(1.0, centre + spread))


def proportion(outcomes: Sequence[float]) -> Interval:
    """The share of successes in 0/1 outcomes with Wilson's 95% score interval."""
    if not outcomes:
        raise ValueError("a proportion needs at least one outcome, got none")
    n, share = len(outcomes), sum(outcomes) / len(outcomes)
    weight = _Z95**2 / n
    centre = (share + weight / 2) / (1 + weight)
    spread = _Z95 * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    # At no success, and at nothing but successes, the bound is the share itself but for rounding.
    low = centre - spread if share > 0 else 0.0
    return Interval(share, low, centre + spread if share < 1 else 1.0)
