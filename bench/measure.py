"""How the benchmarks measure: everybody in turn, then everybody's peak of memory.

    race(benchmark, "loss, T=1024", {"floor": gemms, "rbfast": ours, "Liger": theirs}, rounds=5)

A round runs everybody once, so that a drift of the machine meets all of them alike; ratios are taken within a round.
What each did stands in extra_info["who"] for bench/peers_report.py. RBFAST_BENCH=toy makes the benchmarks run at sizes
of no meaning, to try them.
"""

import ctypes
import gc
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from rbfast import ops

TOY = os.environ.get("RBFAST_BENCH") == "toy"
FLOORS = ("floor", "frozen")
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)

Step = Callable[[], float | None]  # does the work; may say itself how many seconds of it count


def race(
    benchmark: BenchmarkFixture, group: str, steps: Mapping[str, Step], rounds: int, **facts: Any
) -> dict[str, dict[str, Any]]:
    """Seconds of each round and extra MiB of everybody, or why they could not take part; extra_info keeps it."""
    who = {name: _warm(name, step) for name, step in steps.items()}

    def one_round() -> None:
        for name, found in who.items():
            if "seconds" in found:
                found["seconds"].append(_seconds(steps[name]))

    benchmark.group = group
    benchmark.extra_info.update(facts, who=who, isa=ops.cpu_isa() or "reference", threads=torch.get_num_threads())
    benchmark.pedantic(one_round, rounds=2 if TOY else rounds)
    for name, found in who.items():
        if "seconds" in found:
            found["extra_mib"] = extra_mib(steps[name])
    return who


def _warm(name: str, step: Step) -> dict[str, Any]:
    try:
        step()
    except Exception as error:
        if name in FLOORS or name.startswith("rbfast"):  # our failure is an error, a peer's is a finding
            raise
        return {"missing": reason(error)}
    return {"seconds": []}


def absent(error: Exception) -> Step:
    """A step that says why there is none."""

    def step() -> None:
        raise error

    return step


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    counted = step()
    return time.perf_counter() - start if counted is None else counted


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def extra_mib(step: Step) -> float | None:
    """MiB of resident memory at the peak of a step over what is resident before it; None where that cannot be read.

    The step must have run before, so that what libraries and compilers allocate once is not counted.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 2**20)  # every tensor its own pages: what one frees is no longer resident
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident_mib("VmRSS")
    step()
    peak = _resident_mib("VmHWM")
    libc.mallopt(_MMAP_THRESHOLD, 2**25)  # where glibc arrives by itself in a process that frees large tensors
    return peak - before


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
