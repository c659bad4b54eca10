"""The adapter's CUDA ops against the plain-torch reference in fp64: on the GPU, or on the host if there is none."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from column_cases import (
    DTYPES,
    EMPTY,
    EPS32,
    IN_RUNS,
    OPS,
    RUNS,
    Delta,
    arguments,
    fold_all,
    grad_all,
    make,
    run,
    scattered_in_memory,
    sharing_xs,
)
from covering import covering
from cuda_devices import Gpu, host, launches_on_host, real
from fenced import fenced_at_end, fenced_at_start
from torch import Tensor
from torch.nn.functional import pad
from torch.profiler import profile

from rbfast.ops import reference

pytestmark = pytest.mark.slow

# T, in, out, s, k: odd sizes; several tiles of tokens and strips of features, which blocks share unevenly; every number
# of ranks that a sweep is compiled for, and one above the largest.
SHAPES = (
    (1, 1, 1, 1, 1),
    (3, 9, 5, 7, 2),
    (65, 90, 77, 33, 3),
    (500, 40, 530, 17, 1),
    (70, 40, 300, 17, 8),
    (40, 290, 40, 270, 16),
    (37, 80, 50, 80, 23),
    (40, 80, 70, 33, 31),
    (20, 40, 4400, 17, 31),  # more strips than one warp adds up
    (700, 20, 30, 17, 2),  # more blocks of a strip than one warp adds up
    (20, 80, 70, 33, 40),
)
# The relative error of a product with a 16-bit value if the fp32 factor is cut into two pieces of bf16. Of a value in
# [2^e, 2^(e+1)) the first piece leaves at most 2^(e-8), and so the second, in steps half as wide, at most 2^(e-17). In
# fp16 the product of the two second pieces, each at most 2^-8 of its factor, is left out too.
CUT = {torch.bfloat16: 2.0**-17, torch.float16: 2.0**-17 + 2.0**-16}


@pytest.fixture(params=("hopper", "ampere", "geforce", "cuda"))
def gpu(request: pytest.FixtureRequest) -> Gpu:
    return real() if request.param == "cuda" else host(request.param)


def run_on(gpu: Gpu, name: str, d: Delta) -> tuple[Tensor, ...]:
    there = replace(d.map(lambda t: t.to(gpu.device)), cols=d.cols.to(gpu.device))
    return tuple(result.cpu() for result in run(name, there, gpu.ops))


def assert_same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def lost_below_bf16(name: str, d: Delta) -> tuple[Tensor | float, ...]:
    """The error of column_grad from pieces being multiples of 2^-133, the smallest number in bf16."""
    if name != "column_grad" or d.dy.dtype == torch.float32:
        return (0.0, 0.0)
    return tuple(2.0**-134 * d.scale * x.double().abs().sum(0) for x in (d.xs, d.dy[:, :, None]))


def assert_within_budget(gpu: Gpu, name: str, d: Delta, results: tuple[Tensor, ...] | None = None) -> None:
    """At each element: at most the error of plain torch, half a step of the result's dtype, and one step of fp32
    of the sum of the terms' sizes. For column_grad of 16 bits two steps, as it sums twice, and the errors of its cuts:
    two in dA = (dy B)^T xs, one in dB = dy^T H. results: those of the op, if it has run already."""
    steps = [EPS32] * 2
    if name == "column_grad" and (cut := (CUT.get(d.dy.dtype, 0.0), CUT.get(d.xs.dtype, 0.0))) != (0, 0):
        steps = [sum(cut) + 2 * EPS32, cut[0] + 2 * EPS32]
    truths = run(name, d.map(Tensor.double), reference)
    sizes = run(name, d.map(lambda t: t.double().abs()), reference)
    results = run_on(gpu, name, d) if results is None else results
    plains, lost = run(name, d, reference), lost_below_bf16(name, d)
    rows = zip(results, plains, truths, sizes, steps[: len(truths)], lost[: len(truths)], strict=True)
    for ours, plain, truth, size, step, below in rows:
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        info = torch.finfo(ours.dtype)
        budget = (plain - truth).abs() + info.eps / 2 * truth.abs() + step * size + info.smallest_normal * info.eps
        budget = budget + below
        assert ((ours - truth).abs() <= budget).all()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_budget(gpu: Gpu, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_within_budget(gpu, name, make(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_of_single_terms_is_within_budget(gpu: Gpu, dtype: torch.dtype) -> None:
    """With single terms the errors of the cuts do not average out."""
    for seed in range(8):
        assert_within_budget(gpu, "column_grad", make((1, 1, 2000, 1, 1), dtype, seed=seed))
        assert_within_budget(gpu, "column_grad", make((1, 2000, 1, 2000, 1), dtype, seed=seed))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "dtype, magnitude", ((torch.bfloat16, 1e30), (torch.bfloat16, 1e-38), (torch.float16, 1e4), (torch.float16, 1e-7))
)
def test_large_and_tiny_values(gpu: Gpu, name: str, dtype: torch.dtype, magnitude: float) -> None:
    d = make((65, 40, 77, 33, 2), dtype, magnitude)
    if name == "column_grad":  # its products square the magnitude, out of fp32's range
        d = replace(d, xs=make((65, 40, 77, 33, 2), dtype).xs)
    assert_within_budget(gpu, name, d)


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("name", OPS)
def test_empty(gpu: Gpu, name: str, shape: tuple[int, ...]) -> None:
    d = make(shape, torch.bfloat16)
    assert_same(run_on(gpu, name, d), run(name, d, reference))


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("name", OPS)
def test_non_finite_values_spread_as_in_torch(gpu: Gpu, name: str, bad: float) -> None:
    d = make((65, 90, 77, 33, 2), torch.bfloat16)
    for tensor in (d.dy, d.y, d.dx, d.xs, d.base, d.x):
        tensor[-1, -1] = bad
    for ours, expected in zip(run_on(gpu, name, d), run(name, d, reference), strict=True):
        assert torch.equal(ours.isfinite(), expected.isfinite())


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "layout",
    (
        scattered_in_memory,
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
        lambda t: pad(t, (0, -t.shape[1] % 16), value=torch.nan)[:, : t.shape[1]],  # rows are aligned, their ends not
    ),
)
def test_any_strides_give_the_same_bits(gpu: Gpu, name: str, layout: Callable[[Tensor], Tensor]) -> None:
    d = make((70, 90, 77, 33, 3), torch.bfloat16)
    there = d.map(lambda t: t.to(gpu.device))
    strided = replace(there.map(layout), cols=scattered_in_memory(d.cols).to(gpu.device))
    assert_same(tuple(result.cpu() for result in run(name, strided, gpu.ops)), run_on(gpu, name, d))


@covering(3, name=OPS, dtype=DTYPES, shape=[*SHAPES, (40, 160, 128, 48, 2)], fenced=[fenced_at_end, fenced_at_start])
def test_no_memory_outside_the_tensors_is_touched(
    gpu: Gpu, name: str, dtype: torch.dtype, shape: tuple[int, ...], fenced: Callable[[Tensor], Tensor]
) -> None:
    """On the host only. On a GPU compute-sanitizer checks this."""
    if gpu.is_real:
        pytest.skip("needs inaccessible pages of the host")
    for length in (1, 16) if shape[1] % 16 == shape[3] % 16 == 0 else (1,):
        d = make(shape, dtype, run=length)
        inside = replace(d.map(fenced), cols=fenced(d.cols))
        getattr(gpu.ops, name)(*arguments(name, inside))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_does_not_change_the_bits(gpu: Gpu, name: str, dtype: torch.dtype) -> None:
    """With matrices that start one value after an aligned address."""

    def shifted(t: Tensor) -> Tensor:
        return torch.zeros(t.numel() + 1, dtype=t.dtype, device=gpu.device)[1:].view(t.shape).copy_(t)

    d = make((40, 96, 264, 48, 2), dtype, run=16)
    there = replace(d.map(shifted), cols=d.cols.to(gpu.device))
    results = getattr(gpu.ops, name)(*arguments(name, there))
    if results is None:
        results = {"column_linear_": there.y, "column_scatter_": there.dx, "column_fold_": there.weight}[name]
    results = (results,) if isinstance(results, Tensor) else results
    assert_same(tuple(result.cpu() for result in results), run_on(gpu, name, d))


# Strips of one matrix beside those of others, of which a block may have several; a matrix without features; more
# matrices than a launch takes.
@covering(
    2,
    dtype=DTYPES,
    outs=[(300, 40, 40), (1, 0, 520), (70, 1, 260, 8, 30), (20,)],
    tokens=[1, 70, 400],
    s=[17, 150],
    k=[2, 23, 40],
)
def test_gradients_of_matrices_that_share_xs_are_within_budget(
    gpu: Gpu, dtype: torch.dtype, outs: tuple[int, ...], tokens: int, s: int, k: int
) -> None:
    deltas = sharing_xs(outs, tokens, s, k, dtype)
    there = [d.map(lambda t: t.to(gpu.device)) for d in deltas]
    first = grad_all(there, gpu.ops)
    for d, results in zip(deltas, first, strict=True):
        assert_within_budget(gpu, "column_grad", d, tuple(result.cpu() for result in results))
    for before, again in zip(first, grad_all(there, gpu.ops), strict=True):
        assert_same(before, again)


def test_matrices_that_share_xs_may_differ_in_everything_else(gpu: Gpu) -> None:
    """In ranks and dtypes, which need separate launches, and in layout."""
    deltas = [
        *sharing_xs((40, 30), 35, 17, 2, torch.bfloat16),
        *sharing_xs((50,), 35, 17, 9, torch.bfloat16),
        *sharing_xs((60, 20), 35, 17, 2, torch.float32),
        *sharing_xs((4400, 40, 4100), 35, 17, 2, torch.bfloat16),  # more strips than one warp adds up, and fewer
    ]
    deltas[1] = deltas[1].map(scattered_in_memory)
    deltas = [replace(d, xs=deltas[0].xs) for d in deltas]
    for d, results in zip(deltas, grad_all([d.map(lambda t: t.to(gpu.device)) for d in deltas], gpu.ops), strict=True):
        assert_within_budget(gpu, "column_grad", d, tuple(result.cpu() for result in results))
    assert gpu.ops.column_grad_all([], deltas[0].xs.to(gpu.device), [], [], 1.0) == ([], [])
    with pytest.raises(RuntimeError, match="column_grad_all: all lists must be of one length, got 1 and 0"):
        gpu.ops.column_grad_all([deltas[0].dy.to(gpu.device)], deltas[0].xs.to(gpu.device), [], [], 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the profiler does not follow the ops on the host")
@pytest.mark.parametrize("name, outs", (("column_grad", (300,)), ("column_grad_all", (300, 40, 40))))
def test_gradients_take_three_launches_and_one_extra_allocation(name: str, outs: tuple[int, ...]) -> None:
    """For a small layer the host takes longer than the GPU, so each launch counts."""
    on_host, deltas = host("hopper"), sharing_xs(outs, 70, 17, 8, torch.bfloat16)
    before = launches_on_host()
    with profile(profile_memory=True) as calls:
        grad_all(deltas, on_host.ops) if len(deltas) > 1 else run(name, deltas[0], on_host.ops)
    assert launches_on_host() - before == 3
    assert calls.profiler is not None and calls.profiler.kineto_results is not None
    events = calls.profiler.kineto_results.events()
    assert [e.name() for e in events if e.name() != "[memory]"] == [f"rbfast_on_host::{name}"]
    assert sum(e.nbytes() > 0 for e in events) == 2 * len(outs) + 1  # dA and dB of each, and a workspace


@pytest.mark.parametrize("name", OPS)
def test_error_on_an_unsupported_gpu_says_what_to_do(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"no kernel image is available .* sm_80 and later.* with RBFAST_CUDA=0"):
        run_on(host("volta"), name, make((5, 90, 77, 33, 2), torch.bfloat16))


def test_writing_through_a_view_touches_nothing_else(gpu: Gpu) -> None:
    """Every second element, and rows that are aligned although their length is odd."""
    d = make((70, 90, 77, 33, 3), torch.bfloat16).map(lambda t: t.to(gpu.device))
    d = replace(d, cols=d.cols.to(gpu.device))
    calls = (
        ("column_linear_", d.y, (d.xs, d.A, d.B, d.scale)),
        ("column_scatter_", d.dx, (d.dy, d.cols, d.A, d.B, d.scale)),
        ("column_fold_", d.weight, (d.base, d.cols, d.A, d.B, d.scale)),
    )
    for name, target, rest in calls:
        rows, columns = target.shape
        wide = torch.full((2 * columns, 2 * rows), torch.nan, dtype=target.dtype, device=gpu.device)
        longer = torch.full((rows, columns + -columns % 16), torch.nan, dtype=target.dtype, device=gpu.device)
        for room, view in ((wide, wide.T[::2, ::2]), (longer, longer[:, :columns])):
            view.copy_(target)
            getattr(gpu.ops, name)(view, *rest)
            assert torch.equal(view, run(name, d, gpu.ops)[0])
            assert room.isnan().sum() == room.numel() - target.numel()


@pytest.mark.parametrize("name", ("column_grad", "column_linear_", "column_scatter_"))
def test_activations_of_two_dtypes(gpu: Gpu, name: str) -> None:
    d = make((65, 90, 77, 33, 2), torch.bfloat16)
    assert_within_budget(gpu, name, replace(d, xs=d.xs.float(), dx=d.dx.float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (1, 2, 5))
def test_fold_matches_the_reference_bitwise(gpu: Gpu, dtype: torch.dtype, k: int) -> None:
    d = make((1, 100, 70, 66, k), dtype)
    expected = run("column_fold_", d, reference)
    assert_same(run_on(gpu, "column_fold_", d), expected)
    transposed = replace(d, weight=d.weight.T.contiguous().T)
    assert_same(run_on(gpu, "column_fold_", transposed), expected)


@pytest.mark.parametrize("k", (2, 40))
@pytest.mark.parametrize("rows, run_length, is_transposed", ((5200, 1, False), (20600, 1, True), (41100, 8, False)))
def test_fold_with_several_tiles_of_rows_per_block(
    gpu: Gpu, rows: int, run_length: int, is_transposed: bool, k: int
) -> None:
    """As happens if a matrix has many more tiles than a device has multiprocessors."""
    d = make((1, 16, rows, 8, k), torch.bfloat16, run=run_length)
    expected = run("column_fold_", d, reference)
    assert_same(
        run_on(gpu, "column_fold_", replace(d, weight=d.weight.T.contiguous().T) if is_transposed else d), expected
    )


def test_batched_fold_matches_single_folds(gpu: Gpu) -> None:
    shapes = ((1, 96, 70, 64, 3), (1, 40, 130, 17, 1), (1, 9, 0, 7, 2), (1, 96, 1, 32, 0))
    deltas = [make(shape, dtype, seed=i) for i, (shape, dtype) in enumerate(product(shapes, DTYPES))]
    there = [replace(d.map(lambda t: t.to(gpu.device)), cols=d.cols.to(gpu.device)) for d in deltas]
    folded = fold_all([*there, replace(there[0], weight=there[0].weight.T.contiguous().T)], gpu.ops)
    expected = [run("column_fold_", d, reference)[0] for d in (*deltas, deltas[0])]
    assert_same(tuple(weight.cpu() for weight in folded), tuple(expected))
    with pytest.raises(RuntimeError, match="column_fold_all_: all lists must be of one length, got 1 and 0"):
        gpu.ops.column_fold_all_([there[0].weight], [], [there[0].cols], [there[0].A], [there[0].B], 1.0, [1])


@pytest.mark.parametrize("name", IN_RUNS)
@pytest.mark.parametrize("run_length", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_match_single_columns_bitwise(gpu: Gpu, name: str, dtype: torch.dtype, run_length: int) -> None:
    d = make((35, 90, 37, 80, 3), dtype, run=run_length)
    wide = make((35, 96, 37, 80, 3), dtype, run=run_length)  # rows are aligned to a run
    for delta in (d, wide):
        expected = run_on(gpu, name, replace(delta, run=1))
        assert_same(run_on(gpu, name, delta), expected)
        there = replace(delta.map(lambda t: t.to(gpu.device).T.contiguous().T), cols=delta.cols.to(gpu.device))
        assert_same(tuple(result.cpu() for result in run(name, there, gpu.ops)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_of_rank_zero_copies_the_base_bitwise(gpu: Gpu, dtype: torch.dtype) -> None:
    d = make((1, 96, 77, 32, 0), dtype, run=16)
    d.base[0, :3] = torch.tensor((-0.0, float("nan"), float("inf")), dtype=dtype)
    (weight,) = run_on(gpu, "column_fold_", d)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(weight[:, d.cols].view(as_bits), d.base.view(as_bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_rounds_every_float_as_torch_does(gpu: Gpu, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (1, 1 << 14), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    values = bits.to(torch.int32).view(torch.float32)  # every exponent and sign, NaN, and ties of the 16-bit types
    values = torch.cat((values, torch.arange(1 << 16, dtype=torch.int32).mul(1 << 15).view(torch.float32)[None]), 1)
    weight = torch.zeros(1, values.shape[1], dtype=dtype, device=gpu.device)
    cols, one = torch.arange(values.shape[1], device=gpu.device), torch.ones(1, 1, device=gpu.device)
    gpu.ops.column_fold_(weight, weight.clone(), cols, values.to(gpu.device), one, 1.0)
    assert_same((weight.cpu(),), (values.to(dtype),))


@pytest.mark.parametrize("name", OPS)
def test_results_are_bitwise_reproducible(gpu: Gpu, name: str) -> None:
    d = make((150, 60, 300, 48, 2), torch.bfloat16)
    first = run_on(gpu, name, d)
    for _ in range(2):
        assert_same(run_on(gpu, name, d), first)


def test_a_column_outside_the_matrix_is_nan_and_never_written(gpu: Gpu) -> None:
    d = make((5, 90, 77, 33, 2), torch.float32)
    for wrong in (-1, 90):
        cols = d.cols.clone()
        cols[4] = wrong
        bad = replace(d, cols=cols)
        (xs,) = run_on(gpu, "column_gather", bad)
        assert xs[:, 4].isnan().all() and torch.equal(xs.nan_to_num(0)[:, 5:], d.xs[:, 5:])
        for name, before in (("column_scatter_", d.dx), ("column_fold_", d.weight)):
            (after,) = run_on(gpu, name, bad)
            assert torch.equal(after[:, d.cols[4]], before[:, d.cols[4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_run_outside_the_matrix_or_unaligned_is_nan_and_never_written(gpu: Gpu, dtype: torch.dtype) -> None:
    """Rows are aligned to runs of 8. From column 64 on the last run leaves the matrix; from 49 on no run is aligned."""
    d = make((7, 96, 7, 32, 2), dtype, run=8).map(lambda t: t.to(gpu.device))
    narrow = replace(d, x=d.x[:, :90], dx=d.dx[:, :90], weight=d.weight[:, :90])
    whole = (("column_scatter_", d.dx), ("column_fold_", d.weight))
    for first, written in ((49, ()), (64, range(64, 88))):
        d_of = replace(narrow, cols=torch.arange(first, first + 32, device=gpu.device))
        xs = gpu.ops.column_gather(*arguments("column_gather", d_of))
        assert torch.equal(xs[:, : len(written)], d.x[:, list(written)]) and xs[:, len(written) + 2 :].isnan().all()
        for name, target in whole:
            before = target.clone()
            getattr(gpu.ops, name)(*arguments(name, d_of))
            changed = (target != before).any(0).nonzero().flatten().tolist()
            assert set(written) <= set(changed) <= {*written, *(range(88, 90) if written else ())}


@pytest.mark.parametrize(
    "name, change, message",
    (
        ("column_gather", lambda d: {"cols": d.cols.int()}, "column_gather: cols must be int64"),
        ("column_gather", lambda d: {"run": 3}, "column_gather: run must be 1, 2, 4, 8 or 16, got 3"),
        ("column_fold_", lambda d: {"run": 16}, "column_fold_: run must divide the number of columns, 33, got 16"),
        ("column_gather", lambda d: {"x": d.x.double()}, "CUDA ops take float32, bfloat16 or float16, got Double"),
        ("column_grad", lambda d: {"A": d.A.bfloat16()}, "column_grad: A must be float32, got BFloat16"),
        ("column_grad", lambda d: {"xs": d.xs[1:]}, r"xs must be \[5, 33\] to fit the other arguments, got \[4, 33\]"),
        ("column_linear_", lambda d: {"B": d.B[1:]}, r"column_linear_: B must be \[77, 2\] .* got \[76, 2\]"),
        ("column_scatter_", lambda d: {"cols": d.cols[1:]}, r"column_scatter_: A must be \[2, 32\] .* got \[2, 33\]"),
        ("column_fold_", lambda d: {"base": d.base.half()}, "base_columns must have the dtype of weight, Float"),
    ),
)
def test_bad_arguments_are_refused(gpu: Gpu, name: str, change: Callable[[Delta], dict], message: str) -> None:
    d = make((5, 90, 77, 33, 2), torch.float32)
    with pytest.raises(RuntimeError, match=message):
        run_on(gpu, name, replace(d, **change(d)))


def test_too_large_call_is_refused(gpu: Gpu) -> None:
    x, one = torch.zeros(1, 1, device=gpu.device), torch.ones(1, 1, device=gpu.device)
    tokens = x.expand(2**36, 1)
    with pytest.raises(RuntimeError, match="column_grad: too large for one call: 68719476736 tokens of 1 strips"):
        gpu.ops.column_grad(tokens, tokens, one, one, 1.0)


@pytest.mark.parametrize(
    "name, target, width", (("column_linear_", "y", 77), ("column_scatter_", "dx", 90), ("column_fold_", "weight", 90))
)
def test_an_expanded_target_is_refused(gpu: Gpu, name: str, target: str, width: int) -> None:
    d = make((77, 90, 77, 33, 2), torch.float32)
    there = replace(d.map(lambda t: t.to(gpu.device)), cols=d.cols.to(gpu.device))
    there = replace(there, **{target: torch.zeros(1, width, device=gpu.device).expand(77, width)})
    with pytest.raises(
        RuntimeError, match=f"{name}: {target} is an expanded view, which cannot be written to: clone it"
    ):
        getattr(gpu.ops, name)(*arguments(name, there))


@pytest.mark.parametrize(
    "name, left", (("column_gather", "cols"), *((name, "A") for name in OPS[1:]), *((name, "B") for name in OPS[1:]))
)
def test_tensor_on_another_device_is_refused_by_name(gpu: Gpu, name: str, left: str) -> None:
    d = make((5, 90, 77, 33, 2), torch.float32).map(lambda t: t.to(gpu.device))
    d = replace(d, cols=d.cols.to(gpu.device))
    stray = replace(d, **{left: getattr(d, left).to("cpu" if gpu.is_real else "meta")})
    with pytest.raises(RuntimeError, match=rf"{name}: all tensors must be on one device, but .* and {left} on "):
        run(name, stray, gpu.called_for_any_device)
