"""Where the time of one rbfast call goes: its kernels by torch.profiler, or one call marked for ncu."""

from collections.abc import Sequence

import torch
from harness import Step, settle
from registry import Case, Place, cases
from torch.profiler import ProfilerActivity, profile


def main(names: Sequence[str], device: str, is_toy: bool, kernels: int | None) -> int:
    """Profiles the cases whose names contain one of `names`, or all cases if there are no names.

    The exit code is 2 if no case has such a name, or if a GPU case is to run in full size without a GPU.
    """
    lacks_gpu = device == "cuda" and not torch.cuda.is_available()
    if lacks_gpu and not is_toy:
        print("no GPU: use --toy to try its cases on the CPU")
        return 2
    place = Place("cpu" if lacks_gpu else device, is_toy)
    wanted = [name.replace(" ", "-").replace(",", "").lower() for name in names] or [""]
    chosen = [case for case in cases(device) if any(name in str(case).lower() for name in wanted)]
    if not chosen:
        print(f"no case is called {' or '.join(names)}: use one of {', '.join(map(str, cases(device)))}")
        return 2
    for case in chosen:
        step = _warm(case, place)
        if step is None:
            print(f"{case} has nothing to time")
        elif kernels:
            print(f"{case}\n{top_kernels(step, kernels, place.device)}")
        else:
            _between_marks(step, place.device)
    return 0


def _warm(case: Case, place: Place) -> Step | None:
    """rbfast's step, warmed up; None for a case that only has values."""
    step = case.make(place).steps.get("rbfast")
    if step is not None:
        for _ in range(3):
            step()
        settle()
    return step


def _between_marks(step: Step, device: str) -> None:
    if device != "cuda":
        step()
        return
    with torch.cuda.profiler.profile():
        step()
        settle()


def top_kernels(step: Step, count: int, device: str) -> str:
    """A line (ms, calls, name) for each of the kernels, or ops on a CPU, that take most of a step's time."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        step()
        settle()
    events = [event for event in found.key_averages() if not on_gpu or event.device_type.name == "CUDA"]
    times = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event) for event in events]
    times.sort(key=lambda pair: -pair[0])
    total = sum(time for time, _ in times)
    lines = [f"{time / 1e3:8.3f} ms {event.count:6d} x  {event.key[:90]}" for time, event in times[:count] if time > 0]
    calls, kind = sum(event.count for _, event in times), "kernels" if on_gpu else "ops"
    return "\n".join([f"{total / 1e3:8.3f} ms in {calls} {kind}, the first {count}:", *lines])
