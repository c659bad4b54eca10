"""The Triton kernels against the reference in fp64: on a GPU if there is one, else under Triton's interpreter.

The interpreter must be enabled before Triton is imported, so one test here runs the others in a separate process with
TRITON_INTERPRET=1. The interpreter runs the arithmetic of the kernels, operation by operation, in NumPy.
"""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install 'rbfast[gpu]'")

from column_cases import EMPTY, EPS32, IN_RUNS, OPS, RUNS, arguments, make, scattered_in_memory
from column_cases import run as run_columns
from covering import covering
from fenced import fenced_at_end, fenced_at_start
from row_cases import (
    KINDS,
    PARTS_OF_A_HEAD,
    SIZES,
    TAUGHT,
    assert_close_to_fp64,
    assert_masked,
    assert_no_rows,
    assert_no_tail,
    assert_reverse_kl_floors_a_teacher_of_zero,
    assert_tail,
    below_one_without_a_tail,
    certain,
    cold,
    extreme,
    make_with_part_of_a_head,
    masked,
    masked_label,
    no_rows,
    over_one,
    tiny_tail,
    with_factors,
    without_values,
)
from row_cases import make as make_rows
from triton_cases import (
    DEVICE,
    INTERPRETED,
    OnDevice,
    assert_below,
    assert_within_budget,
    needs_device,
    on_device,
    run_triton,
)

from rbfast.kernels import columns, divergence_rows, grouped_columns, scale
from rbfast.ops import reference, registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROUNDING = Path(__file__).with_name("test_triton_rounding.py")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is wrong"))
DTYPES = (torch.float32, torch.float16, BF16)
BETAS = (0.0, 0.3, 1.0)
GROUPED = ("grouped_column_grad", "grouped_column_linear_", "grouped_column_scatter_")  # by rows
# T, in, out, s, k: sizes below one block, several blocks and groups of tokens, several blocks of rank.
SHAPES = ((1, 1, 1, 1, 1), (65, 90, 77, 33, 3), (270, 40, 2100, 17, 4), (37, 80, 50, 80, 37), (600, 20, 140, 9, 2))


@pytest.mark.long
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_everything_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, ROUNDING],
        cwd=ROOT,
        # One thread: the blocks are small, and several threads would lose more by waiting than they gain.
        # The interpreter multiplies with NumPy, in an order that OpenBLAS chooses by CPU. This fixes the order.
        env=os.environ
        | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        | {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:]


@pytest.mark.skipif(any(ROOT.glob("rbfast/_C_cuda*.so")), reason="the CUDA ops are built and would be loaded")
def test_cuda_torch_uses_triton_if_it_can_run_else_the_reference() -> None:
    """The registry under a torch that claims to be built for CUDA, with and without Triton and its C compiler."""
    script = "\n".join(
        (
            "import importlib.util, json, os, shutil, sys, torch",
            "torch.version.cuda = '13.0'",
            "find = importlib.util.find_spec",
            "hidden = sys.argv[1:]",
            "importlib.util.find_spec = lambda name, *args: None if name in hidden else find(name, *args)",
            "shutil.which = lambda name: None if 'compiler' in hidden else name",
            "os.environ.pop('CC', None)",
            "from rbfast import ops",
            "print(json.dumps([ops.implementations('cuda'), 'triton' in sys.modules]))",
        )
    )

    def ask(*hidden: str) -> tuple[dict[str, str], bool]:
        command = [sys.executable, "-c", script, *hidden]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return tuple(json.loads(done.stdout))

    implementations, imported = ask()
    by_triton = (*OPS, *GROUPED, "grouped_column_fold_", "divergence_rows_", "scaled_")
    assert all(implementations[name].startswith("triton (") for name in by_triton)
    assert not imported  # the first call imports it
    reasons = {"triton": "triton is not installed", "compiler": "Triton needs a C compiler: install gcc"}
    for hidden, reason in reasons.items():
        assert set(ask(hidden)[0].values()) == {
            f"reference (no CUDA C++; {reason})",
            "reference (a filter saves a GPU nothing)",
            "torch.mm, fp32 output",
            "torch.nn.functional.grouped_mm",
        }


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_products_are_plain_torch_on_an_old_gpu(capability, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("column_gather", "column_grad"):
        monkeypatch.setattr(columns, name, lambda *args: "by Triton")
    monkeypatch.setattr(registry, "is_old_gpu", registry.is_old_gpu.__wrapped__)  # without its cache
    dy, x, A, B = torch.randn(2, 4), torch.randn(2, 3), torch.randn(1, 3), torch.randn(4, 1)
    gathered = registry._triton_op("column_gather")(x, torch.tensor([2, 0]))
    gradients = registry._triton_op("column_grad")(dy, x, A, B, 0.5)
    assert gathered == "by Triton"
    if capability >= (8, 0):
        assert gradients == "by Triton"
    else:
        assert all(map(torch.equal, gradients, reference.column_grad(dy, x, A, B, 0.5)))


def test_triton_is_found_under_another_distribution(monkeypatch):
    """torch's builds for ROCm install triton-rocm."""
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"triton": ["triton-rocm"]})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"triton-rocm": "3.7.0"}[name])
    assert registry._triton_version.__wrapped__() == "3.7.0"


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="column_gather: all tensors must be on one device, got cpu and meta"):
        registry._triton_op("column_gather")(torch.ones(2, 3), torch.zeros(1, dtype=torch.int64, device="meta"))


