"""DistillLoss forward and backward beside its peers and the floor: its own GEMMs, in one run.

    pytest bench/bench_loss.py --benchmark-json=runs/bench/loss.json

Frozen head; top-k is k = 20 with the exact tail, dense is a teacher with its own head. The floor is torch.mm of the
shapes that the loss cannot do without: logits and their gradient, and the teacher's logits. All in bf16, or in fp32 on
a CPU that cannot multiply bf16. The widest head gets fewer tokens and large vocabularies fewer rounds, to keep the run
short.
"""

import peers
import pytest
import torch
from measure import TOY, Step, race, versions
from peers import Batch
from pytest_benchmark.fixture import BenchmarkFixture

from rbfast.models.student import fast_dtype

K = 20
SHAPES = {  # a student's head: T, H, V, and rounds
    "SmolLM2-135M": (1024, 576, 49152, 5),
    "Qwen2.5-0.5B": (1024, 896, 151936, 3),
    "Qwen2.5-1.5B": (256, 1536, 151936, 3),
}
if TOY:
    SHAPES = {name: (32, 64, 512, 2) for name in SHAPES}
GEMMS = {"top-k": 2, "dense": 3}


def floor(signal: str, batch: Batch) -> Step:
    """The GEMMs alone, into memory that is there."""
    hidden, dz = batch.hidden.detach(), torch.randn(len(batch.hidden), len(batch.weight)).to(batch.weight.dtype)
    logits = torch.empty_like(dz)

    def step() -> None:
        torch.mm(hidden, batch.weight.T, out=logits)
        torch.mm(dz, batch.weight)
        if signal == "dense":
            torch.mm(batch.teacher_hidden, batch.teacher_weight.T, out=logits)

    return step


def make_step(signal: str, who: str, batch: Batch) -> Step:
    """One forward and backward; what is missing says so when the step runs."""
    loss = None

    def step() -> None:
        nonlocal loss
        loss = loss or peers.SIGNALS[signal][who].load(0.0)
        batch.hidden.grad = None
        loss(batch).backward()

    return step


@pytest.mark.parametrize("signal", GEMMS)
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, signal: str) -> None:
    T, H, V, rounds = SHAPES[name]
    batch = Batch.draw(T, H, V, K, fast_dtype())
    steps = {"floor": floor(signal, batch)} | {who: make_step(signal, who, batch) for who in peers.SIGNALS[signal]}
    read = [batch.hidden, batch.weight] + ([batch.teacher_hidden, batch.teacher_weight] if signal == "dense" else [])
    found = race(
        benchmark,
        f"loss, {signal}, {name} T={T} H={H} V={V} {fast_dtype()}",
        steps,
        rounds,
        flops=2 * T * H * V * GEMMS[signal],
        bytes=sum(x.nbytes for x in read),
        versions=versions(("torch", *peers.PACKAGES)),
    )
    for who, peer in peers.SIGNALS[signal].items():
        found[who]["note"] = peer.note
