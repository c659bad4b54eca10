"""divergence_rows_ against the reference in fp64 on every instruction set, and at the extremes."""

from dataclasses import fields, replace

import pytest
import torch
from row_cases import BETAS, EPS32, ROUNDINGS, Rows, make
from torch import Tensor

from rbfast import ops
from rbfast.ops import reference

pytestmark = pytest.mark.usefixtures("isa")
SIZES = ((1, 1), (5, 5), (37, 50), (3001, 2700))  # V, V'


def assert_close_to_fp64(rows: Rows) -> None:
    """No further from the truth than these roundings take it."""
    truth, moved = rows.double().run(reference), rows.nudged().run(reference)
    for ours, exact, other in zip(rows.run(), truth, moved, strict=True):
        assert float((ours - exact).norm()) <= float((other - exact).norm() + ROUNDINGS * EPS32 * exact.norm())
    assert bool((rows.run()[0] >= 0).all())


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("gap", [3.0, 0.1, 0.001])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["dense", "top-k"])
def test_rows_with_a_teacher_match_fp64(kind, beta, size, gap, head):
    rows = make(kind, *size, gap=gap, head=head, beta=beta)
    assert_close_to_fp64(rows)
    assert_close_to_fp64(replace(rows, ce_weight=torch.zeros(9)))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_text_rows_match_fp64(size, head):
    rows = make("text", *size, head=head)
    assert_close_to_fp64(rows)
    assert not rows.run()[0].any()


@pytest.mark.parametrize("kind", ["text", "dense", "top-k"])
def test_gradient_in_place_of_the_logits(kind):
    rows = make(kind, 1000, 1000, head=True)
    divergence, ce, dz = rows.run()
    values = [getattr(rows, field.name) for field in fields(rows)][1:]
    for dtype in (torch.float32, torch.bfloat16):
        logits = rows.logits.clone()
        place = logits.view(dtype)[:, :1000]
        again = ops.divergence_rows_(logits, place, *values)
        assert torch.equal(again[0], divergence) and torch.equal(again[1], ce)
        assert torch.equal(place, dz.to(dtype))
    silent = ops.divergence_rows_(rows.logits.clone(), None, *values)
    assert torch.equal(silent[0], divergence) and torch.equal(silent[1], ce)


@pytest.mark.parametrize("kind", ["text", "dense", "top-k"])
def test_a_row_has_the_same_bits_wherever_it_is(kind, threads):
    rows = make(kind, 1000, 1000)
    truth = rows.run()
    per_row = [field.name for field in fields(rows) if isinstance(getattr(rows, field.name), Tensor)]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for count, part in ((1, order), (3, order), (2, order[:1])):
        threads(count)
        some = replace(rows, **{name: getattr(rows, name)[part] for name in per_row})
        assert all(torch.equal(ours, whole[part]) for ours, whole in zip(some.run(), truth, strict=True))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["dense", "top-k"])
def test_extreme_logits(kind, beta):
    rows = make(kind, 50, 50, beta=beta)
    sign = torch.where(torch.arange(50) % 2 == 0, 1.0, -1.0)
    logits = 1e4 * torch.where(torch.arange(9).unsqueeze(1) % 2 == 0, sign, -sign).contiguous()
    rows = replace(rows, logits=logits)
    if kind == "dense":
        rows = replace(rows, teacher=(1e4 * sign).expand(9, 50).contiguous())
    assert_close_to_fp64(rows)
    assert all(bool(result.isfinite().all()) for result in rows.run())


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_peaked_teacher_and_masked_logits_stay_finite(beta):
    rows = make("dense", 50, 50, beta=beta)
    teacher = torch.full((9, 50), -torch.inf)
    teacher[:, 7] = 3.0
    assert_close_to_fp64(replace(rows, teacher=teacher))
    peaked = make("top-k", 50, beta=beta, k=2)
    certain = torch.tensor([0.0, -torch.inf]).expand(9, 2).contiguous()
    assert_close_to_fp64(replace(peaked, ids=torch.tensor([[7, -1]]).expand(9, 2).contiguous(), logprobs=certain))
    masked = torch.zeros(50)
    masked[3] = -torch.inf
    rows = replace(rows, bias=masked, labels=torch.zeros(9, dtype=torch.int64), teacher=rows.teacher + masked)
    divergence, ce, dz = rows.run()
    assert bool(divergence.isfinite().all()) and bool(ce.isfinite().all()) and not dz[:, 3].any()


