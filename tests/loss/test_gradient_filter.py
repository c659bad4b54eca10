"""The gradient filter: its error stays within the bound that it reports."""

import math

import pytest
import torch
from plain_losses import relative_error

from rbfast import ops
from rbfast.loss.distill_loss import DistillLoss
from rbfast.loss.teacher_signal import Dense, TopK


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_filtered_gradient_error_is_within_its_bound(dtype, head_trains, reduction, monkeypatch):
    if ops.cpu_isa() == "amx":  # AMX does not filter bf16
        monkeypatch.setenv("RBFAST_CPU_ISA", "avx512_bf16")
    T, H, V = 60, 24, 3000
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).to(dtype) for shape in ((T, H), (V, H)))
    labels, row_weight = torch.randint(V, (T,), generator=g), torch.rand(T, generator=g)
    labels[7] = -100
    log_p, ids = torch.log_softmax(3 * torch.randn(T, V, generator=g), 1).topk(20)
    signals = [
        TopK(ids[:40], log_p[:40], torch.arange(40)),
        Dense(logits=3 * torch.randn(20, V), rows=torch.arange(40, T)),
    ]

    def solve(share: float) -> tuple:
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(head_trains)]
        loss_fn = DistillLoss(reduction=reduction, gradient_filter=share, softcap=9.0, chunk_rows=32)
        out = loss_fn(*inputs, labels, signals, kl_weight=row_weight, ce_weight=0.5, temperature=0.7)
        out.loss.sum().backward()
        return out, inputs[0].grad.double(), inputs[1].grad

    exact, d_hidden, d_weight = solve(0.0)
    assert exact.hidden_grad_error_bound is None
    rows = 59 if reduction == "mean" else 1
    for share in (0.003, 0.02, 0.1):
        out, filtered, d_weight_too = solve(share)
        assert torch.equal(out.loss, exact.loss) and torch.equal(out.divergence, exact.divergence)
        assert not head_trains or torch.equal(d_weight_too, d_weight)
        assert not out.hidden_grad_error_bound.requires_grad
        error = (filtered - d_hidden).norm(dim=1)
        rounding = 2**-8 * d_hidden.norm(dim=1) if dtype == torch.bfloat16 else 1e-5
        assert bool((error <= out.hidden_grad_error_bound / rows + rounding).all())
        assert float(out.hidden_grad_error_bound[7]) == 0 and bool((out.hidden_grad_error_bound[labels >= 0] > 0).all())
        assert 1e-4 * share < relative_error(filtered, d_hidden) < 5 * share + 2**-8


def test_filter_is_skipped_where_it_saves_nothing(monkeypatch):
    monkeypatch.setenv("RBFAST_CPU_ISA", "amx")
    if ops.cpu_isa() != "amx":  # pretend that this CPU has it
        monkeypatch.delenv("RBFAST_CPU_ISA")
        monkeypatch.setattr("rbfast.ops.registry.uses_tiles", lambda hidden, weight: True)
    weight, labels = torch.randn(300, 8).bfloat16(), torch.arange(5)
    hidden = torch.randn(5, 8).bfloat16().requires_grad_()
    gradients = []
    for share in (0.0, 0.3):
        out = DistillLoss(gradient_filter=share)(hidden, weight, labels, ce_weight=1.0)
        gradients += torch.autograd.grad(out.loss, hidden)
        assert out.hidden_grad_error_bound is None if share == 0 else not out.hidden_grad_error_bound.any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_error_bound_is_tight_where_all_dropped_terms_add_up(dtype):
    """All rows of the head are equal and the bias sets the logits, so all dropped terms point the same way."""
    T, H, V = 5, 8, 5000
    direction = torch.linspace(-1, 1, H, dtype=dtype)
    hidden, bias = torch.randn(T, H, dtype=dtype).requires_grad_(), torch.linspace(0, 12, V, dtype=dtype)
    weight, upstream = direction.expand(V, H).contiguous(), torch.linspace(0.1, 3, T, dtype=dtype)
    loss_fn = DistillLoss(reduction="none", gradient_filter=0.02)
    out = loss_fn(hidden, weight, torch.full((T,), V - 1), ce_weight=upstream, head_bias=bias)
    out.loss.sum().backward()
    error = hidden.grad.norm(dim=1)  # the whole gradient is 0: it sums to 0 over the vocabulary
    assert bool((error <= out.hidden_grad_error_bound).all()) and bool(
        (error >= 0.98 * out.hidden_grad_error_bound).all()
    )


def test_filter_accepts_extreme_heads():
    hidden = -torch.rand(4, 8, generator=torch.Generator().manual_seed(0)).half()
    weight = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)).half()
    weight[0] = 6e4  # a norm beyond fp16, and logits far below all others
    labels, loss_fn = torch.tensor([1, -100, 2, 3]), DistillLoss(gradient_filter=0.3)
    assert not bool(
        loss_fn(hidden, weight, labels, ce_weight=1.0).hidden_grad_error_bound.any()
    )  # no gradient, so nothing is dropped
    out = loss_fn(hidden.requires_grad_(), weight, labels, ce_weight=1.0)
    assert out.hidden_grad_error_bound.tolist() == [math.inf, 0.0, math.inf, math.inf]
