"""The row kernel: fp32 logits in, losses and a bf16 gradient out. The floor is a copy that moves as many bytes.

The share of a copy's bandwidth is the ratio "floor / rbfast".
"""

from functools import partial
from typing import Any

import torch
from harness import Step
from registry import Bar, Case, Contest, Place

from rbfast import ops
from rbfast.loss.chunking import row_width

SHAPES = ((1024, 128256), (4096, 49152))
ODD = (4096, 50257)  # GPT-2's vocabulary, not a multiple of 2
K = 20
# name -> beta, the signal, and the least share of a copy's bandwidth
KINDS = {
    "text": (0.0, "text", 0.80),
    "top-k": (0.0, "top-k", 0.80),
    "dense, forward KL": (0.0, "dense", 0.75),
    "dense, JS": (0.5, "dense", 0.50),
}


def copy_of(n_bytes: int, device: str) -> Step:
    """A copy that moves this many bytes, reads and writes together."""
    source = torch.empty(n_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def step() -> None:
        target.copy_(source)

    return step


def make(place: Place, rows: int, V: int, name: str) -> Contest:
    beta, signal, share = KINDS[name]
    rows, V = place.size(rows, 16), place.size(V, 512)
    width = row_width(V, place.device != "cpu")
    logits = 3 * place.draw(rows, width, dtype=torch.float32)
    teacher = (logits + 0.1 * place.draw(rows, width, dtype=torch.float32, seed=1))[:, :V]
    logits = logits[:, :V]
    one = torch.ones(rows, device=place.device)
    labels = torch.zeros(rows, dtype=torch.int64, device=place.device)
    dz = logits.new_empty(rows, width, dtype=torch.bfloat16)[:, :V]
    given: tuple[Any, Any, Any] = (None, None, None)
    if signal == "top-k":
        logprobs, ids = torch.log_softmax(teacher, 1).topk(K, 1)
        given = (ids, logprobs, None)
    elif signal == "dense":
        given = (None, None, teacher)
    moved = logits.nbytes + dz.nbytes + (logits.nbytes if signal == "dense" else 0)

    def ours() -> None:
        ops.divergence_rows_(logits, dz, labels, one, 0.1 * one, one, *given, None, beta, 1.0, None)

    return Contest(
        f"rows, {name}, {rows} x {V}",
        {"floor": copy_of(moved, place.device), "rbfast": ours},
        (Bar("floor / rbfast", ">=", share),) if place.device == "cuda" else (),
        rounds=20,
        facts={"bytes": moved},
    )


CASES = [
    Case("rows", f"{name}, {rows} x {V}", partial(make, rows=rows, V=V, name=name), ("cuda",))
    for name in KINDS
    for rows, V in (*SHAPES, *([ODD] if name in ("top-k", "dense, forward KL") else []))
]
