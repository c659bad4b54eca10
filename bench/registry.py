"""What is measured: every case has inputs, a floor, rbfast, peers, and bars that rbfast must meet.

    for case in cases("cuda"):
        contest = case.make(Place("cuda", is_toy=False))
        contest.steps["floor"](), contest.steps["rbfast"](), contest.steps["torch.compile"]()

The cases are in bench/cases, one file per group. A floor is a time that nothing can beat: the work's own GEMMs, or a
copy of its bytes; for an adapter it is the frozen model.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from statistics import median
from typing import Any

import torch
from harness import Found, Step

from rbfast.models.student import fast_dtype

GROUPS = (
    "rows",
    "columns",
    "accuracy",
    "fold",
    "products",
    "loss",
    "adapter",
    "step",
    "trainer",
    "teacher",
    "mixture",
)  # the quick ones first
FLOORS = ("floor", "frozen")
_METRICS = {"ms": ("seconds", 1e3), "GB": ("extra_mib", 2**20 / 1e9), "waits": ("waits", 1)}
_PASSES: dict[str, Callable[[float, float], bool]] = {"<=": lambda x, y: x <= y, ">=": lambda x, y: x >= y}


@dataclass(frozen=True)
class Place:
    """Where a case runs. A toy has tiny sizes: it shows that a case works, not how fast it is."""

    device: str
    is_toy: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" or self.is_toy else fast_dtype()

    def size(self, full: int, toy: int) -> int:
        return toy if self.is_toy else full

    def draw(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> torch.Tensor:
        """Normal values, reproducible for a seed, device and shape."""
        generator = torch.Generator(self.device).manual_seed(hash((seed, *shape)) % 2**31)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype or self.dtype)


@dataclass(frozen=True)
class Bar:
    """A limit for rbfast. metric: "rbfast ms", "rbfast GB", "rbfast waits", a value's name, or a ratio of times:
    "floor / rbfast" or "LoRA r=1 - frozen / rbfast - frozen".
    """

    metric: str
    passes: str  # "<=" or ">="
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} {self.passes} {self.limit:g}"

    def judge(self, found: Found, values: Mapping[str, float]) -> tuple[float | None, bool | None]:
        """The metric's value and whether it passes; None and None if a contestant that it names was not measured."""
        value = measured(self.metric, found, values)
        return value, None if value is None else _PASSES[self.passes](value, self.limit)


def measured(metric: str, found: Found, values: Mapping[str, float]) -> float | None:
    """A metric's value, or None if a contestant that it names was not measured."""
    if metric in values:
        return values[metric]
    if " / " in metric:
        above, below = (_seconds(side, found) for side in metric.split(" / "))
        if not above or not below:
            return None
        return median(a / b if b > 0 else math.inf for a, b in zip(above, below, strict=True))  # b may be a difference
    name, _, unit = metric.rpartition(" ")
    if unit not in _METRICS or not found.get(name, {}).get("seconds"):
        return None
    field_name, scale = _METRICS[unit]
    value = found[name][field_name]
    return None if value is None else scale * (median(value) if isinstance(value, list) else value)


def _seconds(side: str, found: Found) -> list[float]:
    """Seconds per round of "NAME" or "NAME - NAME"; empty if one of them was not measured."""
    rounds = [found.get(name, {}).get("seconds", []) for name in side.split(" - ")]
    return [mine - sum(less) for mine, *less in zip(*rounds, strict=True)] if all(rounds) else []


@dataclass
class Contest:
    """A case with its inputs in memory. values: measures everything but times. notes: how a peer's work differs."""

    title: str
    steps: Mapping[str, Step]
    bars: tuple[Bar, ...] = ()
    rounds: int = 7
    is_host_bound: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    values: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Case:
    """`on`: the devices that it is for."""

    group: str
    name: str
    make: Callable[[Place], Contest]
    on: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        return f"{self.group}-" + re.sub(r"[^\w.]+", "-", self.name)


def cases(device: str) -> list[Case]:
    """All cases for a device, group by group."""
    found = [case for group in GROUPS for case in import_module(f"cases.{group}").CASES]
    return [case for case in found if device in case.on]


def is_ours(who: str) -> bool:
    return who in FLOORS or who.startswith("rbfast")
