"""The CUDA divergence_rows_ against the reference in fp64: on the GPU, or on the host if there is none."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from covering import covering
from cuda_devices import Gpu, host, real
from fenced import fenced_at_end, fenced_at_start
from row_cases import (
    BETAS,
    EPS32,
    KINDS,
    PARTS_OF_A_HEAD,
    ROUNDINGS,
    TAUGHT,
    Rows,
    assert_masked,
    assert_no_rows,
    assert_no_tail,
    assert_reverse_kl_floors_a_teacher_of_zero,
    assert_tail,
    below_one_without_a_tail,
    certain,
    cold,
    extreme,
    make,
    make_with_part_of_a_head,
    masked,
    masked_label,
    no_rows,
    over_one,
    taught_rows,
    tiny_tail,
    with_factors,
    without_values,
)
from torch import Tensor

from rbfast.ops import reference

pytestmark = pytest.mark.slow

# Roundings of a divergence's term: two exp2 and a log2 of the special function unit, each within 2^-22, and the rest.
APPROXIMATIONS = 16
# JS takes a log2 of m over the heavier of p and q, within 2^-22 of itself or of 1: the sum over a row of that times m
# is off by as much, however small beta makes the divergence.
LOG2_OF_JS = 2.0**-22 * math.log(2)


@pytest.fixture(params=("hopper", "ampere", "starved", "cuda"))
def gpu(request: pytest.FixtureRequest) -> Gpu:
    return real() if request.param == "cuda" else host(request.param)


@dataclass(frozen=True)
class OnGpu:
    """A stand-in for the module `ops` whose divergence_rows_ runs on a GPU; takes and gives CPU tensors."""

    gpu: Gpu

    def divergence_rows_(self, logits: Tensor, dz: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        moved = [x.to(self.gpu.device) if isinstance(x, Tensor) else x for x in (logits, dz, *rest)]
        losses = self.gpu.ops.divergence_rows_(*moved)
        if dz is not None:
            dz.copy_(moved[1])
        return tuple(x.cpu() for x in losses)


def run(gpu: Gpu, rows: Rows, dz: Tensor | None = None) -> tuple[Tensor, ...]:
    return rows.run(OnGpu(gpu), dz)


def assert_close_to_fp64(gpu: Gpu, rows: Rows) -> None:
    """Checks that the error is at most that of rounding the logits and the results.

    With a single id p = q = 1, each within a rounding, and so is their difference; the divergence is of second order.
    """
    has_teacher, is_single = rows.ids is not None or rows.teacher is not None, rows.logits.shape[1] == 1
    relative = (APPROXIMATIONS if has_teacher else ROUNDINGS) * EPS32
    single = ROUNDINGS * EPS32 * float((rows.kl_weight * rows.temperature + rows.ce_weight).norm())
    least = (single**2, 0.0, single**2, single) if is_single and has_teacher else (0.0, 0.0, 0.0, 0.0)
    if has_teacher and 0 < rows.beta < 1:
        weights = rows.kl_weight * rows.temperature**2
        least = (
            least[0] + LOG2_OF_JS * len(weights) ** 0.5,
            0.0,
            least[2] + LOG2_OF_JS * float(weights.norm()),
            least[3],
        )
    truth, moved = rows.double().run(reference), rows.nudged().run(reference)
    results = run(gpu, rows)
    for ours, exact, other, slack in zip(results, truth, moved, least, strict=True):
        assert float((ours - exact).norm()) <= float((other - exact).norm() + relative * exact.norm() + slack)
    assert bool((results[0] >= 0).all())


def in_place(gpu: Gpu, rows: Rows, dtype: torch.dtype, ahead: int = 0, behind: int = 0) -> tuple[Tensor, ...]:
    """Runs with dz over the logits, as the loss does. `ahead` floats lie before all rows, `behind` after each."""
    T, V = rows.logits.shape
    room = torch.full((ahead + T * (V + behind),), 7.0, device=gpu.device)
    lines = room[ahead:].view(T, V + behind)
    logits, dz = lines[:, :V], lines.view(dtype)[:, :V]
    logits.copy_(rows.logits)
    losses = gpu.ops.divergence_rows_(logits, dz, *rows.signals(gpu.device))
    assert bool((room[:ahead] == 7).all()) and bool((lines[:, V:] == 7).all()), "written outside the rows"
    return tuple(x.cpu() for x in (*losses, dz))


@pytest.mark.parametrize("pair", [with_factors, without_values])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_match_values_multiplied_by_them_bitwise(gpu: Gpu, kind: str, pair: Callable) -> None:
    ours, spelt = pair(kind)
    assert all(map(torch.equal, run(gpu, ours), run(gpu, spelt)))


@taught_rows
def test_rows_with_a_teacher_match_fp64(gpu: Gpu, kind: str, beta: float, size: tuple, gap: float, head: bool) -> None:
    rows = make(kind, *size, gap=gap, head=head, beta=beta)
    assert_close_to_fp64(gpu, rows)


@pytest.mark.parametrize("kind", TAUGHT)
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


@pytest.mark.parametrize("part", PARTS_OF_A_HEAD)
@pytest.mark.parametrize("kind", KINDS)
def test_head_with_a_single_option_matches_fp64(gpu: Gpu, kind: str, part: str) -> None:
    assert_close_to_fp64(gpu, make_with_part_of_a_head(kind, part))


@pytest.mark.parametrize("kind, beta", [("text", 0.0), ("top-k", 0.0), *(("dense", beta) for beta in (0.0, 0.3, 1.0))])
def test_large_vocabulary_matches_fp64(gpu: Gpu, kind: str, beta: float) -> None:
    """More than a team can hold: on the small devices, and with a dense teacher on all."""
    rows = make(kind, 152_064, 152_064, gap=0.1, k=20, beta=beta)
    rows = rows.at(slice(2, 4))
    assert_close_to_fp64(gpu, rows)
    apart = run(gpu, rows)
    for dtype in (torch.float32, torch.bfloat16):
        over = in_place(gpu, rows, dtype)
        assert all(map(torch.equal, over, (*apart[:-1], apart[-1].to(dtype))))


@covering(
    2,
    teacher=[("text", 0.0), ("top-k", 0.0), ("dense", 0.0), ("dense", 0.5)],
    V=[1000, 4001, 5003, 11_001, 20_002, 32_001],
    memory=[(0, 1), (1, 1), (2, 1), (3, 1), (0, 4), (1, 4)],
    head=[False, True],
)
def test_gradient_in_place_of_the_logits(
    gpu: Gpu, teacher: tuple[str, float], V: int, memory: tuple[int, int], head: bool
) -> None:
    """At every alignment of a row, with a last vector cut off or whole, in layouts that it nearly fills or does not;
    nothing between the rows is touched.

    memory: floats ahead of all rows, and what each row's memory is a multiple of.
    """
    kind, beta = teacher
    ahead, behind = memory[0], -V % memory[1]
    rows = make(kind, V, V, head=head, beta=beta)
    apart = run(gpu, rows)
    for dtype in (torch.float32, torch.bfloat16):
        over = in_place(gpu, rows, dtype, ahead, behind)
        assert all(map(torch.equal, over, (*apart[:-1], apart[-1].to(dtype))))


@pytest.mark.parametrize("fenced", [fenced_at_end, fenced_at_start])
@covering(
    2,
    teacher=[("text", 0.0), ("top-k", 0.3), ("dense", 0.0), ("dense", 1.0)],
    V=[1, 37, 4096, 4001, 11_001, 32_001],
    head=[False, True],
    dz=["none", "apart", "float32", "bfloat16"],
    more=[3, -3],
)
def test_no_memory_outside_the_tensors_is_touched(
    gpu: Gpu, fenced: Callable[[Tensor], Tensor], teacher: tuple[str, float], V: int, head: bool, dz: str, more: int
) -> None:
    """On the host only. On a GPU compute-sanitizer checks this.

    more: how many ids a dense teacher has that the student lacks, or, if below 0, the reverse.
    """
    if gpu.is_real:
        pytest.skip("needs inaccessible pages of the host")
    rows = make(teacher[0], V, max(1, V + more), head=head, beta=teacher[1])
    rows.labels[-1] = V - 1
    logits, *signals = [fenced(x) if isinstance(x, Tensor) else x for x in (rows.logits, *rows.signals())]
    over = {
        "none": None,
        "apart": fenced(rows.logits),
        "float32": logits,
        "bfloat16": logits.view(torch.bfloat16)[:, :V],
    }
    losses = gpu.ops.divergence_rows_(logits, over[dz], *signals)
    assert all(map(torch.equal, losses, run(gpu, rows)[:-1])) or dz == "none"


@pytest.mark.parametrize("kind, beta", [("text", 0.0), ("top-k", 0.3), ("dense", 0.0), ("dense", 0.3), ("dense", 1.0)])
@pytest.mark.parametrize("V, head", [(3001, True), (3001, False), (3000, False)])
def test_losses_match_without_a_gradient(gpu: Gpu, kind: str, beta: float, V: int, head: bool) -> None:
    rows = make(kind, V, V, head=head, beta=beta)
    divergence, ce, loss = OnGpu(gpu).divergence_rows_(rows.logits.clone(), None, *rows.signals())
    with_gradient = run(gpu, rows)
    assert torch.equal(ce, with_gradient[1])
    for ours, other in ((divergence, with_gradient[0]), (loss, with_gradient[2])):
        torch.testing.assert_close(ours, other, rtol=ROUNDINGS * EPS32, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_do_not_depend_on_its_position(gpu: Gpu, kind: str) -> None:
    rows = make(kind, 5003, 5003)
    truth = run(gpu, rows)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for part in (order, order[:1], order[3:5]):
        assert all(torch.equal(ours, whole[part]) for ours, whole in zip(run(gpu, rows.at(part)), truth, strict=True))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", TAUGHT)
def test_extreme_logits(gpu: Gpu, kind: str, beta: float) -> None:
    rows = extreme(kind, beta)
    assert_close_to_fp64(gpu, rows)
    assert all(bool(result.isfinite().all()) for result in run(gpu, rows))


@pytest.mark.parametrize(
    "kind, below",
    [(kind, below) for kind in KINDS for below in (200.0, 50.0)] + [("top-k", -50.0), ("top-k", -200.0)],
)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_pivot_far_from_the_other_logits_matches_fp64(gpu: Gpu, kind: str, below: float, beta: float) -> None:
    """The label's logit, or those of the support, are far from the others: sums about them leave the range of fp32."""
    rows = make(kind, 3000, 3000, beta=beta, k=20)
    of_label, moved = rows.labels.unsqueeze(1), torch.full((9, 1), -below)
    logits = rows.logits.scatter_add(1, of_label, moved)
    if kind == "top-k":
        is_there = rows.ids >= 0
        logits = rows.logits.scatter_add(1, rows.ids.clamp_min(0), torch.where(is_there, -below, 0.0))
        rows = replace(rows, labels=torch.where(torch.arange(9) % 2 == 0, rows.ids[:, 0], rows.labels))
    assert_close_to_fp64(gpu, replace(rows, logits=logits))
    if kind == "dense":
        teacher = rows.teacher.scatter_add(1, of_label, moved)
        assert_close_to_fp64(gpu, replace(rows, logits=logits, teacher=teacher))
        assert_close_to_fp64(gpu, replace(rows, teacher=teacher))


