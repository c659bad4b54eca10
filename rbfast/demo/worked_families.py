"""Worked traces for the demo: code solves reasoning-gym problems step by step, first a plan, then explicit steps.

```python
traces, problems = split("leg_counting", train=200, held_out=40, seed=0)     # no question is in both
```

Every family uses its generator's default difficulty. The steps write down each intermediate value, so that a small
model only has to copy a value, or to do one short operation on values that are already in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from rbfast.data.trace import Trace
from rbfast.grading.grade import Problem, grade
from rbfast.grading.tasks import load_problems


@dataclass(frozen=True)
class Worked:
    """A worked solution: the method in a sentence or two, the steps, and the answer."""

    plan: str
    steps: str
    answer: str


def make_traces(family: str, n: int, seed: int, *, exclude: Collection[str] = ()) -> list[Trace]:
    """`n` worked traces of distinct problems, each verified by the task's own verifier.

    Problems whose worked answer the verifier rejects are left out (some answer keys are wrong; evaluation keeps them).

    Args:
        exclude: questions never to train on, such as the held-out ones.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    # Drawing more from one seed extends the same sequence of problems, so replacements are deterministic.
    wanted = n
    while True:
        traces = [_trace(family, problem) for problem in load_problems(family, wanted, seed, exclude=exclude)]
        verified = [trace for trace in traces if trace is not None]
        if len(verified) >= n:
            return verified[:n]
        wanted += n - len(verified)


def split(family: str, *, train: int, held_out: int, seed: int) -> tuple[list[Trace], list[Problem]]:
    """Traces to train on and problems to evaluate on, from different seeds; no question is in both."""
    problems = load_problems(family, held_out, seed=2 * seed + 1)
    return make_traces(family, train, seed=2 * seed, exclude={p.question for p in problems}), problems


def _trace(family: str, problem: Problem) -> Trace | None:
    domain, work = FAMILIES[family]
    worked = work(problem.entry)
    trace = Trace(
        problem=problem.question,
        reasoning=worked.steps,
        answer=worked.answer,
        plan=worked.plan,
        domain=domain,
        source=f"reasoning-gym:{family}",
        teacher="worked by code",
        verified=True,
    )
    return trace if grade(problem, trace.completion()) >= 1.0 else None


def _word_sequence_reversal(entry: dict[str, Any]) -> Worked:
    words = entry["metadata"]["words"]
    forward = "\n".join(f"{number} {word}" for number, word in enumerate(words, start=1))
    backward = "\n".join(f"{number} {words[number - 1]}" for number in range(len(words), 0, -1))
    plan = "Number the words, then list them from the last number down to 1."
    return Worked(plan, f"{forward}\nFrom {len(words)} down to 1:\n{backward}", ", ".join(reversed(words)))


def _running_total(terms: list[tuple[str, int]], total: int) -> tuple[list[str], int]:
    """One line per term: `+47: 38+40=78, +7=85`. A step changes one digit place, as much as a small model can do."""
    lines = []
    for sign, term in terms:
        steps, total = _by_places(total, sign, term)
        lines.append(f"{sign}{term}: {steps}")
    return lines, total


def _by_places(total: int, sign: str, term: int) -> tuple[str, int]:
    """`total + term` or `total - term`, the largest place of `term` first: (the steps, the result).

    A place with the digit 0 gets a step too: without it, students made one up.
    """
    digits = str(term)
    steps: list[str] = []
    for place, digit in enumerate(digits, start=1):
        part = int(digit) * 10 ** (len(digits) - place)
        before, total = total, total + part if sign == "+" else total - part
        steps.append(f"{'' if steps else before}{sign}{part}={total}")
    return ", ".join(steps), total


def _chain_sum(entry: dict[str, Any]) -> Worked:
    first, *rest = entry["metadata"]["expression"].split()
    lines, total = _running_total(
        [(sign, int(term)) for sign, term in zip(rest[::2], rest[1::2], strict=True)], int(first)
    )
    plan = "Keep a running total: term by term, place by place."
    return Worked(plan, "\n".join([*lines, "All terms are used."]), str(total))


def _leg_counting(entry: dict[str, Any]) -> Worked:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, lines = 0, []
    for animal, count in entry["metadata"]["animals"].items():
        legs = ANIMALS[animal]
        steps, total = _by_places(total, "+", count * legs)
        lines.append(f"{count} {animal} x{legs}={count * legs}: {steps}")
    plan = "Multiply each number by the legs of the animal. Keep a running total, place by place."
    return Worked(plan, "\n".join([*lines, "All animals are counted."]), str(total))


def _simple_geometry(entry: dict[str, Any]) -> Worked:
    sides, angles = entry["metadata"]["n_sides"], [int(angle) for angle in entry["metadata"]["known_angles"]]
    whole = 180 * (sides - 2)
    lines, rest = _running_total([("-", angle) for angle in angles], whole)
    plan = f"The angles of {sides} sides add up to ({sides}-2)x180. Subtract the known ones, place by place."
    return Worked(
        plan, "\n".join([f"{sides}-2={sides - 2}, {sides - 2}x180={whole}", *lines, "All angles are used."]), str(rest)
    )


_AIW_KINDS = {"siblings": "sisters", "friends": "female friends", "colleagues": "female colleagues"}


def _aiw(entry: dict[str, Any]) -> Worked:
    question = entry["question"]
    name, kind = question.split()[0], _AIW_KINDS[entry["metadata"]["task_type"]]
    counts = [int(count) for count in re.findall(rf"(\d+) {kind}", question)]
    total = counts[0] + 1
    steps = f"{name} has {counts[0]} {kind}.\n{name} is a woman too, so she is one more: {counts[0]}+1={total}"
    if len(counts) == 2:
        # Matilda is in both circles. The generator's key ignores the second circle, so it rarely agrees with this.
        total = counts[0] + counts[1] - 1
        steps = (
            f"In the circle of {name}, Matilda has {counts[0]} {kind}.\n"
            f"In the other circle she has {counts[1]}-1={counts[1] - 1}.\n{counts[0]}+{counts[1] - 1}={total}"
        )
    return Worked(f"Count the {kind}, and do not forget {name} herself.", steps, str(total))


# By the name of the reasoning-gym generator: the domain, and the code that solves a problem from the generator's entry.
FAMILIES: dict[str, tuple[str, Callable[[dict[str, Any]], Worked]]] = {
    "aiw": ("logic", _aiw),
    "word_sequence_reversal": ("algorithmic", _word_sequence_reversal),
    "chain_sum": ("arithmetic", _chain_sum),
    "simple_geometry": ("geometry", _simple_geometry),
    "leg_counting": ("arithmetic", _leg_counting),
}