# ---- the adapter's ops ----


@needs_device
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_columns_match_fp64(name, dtype, shape):
    assert_within_budget(name, make(shape, dtype))


@needs_device
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", EMPTY)
def test_empty_columns(name, shape):
    d = make(shape, torch.float16)
    assert all(map(torch.equal, run_triton(name, d), run_columns(name, d, reference)))


@needs_device
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_non_finite_values_spread_as_in_torch(name, dtype, bad):
    d = make((65, 90, 77, 33, 2), dtype)
    for tensor in (d.dy, d.y, d.dx, d.xs, d.base, d.x):
        tensor[-1, -1] = bad
    for ours, expected in zip(run_triton(name, d), run_columns(name, d, reference), strict=True):
        assert torch.equal(ours.isfinite(), expected.isfinite())


@needs_device
@pytest.mark.parametrize("name", OPS)
def test_any_strides_give_the_same_bits(name):
    d = on_device(make((70, 90, 77, 33, 3), torch.float16))
    strided = replace(d.map(lambda t: scattered_in_memory(t).to(DEVICE)), cols=scattered_in_memory(d.cols))
    if DEVICE == "cuda":  # .to(device) would make them dense
        strided = d.map(lambda t: t.T.contiguous().T)
    for ours, expected in zip(run_columns(name, strided, columns), run_columns(name, d, columns), strict=True):
        assert torch.equal(ours, expected)


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (1, 5))
def test_fold_matches_the_reference_bitwise(dtype, k):
    d = make((1, 300, 100, 270, k), dtype)
    assert torch.equal(run_triton("column_fold_", d)[0], run_columns("column_fold_", d, reference)[0])


@needs_device
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_fold_of_rank_zero_copies_the_base_bitwise(dtype):
    d = make((1, 90, 77, 32, 0), dtype, run=16)
    d.base[0, :3] = torch.tensor((-0.0, float("nan"), float("inf")), dtype=dtype)
    (weight,) = run_triton("column_fold_", d)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(weight[:, d.cols].view(as_bits), d.base.view(as_bits))


@needs_device
@pytest.mark.parametrize("name", IN_RUNS)
@pytest.mark.parametrize("run", RUNS)
def test_runs_match_single_columns_bitwise(name, run):
    d = make((65, 336, 77, 288, 3), torch.float16, run=run)
    assert all(map(torch.equal, run_triton(name, d), run_triton(name, replace(d, run=1))))


