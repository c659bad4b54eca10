"""Reports what bash bench/gpu.sh measured: a row per case on a page, JSON, and a short table for the terminal. What the
page has outside of the section `measured` is kept.

python bench/gpu_page.py runs/gpu/cases.jsonl --page docs/gpu.md --json runs/gpu/gpu.json
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from publish import put_section
from registry import FLOORS

from rbfast import ops
from rbfast.utils.files import write_text

Entry = Mapping[str, Any]
HEADS = ("case", "rbfast", "floor", "share", "peers", "waits", "extra", "bars")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="file that bench/run.py --record wrote")
    parser.add_argument("--page", type=Path, required=True, help="Markdown file with the section")
    parser.add_argument("--json", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--kernels", type=Path, help="output of bench/run.py --kernels, for the end of the page")
    args = parser.parse_args(argv)
    lines = args.record.read_text().splitlines() if args.record.exists() else []
    entries = [json.loads(line) for line in lines]
    facts = environment(entries)
    kernels = args.kernels.read_text() if args.kernels and args.kernels.exists() else ""
    record = {"environment": facts, "cases": entries, "kernels": kernels.splitlines()}
    write_text(args.json, json.dumps(record, indent=1) + "\n")
    put_section(args.page, "measured", section(facts, entries, kernels), title="On a GPU")
    print(terminal(entries))
    return 0


def environment(entries: Sequence[Entry]) -> dict[str, str]:
    on_gpu = torch.cuda.is_available()
    found = {
        "date": date.today().isoformat(),
        "card": torch.cuda.get_device_name() if on_gpu else "none: a dry run on the CPU, with tiny sizes",
        "CUDA": str(torch.version.cuda),
    }
    for entry in entries:
        found |= entry.get("versions", {})
    return found | {f"{op} runs as": implementation for op, implementation in ops.implementations("cuda").items()}


# ---- cells ----


def cells(entry: Entry) -> list[str]:
    """The cells of a case's row, under HEADS."""
    if "failed" in entry:
        return [entry["case"], "FAILED: " + entry["failed"], *[""] * (len(HEADS) - 2)]
    who = entry["who"]
    ours = who.get("rbfast", {})
    floor = next((who[name] for name in FLOORS if who.get(name, {}).get("seconds")), None)
    share = f"{100 * median(floor['seconds']) / median(ours['seconds']):.0f}%" if floor and ours.get("seconds") else ""
    extra = ours.get("extra_mib")
    return [
        entry["case"],
        _time(ours) if ours else _values(entry),
        _time(floor) if floor else "",
        share,
        "; ".join(_peer(name, found, ours) for name, found in who.items() if name not in (*FLOORS, "rbfast")),
        str(ours.get("waits", "")),
        "" if extra is None else f"{extra * 2**20 / 1e9:.2f} GB",
        "; ".join(_bar(bar) for bar in entry["bars"]),
    ]


def _time(found: Entry) -> str:
    """The median in ms, and the median absolute deviation in % of it."""
    if not found.get("seconds"):
        return "FAILED: " + found.get("missing", "no round was run")
    middle = median(found["seconds"])
    spread = median(abs(seconds - middle) for seconds in found["seconds"])
    return f"{1e3 * middle:.3g} ms ±{100 * spread / middle:.0f}%"


def _values(entry: Entry) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in entry["values"].items())


def _peer(name: str, found: Entry, ours: Entry) -> str:
    if not found.get("seconds"):
        return f"{name}: {found.get('missing', '')[:60]}"
    times = f" ({median(found['seconds']) / median(ours['seconds']):.2f}x)" if ours.get("seconds") else ""
    return f"{name} {1e3 * median(found['seconds']):.3g}{times}"


def _bar(bar: Entry) -> str:
    value = "-" if bar["value"] is None else f"{bar['value']:.3g}"
    verdict = {True: "ok", False: "MISSED", None: "not judged"}[bar["passes"]]
    return f"{verdict}: {bar['bar']} ({value})"


# ---- the page and the terminal ----


def section(facts: Mapping[str, str], entries: Sequence[Entry], kernels: str) -> str:
    text = [
        "Written by `bash bench/gpu.sh`. Times are medians over rounds in which the peers alternate, with the median",
        "deviation: of CUDA events, or of the wall clock for host-bound work. The floor is the work's own GEMMs or a",
        "copy of its bytes (for an adapter: the frozen model). Share is floor / rbfast; a peer's ratio is its time",
        "over rbfast's. Waits: how often a call makes the host wait for the device. Extra: peak memory beyond what is",
        "kept.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "| " + " | ".join(HEADS) + " |",
        "| --- " * len(HEADS) + "|",
        *("| " + " | ".join(cells(entry)) + " |" for entry in entries),
        "",
    ]
    titles = [f"- {entry['case']}: {entry['title']}" + _notes(entry) for entry in entries if "title" in entry]
    text += ["What each case is:", "", *titles]
    if kernels:
        text += ["", "## Where a step's time goes", "", "```", kernels.rstrip(), "```"]
    return "\n".join(text) + "\n"


def _notes(entry: Entry) -> str:
    notes = [f"{name}: {found['note']}" for name, found in entry["who"].items() if found.get("note")]
    return f" ({'; '.join(notes)})" if notes else ""


def terminal(entries: Sequence[Entry]) -> str:
    """A short line per case, and the number of missed bars."""
    bars = [bar for entry in entries for bar in entry.get("bars", [])]
    missed = sum(bar["passes"] is False for bar in bars)
    failed = sum("failed" in entry for entry in entries)
    lines = [" | ".join(cell for cell in cells(entry) if cell)[:260] for entry in entries]
    summary = f"{len(entries)} cases, {failed} failed; {len(bars)} bars, {missed} missed"
    return "\n".join([*lines, summary])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
