"""Evaluation results of a teacher, as traces: its correct completions, split at the tagged answer.

    traces, fates = traces_from_results("results/", teacher="claude-3.5-sonnet")
    write_traces("traces.jsonl", one_per_problem(traces))

reasoning-gym's evaluation writes one JSON file for each task. The fields that matter:

    {"name": "gcd", "category": "arithmetic", "results": [
        {"question": "...", "completions": [{"full_model_response": "... <answer>6</answer>", "score": 1.0}]}]}
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rbfast.data.trace import Trace

CORRECT, INCORRECT, TEXT_AFTER = "correct", "incorrect", "correct, text after the answer cut off"
UNTAGGED, UNREASONED, OTHER = "no <answer>...</answer>", "no reasoning", "tagged answer is not the scored one"


def traces_from_results(
    folder: str | Path, teacher: str, incorrect: bool = False
) -> tuple[list[Trace], dict[str, Counter]]:
    """The traces of the correct completions (score >= 1) in a folder of `*.json`, and the counts of outcomes per task.

    A completion's reasoning is the text before its last `<answer>`, its answer the text inside. A correct completion is
    dropped if it has no such answer, no reasoning, or tags another answer than the one that was scored. With
    `incorrect` the incorrect ones become traces too, as in a raw pool, if they have reasoning and an answer.

    Raises:
        ValueError: no files, or a file that does not hold results; the message names it and what is wrong.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise ValueError(f"{folder}: expected a folder of .json files, one for each task, found none")
    traces: list[Trace] = []
    fates: dict[str, Counter] = {}
    for path in paths:
        results = _read_results(path)
        counts = fates.setdefault(results["name"], Counter())
        for index, item in enumerate(results["results"]):
            for number, completion in enumerate(item["completions"]):
                fate, reasoning, answer = _split_completion(completion)
                counts[fate] += 1
                if fate in (CORRECT, TEXT_AFTER) or (incorrect and fate == INCORRECT and reasoning and answer):
                    traces.append(
                        Trace(
                            problem=item["question"],
                            reasoning=reasoning,
                            answer=answer,
                            domain=results["category"],
                            source=results["name"],
                            teacher=teacher,
                            id=f"{path.stem}:{index}:{number}",
                            verified=fate != INCORRECT,
                        )
                    )
    return traces, fates


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    kinds = {"name": str, "category": str, "results": list}
    for name, kind in kinds.items():
        if not isinstance(results, dict) or not isinstance(results.get(name), kind):
            raise ValueError(f"{path}: expected an object with {', '.join(kinds)}; {name} is not a {kind.__name__}")
    for index, item in enumerate(results["results"]):
        try:
            complete = isinstance(item["question"], str) and all(
                isinstance(c["full_model_response"], str) and isinstance(c["score"], int | float)
                for c in item["completions"]
            )
        except (KeyError, TypeError):
            complete = False
        if not complete:
            raise ValueError(
                f"{path}: result {index}: expected a question and completions, each with full_model_response (text) "
                "and score (a number)"
            )
    return results


def _split_completion(completion: Mapping[str, Any]) -> tuple[str, str, str]:
    """(fate, reasoning, answer) of a completion."""
    reasoning, _, tagged = completion["full_model_response"].rpartition("<answer>")
    answer, closed, after = tagged.partition("</answer>")
    reasoning, answer = reasoning.strip(), answer.strip() if closed else ""
    fate = TEXT_AFTER if after.strip() else CORRECT
    if completion["score"] < 1:
        fate = INCORRECT
    elif not answer:
        fate = UNTAGGED
    elif not reasoning:
        fate = UNREASONED
    elif answer != completion.get("model_answer", answer):
        fate = OTHER
    return fate, reasoning, answer


def one_per_problem(traces: Iterable[Trace]) -> list[Trace]:
    """The shortest trace of each problem, the first of equals, in the order of the problems."""
    shortest: dict[str, Trace] = {}
    for trace in traces:
        held = shortest.setdefault(trace.problem, trace)
        if len(trace.completion()) < len(held.completion()):
            shortest[trace.problem] = trace
    return list(shortest.values())
