"""Evaluate a model on problems: complete them, grade with each task's own verifier, summarize over items.

```python
problems = load_problems("leg_counting", n=50, seed=7)             # or math-500, gsm8k, a .jsonl file, a hub id
before = evaluate(model, tokenizer, problems)
...                                                                # train
after = evaluate(model, tokenizer, problems, keep="after.jsonl")   # interrupted? the same call resumes
gain = paired_difference([r.correct for r in before], [r.correct for r in after])

samples = evaluate(model, tokenizer, problems, samples=8, temperature=0.8)
summarize_samples(samples)                                         # pass@1, pass@k, majority@8, clustered errors

served = evaluate(Server("http://localhost:8000/v1", "my-model"), tokenizer, problems)
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rbfast.data.answers import extract_answer
from rbfast.evaluation.decoding import Decoding, Model
from rbfast.evaluation.statistics import clustered, pass_at_k, proportion
from rbfast.grading.grade import Problem, answer_key, grade
from rbfast.inference.decoding import Completion
from rbfast.inference.state import Event
from rbfast.inference.vote import majority
from rbfast.utils.files import Journal, check_output, lock_file
from rbfast.utils.records import check_shape


@dataclass(frozen=True)
class Result:
    """A problem, the model's completion, its score in [0, 1], and the interventions of a guide.

    `sample` is the index among the completions of one problem.
    """

    problem: Problem
    completion: Completion
    score: float
    sample: int = 0
    events: tuple[Event, ...] = ()

    @property
    def correct(self) -> bool:
        return self.score >= 1.0

    def to_dict(self) -> dict[str, Any]:
        """A record for `json.dumps`. It holds the whole completion, so that it can be graded again by other rules.

        `system` is present only if the problem has one, `events` only if a guide intervened.
        """
        record: dict[str, Any] = {
            "task": self.problem.task,
            "problem": self.problem.question,
            "answer": self.problem.answer,
            "sample": self.sample,
            "completion": self.completion.text,
            "extracted": extract_answer(self.completion.text),
            "score": self.score,
            "correct": self.correct,
            "tokens": self.completion.tokens,
            "truncated": self.completion.truncated,
        }
        if self.problem.system is not None:
            record["system"] = self.problem.system
        if self.events:
            record["events"] = [asdict(event) for event in self.events]
        return record


def evaluate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    problems: Sequence[Problem],
    *,
    batch_size: int = 32,
    keep: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **decoding: Any,
) -> list[Result]:
    """Graded completions of every problem, in the order of `problems`, with the samples of a problem side by side.

    Args:
        model: a local model, or a `Server` of one.
        tokenizer: the model's. None: a server's own chat template applies, or, with a guide, the prompt is plain text.
        batch_size: the most completions at a time.
        keep: a JSONL file to append the results of each finished problem to. Problems already in it are not run again;
            they are graded again if their answer has changed.
        progress: called with (distinct problems done, distinct problems in all) at the start and after each problem.
        decoding: the fields of `Decoding`.

    Raises:
        ValueError: a number is out of range; `keep` holds results with another label or other decoding settings, or a
            line that is not a result, or another process writes into it.
        OSError: `keep` cannot be written.
        ServerError: a server refused a problem, or did not answer after all retries.
    """
    settings = Decoding(**decoding)
    if keep is not None:
        check_output(keep)  # fail now, not after the first problem
    store = _ResultsFile(Path(keep), settings) if keep is not None else None
    done: dict[_Identity, list[Result]] = {}
    if store:
        with store.lock():  # not beyond the reading, which may replace the file
            done = store.read(problems)
    written = _write_missing(model, tokenizer, problems, done, settings, batch_size, progress)
    with store.lock() if store else nullcontext(), closing(written):
        for found in written:
            if store:
                store.add(found)
    return [result for problem in problems for result in done[_identity(problem)]]


def _write_missing(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    problems: Sequence[Problem],
    done: dict[_Identity, list[Result]],
    settings: Decoding,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Generator[list[Result]]:
    """Adds the results of the problems that `done` lacks to it, and yields those of each problem."""
    by_identity = {_identity(problem): problem for problem in problems}
    todo = [problem for identity, problem in by_identity.items() if identity not in done]

    def report() -> None:
        if progress is not None:
            progress(len(done), len(by_identity))

    report()
    for problem, completions in settings.write(model, tokenizer, todo, batch_size):
        results = [_graded(problem, c, sample, events) for sample, (c, events) in enumerate(completions)]
        done[_identity(problem)] = results
        yield results
        report()


def _graded(problem: Problem, completion: Completion, sample: int, events: tuple[Event, ...]) -> Result:
    score = grade(problem, completion.text, truncated=completion.truncated)
    return Result(problem, completion, score, sample, events)


_Identity = tuple[str, str, str | None]


def _identity(problem: Problem) -> _Identity:
    return problem.task, problem.question, problem.system


def _identity_of(record: dict[str, Any]) -> _Identity:
    return record["task"], record["problem"], record.get("system")


_RECORD: dict[str, Any] = {"task": str, "problem": str, "completion": str, "tokens": int, "truncated": bool}
_RECORD |= {"score": (int, float), "sample": int}


class _ResultsFile:
    """A results file that grows by one problem at a time."""

    def __init__(self, path: Path, decoding: Decoding) -> None:
        self.journal, self.decoding = Journal(path), decoding
        settings = asdict(decoding)
        if decoding.instruction is None:
            del settings["instruction"]  # older files lack this setting
        self.settings = dict(json.loads(json.dumps(settings)))

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other processes from running the same problems within the block."""
        return lock_file(self.journal.path)

    def read(self, problems: Sequence[Problem]) -> dict[_Identity, list[Result]]:
        """The results of the problems whose samples are all in the file, graded against their current answers.

        Removes problems that a killed process left incomplete from the file, and updates scores of changed answers.
        """
        known = {_identity(problem): problem for problem in problems}
        found: dict[_Identity, list[Result]] = {}
        records, regraded = [], False
        for where, record in self.journal.read():
            try:
                check_shape(record, _RECORD, where)
                identity, sample = _identity_of(record), record["sample"]
                events = tuple(Event(**event) for event in record.get("events", ()))
                completion = Completion(record["completion"], record["tokens"], record["truncated"])
            except (TypeError, KeyError, AttributeError, ValueError) as error:
                raise ValueError(f"{where}: expected a result of an evaluation: {error!r}; name another file") from None
            if (was := record.get("decoding")) != self.settings:
                raise ValueError(
                    f"{where}: holds results with another model or decoding: {_differences(was, self.settings)}; "
                    "name another file"
                )
            if (problem := known.get(identity)) is not None:
                result = Result(problem, completion, record["score"], sample, events)
                if record.get("answer") != problem.answer:
                    result, regraded = _graded(problem, completion, sample, events), True
                    record |= result.to_dict()
                found.setdefault(identity, []).append(result)
            records.append(record)
        whole = {key: results for key, results in found.items() if len(results) == self.decoding.samples}
        partial = found.keys() - whole.keys()
        if partial or regraded:
            self.journal.rewrite(r for r in records if _identity_of(r) not in partial)
        return whole

    def add(self, results: Sequence[Result]) -> None:
        self.journal.append(result.to_dict() | {"decoding": self.settings} for result in results)


