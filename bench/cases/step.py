"""Forward, backward and optimizer's step of four Qwen2.5-7B-shaped layers: frozen, adapted, with PEFT's LoRA; on a GPU.

Frozen means frozen weights and inputs that require grad, so that dX flows through every layer: what any adapter needs.
"""

import torch
from harness import Step, absent
from registry import Bar, Case, Contest, Place
from torch import Tensor, nn

from cases.fold import density
from cases.models import lora, qwen
from rbfast.adapter.sparse_adapter import SparseAdapter


def train(model: nn.Module, parameters: list[nn.Parameter], inputs: Tensor) -> Step:
    gradient = 1e-3 * torch.ones_like(inputs)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def step() -> None:
        inputs.grad = None
        model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(gradient)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def make(place: Place) -> Contest:
    T = place.size(4096, 32)

    def model() -> nn.Module:
        return qwen("7B", place, num_hidden_layers=place.size(4, 1), vocab_size=512)

    frozen, adapted = model(), model()
    adapter = SparseAdapter.attach(adapted, placement="random", **density(place))
    width = frozen.config.hidden_size
    inputs = place.draw(1, T, width).requires_grad_()
    steps = {
        "frozen": train(frozen, [], inputs),
        "rbfast": train(adapted, list(adapter.parameters()), inputs),
    }
    with_lora = model()
    try:
        steps["LoRA r=8"] = train(with_lora, lora(with_lora, 8), inputs)
    except ImportError as error:
        steps["LoRA r=8"] = absent(error)
    values = sum(parameter.numel() for parameter in adapter.parameters())
    supports = sorted({m.columns for m in adapter.summary()})
    return Contest(
        f"step of four 7B-shaped layers, T={T}",
        steps,
        (Bar("rbfast / frozen", "<=", 1.08), Bar("LoRA r=8 / rbfast", ">=", 1.0)),
        rounds=7,
        notes={"rbfast": f"{values:,} values, supports {supports[0]} to {supports[-1]}"},
    )


CASES = [Case("step", "four 7B-shaped layers", make, ("cuda",))]
