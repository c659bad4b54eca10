"""The adapter's native CPU ops against the plain-torch reference in fp64, on every instruction set this machine has."""

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
    make,
    run,
    scattered_in_memory,
)
from isas import use_isa
from torch import Tensor

from rbfast import ops
from rbfast.ops import reference

# T, in, out, s, k: odd sizes, sizes below one vector, several groups of tokens, more features than one cache block.
SHAPES = (
    (1, 1, 1, 1, 1),
    (3, 9, 5, 7, 2),
    (65, 90, 77, 33, 3),
    (300, 70, 192, 64, 1),
    (270, 40, 2100, 17, 4),
    (37, 80, 50, 80, 23),
)


@pytest.fixture(params=("scalar", "avx2", "avx512"), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction sets that these ops are compiled for."""
    return use_isa(request.param, monkeypatch)


def assert_within_budget(name: str, d: Delta) -> None:
    """At each element: at most the error of plain torch, half a step of the result's dtype, and one step of fp32
    of the sum of the terms' sizes."""
    truths = run(name, d.map(Tensor.double), reference)
    sizes = run(name, d.map(lambda t: t.double().abs()), reference)
    for ours, plain, truth, size in zip(run(name, d), run(name, d, reference), truths, sizes, strict=True):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        info = torch.finfo(ours.dtype)
        budget = (plain - truth).abs() + info.eps / 2 * truth.abs() + EPS32 * size + info.smallest_normal * info.eps
        assert ((ours - truth).abs() <= budget).all()


def assert_same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OPS)
def test_all_ops_are_native(name: str, isa: str) -> None:
    assert ops.implementations()[name] == f"native ({isa})"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_budget(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_within_budget(name, make(shape, dtype))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "dtype, magnitude", ((torch.bfloat16, 1e30), (torch.bfloat16, 1e-38), (torch.float16, 1e4), (torch.float16, 1e-7))
)
def test_large_and_tiny_values(name: str, dtype: torch.dtype, magnitude: float) -> None:
    d = make((65, 40, 77, 33, 2), dtype, magnitude)
    if name == "column_grad":  # its products square the magnitude, out of fp32's range
        d = replace(d, xs=make((65, 40, 77, 33, 2), dtype).xs)
    assert_within_budget(name, d)


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("name", OPS)
def test_empty(name: str, shape: tuple[int, ...]) -> None:
    d = make(shape, torch.bfloat16)
    assert_same(run(name, d), run(name, d, reference))


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_spread_as_in_torch(name: str, dtype: torch.dtype, bad: float) -> None:
    d = make((65, 90, 77, 33, 2), dtype)
    for tensor in (d.dy, d.y, d.dx, d.xs, d.base, d.x):
        tensor[-1, -1] = bad
    for ours, expected in zip(run(name, d), run(name, d, reference), strict=True):
        assert torch.equal(ours.isfinite(), expected.isfinite())


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "layout", (scattered_in_memory, lambda t: t.T.contiguous().T, lambda t: torch.cat((t, t), 1)[:, : t.shape[1]])
)
def test_any_strides_give_the_same_bits(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    d = make((70, 90, 77, 33, 3), torch.bfloat16)
    strided = replace(d.map(layout), cols=scattered_in_memory(d.cols))
    assert_same(run(name, strided), run(name, d))


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_through_a_view_touches_nothing_else(dtype: torch.dtype) -> None:
    d = make((70, 90, 77, 33, 3), dtype)
    calls = (
        ("column_linear_", d.y, (d.xs, d.A, d.B, d.scale)),
        ("column_scatter_", d.dx, (d.dy, d.cols, d.A, d.B, d.scale)),
        ("column_fold_", d.weight, (d.base, d.cols, d.A, d.B, d.scale)),
    )
    for name, target, rest in calls:
        view = scattered_in_memory(target)
        getattr(ops, name)(view, *rest)
        assert torch.equal(view, run(name, d)[0])
        assert view._base is not None and view._base.isnan().sum() == 3 * target.numel()


def test_expanded_gradient_is_accepted() -> None:
    d = make((70, 90, 77, 33, 3), torch.bfloat16)
    expanded = replace(d, dy=torch.tensor(0.5, dtype=torch.bfloat16).expand(70, 77))
    assert_same(run("column_grad", expanded), run("column_grad", replace(d, dy=expanded.dy.contiguous())))


@pytest.mark.parametrize("name", ("column_grad", "column_linear_", "column_scatter_"))
def test_activations_of_two_dtypes(name: str) -> None:
    d = make((65, 90, 77, 33, 2), torch.bfloat16)
    assert_within_budget(name, replace(d, xs=d.xs.float(), dx=d.dx.float()))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", ((1000, 600, 700, 256, 2), (8300, 40, 30, 20, 1)))
def test_the_bits_do_not_depend_on_the_number_of_threads(
    name: str, shape: tuple[int, ...], threads: Callable[[int], None]
) -> None:
    d = make(shape, torch.bfloat16)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(run(name, d))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (1, 2, 5))