@pytest.mark.parametrize("kind", KINDS)
def test_pivot_far_below_the_row_matches_fp64(gpu: Gpu, kind: str) -> None:
    """All logits that a pivot is picked from are far below the others, and any thread may hold the largest."""
    rows = make(kind, 3000, 3000)
    picked = torch.zeros(9, 3000).scatter(1, rows.labels.unsqueeze(1), -300.0)
    picked[:, torch.arange(32) * 3000 // 32] = -300.0
    teacher = None if rows.teacher is None else rows.teacher + picked
    assert_close_to_fp64(gpu, replace(rows, logits=rows.logits + picked, teacher=teacher))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_label_leaves_the_other_gradients_correct(gpu: Gpu, kind: str) -> None:
    rows = make(kind, 3000, 3000)
    labels = torch.zeros(9, dtype=torch.int64)
    logits = rows.logits.clone()
    logits[:, 0] = -torch.inf
    rows = replace(rows, logits=logits, labels=labels, kl_weight=torch.zeros(9))
    dz, truth = run(gpu, rows)[-1], rows.double().run(reference)[-1]
    torch.testing.assert_close(dz[:, 1:].double(), truth[:, 1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_low_temperature_matches_fp64(gpu: Gpu, beta: float) -> None:
    assert_close_to_fp64(gpu, cold(beta))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_peaked_teacher_and_masked_logits_stay_finite(gpu: Gpu, beta: float) -> None:
    for kind in TAUGHT:
        assert_close_to_fp64(gpu, certain(kind, beta))
    assert_masked(run(gpu, masked(beta)))


@pytest.mark.parametrize("beta", BETAS)
def test_probabilities_that_do_not_add_up_to_1_are_scaled(gpu: Gpu, beta: float) -> None:
    assert_close_to_fp64(gpu, over_one(beta))
    assert_close_to_fp64(gpu, below_one_without_a_tail(beta))


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_of_equal_distributions_is_not_negative(gpu: Gpu, beta: float) -> None:
    for V in (2, 3, 5, 8, 50):
        assert bool((run(gpu, make("top-k", V, gap=0.0, k=2, beta=beta))[0] >= 0).all())


def test_a_masked_label_without_a_weight_leaves_the_loss_finite(gpu: Gpu) -> None:
    for kind in KINDS:
        divergence, _, loss, dz = run(gpu, masked_label(kind))
        assert all(bool(x.isfinite().all()) for x in (divergence, loss, dz))


def test_reverse_kl_floors_a_teacher_of_zero(gpu: Gpu) -> None:
    assert_reverse_kl_floors_a_teacher_of_zero(OnGpu(gpu))


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
    rows = tiny_tail(student_tail)
    assert_close_to_fp64(gpu, rows)
    assert_tail(run(gpu, rows)[-1])


@pytest.mark.parametrize("label", [0.0, -20.0, -30.0])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", TAUGHT)
def test_gradient_error_near_the_teacher(gpu: Gpu, kind: str, beta: float, label: float) -> None:
    """Required: within 0.3% of fp64, where bf16 logits are 10-45% off. label: the shift of the label's logits."""
    rows = replace(make(kind, 3001, 3001, gap=0.02, k=20, beta=beta), ce_weight=torch.zeros(9))
    at, moved = rows.labels.unsqueeze(1), torch.full((9, 1), label)
    teacher = None if rows.teacher is None else rows.teacher.scatter_add(1, at, moved)
    rows = replace(rows, logits=rows.logits.scatter_add(1, at, moved), teacher=teacher)
    exact, ours = rows.double().run(reference)[-1], run(gpu, rows)[-1]
    errors = (ours - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(errors.max()) <= (0.003 if kind == "top-k" else 0.001)


@pytest.mark.parametrize("mask", [-1e8, -1e10])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_tail_of_masks_stays_finite(gpu: Gpu, beta: float, mask: float) -> None:
    """The pivot is so large that its product with the scale is off by more than the range of exponents in fp32."""
    rows = make("top-k", 3000, k=5, beta=beta)
    logits = torch.full_like(rows.logits, mask).scatter(1, rows.ids.clamp_min(0), rows.logits[:, :5])
    rows = replace(rows, logits=logits, labels=rows.ids[:, 0], temperature=torch.ones(9))
    for ours, exact in zip(run(gpu, rows), rows.double().run(reference), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_teacher_that_is_no_distribution_makes_its_row_nan(gpu: Gpu, beta: float, wrong: float) -> None:
    for V in (50, 3001):
        rows = make("dense", V, V, beta=beta)
        rows.teacher[0, 20] = wrong
        divergence, _, _, dz = run(gpu, rows)
        assert divergence[0].isnan() and dz[0].isnan().all()
        assert not divergence[1:].isnan().any() and not dz[1:].isnan().any()


@pytest.mark.parametrize("V_teacher", [50, 40])
@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_row_of_only_minus_inf_is_nan(gpu: Gpu, beta: float, V_teacher: int) -> None:
    rows = make("dense", 50, V_teacher, beta=beta)
    rows.teacher[4] = -torch.inf
    divergence, ce, _, dz = run(gpu, rows)
    assert torch.equal(divergence.isnan(), torch.arange(9) == 4) and bool(ce.isfinite().all())
    assert bool(dz[4, :V_teacher].isnan().all()) and bool(dz[:4].isfinite().all()) and bool(dz[5:].isfinite().all())


@pytest.mark.parametrize("beta", BETAS)
def test_a_tail_of_only_minus_inf_has_no_gradient(gpu: Gpu, beta: float) -> None:
    assert_no_tail(OnGpu(gpu), beta)


def test_nan_stays_in_its_row(gpu: Gpu) -> None:
    for kind in KINDS:
        rows = make(kind, 50, 50)
        rows.logits[0, 20] = torch.nan
        _, ce, _, dz = run(gpu, rows)
        assert ce[0].isnan() and not ce[1:].isnan().any() and not dz[1:].isnan().any()


def test_ids_and_labels_outside_the_vocabulary_make_their_row_nan(gpu: Gpu) -> None:
    for wrong in (50, -2, 1 << 40):
        rows = make("top-k", 50, 50)
        rows.ids[2, 3] = wrong
        divergence, _, _, dz = run(gpu, rows)
        assert divergence[2].isnan() and dz[2].isnan().all()
        assert not divergence[[0, 1, *range(3, 9)]].isnan().any()
        for kind in KINDS:
            rows = make(kind, 50, 50)
            rows.labels[2] = wrong
            ce = run(gpu, rows)[1]
            assert ce[2].isnan() and not ce[[0, 1, *range(3, 9)]].isnan().any()


def test_no_rows(gpu: Gpu) -> None:
    assert_no_rows(run(gpu, no_rows()))


def test_bad_arguments_are_refused_by_name(gpu: Gpu) -> None:
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", (20, 5000))
def test_rows_match_fp64_where_no_cluster_fits(kind: str, V: int) -> None:
    assert_close_to_fp64(host("slice"), make(kind, V, V))


def test_error_on_an_unsupported_gpu_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"invalid device function; .* sm_80 and later.* with RBFAST_CUDA=0"):
        run(host("volta"), make("text"))


def test_gradient_that_overlaps_other_rows_is_refused(gpu: Gpu) -> None:
    rows = make("text", 40)
    moved = rows.signals(gpu.device)
    room = torch.zeros(10, 40, device=gpu.device)
    for dz in (room[1:], room[:9].view(torch.bfloat16).view(18, 40)[:9]):
        with pytest.raises(RuntimeError, match="dz may overlap logits only if each row starts where its logits start"):
            gpu.ops.divergence_rows_(room[:9], dz, *moved)


@pytest.mark.parametrize("left", ["labels", "temperature", "ids", "logprobs", "teacher", "bias"])
def test_tensor_on_another_device_is_refused_by_name(gpu: Gpu, left: str) -> None:
    rows = make("dense" if left == "teacher" else "top-k", head=True)
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    moved = {name: x.to(gpu.device) if isinstance(x, Tensor) else x for name, x in values.items()}
    logits, *rest = (moved | {left: moved[left].to("cpu" if gpu.is_real else "meta")}).values()
    with pytest.raises(RuntimeError, match=f"divergence_rows_: .* logits is on .* and {left} on "):
        gpu.called_for_any_device.divergence_rows_(logits, None, *rest)
