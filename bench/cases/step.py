"""Forward, backward and optimizer's step of four Qwen2.5-7B-shaped layers: frozen, adapted, with PEFT's LoRA; on a GPU.

Frozen means frozen weights and inputs that require grad, so that dX flows through every layer: what any adapter needs.
"""

from collections.abc import Callable, Iterable

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

    return contest(place, f"step of four 7B-shaped layers, T={T}", model, T, 8, (Bar("rbfast / frozen", "<=", 1.08),))


def contest(
    place: Place, title: str, model: Callable[[], nn.Module], T: int, rank: int, bars: tuple[Bar, ...] = ()
) -> Contest:
    """Each contestant has its own model; `rank` is LoRA's."""
    frozen, adapted, with_lora, peer = model(), model(), model(), f"LoRA r={rank}"
    adapter = SparseAdapter.attach(adapted, placement="random", **density(place))
    inputs = place.draw(1, T, frozen.config.hidden_size).requires_grad_()
    ours = list(adapter.parameters())
    steps = {"frozen": train(frozen, [], inputs), "rbfast": train(adapted, ours, inputs)}
    supports = sorted({m.columns for m in adapter.summary()})
    notes = {"rbfast": f"{_values(ours):,} values, supports {supports[0]} to {supports[-1]}"}
    try:
        theirs = lora(with_lora, rank)
        steps[peer], notes[peer] = train(with_lora, theirs, inputs), f"{_values(theirs):,} values"
    except ImportError as error:
        steps[peer] = absent(error)
    return Contest(title, steps, (*bars, Bar(f"{peer} / rbfast", ">=", 1.0)), rounds=7, notes=notes)


def _values(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


CASES = [Case("step", "four 7B-shaped layers", make, ("cuda",))]
