"""What a run left in its folder, read and checked: settings, losses, the adapter, completions, a datasheet.

    run = read_run("runs/first")
    run.settings["base_model"], run.log[-1]["loss_tactical"]
    for measured in run.measurements:                       # one for each limit of tokens
        print(compare("all", measured.before, measured.after).gain)

Completions are every JSONL file in the folder that `rbfast eval -o` or the demo wrote. A file whose name begins with
`before` holds the base model's, any other the trained model's.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from rbfast.columns import CONFIG_FILE, AdapterConfig, read_config
from rbfast.schema import show
from rbfast.spans import ROLES
from rbfast.statistics import Interval, paired_difference, proportion

RUN, LOG, SKIPPED, SUMMARY, DATASHEET = "run.json", "log.json", "skipped.jsonl", "summary.json", "datasheet.json"

Record = dict[str, Any]
Items = dict[tuple[str, str], list[Record]]  # by task and problem, the completions of the problem

# A shape is a type or several, [shape] for a list of it, {name: shape} for an object that has at least these, or
# {str: shape} for one of which every value is that.
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
_LOSSES = {f"loss_{role}": _NUMBER for role in ROLES}
_RESULT = {"task": str, "problem": str, "completion": str, "correct": bool, "tokens": int, "truncated": bool}
_EVENT = {"kind": str, "at": int, "struck": str}
_SHEET = {
    "stages": [{"stage": str, "in": int, "out": int, "dropped": {str: int}}],
    "domains": [{"domain": str, "before": int, "eligible": int, "after": int}],
}


@dataclass(frozen=True)
class Measurement:
    """The completions under one limit of tokens. A side that was not measured is empty.

    `limit` is None where it is not recorded and no completion met it.
    """

    limit: int | None
    before: Items
    after: Items


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it; None stands for a file that is not there.

    `cost` holds what is recorded of: trainable_percent, seconds (of everything), training_seconds, peak_memory_mb,
    tokens_per_epoch, resumed.
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
    """Shares solved of the same n problems, with 95% intervals; None where a side was not measured."""

    name: str
    n: int
    before: Interval | None
    after: Interval | None
    gain: Interval | None


def read_run(folder: str | Path) -> RunFolder:
    """Reads the folder of a run.

    Raises:
        ValueError: the folder holds no run, or a file in it is not what rbfast writes; the message names the file.
    """
    folder = Path(folder)
    settings = read_json(folder / RUN, _SETTINGS)
    if settings is None:
        raise ValueError(
            f"{folder}: expected the folder of a run, as `rbfast distill` or `rbfast demo` writes it; it holds no {RUN}"
        )
    log = read_json(folder / LOG, [{"step": int}])
    for number, entry in enumerate(log or (), start=1):
        _check_some(entry, _LOSSES, f"{folder / LOG}: entry {number}")
    skipped = folder / SKIPPED
    return RunFolder(
        path=folder,
        settings=settings,
        log=log,
        skipped=[record for _, record in _lines(skipped, {"reason": str})] if skipped.exists() else None,
        adapter=read_config(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else None,
        cost=_cost(folder, settings),
        datasheet=read_json(folder / DATASHEET, _SHEET),
        measurements=_measurements(folder),
    )


def families(measured: Measurement) -> list[Comparison]:
    """A comparison for each task, in the order of the files."""
    tasks = dict.fromkeys(task for items in (measured.before, measured.after) for task, _ in items)
    return [compare(task, *(_of(task, items) for items in (measured.before, measured.after))) for task in tasks]


def compare(name: str, before: Items, after: Items) -> Comparison:
    """Before and after over the problems that both sides have; where they share none, one side by itself.

    Of a problem with several completions the mean is taken; its interval is then wider than it need be.
    """
    shared = [problem for problem in before if problem in after]
    if shared:
        first, second = ([score(items[problem]) for problem in shared] for items in (before, after))
        return Comparison(name, len(shared), proportion(first), proportion(second), paired_difference(first, second))
    scores = [score(records) for records in (after or before).values()]
    alone = proportion(scores) if scores else None
    return Comparison(name, len(scores), None if after else alone, alone if after else None, None)


def score(records: list[Record]) -> float:
    """The share of a problem's completions that is right."""
    return sum(record["correct"] for record in records) / len(records)


