"""The head's three products on a CPU. The floor is torch's product of the same shape (on a GPU rbfast uses torch's)."""

from collections.abc import Callable
from functools import partial

import torch
from harness import in_turn
from registry import Bar, Case, Contest, Place

from rbfast import ops

SHAPE = (1024, 576, 49152)  # T, H, V: the head of SmolLM2-135M


def make(place: Place, name: str) -> Contest:
    T, H, V = (32, 64, 512) if place.is_toy else SHAPE
    hidden, weight, dz = place.draw(T, H), place.draw(V, H), place.draw(T, V)
    logits, dW = torch.empty(T, V), torch.zeros(V, H)
    room, d_hidden = torch.empty_like(dz), torch.empty(T, H)
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "head_forward_": (
            lambda: torch.mm(hidden, weight.T, out=room),
            lambda: ops.head_forward_(logits, hidden, weight),
        ),
        "head_backward_": (lambda: torch.mm(dz, weight), lambda: ops.head_backward_(d_hidden, dz, weight)),
        "head_grad_": (lambda: torch.mm(dz.T, hidden), lambda: ops.head_grad_(dW, dz, hidden)),
    }
    floor, ours = calls[name]
    return Contest(
        f"{name}, T={T} H={H} V={V} {place.dtype}",
        {"floor": in_turn([floor]), "rbfast": in_turn([ours])},
        (Bar("rbfast / floor", "<=", 1.25),),
        rounds=10,
        facts={"flops": 2 * T * H * V},
    )


CASES = [
    Case("products", name, partial(make, name=name), ("cpu",))
    for name in ("head_forward_", "head_backward_", "head_grad_")
]
