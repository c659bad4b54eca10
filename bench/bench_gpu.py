"""The GPU ops beside their floors and peers: the loss, its row kernel, the adapter's gradient, and a training step.

    python bench/bench_gpu.py --table docs/gpu.md --json runs/gpu/gpu.json      # what bench/gpu.sh runs

Times are medians of CUDA events over rounds that take everybody in turn: what the GPU takes, the host being ahead of it
unless a call waits for the device. A floor is what the work cannot do without:
its own GEMMs, or a copy of its bytes. A peer that is not installed or a section that fails leaves a line that says so.
`--device cpu --toy` tries the script itself, at sizes of no meaning.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from rbfast import Dense, DistillLoss, SparseAdapter, TopK, ops
from rbfast.utils.files import write_text

Call = Callable[[], object]
AHEAD_CYCLES = 20_000_000  # about 10 ms of a GPU, in which the host launches what is timed
QWEN_14B = ((5120, 5120), (1024, 5120), (1024, 5120), (5120, 5120), (13824, 5120), (13824, 5120), (5120, 13824))


@dataclass(frozen=True)
class Sizes:
    """T tokens, H hidden size, V vocabulary, k of a top-k teacher, copies of a layer, rounds."""

    T: int = 4096
    H: int = 4096
    V: int = 128256
    k: int = 20
    rows: int = 1024
    layers: int = 48
    width: int = 3584  # of a Qwen2.5-7B layer
    density: float = 0.003
    rounds: int = 7


TOY = Sizes(T=32, H=64, V=2048, rows=16, layers=1, width=64, density=0.05, rounds=2)


@dataclass(frozen=True)
class Line:
    """One line of the report. value is in `unit`; bar: the most (or, for a share of bandwidth, the least) it may be."""

    work: str
    who: str
    value: float | None
    unit: str = "ms"
    bar: str = ""
    note: str = ""


class Bench:
    """Where and at which sizes everything is measured, and what came of it."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.lines: list[Line] = []
        self.generator = torch.Generator(device).manual_seed(0)

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def once(self, call: Call) -> float:
        """Milliseconds of one call."""
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - start)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(AHEAD_CYCLES)  # else the first kernels wait for the host, and its time is measured
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def race(self, work: str, calls: dict[str, Call], bar: str = "") -> dict[str, float]:
        """Medians of all calls, taken in turn; the bar is rbfast's. A call that fails leaves a note."""
        times: dict[str, list[float]] = {}
        for who, call in calls.items():
            try:
                for _ in range(2):
                    call()
                times[who] = []
            except Exception as error:  # a peer's failure is a finding, not ours
                self.lines.append(Line(work, who, None, note=f"failed: {type(error).__name__}: {str(error)[:120]}"))
        for _ in range(self.sizes.rounds):
            for who, found in times.items():
                found.append(self.once(calls[who]))
        medians = {who: statistics.median(found) for who, found in times.items()}
        for who, median in medians.items():
            self.lines.append(Line(work, who, median, bar=bar if who == "rbfast" else ""))
        return medians

    def absent(self, work: str, peer: str) -> None:
        self.lines.append(Line(work, peer, None, note="not installed"))


# ---- the loss ----


