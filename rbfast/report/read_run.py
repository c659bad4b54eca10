"""Read and check what a run wrote to its folder: settings, losses, the adapter, completions, a datasheet.

    run = read_run("runs/first")
    run.settings["base_model"], run.log[-1]["loss_tactical"]
    for measured in run.measurements:                       # one for each token limit and sampling setting
        print(compare("all", measured.before, measured.after).gain)

Completions come from every JSONL file in the folder that `rbfast eval -o` or the demo wrote. A file whose name begins
with `before` holds the base model's, any other the trained model's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from rbfast.adapter.adapter_files import CONFIG_FILE, AdapterConfig, read_config
from rbfast.data.spans import ROLES
from rbfast.evaluation.statistics import Interval, paired_difference, proportion
from rbfast.training.run_folder import DATASHEET, LOG, RUN, SKIPPED, SUMMARY
from rbfast.utils.records import check_present_fields, check_shape, json_lines, read_json

Record = dict[str, Any]
Items = dict[tuple[str, str], list[Record]]  # the completions of each problem, by (task, problem)

# A schema is a type or several types, [schema] for a list, {name: schema} for an object with at least these fields, or
# {str: schema} for an object whose values all have this schema.
_NUMBER = (int, float)
_SETTINGS = {"base_model": (str, NoneType), "traces": int, "density": _NUMBER}
_COST = {
    "trainable_percent": _NUMBER,
    "seconds": _NUMBER,
    "training_seconds": _NUMBER,
    "peak_memory_mb": _NUMBER,
    "tokens_per_epoch": int,
    "resumed": bool,
}
_LOSSES = {f"{kind}loss_{role}": _NUMBER for kind in ("", "eval_") for role in ROLES} | {"eval_loss": _NUMBER}
_RESULT = {"task": str, "problem": str, "completion": str, "correct": bool, "tokens": int, "truncated": bool}
_EVENT = {"kind": str, "at": int, "struck": str}
_SHEET = {
    "stages": [{"stage": str, "in": int, "out": int, "dropped": {str: int}}],
    "domains": [{"domain": str, "before": int, "eligible": int, "after": int}],
}


@dataclass(frozen=True)
class Measurement:
    """The completions with one token limit and sampling setting. A side without completions is empty.

    `limit` is None if it was not recorded and no completion reached it. `drawn` describes the guide and the sampling;
    it is empty for plain greedy completions, and if it was not recorded.
    """

    limit: int | None
    before: Items
    after: Items
    drawn: str = ""


@dataclass(frozen=True)
class RunFolder:
    """A run as recorded in its folder; None means that a file is missing.

    `cost` may hold trainable_percent, seconds (of everything), training_seconds, peak_memory_mb, tokens_per_epoch and
    resumed; those that were not recorded are missing.
    """

    path: Path
    settings: dict[str, Any]
    log: list[dict[str, Any]] | None
    skipped: list[dict[str, Any]] | None
    adapter: AdapterConfig | None
    cost: dict[str, Any]
    datasheet: dict[str, Any] | None
    measurements: list[Measurement]


@dataclass(frozen=True)
class Comparison:
    """The shares solved of the same n problems, with 95% intervals; None for a side without completions."""

    name: str
    n: int
    before: Interval | None
    after: Interval | None
    gain: Interval | None


def read_run(folder: str | Path) -> RunFolder:
    """Read the folder of a run.

    Raises:
        ValueError: the folder holds no run, or a file in it is not in rbfast's format; the message names the file.
    """
    folder = Path(folder)
    settings = read_json(folder / RUN, _SETTINGS)
    if settings is None:
        raise ValueError(
            f"{folder}: expected the folder of a run, as `rbfast distill` or `rbfast demo` writes it; it holds no {RUN}"
        )
    log = read_json(folder / LOG, [{"step": int}])
    for number, entry in enumerate(log or (), start=1):
        check_present_fields(entry, _LOSSES, f"{folder / LOG}: entry {number}")
    skipped = folder / SKIPPED
    return RunFolder(
        path=folder,
        settings=settings,
        log=log,
        skipped=[record for _, record in json_lines(skipped, {"reason": str})] if skipped.exists() else None,
        adapter=read_config(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else None,
        cost=_cost(folder, settings),
        datasheet=read_json(folder / DATASHEET, _SHEET),
        measurements=_measurements(folder),
    )


def families(measured: Measurement) -> list[Comparison]:
    """A comparison for each task, in the order of the files."""
    tasks = dict.fromkeys(task for items in (measured.before, measured.after) for task, _ in items)
    return [compare(task, *(_items_of(task, items) for items in (measured.before, measured.after))) for task in tasks]


def compare(name: str, before: Items, after: Items) -> Comparison:
    """Compare before and after over the problems that both sides have; if they share none, one side alone.

    A problem with several completions counts by their mean. The interval is then wider than necessary.
    """
    shared = [problem for problem in before if problem in after]
    if shared:
        first, second = ([share_correct(items[problem]) for problem in shared] for items in (before, after))
        return Comparison(name, len(shared), proportion(first), proportion(second), paired_difference(first, second))
    shares = [share_correct(records) for records in (after or before).values()]
    alone = proportion(shares) if shares else None
    return Comparison(name, len(shares), None if after else alone, alone if after else None, None)


def share_correct(records: list[Record]) -> float:
    """The share of a problem's completions that are right."""
    return sum(record["correct"] for record in records) / len(records)


