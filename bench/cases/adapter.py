"""One training step of SmolLM2-135M at 1,024 tokens on a CPU: frozen, with the adapter folded, with PEFT's adapters.

Frozen means frozen weights and inputs that require grad, so that dX flows through every layer: what any adapter needs.
The others include their optimizer step (fused AdamW, as in transformers' Trainer), and the folded adapter its fold. The
output is the last hidden state: a head and a loss would cost every contestant the same and only bring the ratios closer
to 1. Weights are bf16, or fp32 on a CPU that cannot multiply bf16.
"""

import torch
from harness import Step, absent
from peers.adapters import ADAPTERS, fresh_student, trained
from registry import Bar, Case, Contest, Place
from torch import nn

from cases.step import train


def make_step(who: str, tokens: int) -> tuple[Step, int]:
    """One training step, and the number of values it trains."""
    torch.manual_seed(0)
    model, _ = fresh_student()
    embedded = model.get_input_embeddings()(torch.randint(model.config.vocab_size, (1, tokens)))
    parameters: list[nn.Parameter] = [] if who == "frozen" else trained(ADAPTERS[who](model))
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    return train(model, parameters, embedded.requires_grad_()), sum(parameter.numel() for parameter in parameters)


def make(place: Place) -> Contest:
    tokens = place.size(1024, 16)
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for who in ("frozen", *ADAPTERS):
        try:
            steps[who], values = make_step(who, tokens)
            notes[who] = f"{values:,} trained values" if values else ""
        except ImportError as error:
            steps[who] = absent(error)
    return Contest(
        f"adapter, training step of SmolLM2-135M, {tokens} tokens, {place.dtype}",
        steps,
        (Bar("rbfast / frozen", "<=", 1.05), Bar("LoRA r=1 - frozen / rbfast - frozen", ">=", 5.0)),
        rounds=25,
        notes=notes,
    )


CASES = [Case("adapter", "step of SmolLM2-135M", make, ("cpu",))]
