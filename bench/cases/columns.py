"""The adapter's ops in bf16 beside plain torch and the floor: a copy of the bytes each must read or write.

On a CPU: the linears of SmolLM2-135M with 1,024 tokens, one by one, and `model`: the work of one training step on all
210 of them, each with its own memory, so that nothing is in the cache. On a GPU: a linear of a 14B and of a 7B model
with 4,096 tokens, and the gradient of all linears of the 14B.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from harness import Step, in_turn
from registry import Bar, Case, Contest, Place
from torch import Tensor

from rbfast import ops

RUN = 16  # supports come in aligned runs of this many columns
CACHE = 256 * 2**20  # inputs are rotated until together they are larger than any cache
SMOLLM2 = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))  # out, in
# The outputs that share an input, and its width: q, k and v; o; gate and up; down.
QWEN_14B = (((5120, 1024, 1024), 5120), ((5120,), 5120), ((13824, 13824), 5120), ((5120,), 13824))
LAYERS_14B, VALUES_14B = 48, 44_300_000  # trained values at the default density


@dataclass(frozen=True)
class Linear:
    """The operands of one matrix's ops. xs: columns of x. base: columns of the weight. room: a floor's target."""

    x: Tensor
    y: Tensor
    dy: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    cols: Tensor
    xs: Tensor
    base: Tensor
    room: Tensor

    @classmethod
    def draw(cls, place: Place, T: int, out: int, features: int, s: int, k: int) -> "Linear":
        bf16 = partial(place.draw, dtype=torch.bfloat16)
        fp32 = partial(place.draw, dtype=torch.float32)
        x, dy, weight = bf16(T, features), bf16(T, out), bf16(out, features, seed=1)
        cols = columns(features, s).to(place.device)
        room = torch.empty(max(x.numel(), dy.numel(), weight.numel()), dtype=torch.bfloat16, device=place.device)
        B = fp32(out, k)
        return cls(x, dy.clone(), dy, weight, fp32(k, s), B, cols, x[:, cols], weight[:, cols], room)


def columns(features: int, s: int) -> Tensor:
    """s columns in aligned runs, as in a support."""
    runs = torch.randperm(features // RUN, generator=torch.Generator().manual_seed(0))[: s // RUN].sort().values
    return (runs[:, None] * RUN + torch.arange(RUN)).flatten()


@cache
def in_runs(name: str) -> dict[str, Any]:
    """The `run` argument, if the op takes one."""
    schema = getattr(torch.ops.rbfast, name).default._schema
    return {"run": RUN} if any(argument.name == "run" for argument in schema.arguments) else {}


def copy(source: Tensor, target: Tensor) -> None:
    target[: source.numel()].view_as(source).copy_(source)


def plain_grad(p: Linear) -> tuple[Tensor, Tensor]:
    """The straightforward code: bf16 matrix products, which read dy twice."""
    A, B = p.A.bfloat16(), p.B.bfloat16()
    return (p.dy @ B).T @ p.xs, p.dy.T @ (p.xs @ A.T)


def plain_linear(p: Linear) -> None:
    p.y.add_((p.xs @ p.A.bfloat16().T) @ p.B.bfloat16().T)


def plain_scatter(p: Linear) -> None:
    p.x.index_add_(1, p.cols, (p.dy @ p.B.bfloat16()) @ p.A.bfloat16())


def plain_fold(p: Linear) -> None:
    p.weight.index_copy_(1, p.cols, (p.base.float() + p.B @ p.A).bfloat16())


# op -> contestant -> call. The floor copies the result of a gather, dy for a gradient and a scatter, and the output of
# the others.
CALLS: dict[str, dict[str, Callable[[Linear], object]]] = {
    "column_gather": {
        "floor": lambda p: copy(p.xs, p.room),
        "rbfast": lambda p: ops.column_gather(p.x, p.cols, **in_runs("column_gather")),
        "torch": lambda p: p.x.index_select(1, p.cols),
    },
    "column_grad": {
        "floor": lambda p: copy(p.dy, p.room),
        "rbfast": lambda p: ops.column_grad(p.dy, p.xs, p.A, p.B, 1.0),
        "torch": plain_grad,
    },
    "column_linear_": {
        "floor": lambda p: copy(p.y, p.room),
        "rbfast": lambda p: ops.column_linear_(p.y, p.xs, p.A, p.B, 1e-3),
        "torch": plain_linear,
    },
    "column_scatter_": {
        "floor": lambda p: copy(p.dy, p.room),
        "rbfast": lambda p: ops.column_scatter_(p.x, p.dy, p.cols, p.A, p.B, 1e-3, **in_runs("column_scatter_")),
        "torch": plain_scatter,
    },
    "column_fold_": {
        "floor": lambda p: copy(p.base, p.room),
        "rbfast": lambda p: ops.column_fold_(p.weight, p.base, p.cols, p.A, p.B, 1.0, **in_runs("column_fold_")),
        "torch": plain_fold,
    },
}


# The bytes that an op must read and write.
TOUCHES: dict[str, Callable[[Linear], int]] = {
    "column_gather": lambda p: 2 * p.xs.nbytes,
    "column_grad": lambda p: p.dy.nbytes,
    "column_linear_": lambda p: p.y.nbytes,
    "column_scatter_": lambda p: p.dy.nbytes + 2 * p.xs.nbytes,
    "column_fold_": lambda p: 2 * p.base.nbytes,
}


def one_linear(place: Place, name: str, shape: tuple[int, ...], rounds: int, bars: tuple[Bar, ...] = ()) -> Contest:
    T, out, features, s, k = (32, 48, 64, 32, 2) if place.is_toy else shape
    made = [Linear.draw(place, T, out, features, s, k)]
    if place.device == "cuda":
        made += [Linear.draw(place, T, out, features, s, k) for _ in range(CACHE // TOUCHES[name](made[0]))]
    steps = {who: in_turn([partial(call, p) for p in made]) for who, call in CALLS[name].items()}
    facts = {"bytes": TOUCHES[name](made[0])}
    return Contest(f"{name}, T={T} {out}x{features} s={s} k={k}", steps, bars, rounds, facts=facts)


def every(calls: list[Callable[[Linear], object]], linears: list[Linear], times: int = 1) -> Step:
    def step() -> None:
        for linear in linears * times:
            for call in calls:
                call(linear)

    return step


def whole_model(place: Place, names: tuple[str, ...]) -> Contest:
    T, layers = place.size(1024, 32), place.size(30, 1)
    linears = [Linear.draw(place, T, *shape, 256, 2) for _ in range(layers) for shape in SMOLLM2]
    steps = {who: every([CALLS[name][who] for name in names], linears) for who in CALLS[names[0]]}
    return Contest(f"{' and '.join(names)} of all linears of SmolLM2-135M, T={T} s=256 k=2", steps, rounds=20)


def gradient_of_14b(place: Place) -> Contest:
    T, layers = place.size(4096, 32), place.size(LAYERS_14B, 1)
    inputs = (((64, 32), 128), ((128,), 64)) if place.is_toy else QWEN_14B
    cost = sum(out + features // 8 for outs, features in inputs for out in outs)
    k = place.size(round(VALUES_14B / LAYERS_14B / cost), 2)
    groups = [
        [Linear.draw(place, T, out, features, features // 8 // RUN * RUN, k) for out in outs]
        for outs, features in inputs
    ]
    groups = [[replace(linear, xs=group[0].xs) for linear in group] for group in groups]

    def together() -> None:
        for group in groups * layers:
            dy, A, B = ([getattr(linear, name) for linear in group] for name in ("dy", "A", "B"))
            ops.column_grad_all(dy, group[0].xs, A, B, 1.0)

    linears = [linear for group in groups for linear in group]
    alone = {who: every([call], linears, layers) for who, call in CALLS["column_grad"].items()}
    steps = alone | {"rbfast": together, "rbfast, one by one": alone["rbfast"]}
    title = f"column_grad of all linears of a 14B, T={T} s=in/8 k={k}"
    return Contest(title, steps, (Bar("rbfast ms", "<=", 14.0),), rounds=5)


def _on_cpu() -> Iterator[Case]:
    for name in ("column_gather", "column_grad", "column_fold_"):
        for out, features in dict.fromkeys(SMOLLM2):
            shape = (1024, out, features, 256, 2)
            yield Case(
                "columns", f"{name} {out}x{features}", partial(one_linear, name=name, shape=shape, rounds=200), ("cpu",)
            )
    for names in (("column_gather", "column_grad"), ("column_fold_",)):
        yield Case("columns", f"model, {' and '.join(names)}", partial(whole_model, names=names), ("cpu",))


def _on_gpu() -> Iterator[Case]:
    for name in CALLS:
        shape = (4096, 18944, 3584, 448, 15)
        yield Case("columns", f"{name} 7B", partial(one_linear, name=name, shape=shape, rounds=20), ("cuda",))
    shape, bar = (4096, 13824, 5120, 640, 18), Bar("rbfast ms", "<=", 0.12)
    made = partial(one_linear, name="column_grad", shape=shape, rounds=20, bars=(bar,))
    yield Case("columns", "column_grad 14B", made, ("cuda",))
    yield Case("columns", "gradient of a 14B", gradient_of_14b, ("cuda",))


CASES = [*_on_cpu(), *_on_gpu()]
