"""The CUDA divergence_rows_ against the reference in fp64: on the GPU, or on the host where there is none."""

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from cuda_devices import Gpu, host, real
from row_cases import BETAS, EPS32, ROUNDINGS, Rows, make
from torch import Tensor

from rbfast.ops import reference

pytestmark = pytest.mark.slow

KINDS = ("text", "dense", "top-k")
# Of a divergence's term: two exp2 and a log2 of the special function unit, each within 2^-22, and what they go through.
# JS takes another log2, whose error does not shrink with beta as the term does.
APPROXIMATIONS, APPROXIMATIONS_OF_JS = 16, 32


@pytest.fixture(params=("hopper", "ampere", "starved", "cuda"))
def gpu(request: pytest.FixtureRequest) -> Gpu:
    return real() if request.param == "cuda" else host(request.param)


@dataclass(frozen=True)
class There:
    """A stand-in for the module `ops` whose divergence_rows_ runs on a GPU; takes and gives CPU tensors."""

    gpu: Gpu

    def divergence_rows_(self, logits: Tensor, dz: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        moved = [x.to(self.gpu.device) if isinstance(x, Tensor) else x for x in (logits, dz, *rest)]
        divergence, ce = self.gpu.ops.divergence_rows_(*moved)
        if dz is not None:
            dz.copy_(moved[1])
        return divergence.cpu(), ce.cpu()


def run(gpu: Gpu, rows: Rows, dz: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return rows.run(There(gpu), dz)


def assert_close_to_fp64(gpu: Gpu, rows: Rows) -> None:
    """No further from the truth than the roundings of a logit and of a result take it.

    Of a single id p = q = 1, each within a rounding, and so is their difference; the divergence is of second order.
    """
    has_teacher, is_single = rows.ids is not None or rows.teacher is not None, rows.logits.shape[1] == 1
    approximations = APPROXIMATIONS_OF_JS if 0 < rows.beta < 1 else APPROXIMATIONS
    relative = (approximations if has_teacher else ROUNDINGS) * EPS32
    single = ROUNDINGS * EPS32 * float((rows.kl_weight * rows.temperature + rows.ce_weight).norm())
    least = (single**2, 0.0, single) if is_single and has_teacher else (0.0, 0.0, 0.0)
    truth, moved = rows.double().run(reference), rows.nudged().run(reference)
    results = run(gpu, rows)
    for ours, exact, other, slack in zip(results, truth, moved, least, strict=True):
        assert float((ours - exact).norm()) <= float((other - exact).norm() + relative * exact.norm() + slack)
    assert bool((results[0] >= 0).all())


def in_place(gpu: Gpu, rows: Rows, dtype: torch.dtype, ahead: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """With dz over the logits, as the loss does it; `ahead` floats lie before each row, and behind the last."""
    T, V = rows.logits.shape
    room = torch.full((T * (V + ahead) + ahead,), 7.0, device=gpu.device)
    lines = room[ahead:].view(T, V + ahead)
    logits, dz = lines[:, :V], lines.view(dtype)[:, :V]
    logits.copy_(rows.logits)
    values = [getattr(rows, field.name) for field in fields(rows)][1:]
    moved = [x.to(gpu.device) if isinstance(x, Tensor) else x for x in values]
    divergence, ce = gpu.ops.divergence_rows_(logits, dz, *moved)
    assert bool((room[:ahead] == 7).all()) and bool((lines[:, V:] == 7).all()), "written outside the rows"
    return divergence.cpu(), ce.cpu(), dz.cpu()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("gap", [3.0, 0.1, 0.001])
@pytest.mark.parametrize("size", [(1, 1), (5, 5), (37, 50), (3001, 2700)])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["dense", "top-k"])
def test_rows_with_a_teacher_match_fp64(gpu: Gpu, kind: str, beta: float, size: tuple, gap: float, head: bool) -> None:
    rows = make(kind, *size, gap=gap, head=head, beta=beta)
    assert_close_to_fp64(gpu, rows)


@pytest.mark.parametrize("kind", ["dense", "top-k"])
@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_alone_matches_fp64(gpu: Gpu, kind: str, beta: float) -> None:
    rows = replace(make(kind, 3001, 2700, beta=beta), ce_weight=torch.zeros(9))
    assert_close_to_fp64(gpu, rows)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("V", [1, 5, 37, 3001])
def test_text_rows_match_fp64(gpu: Gpu, V: int, head: bool) -> None:
    rows = make("text", V, head=head)
    assert_close_to_fp64(gpu, rows)
    assert not run(gpu, rows)[0].any()


@pytest.mark.parametrize("kind, beta", [("text", 0.0), ("top-k", 0.0), *(("dense", beta) for beta in (0.0, 0.3, 1.0))])
def test_a_large_vocabulary(gpu: Gpu, kind: str, beta: float) -> None:
    """More than a team keeps on the small devices, and a dense teacher on all."""
    rows = make(kind, 152_064, 152_064, gap=0.1, k=20, beta=beta)
    per_row = [field.name for field in fields(rows) if isinstance(getattr(rows, field.name), Tensor)]
    rows = replace(rows, **{name: getattr(rows, name)[2:4].contiguous() for name in per_row})
    assert_close_to_fp64(gpu, rows)
    apart = run(gpu, rows)
    for dtype in (torch.float32, torch.bfloat16):
        over = in_place(gpu, rows, dtype)
        assert torch.equal(over[0], apart[0]) and torch.equal(over[1], apart[1])
        assert torch.equal(over[2], apart[2].to(dtype))


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
@pytest.mark.parametrize("V", [1000, 5003, 11_000, 20_000])
@pytest.mark.parametrize("kind, beta", [("text", 0.0), ("top-k", 0.0), ("dense", 0.0), ("dense", 0.5)])
def test_gradient_in_place_of_the_logits(gpu: Gpu, kind: str, beta: float, V: int, ahead: int) -> None:
    """At every alignment of a row; nothing between the rows is touched."""
    rows = make(kind, V, V, head=True, beta=beta)
    apart = run(gpu, rows)
    for dtype in (torch.float32, torch.bfloat16):
        over = in_place(gpu, rows, dtype, ahead)
        assert torch.equal(over[0], apart[0]) and torch.equal(over[1], apart[1])
        assert torch.equal(over[2], apart[2].to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gradient(gpu: Gpu, kind: str) -> None:
    rows = make(kind, 3001, 3001, head=True)
    values = [getattr(rows, field.name) for field in fields(rows)][1:]
    divergence, ce = There(gpu).divergence_rows_(rows.logits.clone(), None, *values)
    with_gradient = run(gpu, rows)
    assert torch.equal(ce, with_gradient[1])
    torch.testing.assert_close(divergence, with_gradient[0], rtol=ROUNDINGS * EPS32, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_wherever_it_is(gpu: Gpu, kind: str) -> None:
    rows = make(kind, 5003, 5003)
    truth = run(gpu, rows)
    per_row = [field.name for field in fields(rows) if isinstance(getattr(rows, field.name), Tensor)]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for part in (order, order[:1], order[3:5]):
        some = replace(rows, **{name: getattr(rows, name)[part] for name in per_row})
        assert all(torch.equal(ours, whole[part]) for ours, whole in zip(run(gpu, some), truth, strict=True))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["dense", "top-k"])
def test_extreme_logits(gpu: Gpu, kind: str, beta: float) -> None:
    rows = make(kind, 50, 50, beta=beta)
    sign = torch.where(torch.arange(50) % 2 == 0, 1.0, -1.0)
    rows = replace(rows, logits=1e4 * torch.where(torch.arange(9).unsqueeze(1) % 2 == 0, sign, -sign).contiguous())
    if kind == "dense":
        rows = replace(rows, teacher=(1e4 * sign).expand(9, 50).contiguous())
    assert_close_to_fp64(gpu, rows)
    assert all(bool(result.isfinite().all()) for result in run(gpu, rows))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_peaked_teacher_and_masked_logits_stay_finite(gpu: Gpu, beta: float) -> None:
    rows = make("dense", 50, 50, beta=beta)
    teacher = torch.full((9, 50), -torch.inf)
    teacher[:, 7] = 3.0
    assert_close_to_fp64(gpu, replace(rows, teacher=teacher))
    peaked = make("top-k", 50, beta=beta, k=2)
    certain = torch.tensor([0.0, -torch.inf]).expand(9, 2).contiguous()
    ids = torch.tensor([[7, -1]]).expand(9, 2).contiguous()
    assert_close_to_fp64(gpu, replace(peaked, ids=ids, logprobs=certain))
    masked = torch.zeros(50)
    masked[3] = -torch.inf
    rows = replace(rows, bias=masked, labels=torch.zeros(9, dtype=torch.int64), teacher=rows.teacher + masked)
    divergence, ce, dz = run(gpu, rows)
    assert bool(divergence.isfinite().all()) and bool(ce.isfinite().all()) and not dz[:, 3].any()


def test_reverse_kl_floors_a_teacher_of_zero(gpu: Gpu) -> None:
    rows = make("dense", 50, 50, beta=1.0)
    teacher = torch.full((9, 50), -torch.inf)
    teacher[:, 7] = 3.0
    rows = replace(rows, teacher=teacher)
    # What is rounded is a log-prob of -100, times q <= 1 and the row's factor.
    atol = ROUNDINGS * EPS32 * 100 * float((rows.kl_weight * rows.temperature).max())
    for ours, exact in zip(run(gpu, rows), rows.double().run(reference), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=ROUNDINGS * EPS32, atol=atol)


@pytest.mark.parametrize("beta", BETAS)
def test_supports_at_their_limits(gpu: Gpu, beta: float) -> None:
    """No ids, padding alone, every id, and more ids than a warp has lanes."""
    rows = make("top-k", 50, beta=beta)
    nothing = replace(rows, ids=torch.zeros(9, 0, dtype=torch.int64), logprobs=torch.zeros(9, 0))
    assert_close_to_fp64(gpu, nothing)
    assert_close_to_fp64(gpu, replace(rows, ids=torch.full((9, 5), -1)))
    assert_close_to_fp64(gpu, make("top-k", 40, beta=beta, k=40))
    assert_close_to_fp64(gpu, make("top-k", 3001, beta=beta, k=100))


@pytest.mark.parametrize("student_tail", [1e-9, 1e-30])
def test_a_tiny_tail_of_the_student_keeps_its_gradient(gpu: Gpu, student_tail: float) -> None:
    """One column has nearly all the student's mass, the teacher gives it 0.9; elsewhere dz = q_v (1 - 0.1 / q_tail)."""
    V = 1000
    logits = torch.zeros(1, V)
    logits[0, 0] = torch.log(torch.tensor((V - 1) / student_tail))
    one, label = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    rows = Rows(logits, label, one, 0 * one, one, torch.tensor([[0]]), torch.tensor([[0.9]]).log())
    assert_close_to_fp64(gpu, rows)
    torch.testing.assert_close(run(gpu, rows)[2][0, 1:], torch.full((V - 1,), -0.1 / (V - 1)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["dense", "top-k"])
def test_the_gradient_near_the_teacher(gpu: Gpu, kind: str, beta: float) -> None:
    """The bar: within 0.3% of fp64 where rounding logits to bf16 costs 10-45%."""
    rows = replace(make(kind, 3001, 3001, gap=0.02, k=20, beta=beta), ce_weight=torch.zeros(9))
    exact, ours = rows.double().run(reference)[2], run(gpu, rows)[2]
    assert float((ours - exact).norm() / exact.norm()) <= 0.003


def test_what_is_not_a_number_stays_in_its_row(gpu: Gpu) -> None:
    for kind in KINDS:
        rows = make(kind, 50, 50)
        rows.logits[0, 20] = torch.nan
        _, ce, dz = run(gpu, rows)
        assert ce[0].isnan() and not ce[1:].isnan().any() and not dz[1:].isnan().any()


def test_ids_and_labels_outside_the_vocabulary_make_their_row_nan(gpu: Gpu) -> None:
    for wrong in (50, -2, 1 << 40):
        rows = make("top-k", 50, 50)
        rows.ids[2, 3] = wrong
        divergence, _, dz = run(gpu, rows)
        assert divergence[2].isnan() and dz[2].isnan().all()
        assert not divergence[[0, 1, *range(3, 9)]].isnan().any()
        for kind in KINDS:
            rows = make(kind, 50, 50)
            rows.labels[2] = wrong
            ce = run(gpu, rows)[1]
            assert ce[2].isnan() and not ce[[0, 1, *range(3, 9)]].isnan().any()


def test_no_rows(gpu: Gpu) -> None:
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    divergence, ce, dz = run(gpu, Rows(torch.zeros(0, 37), none, empty, empty, empty))
    assert divergence.shape == ce.shape == (0,) and dz.shape == (0, 37)


def test_wrong_arguments_are_named(gpu: Gpu) -> None:
    rows = make("top-k")
    for change, message in (
        ({"labels": rows.labels.int()}, "labels must be Long"),
        ({"kl_weight": rows.kl_weight[:4]}, "kl_weight must be Float with one entry per row"),
        ({"bias": torch.zeros(36)}, r"bias must be float32 \[37\]"),
        ({"ids": None, "teacher": torch.zeros(8, 37)}, "teacher must be Float with one entry per row"),
        (
            {"ids": torch.zeros(9, 1025, dtype=torch.int64), "logprobs": torch.zeros(9, 1025)},
            "k at most 1024 on a GPU, got 1025",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(gpu, replace(rows, **change))
    with pytest.raises(RuntimeError, match="dz must be float32 or bfloat16"):
        run(gpu, rows, dz=torch.zeros(9, 36))


def test_a_gradient_that_lies_across_rows_is_refused(gpu: Gpu) -> None:
    rows = make("text", 40)
    values = [getattr(rows, field.name) for field in fields(rows)][1:]
    moved = [x.to(gpu.device) if isinstance(x, Tensor) else x for x in values]
    room = torch.zeros(10, 40, device=gpu.device)
    for dz in (room[1:], room[:9].view(torch.bfloat16).view(18, 40)[:9]):
        with pytest.raises(RuntimeError, match="dz overlaps logits in another way than row by row"):
            gpu.ops.divergence_rows_(room[:9], dz, *moved)


@pytest.mark.parametrize("left", ["labels", "temperature", "ids", "logprobs", "teacher", "bias"])
def test_a_tensor_left_on_another_device_is_named(gpu: Gpu, left: str) -> None:
    rows = make("dense" if left == "teacher" else "top-k", head=True)
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    moved = {name: x.to(gpu.device) if isinstance(x, Tensor) else x for name, x in values.items()}
    logits, *rest = (moved | {left: moved[left].to("cpu" if gpu.is_real else "meta")}).values()
    with pytest.raises(RuntimeError, match=f"divergence_rows_: .* logits is on .* and {left} on "):
        gpu.called_for_any_device.divergence_rows_(logits, None, *rest)
