"""Runs every case of the registry: all contestants in turn, then the bars.

    pytest bench/cases --benchmark-only                   # all cases of a CPU, rbfast beside its floors
    pytest bench/cases --benchmark-only --peers -k loss   # the loss, beside its peers

A case fails if rbfast fails or misses a bar, after the record is written.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from harness import Found, clock_for, race, reason, versions
from pytest_benchmark.fixture import BenchmarkFixture
from registry import Case, Contest, Place, is_ours

from rbfast import ops

Record = Callable[[dict[str, Any]], None]
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "torchtune", "cut-cross-entropy")


def test_case(benchmark: BenchmarkFixture, case: Case, place: Place, with_peers: bool, record: Record) -> None:
    entry: dict[str, Any] = {"case": str(case), "group": case.group}
    try:
        entry |= measure(benchmark, case.make(place), place, with_peers)
    except Exception as error:
        record(entry | {"failed": reason(error)})
        raise
    finally:
        gc.collect()
        if place.device == "cuda":
            torch.cuda.empty_cache()
    record(entry)
    failed = {who: found["missing"] for who, found in entry["who"].items() if is_ours(who) and "missing" in found}
    assert not failed, failed
    missed = [f"{bar['bar']}, got {bar['value']:.4g}" for bar in entry["bars"] if bar["passes"] is False]
    assert not missed, missed


def measure(benchmark: BenchmarkFixture, contest: Contest, place: Place, with_peers: bool) -> dict[str, Any]:
    steps = {who: step for who, step in contest.steps.items() if with_peers or is_ours(who)}
    benchmark.group = contest.title
    found: Found = race(
        steps,
        2 if place.is_toy else contest.rounds,
        clock_for(place.device, contest.is_host_bound),
        place.device,
        lambda one_round, rounds: benchmark.pedantic(one_round, rounds=rounds),
    )
    for who, entry in found.items():
        entry["note"] = contest.notes.get(who, "")
    values = contest.values()
    bars = [] if place.is_toy else [bar for bar in contest.bars if with_peers or _is_judged_alone(bar.metric)]
    judged = [(bar, *bar.judge(found, values)) for bar in bars]
    entry = {
        "title": contest.title,
        "who": found,
        "values": values,
        "bars": [{"bar": str(bar), "value": value, "passes": passes} for bar, value, passes in judged],
        "clock": "wall" if contest.is_host_bound or place.device == "cpu" else "events",
        "is_toy": place.is_toy,
        "isa": ops.cpu_isa() or "reference",
        "threads": torch.get_num_threads(),
        "versions": versions(PACKAGES),
        **contest.facts,
    }
    benchmark.extra_info.update(entry)
    return entry


def _is_judged_alone(metric: str) -> bool:
    """Whether a bar names only rbfast and its floor."""
    names = metric.replace(" - ", " / ").split(" / ") if " / " in metric else []
    return all(is_ours(name) for name in names)
