"""Load problems: from reasoning-gym's generators, known benchmarks, files and datasets on the hub.

```python
load_problems("leg_counting", n=50, seed=7)                 # a reasoning-gym generator
load_problems("math-500", n=None, seed=0)                   # all of a benchmark
load_problems("aime24", n=50, seed=0, fewer=True)           # 50, or all if it has fewer
load_problems("my/problems.jsonl", n=100, seed=0)           # fields `problem` and `answer`
load_problems("owner/name:test", n=100, seed=0)             # a dataset on the hub, and its split
load_problems("owner/name:main:test", n=100, seed=0)        # one of several configs
```
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rbfast.data import hub
from rbfast.data.answers import extract_answer
from rbfast.data.formats import AUTO, FormatOptions, question_of
from rbfast.data.readers import read_rows
from rbfast.data.row_files import KINDS, is_path_of_rows
from rbfast.data.trace import TraceError
from rbfast.grading import math_equality
from rbfast.grading.grade import Problem, import_reasoning_gym

_REASONING_GYM = "reasoning-gym:"


def load_problems(
    task: str,
    n: int | None,
    seed: int,
    *,
    fewer: bool = False,
    exclude: Collection[str] = (),
    options: FormatOptions = AUTO,
) -> list[Problem]:
    """`n` distinct problems of a task; the same arguments give the same problems on every machine.

    Args:
        task: a reasoning-gym generator at its default difficulty (`leg_counting`, `reasoning-gym:leg_counting`); a
            file (.jsonl, .json, .parquet, .arrow, .csv, .tsv) or a folder of them, in any format of docs/formats.md
            that has answers; one of `hub.BENCHMARKS`; or a dataset on the hub in such a format: `owner/name`,
            `owner/name:split` or `owner/name:config:split`. The split (default: test) may be a slice, `test[:100]`.
        n: the number of problems to draw; None for all of a file or dataset, in its order.
        fewer: take all problems if there are fewer than `n`.
        exclude: questions to leave out, such as those of the training data.
        options: how to read rows if their field names are not enough.

    Raises:
        ValueError: an unknown task, a malformed line, or fewer than `n` problems without `fewer`.
        ImportError: the package that generates or grades the problems is not installed.
    """
    if n is not None and n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    if is_path_of_rows(task):
        if not Path(task).exists():
            raise FileNotFoundError(f"{task}: expected a file of problems, found none")
        return _sample(_read_file(Path(task), options), task, n, seed, fewer, exclude)
    if Path(task).is_file():
        raise ValueError(f"{task}: expected a {KINDS}; convert it, with pandas for example: docs/formats.md")
    if task in hub.BENCHMARKS or "/" in task:
        return _sample(_read_hub(hub.BENCHMARKS.get(task, task), task, options), task, n, seed, fewer, exclude)
    return _generate_problems(task.removeprefix(_REASONING_GYM), n, seed, fewer, exclude)


def _generate_problems(task: str, n: int | None, seed: int, fewer: bool, exclude: Collection[str]) -> list[Problem]:
    gym = import_reasoning_gym()
    if task not in gym.factory.DATASETS:
        raise ValueError(
            f"task must be a {KINDS}, one of {', '.join(hub.BENCHMARKS)}, a dataset on the hub "
            f"(owner/name:config:split) or one of reasoning-gym's generators, got {task!r}"
        )
    if n is None:
        raise ValueError(f"{task} generates endless problems: set n (-n on the command line)")
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
    if len(problems) < n and not fewer:
        raise ValueError(
            f"{task} gave {len(problems)} distinct problems in {tries} draws, but {n} were requested: request fewer"
        )
    return list(problems.values())


def _sample(
    loaded: Sequence[Problem], source: str, n: int | None, seed: int, fewer: bool, exclude: Collection[str]
) -> list[Problem]:
    problems: dict[tuple[str, str | None], Problem] = {}
    for problem in loaded:
        if problem.question not in exclude:
            problems.setdefault((problem.question, problem.system), problem)
    if not all(math_equality.is_plain(problem.answer) for problem in problems.values()):
        math_equality.require_math_verify()  # fail now, not after hours of generation
    if n is None:
        return list(problems.values())
    if len(problems) < n and not fewer:
        raise ValueError(f"{source} holds {len(problems)} usable problems, but {n} were requested: request fewer")
    return random.Random(seed).sample(list(problems.values()), min(n, len(problems)))


def _read_file(path: Path, options: FormatOptions) -> list[Problem]:
    return [_problem_of(row, where, path.stem, options) for where, row in read_rows(path, split="test")]


def _read_hub(where: str, task: str, options: FormatOptions) -> list[Problem]:
    dataset = hub.parse_name(where, split="test")
    if dataset is None:
        raise ValueError(f"{task}: expected a {KINDS}, or a dataset on the hub ({hub.FORMS}); there is no such file")
    try:
        rows = hub.load_rows(dataset)
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from error
    return [_problem_of(row, f"{dataset}: row {number}", task, options) for number, row in enumerate(rows)]


def _problem_of(row: Any, where: str, task: str, options: FormatOptions) -> Problem:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    try:
        fields = question_of(row, options)
    except TraceError as error:
        raise ValueError(f"{where}: {error}") from None
    if (answer := fields.get("answer")) is None:
        raise ValueError(
            f"{where}: answer: expected text or a number, got none; name its field with --map answer=FIELD"
        )
    return Problem(task, fields["problem"], extract_answer(answer) or answer.strip(), {}, fields.get("system"))
