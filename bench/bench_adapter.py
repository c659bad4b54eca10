"""One training step of SmolLM2-135M at 1,024 tokens: frozen, with the adapter folded, with PEFT's LoRA.

    pytest bench/bench_adapter.py -s

Frozen means frozen weights and inputs that require grad, so that dX flows through every layer: what any adapter needs.
The other two include their optimizer's step (and, folded, the fold). LoRA has rank 1, its smallest, which trains fewer
values than the adapter at its default density. The output is the last hidden state: a head and a loss would cost all
three the same and only bring the ratios closer to 1. A round runs the three in turn, so that a drift of the machine
meets all of them; ratios are medians over rounds. Peak memory is that of the steps alone, each in its own process.
Weights are bf16, or fp32 on a CPU that cannot multiply bf16.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from rbfast import ops
from rbfast.adapter import SparseAdapter
from rbfast.models import SMOLLM2, fast_dtype, load_student

TOKENS, THREADS, ROUNDS, DENSITY, LORA_RANK = 1024, 2, 11, 0.003, 1
VARIANTS = ("frozen", "adapter", "lora")


def attach(model: nn.Module, variant: str) -> list[nn.Parameter]:
    if variant == "adapter":
        return list(SparseAdapter.attach(model, DENSITY, placement="random").parameters())
    if variant == "lora":
        from peft import LoraConfig, get_peft_model

        lora = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear"))  # type: ignore[arg-type]
        return [parameter for parameter in lora.parameters() if parameter.requires_grad]
    return []


def make_step(variant: str) -> tuple[Callable[[], None], int]:
    """One training step, and how many values it trains."""
    torch.manual_seed(0)
    model, _ = load_student(SMOLLM2)
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(torch.randint(model.config.vocab_size, (1, TOKENS)))
    inputs, gradient = embedded.requires_grad_(), torch.randn_like(embedded) * 1e-3
    trained = attach(model, variant)
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        inputs.grad = None
        model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(gradient)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in trained)


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def print_peak(variant: str) -> None:
    """Prints the peak resident memory of three steps over what the loaded model holds, in MiB."""
    torch.set_num_threads(THREADS)
    step, _ = make_step(variant)
    held = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for _ in range(3):
        step()
    print(resident_mib("VmHWM") - held)


def peak_mib(variant: str) -> float:
    run = subprocess.run([sys.executable, __file__, variant], stdout=subprocess.PIPE, text=True, check=True)
    return float(run.stdout.split()[-1])


def test_a_training_step(benchmark: BenchmarkFixture) -> None:
    pytest.importorskip("peft")
    torch.set_num_threads(THREADS)
    made = {variant: make_step(variant) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}

    def one_round() -> None:
        for variant, (step, _) in made.items():
            start = time.perf_counter()
            step()
            seconds[variant].append(time.perf_counter() - start)

    benchmark.group = f"training step, SmolLM2-135M, {TOKENS} tokens, {fast_dtype()}"
    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    seconds = {variant: taken[1:] for variant, taken in seconds.items()}  # without the warm-up
    rows = {}
    for variant, taken in seconds.items():
        ratios = [mine / frozen for mine, frozen in zip(taken, seconds["frozen"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        rows[variant] = {
            "median_s": median(taken),
            "to_frozen": median(ratios),
            "to_frozen_quartiles": (low, high),
            "trained_values": made[variant][1],
            "peak_mib": peak_mib(variant),
        }
        print(f"\n{variant:8}", *(f"{key} {value}" for key, value in rows[variant].items()))
    benchmark.extra_info.update(rows, isa=ops.cpu_isa() or "reference", threads=THREADS, torch=torch.__version__)
    assert rows["adapter"]["to_frozen"] <= 1.05
    assert rows["adapter"]["to_frozen"] - 1 <= (rows["lora"]["to_frozen"] - 1) / 5


if __name__ == "__main__":
    print_peak(sys.argv[1])