@needs_device
@pytest.mark.parametrize(
    "name, change, message",
    (
        ("column_gather", lambda d: {"cols": d.cols.int()}, "column_gather: cols must be int64"),
        ("column_grad", lambda d: {"A": d.A.half()}, "column_grad: A must be float32, got torch.float16"),
        ("column_grad", lambda d: {"xs": d.xs[1:]}, r"xs must be \[5, 33\] to fit the other arguments, got \[4, 33\]"),
        ("column_linear_", lambda d: {"y": d.y.double()}, "take float32, bfloat16 or float16, got torch.float64"),
        ("column_fold_", lambda d: {"base": d.base.half()}, "base_columns must have the dtype of weight"),
        ("column_fold_", lambda d: {"base": d.base[1:]}, r"base_columns must be \[77, 33\] to fit"),
        ("column_fold_", lambda d: {"run": 2}, "run must be 1, 2, 4, 8 or 16 and divide the 33 columns, got 2"),
    ),
)
def test_bad_column_arguments_are_refused(name, change, message):
    d = make((5, 90, 77, 33, 2), torch.float32)
    with pytest.raises(ValueError, match=message):
        run_triton(name, replace(d, **change(d)))


@needs_device
@pytest.mark.parametrize(
    "name, target, width", (("column_linear_", "y", 77), ("column_scatter_", "dx", 90), ("column_fold_", "weight", 90))
)
def test_an_expanded_target_is_refused(name, target, width):
    d = on_device(make((77, 90, 77, 33, 2), torch.float32))
    expanded = replace(d, **{target: torch.zeros(1, width, device=DEVICE).expand(77, width)})
    with pytest.raises(ValueError, match=f"{name}: {target} is an expanded view, which cannot be written to: clone it"):
        getattr(columns, name)(*arguments(name, expanded))


# ---- the ops of stacked experts ----


@needs_device
@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shares", ((0, 1, 2, 3), (5, 0, 5)))
def test_experts_match_fp64(name, dtype, shape, shares):
    """shares: the proportions in which the experts get the rows."""
    d = make(shape, dtype)
    rows = len(d.x)
    counts = [share * rows // sum(shares) for share in shares]
    counts[-1] += rows - sum(counts)
    A, B = (torch.stack([(1 + e) * part for e in range(len(shares))]) for part in (d.A, d.B))
    ends = torch.tensor(counts).cumsum(0)

    def run_all(to):
        y, dx, dy, xs, a, b = (to(t) for t in (d.y.clone(), d.dx.clone(), d.dy, d.xs, A, B))
        if name == "grouped_column_grad":
            return grouped_columns.grouped_column_grad(dy, xs, to(ends), a, b, d.scale)
        if name == "grouped_column_linear_":
            grouped_columns.grouped_column_linear_(y, xs, to(ends), a, b, d.scale)
            return (y,)
        grouped_columns.grouped_column_scatter_(dx, dy, to(ends), scattered_in_memory(to(d.cols)), a, b, d.scale)
        return (dx,)

    def run_each(wide):
        results = []
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            one = d.map(lambda t, start=start, end=end: t[start:end] if len(t) == rows else t)
            one = replace(one, A=A[expert], B=B[expert], weight=d.weight).map(wide)
            results.append(run_columns(name.removeprefix("grouped_"), one, reference))
        join = torch.stack if name == "grouped_column_grad" else torch.cat
        return [join(parts) for parts in zip(*results, strict=True)]

    ours = [result.cpu() for result in run_all(lambda t: t.to(DEVICE))]
    for result, plain, truth in zip(ours, run_each(lambda t: t), run_each(Tensor.double), strict=True):
        assert result.dtype == plain.dtype and result.shape == plain.shape
        eps, size = torch.finfo(result.dtype).eps, truth.abs().amax() if truth.numel() else 0.0
        assert_below(
            name, (result - truth).abs(), 2 * (plain - truth).abs() + eps / 2 * truth.abs() + 64 * EPS32 * size
        )


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (3, 0))
@pytest.mark.parametrize("is_transposed", (False, True))
def test_grouped_fold_matches_the_reference_bitwise(dtype, k, is_transposed):
    d = make((1, 300, 100, 270, k), torch.float32)
    A, B, weight, base = (torch.stack([t, 2 * t]) for t in (d.A, d.B, d.weight.to(dtype), d.base.to(dtype)))
    expected = weight.clone()
    for expert in range(2):
        reference.column_fold_(expected[expert], base[expert], d.cols, A[expert], B[expert], d.scale)
    folded = (weight.mT.contiguous().mT if is_transposed else weight.clone()).to(DEVICE)
    grouped_columns.grouped_column_fold_(folded, *(t.to(DEVICE) for t in (base, d.cols, A, B)), d.scale)
    assert torch.equal(folded.cpu(), expected)


