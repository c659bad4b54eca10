"""Times contestants in turn, then measures each one's peak memory and rbfast's waits for the device.

    found = race({"floor": gemms, "rbfast": ours, "Liger": theirs}, rounds=5, clock=clock_for("cuda"))
    found["rbfast"]["seconds"], found["rbfast"]["extra_mib"], found["rbfast"]["waits"]

A round runs each contestant once, so that drift of the machine affects all alike; ratios are taken within a round.
A clock measures wall time on a CPU, and CUDA events on a GPU, with the host ahead of the device. Host-bound work on a
GPU is measured in wall time too (`wall`).
"""

import ctypes
import gc
import importlib.metadata
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rbfast.loss import workspace

Step = Callable[[], float | None]  # does the work; may return the seconds that count
Clock = Callable[[Step], float]
Found = dict[str, dict[str, Any]]

AHEAD_CYCLES = 20_000_000  # about 10 ms on a GPU, for the host to launch the timed work
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
_WAITS = {"_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select", "_unique2", "unique_dim"}


def race(
    steps: Mapping[str, Step], rounds: int, clock: Clock, device: str, runner: Callable[..., object] | None = None
) -> Found:
    """Each contestant's seconds per round and extra MiB, or why it could not run; rbfast's waits for the device.

    runner(one_round, rounds), if given, runs the rounds, so that a benchmark fixture sees them. A failure of rbfast is
    recorded like a peer's: the caller decides what to do about it.
    """
    who = {name: _warm(step) for name, step in steps.items()}
    order = [name for name, found in who.items() if "seconds" in found]

    def one_round() -> None:
        for name in order:
            who[name]["seconds"].append(clock(steps[name]))
        order.reverse()  # so that no contestant always follows the same one

    gc.collect()
    gc.freeze()  # else a collection walks torch and every peer's modules, for 0.2 s, inside some step
    try:
        (runner or _repeat)(one_round, rounds)
        for name, found in who.items():
            if "seconds" in found:
                found["extra_mib"] = extra_mib(steps[name], device)
                if name.startswith("rbfast"):
                    found["waits"] = host_waits(steps[name], device)
    finally:
        gc.unfreeze()
    return who


def _repeat(call: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        call()


def _warm(step: Step) -> dict[str, Any]:
    try:
        for _ in range(2):
            step()
    except Exception as error:
        return {"missing": reason(error)}
    return {"seconds": []}


def absent(error: Exception) -> Step:
    """The step of a missing contestant: raises the error that says why it is missing."""

    def step() -> None:
        raise error

    return step


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def in_turn(calls: Iterable[Callable[[], object]]) -> Step:
    """A step that makes the next of these calls: if their inputs together exceed the cache, each call finds it cold."""
    turn = cycle(calls)

    def step() -> None:
        next(turn)()

    return step


# ---- clocks ----


def wall(step: Step) -> float:
    """Seconds of wall time; on a GPU, from an idle device to an idle device."""
    settle()
    start = time.perf_counter()
    counted = step()
    settle()
    return time.perf_counter() - start if counted is None else counted


def events(step: Step) -> float:
    """Seconds between two CUDA events around a step, with the host ahead unless the step waits for the device."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(AHEAD_CYCLES)  # else the first kernels wait for the host, whose time would be measured too
    before.record()
    counted = step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000 if counted is None else counted


def clock_for(device: str, is_host_bound: bool = False) -> Clock:
    return events if device == "cuda" and not is_host_bound else wall


def settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ---- waits ----


class _CountWaits(TorchDispatchMode):
    """Counts the ops that would make the host wait for the device on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.partition("::")[2]
        self.count += name in _WAITS or (name.startswith("index") and _has_boolean_index(args))
        return func(*args, **(kwargs or {}))


def _has_boolean_index(args: Sequence[Any]) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


def host_waits(step: Step, device: str) -> int:
    """How often the host waits for the device: CUDA's count, or on a CPU the number of ops that would wait."""
    if device != "cuda":
        with _CountWaits() as mode:
            step()
        return mode.count
    settle()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    settle()
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


# ---- memory ----


def extra_mib(step: Step, device: str) -> float | None:
    """Peak MiB of a step above what is in use before it (on a GPU, before or after it); None if it cannot be read.

    The step must have run before, so that one-time allocations of libraries and compilers are not counted.
    """
    if device == "cuda":
        return _extra_on_gpu(step)
    return _extra_resident(step) if sys.platform.startswith("linux") else None


def _extra_on_gpu(step: Step) -> float:
    settle()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    settle()
    return (torch.cuda.max_memory_allocated() - max(before, torch.cuda.memory_allocated())) / 2**20


def _extra_resident(step: Step) -> float:
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 2**20)  # every tensor gets its own pages: freed ones are no longer resident
    workspace.release()  # so that buffers that a loss keeps for its next call are counted
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_mib("VmRSS")
    step()
    peak = _resident_mib("VmHWM")
    libc.mallopt(_MMAP_THRESHOLD, 2**25)  # glibc's own choice in a process that frees large tensors
    return peak - before


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


# ---- versions ----


def versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