def _of(task: str, items: Items) -> Items:
    return {key: records for key, records in items.items() if key[0] == task}


def _cost(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the run says of its cost, and the demo's summary of the whole; the run knows its training best."""
    summary = read_json(folder / SUMMARY, {}) or {}
    _check_some(summary, _COST, str(folder / SUMMARY))
    _check_some(settings, _COST, str(folder / RUN))
    recorded = {name: value for name, value in summary.items() if name in _COST}
    recorded |= {name: value for name, value in settings.items() if name in _COST and name != "seconds"}
    if "seconds" in settings:
        recorded["training_seconds"] = settings["seconds"]
    return recorded


# ------------------------------------------------------------------------------------------------------- completions


def _measurements(folder: Path) -> list[Measurement]:
    sides: dict[int | None, tuple[Items, Items]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        if path.name != SKIPPED and _holds_results(path):
            for where, record in _lines(path, _RESULT):
                before, after = sides.setdefault(_limit(record, where), ({}, {}))
                items = before if path.name.startswith("before") else after
                items.setdefault((record["task"], record["problem"]), []).append(record)
    found = [Measurement(_met(pair) if limit is None else limit, *pair) for limit, pair in sides.items()]
    return sorted(found, key=lambda measured: measured.limit or 0)


def _holds_results(path: Path) -> bool:
    """Whether the first line is a completion; a folder may hold traces as well."""
    first = next(_lines(path, object, most=1), None)
    return first is not None and isinstance(first[1], dict) and "completion" in first[1]


def _limit(record: Record, where: str) -> int | None:
    """The recorded limit of a completion's tokens; its events are checked on the way."""
    _check_some(record, {"events": [_EVENT], "decoding": {"max_new_tokens": int}}, where)
    if (decoding := record.get("decoding")) is None:
        return None
    if (guide := decoding.get("guide")) is not None:
        check(guide, {"budget": int}, f"{where}: decoding: guide")
        return int(guide["budget"])
    return int(decoding["max_new_tokens"])


def _met(sides: Iterable[Items]) -> int | None:
    """The limit that is not recorded, as the completions that were cut at it show it."""
    records = (record for items in sides for found in items.values() for record in found)
    return max((record["tokens"] for record in records if record["truncated"]), default=None)


# ------------------------------------------------------------------------------------------------------------- files


def read_json(path: Path, shape: Any) -> Any:
    """The JSON in a file, or None where there is no such file. Raises ValueError where it is none of this shape."""
    if not path.is_file():
        return None
    return _parse(path.read_bytes(), shape, str(path))


def _lines(path: Path, shape: Any, most: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with where it stands. A last line that was cut short is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if (most is not None and number > most) or not line.endswith(b"\n"):
                return
            yield f"{path}:{number}", _parse(line, shape, f"{path}:{number}")


def _parse(text: bytes, shape: Any, where: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON: {error}") from None
    check(value, shape, where)
    return value


def check(value: Any, shape: Any, where: str) -> None:
    """Raises ValueError, naming the first mismatch, for a value of another shape."""
    kinds: Any = type(shape) if isinstance(shape, dict | list) else shape
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{where}: expected {names}, got {show(value)}")
    if isinstance(shape, list):
        for number, item in enumerate(value, start=1):
            check(item, shape[0], f"{where}: entry {number}")
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            if name is str:
                for key, item in value.items():
                    check(item, inner, f"{where}: {key}")
            elif name not in value:
                raise ValueError(f"{where}: {name} is missing")
            else:
                check(value[name], inner, f"{where}: {name}")


def _check_some(value: Mapping[str, Any], shape: Mapping[str, Any], where: str) -> None:
    """Checks the parts of `shape` that are there."""
    check(value, {name: inner for name, inner in shape.items() if name in value}, where)