def test_reverse_kl_floors_a_teacher_of_zero():
    rows = make("dense", 50, 50, beta=1.0)
    teacher = torch.full((9, 50), -torch.inf)
    teacher[:, 7] = 3.0
    rows = replace(rows, teacher=teacher)
    # What is rounded is a log-prob of -100, times q <= 1 and the row's factor.
    atol = ROUNDINGS * EPS32 * 100 * float((rows.kl_weight * rows.temperature).max())
    for ours, exact in zip(rows.run(), rows.double().run(reference), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=ROUNDINGS * EPS32, atol=atol)


@pytest.mark.parametrize("student_tail", [1e-9, 1e-30])
def test_a_tiny_tail_of_the_student_keeps_its_gradient(student_tail):
    """One column has nearly all the student's mass, the teacher gives it 0.9; elsewhere dz = q_v (1 - 0.1 / q_tail)."""
    V = 1000
    logits = torch.zeros(1, V)
    logits[0, 0] = torch.log(torch.tensor((V - 1) / student_tail))
    one = torch.ones(1)
    rows = Rows(
        logits, torch.zeros(1, dtype=torch.int64), one, 0 * one, one, torch.tensor([[0]]), torch.tensor([[0.9]]).log()
    )
    *_, dz = rows.run()
    assert_close_to_fp64(rows)
    torch.testing.assert_close(dz[0, 1:], torch.full((V - 1,), -0.1 / (V - 1)), rtol=1e-5, atol=0)


def test_a_nan_is_not_hidden():
    for kind in ("text", "dense", "top-k"):
        rows = make(kind, 50, 50)
        rows.logits[0, 20] = torch.nan
        assert bool(rows.run()[1][0].isnan())
        assert not rows.run()[1][1:].isnan().any()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_teacher_row_of_only_minus_inf_is_nan(beta):
    rows = make("dense", 50, 50, beta=beta)
    rows.teacher[4] = -torch.inf
    for ours, exact in zip(rows.run(), rows.double().run(reference), strict=True):
        torch.testing.assert_close(ours.double(), exact, equal_nan=True, rtol=1e-4, atol=1e-5)
    divergence, ce, dz = rows.run()
    assert torch.equal(divergence.isnan(), torch.arange(9) == 4) and bool(ce.isfinite().all())
    assert bool(dz[4].isnan().all()) and bool(dz[:4].isfinite().all()) and bool(dz[5:].isfinite().all())


def test_wrong_arguments_are_named():
    rows = make("top-k")
    for change, message in (
        ({"labels": rows.labels + 37}, r"labels must be in \[0, 37\)"),
        ({"labels": rows.labels.int()}, "labels must be Long"),
        ({"kl_weight": rows.kl_weight[:4]}, "kl_weight must be Float with one entry per row"),
        ({"ids": rows.ids + 37}, r"ids must be in \[-1, 37\)"),
        ({"bias": torch.zeros(36)}, r"bias must be float32 \[37\]"),
        ({"ids": None, "teacher": torch.zeros(8, 37)}, "teacher must be Float with one entry per row"),
    ):
        with pytest.raises(RuntimeError, match=message):
            replace(rows, **change).run()
    with pytest.raises(RuntimeError, match="dz must be float32 or bfloat16"):
        rows.run(dz=torch.zeros(9, 36))


def test_no_rows():
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    divergence, ce, dz = Rows(torch.zeros(0, 37), none, empty, empty, empty).run()
    assert divergence.shape == ce.shape == (0,) and dz.shape == (0, 37)


@pytest.mark.parametrize("kind", ["text", "dense", "top-k"])
def test_opcheck(kind):
    rows = make(kind, head=True)
    values = [getattr(rows, field.name) for field in fields(rows)][1:]
    torch.library.opcheck(ops.divergence_rows_, (rows.logits, torch.zeros(9, 37), *values))
