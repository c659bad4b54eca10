"""Traces that a run does not train on: their loss says whether it still learns, or only remembers.

trained, measured = part(traces, 0.05, seed=0)      # or traces of a file of their own in place of 0.05
"""

import random
import warnings
from collections.abc import Sequence

from rbfast.data.trace import Trace


def part(
    traces: Sequence[Trace], held_out: Sequence[Trace] | float | None, seed: int
) -> tuple[Sequence[Trace], Sequence[Trace]]:
    """The traces to train on, and those to measure. A number is the share of the problems whose traces are measured:
    all traces of one problem are on one side. Warns of traces to measure whose problem is trained on.

    Raises:
        ValueError: a share that leaves no trace on one side, or an empty list.
    """
    if held_out is None:
        return traces, []
    if isinstance(held_out, int | float):
        return _share(traces, held_out, seed)
    if not held_out:
        raise ValueError("held_out: expected traces to measure the loss on, got none")
    trained = {_key(trace) for trace in traces}
    if known := sum(_key(trace) in trained for trace in held_out):
        warnings.warn(
            f"{known} of {len(held_out)} held-out traces have a problem that is trained on: their loss flatters",
            stacklevel=3,
        )
    return traces, held_out


def _share(traces: Sequence[Trace], share: float, seed: int) -> tuple[list[Trace], list[Trace]]:
    problems = list(dict.fromkeys(map(_key, traces)))
    if not 0 < share < 1 or len(problems) < 2:
        raise ValueError(
            f"held_out: expected a share of the problems, above 0 and below 1, and at least 2 problems; got {share!r} "
            f"of {len(problems)}"
        )
    count = min(max(1, round(share * len(problems))), len(problems) - 1)
    measured = set(random.Random(seed).sample(problems, count))
    return [trace for trace in traces if _key(trace) not in measured], [t for t in traces if _key(t) in measured]


def _key(trace: Trace) -> str:
    return " ".join(trace.problem.split())
