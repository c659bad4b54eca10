"""Where the time of one rbfast call goes: its kernels by torch.profiler, or one call marked for ncu."""

from collections.abc import Sequence

import torch
from harness import Step, settle
from registry import Case, Place, cases
from torch.profiler import ProfilerActivity, profile


def main(names: Sequence[str], device: str, is_toy: bool, kernels: int | None) -> int:
    """Profiles the cases whose names contain one of `names`; the exit code is 2 if there is none."""
    wanted = [name.replace(" ", "-").replace(",", "") for name in names]
    chosen = [case for case in cases(device) if any(name in str(case) for name in wanted)]
    if not chosen:
        print(f"no case is called {' or '.join(names) or 'nothing'}; there are {', '.join(map(str, cases(device)))}")
        return 2
    place = Place("cuda" if torch.cuda.is_available() else "cpu", is_toy or not torch.cuda.is_available())
    for case in chosen:
        step = _warm(case, place)
        if kernels:
            print(f"{case}\n{top_kernels(step, kernels)}")
        else:
            _between_marks(step)
    return 0


def _warm(case: Case, place: Place) -> Step:
    step = case.make(place).steps["rbfast"]
    for _ in range(3):
        step()
    settle()
    return step


def _between_marks(step: Step) -> None:
    marks = torch.cuda.profiler.profile() if torch.cuda.is_available() else None
    if marks is None:
        step()
        return
    with marks:
        step()
        settle()


def top_kernels(step: Step, count: int) -> str:
    """A line (ms, calls, name) for each of the kernels, or ops without a GPU, that take most of a step's time."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        step()
        settle()
    events = [event for event in found.key_averages() if not on_gpu or event.device_type.name == "CUDA"]
    times = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event) for event in events]
    times.sort(key=lambda pair: -pair[0])
    total = sum(time for time, _ in times)
    lines = [f"{time / 1e3:8.3f} ms {event.count:6d} x  {event.key[:90]}" for time, event in times[:count] if time > 0]
    return "\n".join([f"{total / 1e3:8.3f} ms in {sum(e.count for _, e in times)} kernels, the first {count}:", *lines])