class Batch:
    """A student with its head, and its teacher's signals; the head may be trained."""

    def __init__(self, bench: Bench, is_trained: bool = False) -> None:
        s = bench.sizes
        self.hidden = bench.draw(s.T, s.H).requires_grad_()
        self.weight = (bench.draw(s.V, s.H) / s.H**0.5).requires_grad_(is_trained)
        self.labels = torch.randint(s.V, (s.T,), generator=bench.generator, device=bench.device)
        self.teacher_hidden = self.hidden.detach() + 0.3 * bench.draw(s.T, s.H)
        self.teacher_weight = self.weight.detach().clone()
        parts = [(x @ self.teacher_weight.T).float() for x in self.teacher_hidden.split(256)]
        top = [torch.log_softmax(z, 1).topk(s.k, 1) for z in parts]
        self.logprobs, self.ids = torch.cat([t.values for t in top]), torch.cat([t.indices for t in top])

    def ours(self, signal: str) -> Call:
        dense = Dense(self.teacher_hidden, self.teacher_weight)
        teacher, loss = dense if signal == "dense" else TopK(self.ids, self.logprobs), DistillLoss()
        return lambda: loss(self.hidden, self.weight, self.labels, teacher, ce_weight=0.1).loss.backward()

    def floor(self, signal: str) -> Call:
        """The GEMMs: logits, dX, and the teacher's logits or dW where there are any; in bf16."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        dz = torch.zeros(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
        gemms = [lambda: torch.mm(hidden, weight.T, out=dz), lambda: torch.mm(dz, weight)]
        if signal == "dense":
            gemms.append(lambda: torch.mm(self.teacher_hidden, self.teacher_weight.T, out=dz))
        if self.weight.requires_grad:
            gemms.append(lambda: torch.mm(dz.T, hidden))
        return lambda: [gemm() for gemm in gemms]


def plain_loss(batch: Batch, signal: str) -> Tensor:
    """What one writes in torch: whole logits, in fp32 after a bf16 product."""
    z = (batch.hidden @ batch.weight.T).float()
    log_q = torch.log_softmax(z, 1)
    ce = 0.1 * torch.nn.functional.nll_loss(log_q, batch.labels)
    if signal == "dense":
        log_p = torch.log_softmax((batch.teacher_hidden @ batch.teacher_weight.T).float(), 1)
        return (log_p.exp() * (log_p - log_q)).sum(1).mean() + ce
    p = batch.logprobs.exp()
    p_tail = (1 - p.sum(1)).clamp_min(1e-9)
    log_q_tail = torch.logsumexp(z.scatter(1, batch.ids, -torch.inf), 1) - torch.logsumexp(z, 1)
    seen = (p * (batch.logprobs - log_q.gather(1, batch.ids))).sum(1)
    return (seen + p_tail * (p_tail.log() - log_q_tail)).mean() + ce


def liger(batch: Batch) -> Call:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    given = (batch.teacher_hidden, batch.teacher_weight, batch.labels)
    return lambda: loss(batch.hidden, batch.weight, *given).backward()


def cut_cross_entropy(batch: Batch) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(batch.hidden, batch.weight, batch.labels).backward()


def bench_loss(bench: Bench) -> None:
    for signal, is_trained, bar in (("top-k", False, "<= 12"), ("top-k", True, "<= 18.5"), ("dense", False, "<= 25")):
        work = f"loss, {signal}, {'trained' if is_trained else 'frozen'} head"
        batch = Batch(bench, is_trained)
        compiled = torch.compile(plain_loss)
        calls: dict[str, Call] = {
            "floor": batch.floor(signal),
            "rbfast": batch.ours(signal),
            "torch": lambda batch=batch, signal=signal: plain_loss(batch, signal).backward(),
            "torch.compile": lambda batch=batch, signal=signal, f=compiled: f(batch, signal).backward(),
        }
        peers = {"Liger-Kernel": liger} if signal == "dense" else {"cut-cross-entropy (CE alone)": cut_cross_entropy}
        for name, make in peers.items():
            try:
                calls[name] = make(batch)
            except ImportError:
                bench.absent(work, name)
        bench.race(work, calls, bar)
        if bench.device == "cuda":
            _workspace(bench, work, batch.ours(signal), batch)


def _workspace(bench: Bench, work: str, call: Call, batch: Batch) -> None:
    """The peak of memory over what is there before and the gradients that stay."""
    batch.hidden.grad = batch.weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    kept = torch.cuda.memory_allocated() - before
    extra = (torch.cuda.max_memory_allocated() - before - kept) / 1e9
    bench.lines.append(Line(work, "rbfast workspace", extra, "GB", "<= 1"))


def bench_rows(bench: Bench) -> None:
    """The row kernel's share of the bandwidth of a copy: it must read fp32 logits once and write a bf16 gradient."""
    s = bench.sizes
    source = torch.empty(s.rows, s.V, device=bench.device)
    target, dz = torch.empty_like(source), torch.empty_like(source, dtype=torch.bfloat16)
    copied = bench.race("copy of fp32 logits", {"torch copy_": lambda: target.copy_(source)})["torch copy_"]
    bandwidth = 2 * source.nbytes / copied
    logits = 3 * bench.draw(s.rows, s.V, dtype=torch.float32)
    teacher, one = logits + 0.1 * bench.draw(s.rows, s.V, dtype=torch.float32), torch.ones(s.rows, device=bench.device)
    labels, ce_weight = torch.zeros(s.rows, dtype=torch.int64, device=bench.device), 0.1 * one
    logprobs, ids = torch.log_softmax(teacher, 1).topk(s.k, 1)
    for name, signal in (("top-k", (ids, logprobs, None)), ("dense", (None, None, teacher))):

        def call(signal: tuple = signal) -> object:
            return ops.divergence_rows_(source, dz, labels, one, ce_weight, one, *signal, None, 0.0, 1.0, None)

        source.copy_(logits)
        took = bench.race(f"row kernel, {name}", {"rbfast": call}).get("rbfast")
        if took is not None:
            moved = source.nbytes * (1.5 if name == "top-k" else 2.5)
            share = 100 * moved / took / bandwidth
            bench.lines.append(Line(f"row kernel, {name}", "share of the copy's bandwidth", share, "%", ">= 85"))