def test_fold_matches_the_reference_bitwise(dtype: torch.dtype, k: int) -> None:
    d = make((1, 300, 100, 270, k), dtype)
    assert_same(run("column_fold_", d), run("column_fold_", d, reference))


def deltas_to_fold() -> list[Delta]:
    """Matrices of every dtype, in several layouts, of one row and of many blocks, with and without ranks."""
    shapes = ((1, 96, 100, 64, 3), (1, 40, 2100, 17, 1), (1, 9, 0, 7, 2), (1, 300, 33, 270, 5), (1, 96, 1, 32, 0))
    made = [make(shape, dtype, seed=i) for i, (shape, dtype) in enumerate(product(shapes, DTYPES))]
    made += [make((1, 96, 100, 64, 3), torch.bfloat16, run=16).map(lambda t: t.T.contiguous().T)]
    return [*made, make((1, 96, 77, 32, 2), torch.float16, run=8)]


def test_batched_fold_matches_single_folds(threads: Callable[[int], None]) -> None:
    deltas = deltas_to_fold()
    expected = [run("column_fold_", d)[0] for d in deltas]
    for count in (1, 3):
        threads(count)
        assert_same(tuple(fold_all(deltas)), tuple(expected))
    assert all(map(torch.equal, [d.weight for d in deltas], [d.weight for d in deltas_to_fold()]))  # unchanged


def test_batched_fold_checks_everything_before_it_writes(isa: str) -> None:
    good, bad = make((1, 90, 77, 33, 2), torch.float32), make((1, 90, 77, 33, 2), torch.float32)
    weights = [good.weight.clone(), bad.weight]
    columns, lists = [good.cols, bad.cols + 90], ([d.A for d in (good, bad)], [d.B for d in (good, bad)])
    with pytest.raises(RuntimeError, match=r"^column_fold_all_: cols must lie in \[0, 90\), got \d+ at position 0$"):
        ops.column_fold_all_(weights, [good.base, bad.base], columns, *lists, 1.0, [1, 1])
    assert torch.equal(weights[0], good.weight)
    with pytest.raises(RuntimeError, match=r"take float32, bfloat16 or float16, got Double; cast it"):
        doubles = ([weights[0], bad.weight.double()], [good.base, bad.base.double()])
        ops.column_fold_all_(*doubles, [good.cols, bad.cols], *lists, 1.0, [1, 1])
    assert torch.equal(weights[0], good.weight)
    with pytest.raises(RuntimeError, match=r"^column_fold_all_: all lists must be of one length, got 2 and 1$"):
        ops.column_fold_all_(weights, [good.base], columns, *lists, 1.0, [1, 1])


def test_batched_fold_of_the_reference_matches_the_kernel() -> None:
    deltas = deltas_to_fold()
    assert_same(tuple(fold_all(deltas, reference)), tuple(fold_all(deltas)))


