"""Waits of the loss for its device, and the cost of a small call on the host."""

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from host_waits import host_waits
from torch import Tensor

import rbfast
from rbfast.loss.distill_loss import DistillLoss
from rbfast.loss.teacher_signal import Dense, TopK

T, H, V, K = 40, 16, 61, 5


def signals(kind: str) -> list:
    g = torch.Generator().manual_seed(0)
    log_p, ids = torch.log_softmax(torch.randn(T, V, generator=g), 1).topk(K)
    logits = torch.randn(T, V, generator=g)
    return {
        "text": [],
        "top-k": [TopK(ids, log_p)],
        "dense": [Dense(torch.randn(T, 8, generator=g), torch.randn(V, 8, generator=g))],
        "mixed": [TopK(ids[:9], log_p[:9], torch.arange(9)), Dense(logits=logits[:7], rows=torch.arange(12, 19))],
    }[kind]


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [0, 8])
@pytest.mark.parametrize("kind", ["text", "top-k", "dense", "mixed"])
def test_loss_waits_at_most_once_and_never_with_rows_given(kind, ignored, reduction, trained_head, monkeypatch):
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.randint(V, (T,), generator=g)
    labels[T - ignored :] = -100
    rows = torch.nonzero(labels >= 0).squeeze(1)
    parameters = {"kl_weight": torch.rand(T, generator=g), "ce_weight": 0.3, "temperature": 1.5}

    def run(**known: Tensor) -> tuple[list[str], list[Tensor]]:
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained_head)]
        upstream = torch.ones(T) if reduction == "none" else torch.ones(())
        with host_waits(monkeypatch) as waits:
            out = DistillLoss(reduction=reduction)(*inputs, labels, signals(kind), **parameters, **known)
            out.loss.backward(upstream)
        return waits.found, [out.loss.detach(), out.divergence, out.ce, *(x.grad for x in inputs if x.requires_grad)]

    waited, values = run()
    assert len(waited) <= 1, waited
    waited_with_rows, same = run(rows=rows)
    assert waited_with_rows == []
    assert all(map(torch.equal, values, same))


# Launches of a call, forward and backward, with its rows given and without. Each costs the host more than the device.
MOST_LAUNCHES = {
    ("text", 0): (8, 13),
    ("top-k", 0): (8, 25),
    ("dense", 0): (9, 14),
    ("top-k", 8): (18, 36),
    ("mixed", 8): (29, 55),
}


@pytest.mark.parametrize("kind, ignored", MOST_LAUNCHES)
def test_small_call_makes_few_launches(kind, ignored, monkeypatch):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, H, generator=g).requires_grad_()
    weight = torch.randn(V, H, generator=g).requires_grad_()
    labels = torch.randint(V, (T,), generator=g)
    labels[T - ignored :] = -100
    rows, teacher = torch.nonzero(labels >= 0).squeeze(1), signals(kind)
    for known, most in zip(({"rows": rows}, {}), MOST_LAUNCHES[kind, ignored], strict=True):
        with host_waits(monkeypatch) as calls:
            DistillLoss()(hidden, weight, labels, teacher, ce_weight=0.3, **known).loss.backward()
            hidden.grad = weight.grad = None
        assert calls.launches <= most


MOST_CALLS = 60  # of our functions; torch makes about 40 calls of its own for an empty autograd.Function
OURS = str(Path(rbfast.__file__).parent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_call_runs_three_ops_and_little_else(dtype, monkeypatch):
    hidden, weight = torch.randn(T, H).to(dtype).requires_grad_(), torch.randn(V, H).to(dtype)
    labels, rows, (teacher,) = torch.zeros(T, dtype=torch.int64), torch.arange(T), signals("top-k")
    loss_fn, calls = DistillLoss(), 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(OURS)

    with host_waits(monkeypatch) as recorded:
        loss_fn(hidden, weight, labels, teacher, ce_weight=0.3, rows=rows).loss.backward()
    # The forward of the head, the rows, the backward of the head; autograd's first gradient, and the product with it.
    assert recorded.launches <= 5
    try:
        sys.setprofile(count)
        loss_fn(hidden, weight, labels, teacher, ce_weight=0.3, rows=rows).loss.backward()
    finally:
        sys.setprofile(None)
    assert 10 < calls <= MOST_CALLS
