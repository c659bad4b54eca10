"""DistillLoss forward and backward beside plain torch, torch.compile and the floor: its own GEMMs, in one run.

    pytest bench/bench_loss.py --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds

Frozen head; top-k is k = 20 with the exact tail, dense is a teacher with its own head. The floor is torch.mm of the
shapes that the loss cannot do without: logits and their gradient, and the teacher's logits. All in bf16, or in fp32 on
a CPU that cannot multiply bf16. `ratio` in extra_info is the median time over the floor's. The memory tests measure the
peak of resident memory over what the inputs take, each in its own process, and keep it in extra_info as `extra_MB`.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from rbfast import ops
from rbfast.loss import DistillLoss
from rbfast.models import fast_dtype
from rbfast.signals import Dense, TopK

T, H, V, K = 1024, 576, 49152, 20
DTYPE = fast_dtype()
SIGNALS, PEERS = ("top-k", "dense"), ("floor", "eager", "compile", "rbfast")
GEMMS = {"top-k": 2, "dense": 3}


class Batch:
    """A student [T, H] with a frozen head [V, H], and its teacher's signals."""

    def __init__(self, tokens: int = T) -> None:
        g = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, H, generator=g).to(DTYPE).requires_grad_()
        self.weight = (torch.randn(V, H, generator=g) / 8).to(DTYPE)
        self.labels = torch.randint(V, (tokens,), generator=g)
        self.teacher_hidden = (self.hidden.detach() + 0.3 * torch.randn(tokens, H, generator=g)).to(DTYPE)
        self.teacher_weight = self.weight.clone()
        rows = [torch.log_softmax((x @ self.weight.T).float(), 1).topk(K, 1) for x in self.teacher_hidden.split(64)]
        self.logprobs, self.ids = torch.cat([row.values for row in rows]), torch.cat([row.indices for row in rows])


def plain_dense(batch: Batch) -> Tensor:
    log_p = torch.log_softmax((batch.teacher_hidden @ batch.teacher_weight.T).float(), 1)
    log_q = torch.log_softmax((batch.hidden @ batch.weight.T).float(), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def plain_top_k(batch: Batch) -> Tensor:
    z = (batch.hidden @ batch.weight.T).float()
    total = z.logsumexp(1, keepdim=True)
    log_q = z.gather(1, batch.ids) - total
    log_q_tail = z.scatter(1, batch.ids, -torch.inf).logsumexp(1, keepdim=True) - total
    p = batch.logprobs.exp()
    p_tail = 1 - p.sum(1, keepdim=True)
    value = (p * (batch.logprobs - log_q)).sum(1, keepdim=True) + p_tail * (p_tail.log() - log_q_tail)
    return value.mean()


PLAIN: dict[str, Callable[[Batch], Tensor]] = {"top-k": plain_top_k, "dense": plain_dense}


def step(signal: str, peer: str, batch: Batch) -> Callable[[], object]:
    """One forward and backward of the loss, or the GEMMs alone."""
    if peer == "floor":
        hidden, weight, dz = batch.hidden.detach(), batch.weight, torch.randn(len(batch.hidden), V).to(DTYPE)

        def gemms() -> None:
            torch.mm(hidden, weight.T)
            torch.mm(dz, weight)
            if signal == "dense":
                torch.mm(batch.teacher_hidden, batch.teacher_weight.T)

        return gemms
    if peer == "rbfast":
        loss_fn = DistillLoss()
        dense = Dense(batch.teacher_hidden, batch.teacher_weight)
        teacher = dense if signal == "dense" else TopK(batch.ids, batch.logprobs)
        return lambda: loss_fn(batch.hidden, batch.weight, batch.labels, teacher).loss.backward()
    plain = PLAIN[signal]
    formula = torch.compile(plain, fullgraph=True) if peer == "compile" else plain
    return lambda: formula(batch).backward()


@pytest.fixture(scope="module")
def times() -> dict[tuple[str, str], list[float]]:
    """Seconds of every peer, taken in turn so that a busy moment of the machine meets all of them alike."""
    batch = Batch()
    steps = {(signal, peer): step(signal, peer, batch) for signal in SIGNALS for peer in PEERS}
    for run in steps.values():
        run()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(9):
        for key, run in steps.items():
            batch.hidden.grad = None
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
    return seconds


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_forward_and_backward(benchmark: BenchmarkFixture, times: dict, signal: str, peer: str) -> None:
    ratios = [ours / floor for ours, floor in zip(times[signal, peer], times[signal, "floor"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    benchmark.group = f"DistillLoss {signal} T={T} H={H} V={V} {DTYPE}"
    benchmark.extra_info.update(
        ratio=round(middle, 3),
        ratio_quartiles=(round(low, 3), round(high, 3)),
        seconds=round(statistics.median(times[signal, peer]), 4),
        flops=2 * T * H * V * GEMMS[signal],
        isa=ops.cpu_isa() or "reference",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    print(f"\n{signal:6} {peer:8} {middle:.3f} of the floor [{low:.3f}, {high:.3f}]")
    batch = Batch()
    benchmark.pedantic(step(signal, peer, batch), rounds=5, warmup_rounds=1)


def peak_memory(signal: str, peer: str) -> float:
    """MB of resident memory at the peak of one step over what was resident before it; Linux only."""
    warm, batch = Batch(tokens=16), Batch()
    step(signal, peer, warm)()  # what the libraries allocate once
    run = step(signal, peer, batch)
    status = Path("/proc/self/status")

    def kilobytes(name: str) -> int:
        return int(status.read_text().split(name)[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = kilobytes("VmRSS:")
    run()
    return (kilobytes("VmHWM:") - before) / 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("peer", ("eager", "compile", "rbfast"))
@pytest.mark.parametrize("signal", SIGNALS)
def test_peak_memory(benchmark: BenchmarkFixture, signal: str, peer: str) -> None:
    command = [sys.executable, __file__, signal, peer]
    extra = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    benchmark.group = f"DistillLoss {signal} peak memory"
    benchmark.extra_info["extra_MB"] = extra
    print(f"\n{signal:6} {peer:8} {extra:.0f} MB")
    benchmark.pedantic(lambda: None)


if __name__ == "__main__":
    print(json.dumps(peak_memory(*sys.argv[1:])))