def test_batched_fold_passes_opcheck() -> None:
    made = [make((1, 90, 77, 33, 2), torch.bfloat16, seed=seed) for seed in range(2)]
    lists = ([getattr(d, name) for d in made] for name in ("weight", "base", "cols", "A", "B"))
    torch.library.opcheck(ops.column_fold_all_, (*lists, 0.7, [1, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_rounds_every_float_as_torch_does(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (1, 1 << 16), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    values = bits.to(torch.int32).view(torch.float32)  # every exponent and sign, NaN, and ties of the 16-bit types
    values = torch.cat((values, torch.arange(1 << 16, dtype=torch.int32).mul(1 << 15).view(torch.float32)[None]), 1)
    weight = torch.zeros(1, values.shape[1], dtype=dtype)
    ops.column_fold_(weight, weight.clone(), torch.arange(values.shape[1]), values, torch.ones(1, 1), 1.0)
    assert_same((weight,), (values.to(dtype),))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fold_reads_every_16_bit_value_as_torch_does(dtype: torch.dtype) -> None:
    base = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None]
    weight, every = torch.zeros_like(base), torch.arange(2**16)
    ops.column_fold_(weight, base, every, torch.zeros(1, 2**16), torch.ones(1, 1), 1.0)
    assert_same((weight,), (base,))


@pytest.mark.parametrize("name", IN_RUNS)
@pytest.mark.parametrize("run_length", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_match_single_columns_bitwise(name: str, dtype: torch.dtype, run_length: int) -> None:
    d = make((65, 330, 77, 288, 3), dtype, run=run_length)
    singles = replace(d, run=1)
    assert_same(run(name, d), run(name, singles))
    strided = d.map(lambda t: t.T.contiguous().T)
    assert_same(run(name, strided), run(name, singles))


@pytest.mark.parametrize("name", IN_RUNS)
def test_columns_that_do_not_form_the_given_runs_are_refused(name: str) -> None:
    d = make((5, 90, 77, 32, 2), torch.float32, run=16)
    shifted = replace(d, cols=d.cols + 1)
    with pytest.raises(RuntimeError, match=rf"^{name}: cols must come in aligned runs of 16, got \d+ at position 0$"):
        run(name, shifted)
    swapped = replace(d, cols=d.cols.flip(0))
    with pytest.raises(RuntimeError, match=rf"^{name}: cols must come in aligned runs of 16"):
        run(name, swapped)
    mixed = d.cols.clone()
    mixed[[15, 31]] = d.cols[[31, 15]]
    with pytest.raises(RuntimeError, match=rf"^{name}: cols must come in aligned runs of 16, got \d+ at position 15$"):
        run(name, replace(d, cols=mixed))
    with pytest.raises(RuntimeError, match=rf"^{name}: run must divide the number of columns, 33, got 16$"):
        run(name, replace(make((5, 90, 77, 33, 2), torch.float32), run=16))
    with pytest.raises(RuntimeError, match=rf"^{name}: run must be 1, 2, 4, 8 or 16, got 3$"):
        run(name, replace(make((5, 90, 77, 33, 2), torch.float32), run=3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_of_rank_zero_copies_the_base_bitwise(dtype: torch.dtype) -> None:
    d = make((1, 90, 77, 32, 0), dtype, run=16)
    d.base[0, :3] = torch.tensor((-0.0, float("nan"), float("inf")), dtype=dtype)
    (weight,) = run("column_fold_", d)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(weight[:, d.cols].view(as_bits), d.base.view(as_bits))


def test_the_longest_run_is_found() -> None:
    for run_length in (1, *RUNS):
        cols = make((1, 96, 1, 64, 1), torch.float32, run=run_length).cols
        assert ops.run_of(cols, 96) == run_length
        assert ops.run_of(cols + 1, 96) == 1
    everything = torch.arange(96)
    assert [ops.run_of(everything, width) for width in (96, 104, 100, 98, 97)] == [16, 8, 4, 2, 1]
    assert [ops.run_of(everything[:s], 96) for s in (0, 1, 8, 24, 32)] == [1, 1, 8, 8, 16]


def test_grad_is_the_gradient_of_linear() -> None:
    d = make((20, 30, 25, 12, 3), torch.float32).map(Tensor.double)
    A, B = d.A.requires_grad_(), d.B.requires_grad_()
    (d.scale * (d.xs @ A.T) @ B.T).backward(d.dy)
    torch.testing.assert_close(reference.column_grad(d.dy, d.xs, A.detach(), B.detach(), d.scale), (A.grad, B.grad))


def test_fold_and_side_path_agree() -> None:
    d = make((20, 30, 25, 12, 3), torch.float32)
    folded = run("column_fold_", d)[0].double()
    beside = replace(d, y=d.x @ d.weight.T)
    torch.testing.assert_close(run("column_linear_", beside)[0], (d.x.double() @ folded.T).float())
    beside = replace(d, dx=d.dy @ d.weight)
    torch.testing.assert_close(run("column_scatter_", beside)[0], (d.dy.double() @ folded).float())


@pytest.mark.parametrize("index", (-1, 90))
def test_column_outside_the_matrix_is_refused(index: int) -> None:
    d = make((5, 90, 77, 33, 2), torch.float32)
    cols = d.cols.clone()
    cols[4] = index
    for name in ("column_gather", "column_scatter_", "column_fold_"):
        with pytest.raises(RuntimeError, match=rf"^{name}: cols must lie in \[0, 90\), got {index} at position 4$"):
            run(name, replace(d, cols=cols))


@pytest.mark.parametrize(
    "name, change, message",
    (
        (
            "column_gather",
            lambda d: {"cols": d.cols.int()},
            "column_gather: cols must be int64 with 1 dimension, got Int",
        ),
        ("column_gather", lambda d: {"x": d.x.double()}, "take float32, bfloat16 or float16, got Double; cast it"),
        ("column_gather", lambda d: {"x": d.x[0]}, "column_gather: x must have 2 dimensions, got 1"),
        ("column_grad", lambda d: {"A": d.A.bfloat16()}, "column_grad: A must be float32, got BFloat16"),
        ("column_grad", lambda d: {"xs": d.xs[1:]}, r"xs must be \[5, 33\] to fit the other arguments, got \[4, 33\]"),
        ("column_linear_", lambda d: {"B": d.B[1:]}, r"column_linear_: B must be \[77, 2\] .* got \[76, 2\]"),
        ("column_scatter_", lambda d: {"cols": d.cols[1:]}, r"column_scatter_: A must be \[2, 32\] .* got \[2, 33\]"),
        (
            "column_fold_",
            lambda d: {"base": d.base.half()},
            "base_columns must have the dtype of weight, Float, got Half",
        ),
        ("column_fold_", lambda d: {"B": d.B.double()}, "column_fold_: B must be float32, got Double"),
    ),
)
def test_bad_arguments_are_refused(name: str, change: Callable[[Delta], dict], message: str) -> None:
    d = make((5, 90, 77, 33, 2), torch.float32)
    with pytest.raises(RuntimeError, match=message):
        run(name, replace(d, **change(d)))


@pytest.mark.parametrize(
    "name, target, width", (("column_linear_", "y", 77), ("column_scatter_", "dx", 90), ("column_fold_", "weight", 90))
)
def test_an_expanded_target_is_refused(name: str, target: str, width: int) -> None:
    d = make((77, 90, 77, 33, 2), torch.float32)
    expanded = replace(d, **{target: torch.zeros(1, width).expand(77, width)})
    with pytest.raises(
        RuntimeError, match=f"{name}: {target} is an expanded view, which cannot be written to: clone it"
    ):
        getattr(ops, name)(*arguments(name, expanded))


def test_matrix_with_too_many_columns_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"column_gather: x must have fewer than 2\^31 columns, got 2147483648"):
        ops.column_gather(torch.zeros(1, 1).expand(1, 2**31), torch.zeros(1, dtype=torch.int64))


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    d = make((500, 90, 77, 33, 2), torch.float32)
    monkeypatch.setenv("RBFAST_CPU_ISA", "neon")
    for name in OPS:
        with pytest.raises(RuntimeError, match=r"^RBFAST_CPU_ISA must be scalar, avx2, .* got neon$"):
            run(name, d)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    d = make((65, 90, 77, 33, 2), torch.bfloat16)
    for layout in (torch.clone, lambda t: t.T.contiguous().T):
        torch.library.opcheck(getattr(torch.ops.rbfast, name).default, arguments(name, d.map(layout)))


@pytest.mark.parametrize("name", OPS)
def test_compiles_without_graph_breaks(name: str) -> None:
    d = make((65, 90, 77, 33, 2), torch.bfloat16)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(name, d), run(name, d))
