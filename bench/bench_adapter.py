"""One training step of SmolLM2-135M at 1,024 tokens: frozen, with the adapter folded, with PEFT's adapters.

    pytest bench/bench_adapter.py -s

Frozen means frozen weights and inputs that require grad, so that dX flows through every layer: what any adapter needs.
The others include their optimizer's step, AdamW fused as transformers' trainer has it (and, folded, the fold). The
output is the last hidden state: a head and a loss would cost everybody the same and only bring the ratios closer to 1.
Weights are bf16, or fp32 on a CPU that cannot multiply bf16.
"""

from statistics import median

import torch
from adapters import ADAPTERS, fresh_student, trained
from measure import TOY, Step, absent, race, versions
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from rbfast.models.student import fast_dtype

TOKENS, ROUNDS = (16 if TOY else 1024), 5


def make_step(who: str) -> tuple[Step, int]:
    """One training step, and how many values it trains."""
    torch.manual_seed(0)
    model, _ = fresh_student()
    embedded = model.get_input_embeddings()(torch.randint(model.config.vocab_size, (1, TOKENS)))
    inputs, gradient = embedded.requires_grad_(), torch.randn_like(embedded) * 1e-3
    parameters: list[nn.Parameter] = [] if who == "frozen" else trained(ADAPTERS[who](model))
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def step() -> None:
        inputs.grad = None
        model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(gradient)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in parameters)


def test_a_training_step(benchmark: BenchmarkFixture) -> None:
    steps: dict[str, Step] = {}
    values: dict[str, int] = {}
    for who in ("frozen", *ADAPTERS):
        try:
            steps[who], values[who] = make_step(who)
        except ImportError as error:
            steps[who] = absent(error)
    group = f"adapter, training step of SmolLM2-135M, {TOKENS} tokens, {fast_dtype()}"
    found = race(benchmark, group, steps, ROUNDS, versions=versions(("torch", "transformers", "peft")))
    for who, entry in found.items():
        if "seconds" in entry:
            entry["trained_values"] = values[who]

    def over_frozen(who: str) -> float:
        pairs = zip(found[who]["seconds"], found["frozen"]["seconds"], strict=True)
        return median(mine / frozen for mine, frozen in pairs) - 1

    if not TOY:
        assert over_frozen("rbfast") <= 0.05
        assert "seconds" not in found["LoRA r=1"] or over_frozen("rbfast") <= over_frozen("LoRA r=1") / 5
