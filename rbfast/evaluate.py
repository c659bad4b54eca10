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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.generate import Completion, complete
from rbfast.grading import Problem, extract_answer, grade, readings
from rbfast.statistics import Interval, paired_difference, proportion
from rbfast.tasks import load_problems
from rbfast.trace import format_prompt

__all__ = [
    "Interval",
    "Problem",
    "Result",
    "evaluate",
    "extract_answer",
    "grade",
    "load_problems",
    "paired_difference",
    "proportion",
    "readings",
    "summarize",
]


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
