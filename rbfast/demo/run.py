"""The demo: distill worked traces of several task families into a small student, with accuracy before and after.

Nothing is downloaded from the hub: the student installs from PyPI; problems and worked solutions are generated.
Held-out problems come from other seeds than the traces and share no question with them. The same seed gives the same
numbers.
"""

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rbfast.demo.worked_families import FAMILIES, split
from rbfast.evaluation.evaluate import Result, evaluate
from rbfast.evaluation.statistics import paired_difference
from rbfast.grading.grade import Problem
from rbfast.models.student import SMOLLM2, fast_dtype, load_student
from rbfast.report.plots import draw_accuracy, draw_losses, draw_placement, save
from rbfast.report.run_report import write_report
from rbfast.training.distill import DistillConfig, distill
from rbfast.utils.files import write_text
from rbfast.utils.progress import counting

TRAIN, HELD_OUT = 140, 48
MAX_NEW_TOKENS = 320
CONFIG = DistillConfig(batch_size=4, save_steps=30)


def run_demo(out: str | Path, device: str = "cpu", seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Run the demo into the folder `out`, and return the content of `out/summary.json`.

    The seed determines traces, problems, columns, their initial values and the order of training. An interrupted demo
    resumes: finished evaluations are read back, and training continues from its checkpoint.
    """
    out, start, config = Path(out), time.monotonic(), replace(CONFIG, seed=seed)
    model, tokenizer = load_student(SMOLLM2, fast_dtype(device))
    model = model.to(torch.device(device))  # type: ignore[arg-type]
    splits = {name: split(name, train=TRAIN, held_out=HELD_OUT, seed=seed) for name in FAMILIES}
    traces = [trace for family, _ in splits.values() for trace in family]
    problems = [problem for _, family in splits.values() for problem in family]

    def measure(name: str) -> list[dict[str, Any]]:
        with counting(f"evaluating {name} training", quiet) as progress:
            return _load_or_measure(
                out / f"{name}.jsonl",
                problems,
                lambda: evaluate(
                    model, tokenizer, problems, max_new_tokens=MAX_NEW_TOKENS, batch_size=60, progress=progress
                ),
            )

    before = measure("before")
    run = distill(model, tokenizer, traces, out, config, quiet=quiet)
    after = measure("after")
    families = {name: _compare(_of_family(name, before), _of_family(name, after)) for name in FAMILIES}
    summary = {
        "trainable_percent": run.adapter.trainable_percent,
        "families": families,
        "mean": _compare(before, after),
        "seconds": time.monotonic() - start,
        "training_seconds": run.seconds,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    save(draw_losses(run.log_history), out / "losses.png")
    placed = {m.name: {"columns": m.columns, "values": m.values, "in": m.in_features} for m in run.adapter.summary()}
    save(draw_placement(placed), out / "placement.png")
    save(draw_accuracy([{"family": name} | entry for name, entry in families.items()]), out / "accuracy.png")
    write_text(out / "summary.json", json.dumps(summary, indent=1))
    write_report([out], out / "report.html")
    return summary


def run_seeds(out: str | Path, seeds: Sequence[int], device: str = "cpu", quiet: bool = False) -> dict[str, Any]:
    """Run the demo once for each seed, each in its own folder; `out/summary.json` covers all their problems together.

    The gain of a single training varies with rounding errors; `gains` shows by how much.
    """
    out = Path(out)
    folders = [out / f"seed{seed}" for seed in seeds]
    runs = [run_demo(folder, device, seed, quiet) for folder, seed in zip(folders, seeds, strict=True)]
    before, after = (
        [record for folder in folders for record in _read(folder / f"{name}.jsonl")] for name in ("before", "after")
    )
    summary = {
        "seeds": list(seeds),
        "gains": [run["mean"]["gain"] for run in runs],
        "trainable_percent": runs[0]["trainable_percent"],
        "families": {name: _compare(_of_family(name, before), _of_family(name, after)) for name in FAMILIES},
        "mean": _compare(before, after),
        "seconds": sum(run["seconds"] for run in runs),
        "training_seconds": sum(run["training_seconds"] for run in runs),
        "peak_memory_mb": max(run["peak_memory_mb"] for run in runs),
    }
    write_text(out / "summary.json", json.dumps(summary, indent=1))
    write_report(folders, out / "report.html")
    return summary


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the summary as a table: a line per family, with the paired gain and its 95% interval."""
    table = Table("family", "n", "before", "after", "gain (95% interval)")
    for name, row in [*summary["families"].items(), ("mean", summary["mean"])]:
        if name == "mean":
            table.add_section()
        gain = (
            f"{100 * (row['after'] - row['before']):+.1f} ({100 * row['ci_low']:+.1f} .. {100 * row['ci_high']:+.1f})"
        )
        table.add_row(name, str(row["n"]), f"{100 * row['before']:.1f}%", f"{100 * row['after']:.1f}%", gain)
    console.print(table)
    if "gains" in summary:
        console.print("gain of each seed: " + ", ".join(f"{100 * gain:+.1f}" for gain in summary["gains"]))
    console.print(
        f"trained {summary['trainable_percent']:.3f}% of the parameters; {summary['seconds'] / 60:.1f} minutes "
        f"({summary['training_seconds'] / 60:.1f} of training), peak memory {summary['peak_memory_mb'] / 1024:.1f} GiB"
    )


def _load_or_measure(
    path: Path, problems: Sequence[Problem], measure: Callable[[], list[Result]]
) -> list[dict[str, Any]]:
    """The records in `path` if they belong to these problems; else measure now and write them there."""
    if path.exists():
        records = _read(path)
        if [r["problem"] for r in records] == [p.question for p in problems]:
            return records
    records = [result.to_dict() for result in measure()]
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _of_family(family: str, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["task"].removeprefix("reasoning-gym:") == family]


def _compare(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, float]:
    first, second = ([float(record["correct"]) for record in records] for records in (before, after))
    gain = paired_difference(first, second)
    n = len(first)
    return {
        "before": sum(first) / n,
        "after": sum(second) / n,
        "gain": gain.mean,
        "ci_low": gain.low,
        "ci_high": gain.high,
        "n": n,
    }