# ---- the adapter ----


def bench_column_grad(bench: Bench) -> None:
    """column_grad for every linear of a Qwen2.5-14B-shaped layer, times its layers; 44M trained values in all."""
    s = bench.sizes
    shapes = QWEN_14B if s.layers > 1 else ((64, 96), (96, 64))
    per_layer = 44_300_000 // 48
    outs, supports = sum(out for out, _ in shapes), sum(features // 8 for _, features in shapes)
    k = max(1, round(per_layer / (outs + supports))) if s.layers > 1 else 2
    made = []
    for out, features in shapes:
        dy, xs = bench.draw(s.T, out), bench.draw(s.T, features // 8)
        A, B = bench.draw(k, features // 8, dtype=torch.float32), bench.draw(out, k, dtype=torch.float32)
        made.append((dy, xs, A, B, 1.0))
    room = torch.empty_like(max((m[0] for m in made), key=Tensor.numel))

    def floor() -> None:
        for dy, *_ in made:
            room.view(-1)[: dy.numel()].view_as(dy).copy_(dy)

    def plain() -> None:
        for dy, xs, A, B, _ in made:
            ((dy @ B.to(dy.dtype)).T @ xs, dy.T @ (xs @ A.to(dy.dtype).T))

    calls: dict[str, Call] = {
        "floor (a copy of dy)": floor,
        "rbfast": lambda: [ops.column_grad(*m) for m in made],
        "torch, bf16": plain,
    }
    medians = bench.race(f"adapter gradient, one layer, k={k}", calls)
    if "rbfast" in medians:
        total = s.layers * medians["rbfast"]
        bench.lines.append(Line(f"adapter gradient, {s.layers} layers", "rbfast", total, bar="<= 6"))


def bench_step(bench: Bench) -> None:
    """Forward and backward of four Qwen2.5-7B-shaped layers: frozen, with the adapter folded, with PEFT's LoRA."""
    from transformers import Qwen2Config, Qwen2Model

    s = bench.sizes
    heads = max(2, s.width // 128)
    config = Qwen2Config(
        vocab_size=1024, hidden_size=s.width, intermediate_size=s.width * 37 // 7, num_hidden_layers=4
    ).to_dict() | {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 7)}

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = Qwen2Model(Qwen2Config(**config)).to(bench.device, torch.bfloat16)
        return model.requires_grad_(False)

    inputs = bench.draw(1, s.T, s.width).requires_grad_()
    gradient = 1e-3 * bench.draw(1, s.T, s.width)

    def step(model: nn.Module, parameters: list[nn.Parameter]) -> Call:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=bench.device == "cuda") if parameters else None

        def call() -> None:
            inputs.grad = None
            model(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(gradient)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return call

    work = "step of four 7B-shaped layers"
    adapted = make()
    adapter = SparseAdapter.attach(adapted, density=s.density, placement="random")
    calls = {"frozen": step(make(), []), "rbfast": step(adapted, list(adapter.parameters()))}
    try:
        from peft import LoraConfig, get_peft_model

        lora = get_peft_model(make(), LoraConfig(r=8, target_modules="all-linear"))  # type: ignore[arg-type]
        calls["PEFT LoRA r=8"] = step(lora, [p for p in lora.parameters() if p.requires_grad])
    except ImportError:
        bench.absent(work, "PEFT LoRA r=8")
    medians = bench.race(work, calls)
    for who in medians.keys() - {"frozen"}:
        over = 100 * (medians[who] / medians["frozen"] - 1)
        bench.lines.append(Line(work, f"{who} over frozen", over, "%", "<= 3" if who == "rbfast" else ""))


def bench_accuracy(bench: Bench) -> None:
    """Relative error of dX in bf16 near the teacher, against fp64 of the same bf16 inputs."""
    s = bench.sizes
    T, V = min(64, s.T), min(32000, s.V)
    hidden, weight = bench.draw(T, s.H).requires_grad_(), bench.draw(V, s.H) / s.H**0.5
    z = hidden.detach().double() @ weight.double().T
    teacher = z + 0.02 * torch.randn(T, V, generator=bench.generator, device=bench.device, dtype=torch.float64)
    labels = torch.zeros(T, dtype=torch.int64, device=bench.device)
    DistillLoss(reduction="sum")(hidden, weight, labels, Dense(logits=teacher.float())).loss.backward()
    exact = (torch.softmax(z, 1) - torch.softmax(teacher.float().double(), 1)) @ weight.double()
    assert hidden.grad is not None
    error = 100 * float((hidden.grad.double() - exact).norm() / exact.norm())
    bench.lines.append(Line("gradient error, gap 0.02", "rbfast", error, "%", "<= 0.3"))


# ---- the report ----

SECTIONS = (bench_accuracy, bench_rows, bench_column_grad, bench_step, bench_loss)  # the longest last


def environment(device: str) -> dict[str, str]:
    found = {"date": date.today().isoformat(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    found["card"] = torch.cuda.get_device_name() if device == "cuda" else "none: a dry run on the CPU"
    found["column_grad runs as"] = ops.implementations(device)["column_grad"]
    for package in ("triton", "transformers", "liger-kernel", "cut-cross-entropy", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def markdown(facts: dict[str, str], sizes: Sizes, lines: list[Line]) -> str:
    text = ["# On a GPU", "", "Made by `bash bench/gpu.sh`: medians of one run, everybody in turn.", ""]
    text += [f"- {name}: {value}" for name, value in facts.items()]
    text += [f"- sizes: {', '.join(f'{name}={value}' for name, value in asdict(sizes).items())}", ""]
    text += ["| work | who | value | bar | |", "| --- | --- | --- | --- | --- |"]
    for line in lines:
        value = "-" if line.value is None else f"{line.value:.3g} {line.unit}"
        text.append(f"| {line.work} | {line.who} | {value} | {line.bar} | {line.note} |")
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="sizes of no meaning")
    parser.add_argument("--table", type=Path, required=True, help="markdown file to write")
    parser.add_argument("--json", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    bench = Bench(args.device, TOY if args.toy else Sizes())
    failed = []
    for section in SECTIONS:
        try:
            section(bench)
        except Exception as error:  # the other sections are still worth having; the exit status says what happened
            traceback.print_exc()
            failed.append(section.__name__)
            bench.lines.append(Line(section.__name__, "", None, note=f"failed: {str(error)[:120]}"))
        if args.device == "cuda":
            torch.cuda.empty_cache()
        facts = environment(args.device)
        record = {"environment": facts, "sizes": asdict(bench.sizes), "lines": [asdict(line) for line in bench.lines]}
        write_text(args.json, json.dumps(record, indent=1) + "\n")
        write_text(args.table, markdown(facts, bench.sizes, bench.lines))
    print(f"wrote {args.table} and {args.json}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
