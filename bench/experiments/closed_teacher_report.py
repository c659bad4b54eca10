"""The section of docs/results.md that closed_teacher.py writes: its two tables, and what they were made with."""

import datetime
import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from publish import cpu

import rbfast
from rbfast.evaluation.statistics import paired_difference

METHODS = ("rbfast", "columns by gradient", "LoRA")
LOSSES = ("strategic", "tactical", "answer", "mean")


def best(entries: Iterable[Mapping[str, Any]], method: str) -> Mapping[str, Any]:
    """The entry of a method with the lowest mean loss."""
    return min((entry for entry in entries if entry["method"] == method), key=lambda entry: entry["mean"])


def averaged(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Merges the entries of several seeds: losses are averaged, `means` keeps each seed's, `seconds` adds up."""
    return [
        {
            **entries[0],
            **{column: mean(entry[column] for entry in entries) for column in LOSSES},
            "means": [entry["mean"] for entry in entries],
            "seconds": sum(entry["seconds"] for entry in entries),
        }
        for entries in zip(*found, strict=True)
    ]


def comparison_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A row per entry, with the lowest loss of each column in bold; then the best rate of each method, and by how much
    the methods differ there."""
    lowest = {column: min(entry[column] for entry in entries) for column in LOSSES}
    lines = [
        "| method | trained values | learning rate | strategic | tactical | answer | mean | each seed |",
        "| --- " * 8 + "|",
    ]
    for entry in entries:
        losses = [f"{entry[c]:.4f}" if entry[c] > lowest[c] else f"**{entry[c]:.4f}**" for c in LOSSES]
        rate = "" if entry["rate"] is None else f"{entry['rate']:g}"
        lines.append(
            f"| {entry['method']} | {entry['values']:,} | {rate} | {' | '.join(losses)} | {_each(entry['means'])} |"
        )
    ours = best(entries, "rbfast")
    notes = [_best_rate(entries, method) for method in METHODS]
    for method in METHODS[1:]:
        differences = [our - their for our, their in zip(ours["means"], best(entries, method)["means"], strict=True)]
        notes.append(f"rbfast minus {method} there: {mean(differences):+.4f} ({_each(differences, '+')}).")
    return "\n".join([*lines, "", "\n".join(notes)])


def _each(values: Iterable[float], sign: str = "") -> str:
    return ", ".join(f"{value:{sign}.4f}" for value in values)


def _best_rate(entries: Sequence[Mapping[str, Any]], method: str) -> str:
    found, rates = best(entries, method), [entry["rate"] for entry in entries if entry["method"] == method]
    edge = {max(rates): "the highest", min(rates): "the lowest"}.get(found["rate"])
    note = f" ({edge} tried: its best may lie beyond)" if edge else ""
    return f"Best of {method}: {found['mean']:.4f} at {found['rate']:g}{note}."


def accuracy_table(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], traces: Mapping[str, int]
) -> str:
    """A line per task and one for all: traces trained on, problems, shares solved, the paired gain."""
    solved: dict[str, tuple[list[bool], list[bool]]] = {}
    for old, new in zip(before, after, strict=True):
        first, second = solved.setdefault(old["task"], ([], []))
        first.append(old["correct"])
        second.append(new["correct"])
    lines = ["| task | traces | problems | before | after | gain (95% interval) |", "| --- " * 6 + "|"]
    lines += [_accuracy_row(task, traces.get(task, 0), *pair) for task, pair in solved.items()]
    everything = [record["correct"] for record in before], [record["correct"] for record in after]
    return "\n".join([*lines, _accuracy_row("**all**", sum(traces.values()), *everything)])


def _accuracy_row(name: str, traces: int, before: Sequence[bool], after: Sequence[bool]) -> str:
    gain = paired_difference(before, after)
    old, new = (100 * sum(solved) / len(solved) for solved in (before, after))
    interval = f"{100 * gain.mean:+.1f} ({100 * gain.low:+.1f} .. {100 * gain.high:+.1f})"
    return f"| {name} | {traces} | {len(before)} | {old:.1f}% | {new:.1f}% | {interval} |"


def section(
    recipe: Any,
    dtype: torch.dtype,
    fates: Mapping[str, Counter],
    entries: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any],
    fitting: Mapping[str, int],
    command: str,
) -> str:
    """The Markdown section of docs/results.md."""
    total = sum(fates.values(), Counter())
    became = "; ".join(f"{fate}: {count}" for fate, count in total.most_common())
    trained, seconds = measured["trained"], measured["seconds"] + sum(entry["seconds"] for entry in entries)
    cut = [sum(r["truncated"] for r in measured[when]) / len(measured[when]) for when in ("before", "after")]
    packages = ("torch", "transformers", "peft", "reasoning-gym")
    versions = [f"rbfast {rbfast.__version__}", *(f"{name} {importlib.metadata.version(name)}" for name in packages)]
    return f"""## A closed teacher: {recipe.teacher}

`{command}`

{total.total()} completions of {len(fates)} tasks ({became}). Student: {recipe.student}, {dtype}; seed {recipe.seed}.

**Held-out loss**, nats per token on {recipe.held_out} traces of at most {recipe.compare_tokens} tokens. All methods
train on the same {recipe.train} other traces: one epoch of batch {recipe.batch_size} in the same order, with the same
objective, schedule and trainer. rbfast takes random columns at density {recipe.density:g}, "columns by gradient" those
with the largest gradient; LoRA is PEFT's, rank {recipe.lora_rank} on all linears, with fp32 weights. Means over
{recipe.compare_seeds} seeds, which draw the traces, their order and the initialisation.

{comparison_table(entries)}

**Accuracy on fresh problems** of the same tasks, graded by their own verifiers; greedy, at most {recipe.max_new_tokens}
tokens ({100 * cut[0]:.0f}% of the completions were cut there before training, {100 * cut[1]:.0f}% after). Trained on
the shortest correct completion of each problem, if it fits {recipe.tokens} tokens: {trained["traces"]} traces,
{trained["steps"]} steps at {trained["rate"]:g} (the best rate above), {trained["values"]:,} trained values
({trained["percent"]:.3f}%).

{accuracy_table(measured["before"], measured["after"], fitting)}

{datetime.date.today()}; {cpu()}, {torch.get_num_threads()} threads; {seconds:.0f} s in all \
({trained["seconds"]:.0f} s of them the training for the second table); {", ".join(versions)}.
"""
