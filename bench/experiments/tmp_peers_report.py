"""The tables and the picture of `make bench`: everybody's time as ratios with their spread, and peak memory.

python bench/peers_report.py runs/bench/bench.json      # rewrites the section of docs/bench.md, and docs/bench.png
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from harness import FLOORS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from publish import cpu, put_section

from rbfast.utils.files import replacing

DOCS = Path(__file__).resolve().parent.parent / "docs"

_OURS, _THEIRS = "#0072B2", "#999999"


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


def table(who: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each who took part or could not; the ratios' units are the floor, if there is one, and rbfast."""
    units = [name for name in (*FLOORS, "rbfast") if "seconds" in who.get(name, {})]
    has_values = any("trained_values" in entry for entry in who.values())
    heads = ["", "s", *(f"/ {unit}" for unit in units), *(["trained values"] if has_values else []), "extra MiB", ""]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, entry in who.items():
        if "seconds" not in entry:
            lines.append(f"| {name} |" + " - |" * (len(heads) - 2) + f" {entry['missing']} |")
            continue
        cells = [name, f"{median(entry['seconds']):.3f}"]
        cells += [str(ratio(entry["seconds"], who[unit]["seconds"])) for unit in units]
        cells += [f"{entry.get('trained_values', 0):,}"] if has_values else []
        extra = entry.get("extra_mib")
        lines.append("| " + " | ".join([*cells, "" if extra is None else f"{extra:.0f}", entry.get("note", "")]) + " |")
    return "\n".join(lines)


def section(benchmarks: Sequence[Mapping[str, Any]]) -> str:
    groups = [(benchmark["group"], benchmark["extra_info"]) for benchmark in benchmarks]
    versions = {name: version for _, facts in groups for name, version in facts["versions"].items()}
    rounds = min(len(entry["seconds"]) for _, facts in groups for entry in _took_part(facts["who"]).values())
    tables = "\n\n".join(f"### {group}\n\n{table(facts['who'])}" for group, facts in groups)
    machine = groups[0][1]
    return f"""`make bench`

Medians of {rounds} rounds or more, in which everybody takes a turn. Ratios are taken within a round and stand
with their quartiles. Extra MiB: resident memory at the peak of a step over what is there before it.

{tables}

{date.today()}; {cpu()}, {machine["threads"]} threads, {machine["isa"]}; \
{", ".join(f"{name} {version}" for name, version in versions.items())}.

![everybody's time over rbfast's](bench.png)
"""


def _took_part(who: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: entry for name, entry in who.items() if "seconds" in entry}


def draw(benchmarks: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each group: times over rbfast's, with quartiles."""
    columns = min(3, len(benchmarks))
    rows = -(-len(benchmarks) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.6 * rows), layout="constrained")
    for number, benchmark in enumerate(benchmarks):
        who = _took_part(benchmark["extra_info"]["who"])
        ratios = {name: ratio(entry["seconds"], who["rbfast"]["seconds"]) for name, entry in who.items()}
        axes = figure.add_subplot(rows, columns, number + 1)
        spread = [[r.middle - r.low for r in ratios.values()], [r.high - r.middle for r in ratios.values()]]
        colours = [_OURS if name.startswith("rbfast") else _THEIRS for name in ratios]
        axes.barh([*ratios], [r.middle for r in ratios.values()], xerr=spread, color=colours, capsize=2)
        axes.axvline(1, color=_OURS, linewidth=0.8, linestyle=":")
        axes.invert_yaxis()
        axes.set_title(benchmark["group"], fontsize=8, wrap=True)
        axes.set_xlabel("time / rbfast's", fontsize=8)
        axes.tick_params(labelsize=8)
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="JSON file that pytest wrote with --benchmark-json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of bench.md and bench.png")
    args = parser.parse_args(argv)
    benchmarks = json.loads(args.record.read_text())["benchmarks"]
    text = section(benchmarks)
    put_section(args.docs / "bench.md", "speed", text)
    draw(benchmarks, args.docs / "bench.png")
    print(text)
    return 0