def summarize(results: Sequence[Result]) -> dict[str, float]:
    """`n`, `accuracy` with its 95% interval (`ci_low`, `ci_high`), the share `truncated`, the mean number of `tokens`.

    Raises ValueError if there are no results.
    """
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


def correct_by_item(results: Sequence[Result]) -> list[list[float]]:
    """1.0 or 0.0 for each sample of each problem, in order: the input of `clustered` and `paired_bootstrap`."""
    return [[float(result.correct) for result in item] for item in by_problem(results)]


def by_problem(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each problem, in the order in which the problems come first."""
    items: dict[_Identity, list[Result]] = {}
    for result in results:
        items.setdefault(_identity(result.problem), []).append(result)
    return list(items.values())


def summarize_samples(results: Sequence[Result]) -> dict[str, float]:
    """Summarize several samples per problem, the same number for each problem.

    Returns `items`, `samples`, `pass@1` with its item-clustered standard error `pass@1_se`, unbiased `pass@k` for the
    powers of two up to `samples` and for `samples`, `majority@n`, the share `truncated`, and the mean number of
    `tokens` of a completion.

    Raises:
        ValueError: no results, or problems with different numbers of samples.
    """
    items = by_problem(results)
    counts = sorted({len(item) for item in items})
    if len(counts) != 1:
        raise ValueError(f"every problem needs the same number of samples, got {counts or 'no results'}")
    samples, n = counts[0], len(results)
    mean, error = clustered(correct_by_item(results))
    summary: dict[str, float] = {"items": len(items), "samples": samples, "pass@1": mean, "pass@1_se": error}
    for k in sorted({*(2**power for power in range(1, samples.bit_length())), samples} - {1}):
        chances = [pass_at_k(samples, sum(result.correct for result in item), k) for item in items]
        summary[f"pass@{k}"] = sum(chances) / len(items)
    summary[f"majority@{samples}"] = sum(map(majority_correct, items)) / len(items)
    summary["truncated"] = sum(result.completion.truncated for result in results) / n
    summary["tokens"] = sum(result.completion.tokens for result in results) / n
    return summary


def majority_correct(item: Sequence[Result]) -> float:
    """1.0 if the samples' most frequent answer is correct, by the grade of the first sample that gave it, else 0.0."""
    keys = [answer_key(result.completion.text, truncated=result.completion.truncated) for result in item]
    winner = majority(keys).answer
    return float(next((r.correct for r, key in zip(item, keys, strict=True) if key == winner and winner), False))


def _differences(saved: object, now: dict[str, Any]) -> str:
    was = saved if isinstance(saved, dict) else {}
    names = [name for name in now | was if was.get(name) != now.get(name)]
    return ", ".join(f"its {name} is {was.get(name)!r}, now {now.get(name)!r}" for name in names)