@needs_device
def test_experts_without_rows_have_a_gradient_of_zero():
    d = make((0, 90, 77, 33, 2), torch.float32)
    A, B, ends = d.A.expand(3, -1, -1), d.B.expand(3, -1, -1), torch.zeros(3, dtype=torch.int64)
    given = [t.to(DEVICE) for t in (d.dy, d.xs, ends, A, B)]
    assert not any(grad.any() for grad in grouped_columns.grouped_column_grad(*given, 0.5))


@needs_device
def test_bad_expert_arguments_are_refused():
    d, ends = make((8, 90, 77, 33, 2), torch.float32), torch.tensor([3, 8])
    A, B = d.A.expand(2, -1, -1), d.B.expand(2, -1, -1)
    for bad, message in (
        ((d.dy, d.xs[1:], ends, A, B), r"as many rows .* in both, got torch.float32 \[7, 33\]"),
        ((d.dy, d.xs, ends.int(), A, B), "ends must be int64"),
        ((d.dy, d.xs, torch.zeros(4, dtype=torch.int64)[::2], A, B), "ends must be int64"),
        ((d.dy, d.xs, ends, A[:1], B), r"A must be float32 \[2, 2, 33\]"),
        ((d.dy, d.xs, ends, A, B.mT), r"B must be float32 \[2, 77, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_columns.grouped_column_grad(*(t.to(DEVICE) for t in bad), 0.5)
    weight = d.weight.expand(2, -1, -1).clone()
    for bad, message in (
        ((weight, d.base.expand(2, -1, -1)[:, 1:], d.cols, A, B), r"base_columns must be torch.float32 \[2, 77, 33\]"),
        (
            (weight, d.base.half().expand(2, -1, -1), d.cols, A, B),
            r"base_columns must be torch.float32 .* got torch.float16",
        ),
        ((weight, d.base.expand(2, -1, -1), d.cols, A[:1], B), r"grouped_column_fold_: A must be float32 \[2, 2, 33\]"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_columns.grouped_column_fold_(*(t.to(DEVICE) for t in bad), 0.5)


# ---- memory ----


@needs_device
@pytest.mark.skipif(not INTERPRETED, reason="needs inaccessible pages of the host")
@pytest.mark.parametrize("fenced", (fenced_at_end, fenced_at_start))
@pytest.mark.parametrize("name", (*OPS, *GROUPED, *KINDS))
def test_no_memory_outside_the_tensors_is_touched(name, fenced):
    d = make((65, 90, 77, 33, 3), torch.float16).map(fenced)
    cols, ends = fenced(d.cols), fenced(torch.tensor((20, 20, 65)))
    stacked = fenced(d.A.expand(3, 3, 33)), fenced(d.B.expand(3, 77, 3)), d.scale
    if name in OPS:
        getattr(columns, name)(*arguments(name, replace(d, cols=cols)))
    elif name == "grouped_column_grad":
        grouped_columns.grouped_column_grad(d.dy, d.xs, ends, *stacked)
    elif name == "grouped_column_linear_":
        grouped_columns.grouped_column_linear_(d.y, d.xs, ends, *stacked)
    elif name == "grouped_column_scatter_":
        grouped_columns.grouped_column_scatter_(d.dx, d.dy, ends, cols, *stacked)
    else:
        rows = make_rows(name, 70, 67, head=True, beta=0.3)
        given = [fenced(x) if isinstance(x, Tensor) else x for x in (rows.logits, rows.logits, *rows.signals())]
        divergence_rows.divergence_rows_(*given)


# ---- divergence_rows_ ----


@needs_device
@covering(3, kind=TAUGHT, beta=BETAS, size=SIZES, gap=(3.0, 0.001), head=(False, True))
def test_rows_with_a_teacher_match_fp64(kind, beta, size, gap, head):
    assert_close_to_fp64(make_rows(kind, *size, gap=gap, head=head, beta=beta), OnDevice)


@needs_device
@pytest.mark.parametrize("kind", TAUGHT)
@pytest.mark.parametrize("beta", BETAS)
def test_gradient_error_near_the_teacher(kind, beta):
    """Required: within 0.3% of fp64 at the same inputs, where student and teacher are 0.001 apart."""
    rows = replace(make_rows(kind, 1000, 1000, gap=0.001, beta=beta, k=20), ce_weight=torch.zeros(9))
    *_, ours = rows.run(OnDevice)
    *_, exact = rows.double().run(reference)
    share = float((ours - exact).norm() / exact.norm())
    assert share <= 0.003, f"the gradient is {100 * share:.3g}% off"


@needs_device
@pytest.mark.parametrize("size", ((1, 1), (37, 50), (3001, 2700)))
@pytest.mark.parametrize("head", (False, True))
def test_text_rows_match_fp64(size, head):
    assert_close_to_fp64(make_rows("text", *size, head=head), OnDevice)


@needs_device
@pytest.mark.parametrize("part", PARTS_OF_A_HEAD)
@pytest.mark.parametrize("kind", KINDS)
def test_head_with_a_single_option_matches_fp64(kind, part):
    assert_close_to_fp64(make_with_part_of_a_head(kind, part), OnDevice)


@needs_device
@pytest.mark.parametrize("pair", [with_factors, without_values])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_match_values_multiplied_by_them_bitwise(kind, pair):
    ours, spelt = pair(kind)
    assert all(map(torch.equal, ours.run(OnDevice), spelt.run(OnDevice)))


def assert_same_bits(name: str, ours: Tensor, expected: Tensor) -> None:
    gap = (ours.double() - expected.double()).abs()
    message = f"{name}: {int((gap != 0).sum())} of {gap.numel()} differ, by up to {float(gap.max()):.3g} "
    assert torch.equal(ours, expected), message + f"of {float(expected.abs().max()):.3g}"


@needs_device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_place_of_the_logits(kind, dtype):
    """V takes several blocks, and in 16 bits dz fills the first half of each row's memory.

    Elsewhere dz has the same stride: for a stride divisible by 16 Triton makes another kernel, which may sum in another
    order.
    """
    V = 5000
    rows = make_rows(kind, V, V, head=True)
    values = rows.signals(DEVICE)
    elsewhere = torch.empty_like(rows.logits, device=DEVICE).view(dtype)[:, :V]
    expected = divergence_rows.divergence_rows_(rows.logits.clone().to(DEVICE), elsewhere, *values)
    logits = rows.logits.clone().to(DEVICE)
    place = logits.view(dtype)[:, :V]
    ours = divergence_rows.divergence_rows_(logits, place, *values)
    for name, one, other in zip(
        ("divergence", "ce", "loss", "dz"), (*ours, place), (*expected, elsewhere), strict=True
    ):
        assert_same_bits(name, one, other)
    silent = divergence_rows.divergence_rows_(rows.logits.clone().to(DEVICE), None, *values)
    for one, other in zip(silent, expected, strict=True):  # another kernel, which may sum in another order
        torch.testing.assert_close(one, other, rtol=0 if INTERPRETED else 16 * EPS32, atol=0)


@needs_device
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", TAUGHT)
def test_extreme_logits(kind, beta):
    rows = extreme(kind, beta)
    assert_close_to_fp64(rows, OnDevice)
    assert all(bool(result.isfinite().all()) for result in rows.run(OnDevice))


@needs_device
@pytest.mark.parametrize("beta", BETAS)
def test_low_temperature_matches_fp64(beta):
    assert_close_to_fp64(cold(beta), OnDevice)


@needs_device
@pytest.mark.parametrize("beta", (0.0, 0.3))
def test_a_peaked_teacher_and_masked_logits_stay_finite(beta):
    for kind in TAUGHT:
        assert_close_to_fp64(certain(kind, beta), OnDevice)
    assert_masked(masked(beta).run(OnDevice))


@needs_device
@pytest.mark.parametrize("beta", BETAS)
def test_probabilities_that_do_not_add_up_to_1_are_scaled(beta):
    assert_close_to_fp64(over_one(beta), OnDevice)
    assert_close_to_fp64(below_one_without_a_tail(beta), OnDevice)


@needs_device
@pytest.mark.parametrize("beta", BETAS)
def test_divergence_of_equal_distributions_is_not_negative(beta):
    for V in (2, 3, 8, 50):
        assert bool((make_rows("top-k", V, gap=0.0, k=2, beta=beta).run(OnDevice)[0] >= 0).all())


@needs_device
def test_a_masked_label_without_a_weight_leaves_the_loss_finite():
    for kind in KINDS:
        divergence, _, loss, dz = masked_label(kind).run(OnDevice)
        assert all(bool(x.isfinite().all()) for x in (divergence, loss, dz))


@needs_device
@pytest.mark.parametrize("beta", BETAS)
def test_a_tail_of_only_minus_inf_has_no_gradient(beta):
    assert_no_tail(OnDevice, beta)


@needs_device
def test_reverse_kl_floors_a_teacher_of_zero():
    assert_reverse_kl_floors_a_teacher_of_zero(OnDevice)


@needs_device
@pytest.mark.parametrize("student_tail", (1e-9, 1e-30))
def test_a_tiny_tail_of_the_student_keeps_its_gradient(student_tail):
    rows = tiny_tail(student_tail)
    assert_close_to_fp64(rows, OnDevice)
    assert_tail(rows.run(OnDevice)[-1])


@needs_device
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind):
    rows = make_rows(kind, 50, 50)
    rows.logits[0, 20] = torch.nan
    divergence, ce, _, dz = rows.run(OnDevice)
    assert bool(ce[0].isnan()) and bool(dz[0].isnan().any()) and not ce[1:].isnan().any()
    assert kind == "text" or bool(divergence[0].isnan())


@needs_device
@pytest.mark.parametrize("V_teacher", (50, 40))
@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_row_of_only_minus_inf_is_nan(beta, V_teacher):
    rows = make_rows("dense", 50, V_teacher, beta=beta)
    rows.teacher[4] = -torch.inf
    for ours, exact in zip(rows.run(OnDevice), rows.double().run(reference), strict=True):
        assert torch.equal(ours.isnan(), exact.isnan())
        torch.testing.assert_close(ours.double(), exact, equal_nan=True, rtol=1e-4, atol=1e-5)


@needs_device
@pytest.mark.parametrize("wrong", (50, -2, 1 << 40))
def test_ids_and_labels_outside_the_vocabulary_make_their_row_nan(wrong):
    others = [0, 1, *range(3, 9)]
    rows = make_rows("top-k", 50, 50)
    rows.ids[2, 3] = wrong
    divergence, _, _, dz = rows.run(OnDevice)
    assert bool(divergence[2].isnan()) and bool(dz[2].isnan().all())
    assert not divergence[others].isnan().any() and not dz[others].isnan().any()
    for kind in KINDS:
        rows = make_rows(kind, 50, 50)
        rows.labels[2] = wrong
        ce = rows.run(OnDevice)[1]
        assert bool(ce[2].isnan()) and not ce[others].isnan().any()


@needs_device
@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_one_program_handles(kind, monkeypatch):
    monkeypatch.setattr(divergence_rows, "BLOCK_ROWS", 4)  # of nine rows
    rows = make_rows(kind)
    divergence, ce, loss, _ = rows.run(OnDevice)
    torch.testing.assert_close(loss, rows.kl_weight * rows.temperature**2 * divergence + rows.ce_weight * ce)


@needs_device
def test_no_rows_and_no_support():
    assert_no_rows(no_rows().run(OnDevice))
    assert_close_to_fp64(make_rows("top-k", 37, k=0), OnDevice)


@needs_device
def test_bad_row_arguments_are_refused():
    rows = make_rows("top-k")
    for change, message in (
        ({"labels": rows.labels.int()}, "labels must be torch.int64"),
        ({"kl_weight": rows.kl_weight[:4]}, "kl_weight must be torch.float32 with one entry per row"),
        ({"labels": rows.labels.new_empty(9, 0)}, "labels must be torch.int64 with one entry per row"),
        ({"bias": torch.zeros(36)}, r"bias must be float32 \[37\]"),
        ({"logits": rows.logits.double()}, "logits must be float32"),
        ({"ids": rows.ids[:, 1:]}, r"ids and logprobs must both be \[T, k\]"),
        ({"ids": None, "teacher": torch.zeros(8, 37)}, "teacher must be torch.float32 with one entry per row"),
        ({"ids": None, "teacher": torch.zeros(9, 0)}, r"teacher must be \[9, columns\] with dense rows"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(rows, **change).run(OnDevice)
    with pytest.raises(ValueError, match="dz must be float32, bfloat16 or float16 of the shape of logits"):
        rows.run(OnDevice, dz=torch.zeros(9, 38))
    values = rows.signals(DEVICE)
    logits = rows.logits.clone().to(DEVICE)
    packed = logits.view(-1).view(torch.float16)[: 9 * 37].view(9, 37)  # its row 1 starts in the logits of row 0
    with pytest.raises(ValueError, match="dz may overlap logits only if each row starts where its logits start"):
        divergence_rows.divergence_rows_(logits, packed, *values)


# ---- through the dispatcher ----


@on_a_gpu
@pytest.mark.parametrize("name", OPS)
def test_the_registry_compiles_without_graph_breaks(name):
    d = on_device(make((65, 90, 77, 33, 2), torch.bfloat16))
    compiled = torch.compile(run_columns, fullgraph=True)
    assert all(map(torch.equal, compiled(name, d), run_columns(name, d)))


# ---- scaled_ ----


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("shape", ((1,), (3, 7), (100, 300), (0, 4)))
def test_scaled_multiplies_in_the_dtype_of_the_factor(shape, dtype, other, monkeypatch):
    monkeypatch.setattr(scale, "PROGRAMS", 2)  # each takes several blocks
    monkeypatch.setattr(scale, "BLOCK", 1024)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    for factor in (1 / 3, 1.0, -2.0, torch.nan):
        by = torch.tensor(factor, device=DEVICE)
        for x, out in ((start.clone(),) * 2, (start, torch.full_like(start, torch.nan, dtype=other))):
            wanted = (x.float() * by).to(out.dtype)
            scale.scaled_(out, x, by)
            torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)


def test_scaled_refuses_strided_tensors_and_unsuitable_factors():
    dense, turned = torch.ones(4, 3), torch.ones(3, 4).T
    for out, x in ((dense, turned), (turned, dense), (dense, torch.ones(3))):
        with pytest.raises(ValueError, match="out and x must be contiguous and of one shape"):
            scale.scaled_(out, x, torch.ones(()))
    for factor in (torch.ones(2), torch.ones((), dtype=torch.float16)):
        with pytest.raises(ValueError, match="factor must be one float32 or float64"):
            scale.scaled_(torch.ones(3), torch.ones(3), factor)
