"""Writes the results of make bench to docs/bench.md: this kind of CPU's section, picture and column of ratios.

    python bench/cpu_page.py runs/bench/cases.jsonl

The sections and columns of other kinds of CPU stay as they are.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from publish import DOCS, cpu, cpu_kind, put_section
from registry import FLOORS, measured

from rbfast.report.plots import save
from rbfast.utils.files import write_text

Entry = Mapping[str, Any]
_OURS, _THEIRS = "#0072B2", "#999999"
_STUDENTS = ("SmolLM2-135M", "Qwen2.5-0.5B", "Qwen2.5-1.5B")
# The ratios that the README quotes: row of the table -> case, ratio of times.
RATIOS = {
    **{
        f"loss, {signal}, {student}: {said}": (f"loss-{signal}-{student}", metric)
        for student in _STUDENTS
        for signal in ("top-k", "dense")
        for said, metric in (
            ("over its bare products", "rbfast / floor"),
            ("torch.compile over it", "torch.compile / rbfast"),
        )
    },
    "step with the adapter over frozen": ("adapter-step-of-SmolLM2-135M", "rbfast / frozen"),
    "step with LoRA r=1 over frozen": ("adapter-step-of-SmolLM2-135M", "LoRA r=1 / frozen"),
    "whole step over TRL SFT's": ("trainer-text", "rbfast / TRL SFT"),
    "whole step over TRL GKD's": ("trainer-teacher", "rbfast / TRL GKD"),
}


class Ratio(NamedTuple):
    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(seconds: Sequence[float], unit: Sequence[float]) -> Ratio:
    """Median and quartiles of the ratios within a round."""
    ratios = [mine / theirs for mine, theirs in zip(seconds, unit, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return Ratio(median(ratios), low, high)


# ---- the section of a kind of CPU ----


def table(who: Mapping[str, Entry]) -> str:
    """A row per contestant, including those that could not run, with ratios to rbfast and to the floor, if any."""
    units = [name for name in (*FLOORS, "rbfast") if who.get(name, {}).get("seconds")]
    heads = ["", "s", *(f"/ {unit}" for unit in units), "extra MiB", ""]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, entry in who.items():
        if not entry.get("seconds"):
            lines.append(f"| {name} |" + " - |" * (len(heads) - 2) + f" {entry['missing']} |")
            continue
        cells = [name, f"{median(entry['seconds']):.3f}"]
        cells += [str(ratio(entry["seconds"], who[unit]["seconds"])) for unit in units]
        extra = entry.get("extra_mib")
        lines.append("| " + " | ".join([*cells, "" if extra is None else f"{extra:.0f}", entry.get("note", "")]) + " |")
    return "\n".join(lines)


def section(entries: Sequence[Entry], kind: str, picture: str) -> str:
    versions = {name: version for entry in entries for name, version in entry["versions"].items()}
    rounds = min(len(found["seconds"]) for entry in entries for found in _took_part(entry).values())
    tables = "\n\n".join(f"#### {entry['title']}\n\n{table(entry['who'])}" for entry in entries)
    machine = entries[0]
    return f"""### {kind}

`make bench`. Medians of at least {rounds} rounds, in which the peers alternate. Ratios are taken within a round and
given with their quartiles. Extra MiB: a step's peak resident memory minus that before it.

{tables}

{date.today()}; {cpu()}, {machine["threads"]} threads, {machine["isa"]}; \
{", ".join(f"{name} {version}" for name, version in versions.items() if version != "not installed")}.

![times relative to rbfast]({picture})
"""


def _took_part(entry: Entry) -> dict[str, Entry]:
    return {name: found for name, found in entry["who"].items() if found.get("seconds")}


def draw(entries: Sequence[Entry], path: Path) -> None:
    """A panel per case: times relative to rbfast's, with quartiles."""
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.6 * rows), layout="constrained")
    for number, entry in enumerate(entries):
        who = _took_part(entry)
        ratios = {name: ratio(found["seconds"], who["rbfast"]["seconds"]) for name, found in who.items()}
        axes = figure.add_subplot(rows, columns, number + 1)
        spread = [[r.middle - r.low for r in ratios.values()], [r.high - r.middle for r in ratios.values()]]
        colours = [_OURS if name.startswith("rbfast") else _THEIRS for name in ratios]
        axes.barh([*ratios], [r.middle for r in ratios.values()], xerr=spread, color=colours, capsize=2)
        axes.axvline(1, color=_OURS, linewidth=0.8, linestyle=":")
        axes.invert_yaxis()
        axes.set_title(entry["title"], fontsize=8, wrap=True)
        axes.set_xlabel("time / rbfast's", fontsize=8)
        axes.tick_params(labelsize=8)
    save(figure, path)


# ---- the ratios, a column for each kind of CPU ----


def ratios_of(entries: Sequence[Entry]) -> dict[str, float]:
    by_case = {entry["case"]: entry["who"] for entry in entries}
    values = {line: measured(metric, by_case.get(case, {}), {}) for line, (case, metric) in RATIOS.items()}
    return {line: round(value, 3) for line, value in values.items() if value is not None}


def ratio_table(by_kind: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown; a cell is empty if that kind of CPU was not measured."""
    lines = ["| ratio of times | " + " | ".join(by_kind) + " |", "| --- " * (1 + len(by_kind)) + "|"]
    for line in RATIOS:
        if any(line in values for values in by_kind.values()):
            cells = (f"{values[line]:.2f}" if line in values else "" for values in by_kind.values())
            lines.append(f"| {line} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="file that bench/run.py --record wrote")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of bench.md and bench_ratios.json")
    args = parser.parse_args(argv)
    lines = map(json.loads, args.record.read_text().splitlines() if args.record.exists() else [])
    timed = [entry for entry in lines if entry.get("who", {}).get("rbfast", {}).get("seconds")]
    entries = [entry for entry in timed if not entry.get("is_toy")]
    if not entries:
        found = "only toys" if timed else "none"
        print(f"{args.record}: expected cases in which rbfast was timed, found {found}", file=sys.stderr)
        return 2
    kind = cpu_kind()
    kept = args.docs / "bench_ratios.json"
    by_kind = (json.loads(kept.read_text()) if kept.exists() else {}) | {kind: ratios_of(entries)}
    write_text(kept, json.dumps(by_kind, indent=1) + "\n")
    picture = f"bench-{re.sub(r'[^a-z0-9]+', '-', kind.lower())}.png"
    draw(entries, args.docs / picture)
    put_section(args.docs / "bench.md", "ratios", ratio_table(by_kind))
    put_section(args.docs / "bench.md", f"speed: {kind}", section(entries, kind, picture))
    print(f"on {cpu()} ({kind}):\n\n{ratio_table({kind: by_kind[kind]})}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