def _items_of(task: str, items: Items) -> Items:
    return {key: records for key, records in items.items() if key[0] == task}


def _cost(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The cost from the demo's summary and from the run's settings, which take precedence."""
    summary = read_json(folder / SUMMARY, {}) or {}
    check_present_fields(summary, _COST, str(folder / SUMMARY))
    check_present_fields(settings, _COST, str(folder / RUN))
    recorded = {name: value for name, value in summary.items() if name in _COST}
    recorded |= {name: value for name, value in settings.items() if name in _COST and name != "seconds"}
    if "seconds" in settings:
        recorded["training_seconds"] = settings["seconds"]
    return recorded


# ------------------------------------------------------------------------------------------------------- completions


def _measurements(folder: Path) -> list[Measurement]:
    sides: dict[tuple[int | None, str], tuple[Items, Items]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        if path.name != SKIPPED and _holds_results(path):
            for where, record in json_lines(path, _RESULT):
                before, after = sides.setdefault((_limit(record, where), _sampling_label(record, where)), ({}, {}))
                items = before if path.name.startswith("before") else after
                items.setdefault((record["task"], record["problem"]), []).append(record)
    found = [
        Measurement(_inferred_limit(pair) if limit is None else limit, *pair, drawn)
        for (limit, drawn), pair in sides.items()
    ]
    return sorted(found, key=lambda measured: (measured.limit or 0, measured.drawn))


def _holds_results(path: Path) -> bool:
    """Whether the first line is a completion: a folder may also hold traces."""
    first = next(json_lines(path, object), None)
    return first is not None and isinstance(first[1], dict) and {"task", "completion"} <= first[1].keys()


def _limit(record: Record, where: str) -> int | None:
    """The recorded token limit of a completion. Also checks the record's events."""
    check_present_fields(record, {"events": [_EVENT], "decoding": {"max_new_tokens": int}}, where)
    if (decoding := record.get("decoding")) is None:
        return None
    if (guide := decoding.get("guide")) is not None:
        check_shape(guide, {"limits": {"budget": int}}, f"{where}: decoding: guide")
        return int(guide["limits"]["budget"])
    return int(decoding["max_new_tokens"])


def _sampling_label(record: Record, where: str) -> str:
    decoding = record.get("decoding") or {}
    check_present_fields(decoding, {"samples": int, "temperature": _NUMBER}, f"{where}: decoding")
    samples, temperature = decoding.get("samples", 1), decoding.get("temperature", 0)
    labels = ["guided"] if decoding.get("guide") is not None else []
    if samples > 1 or temperature != 0:
        labels.append(f"{samples} sample{'s' if samples > 1 else ''} at temperature {temperature:g}")
    return ", ".join(labels)


def _inferred_limit(sides: Iterable[Items]) -> int | None:
    """The token limit, if it was not recorded: the length of the longest truncated completion."""
    records = (record for items in sides for found in items.values() for record in found)
    return max((record["tokens"] for record in records if record["truncated"]), default=None)


# ------------------------------------------------------------------------------------------------------------- files


def main_measurement(run: RunFolder) -> Measurement | None:
    """The measurement to report first: with both sides if possible, then with the highest limit, then plain greedy."""
    return max(run.measurements, key=lambda m: (bool(m.before and m.after), m.limit or 0), default=None)


def task_name(name: str) -> str:
    """The display name of a task: a file without its folder, a generator without its library."""
    return Path(name).name if name.endswith(".jsonl") else name.removeprefix("reasoning-gym:")
