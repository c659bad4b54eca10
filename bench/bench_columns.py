"""The adapter's ops in bf16 beside plain torch and the floor (a copy of the bytes each must read or write), in one run.

    pytest bench/bench_columns.py --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds

Each group is one op at one shape; the number in brackets beside a time is its ratio to the fastest of the group.
The group `model` is what one training step of SmolLM2-135M does with 1,024 tokens: its 210 linears, each with its own
memory, so that nothing is in the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from rbfast import ops

TOKENS, SUPPORT, RANK, LAYERS = 1024, 256, 2, 30
LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))  # out, in
SHAPES = tuple(dict.fromkeys(LAYER))


@dataclass(frozen=True)
class Linear:
    x: Tensor
    dy: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    cols: Tensor
    xs: Tensor
    base: Tensor
    room: Tensor  # where the floor copies to


def make(out: int, features: int) -> Linear:
    x = torch.randn(TOKENS, features, dtype=torch.bfloat16)
    dy = torch.randn(TOKENS, out, dtype=torch.bfloat16)
    weight = torch.randn(out, features, dtype=torch.bfloat16)
    cols = torch.randperm(features)[:SUPPORT].sort().values
    A, B = torch.randn(RANK, SUPPORT), torch.randn(out, RANK)
    room = torch.empty(max(TOKENS, out) * max(out, features, SUPPORT), dtype=torch.bfloat16)
    return Linear(x, dy, weight, A, B, cols, x[:, cols], weight[:, cols], room)


def copy(source: Tensor, target: Tensor) -> None:
    target[: source.numel()].view_as(source).copy_(source)


def plain_grad(p: Linear) -> tuple[Tensor, Tensor]:
    """What one writes without thinking of memory: bf16 matrix products, dy read twice."""
    A, B = p.A.bfloat16(), p.B.bfloat16()
    return (p.dy @ B).T @ p.xs, p.dy.T @ (p.xs @ A.T)


def plain_fold(p: Linear) -> None:
    p.weight[:, p.cols] = (p.base.float() + p.B @ p.A).bfloat16()


# op -> who -> the call; the floor of a gather is its result's bytes, of a gradient dy's, of a fold the columns'.
CALLS: dict[str, dict[str, Callable[[Linear], object]]] = {
    "column_gather": {
        "rbfast": lambda p: ops.column_gather(p.x, p.cols),
        "torch": lambda p: p.x.index_select(1, p.cols),
        "floor": lambda p: copy(p.xs, p.room),
    },
    "column_grad": {
        "rbfast": lambda p: ops.column_grad(p.dy, p.xs, p.A, p.B, 1.0),
        "torch": plain_grad,
        "floor": lambda p: copy(p.dy, p.room),
    },
    "column_fold_": {
        "rbfast": lambda p: ops.column_fold_(p.weight, p.base, p.cols, p.A, p.B, 1.0),
        "torch": plain_fold,
        "floor": lambda p: copy(p.base, p.room),
    },
}
BYTES: dict[str, Callable[[Linear], int]] = {
    "column_gather": lambda p: 2 * p.xs.nbytes,
    "column_grad": lambda p: p.dy.nbytes + 2 * p.xs.nbytes,
    "column_fold_": lambda p: 2 * p.base.nbytes,
}


def measure(benchmark: BenchmarkFixture, group: str, linears: list[Linear], names: tuple[str, ...], who: str) -> None:
    calls = [CALLS[name][who] for name in names]

    def step() -> None:
        for linear in linears:
            for call in calls:
                call(linear)

    benchmark.group = group
    benchmark.extra_info.update(
        isa=ops.cpu_isa() or "reference",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        bytes=sum(BYTES[name](linear) for name in names for linear in linears),
    )
    benchmark.pedantic(step, rounds=max(20, 400 // len(linears)), warmup_rounds=3)


@pytest.mark.parametrize("who", ("rbfast", "torch", "floor"))
@pytest.mark.parametrize("out, features", SHAPES)
@pytest.mark.parametrize("name", CALLS)
def test_one_linear(benchmark: BenchmarkFixture, name: str, out: int, features: int, who: str) -> None:
    group = f"{name} T={TOKENS} {out}x{features} s={SUPPORT} k={RANK}"
    measure(benchmark, group, [make(out, features)], (name,), who)


@pytest.fixture(scope="module")
def model() -> list[Linear]:
    return [make(*shape) for _ in range(LAYERS) for shape in LAYER]


@pytest.mark.parametrize("who", ("rbfast", "torch", "floor"))
@pytest.mark.parametrize("names", (("column_gather", "column_grad"), ("column_fold_",)), ids="+".join)
def test_model(benchmark: BenchmarkFixture, model: list[Linear], names: tuple[str, ...], who: str) -> None:
    measure(benchmark, "model " + "+".join(names), model, names, who)
