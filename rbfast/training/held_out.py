"""Held-out traces, which a run does not train on: their loss shows overfitting.

trained, eval_traces = split_held_out(traces, 0.05, seed=0)      # or a list of held-out traces instead of 0.05
"""

import random
import warnings
from collections.abc import Sequence
from typing import Any

from rbfast.data.trace import Trace
from rbfast.training.examples import check_items


def split_held_out(
    traces: Sequence[Trace], held_out: Sequence[Trace] | float | None, seed: int
) -> tuple[Sequence[Trace], Sequence[Trace]]:
    """The traces to train on, and those to measure. If `held_out` is a number, it is the share of problems to measure:
    all traces of a problem are on one side. Warns if the problem of a trace to measure is trained on.

    Raises:
        ValueError: a share that leaves no trace on one side, or an empty list.
        TypeError: a list of something other than Trace, or a file name.
    """
    if held_out is None:
        return traces, []
    if isinstance(held_out, int | float):
        return _split_by_share(traces, held_out, seed)
    check_items(held_out, Trace, "read_traces")
    if not held_out:
        raise ValueError("held_out: expected traces to measure the loss on, got none")
    trained = {_problem_of(trace) for trace in traces}
    if known := sum(_problem_of(trace) in trained for trace in held_out):
        warnings.warn(
            f"{known} of {len(held_out)} held-out traces have a problem that is trained on: their loss is too low",
            stacklevel=3,
        )
    return traces, held_out


def _split_by_share(traces: Sequence[Trace], share: float, seed: int) -> tuple[list[Trace], list[Trace]]:
    problems = list(dict.fromkeys(map(_problem_of, traces)))
    if not 0 < share < 1 or len(problems) < 2:
        raise ValueError(
            f"held_out: expected a share of the problems, above 0 and below 1, and at least 2 problems; got {share!r} "
            f"of {len(problems)}"
        )
    count = min(max(1, round(share * len(problems))), len(problems) - 1)
    held_out = set(random.Random(seed).sample(problems, count))
    trained = [trace for trace in traces if _problem_of(trace) not in held_out]
    return trained, [trace for trace in traces if _problem_of(trace) in held_out]


def _problem_of(trace: Trace) -> str:
    return " ".join(trace.problem.split())


def evaluation_arguments(every: int, keep_best: bool, from_start: bool) -> dict[str, Any]:
    """TrainingArguments that measure the held-out loss every `every` steps and at the end. from_start: before the first
    step too. keep_best: end with the checkpoint of lowest loss."""
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False)
    steps = dict(eval_strategy="steps", eval_steps=every, eval_on_start=from_start)
    return steps | (best if keep_best else {})


def strip_timings(entry: dict[str, float]) -> dict[str, float]:
    """An entry of a Trainer's log without evaluation timings, so that the same run gives the same log."""
    return {name: value for name, value in entry.items() if not name.startswith("eval_") or "loss" in name}
