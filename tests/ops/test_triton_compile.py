"""Every Triton kernel, in the specialisations that the ops launch, compiled for four GPUs without having them.

Launches are recorded, not made: the ops are called with tensors without memory.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'rbfast[gpu]'")

from column_cases import OPS  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rbfast import ops  # noqa: E402
from rbfast.kernels import columns, divergence_rows, grouped_columns, scale  # noqa: E402

pytestmark = pytest.mark.slow

SHARED_LIMIT = {
    80: 163,
    90: 227,
    100: 227,
    120: 99,
}  # KiB of one block: CUDA C++ programming guide, compute capabilities
OLD = {75: 64}  # here the reference replaces the kernels that multiply
# (dtype, rank, architecture): bytes of registers that project_kernel stores and loads again. Elsewhere there are none.
SPILLED = {(torch.bfloat16, 20, 100): 8, (torch.bfloat16, 20, 120): 16}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """What Triton would compile for these arguments: sizes of 1 and None are constants, addresses aligned."""
        signature, constants, attributes = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(self.kernel.params, self.args, strict=True)):
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "fp32"
            if isinstance(value, int):
                signature[parameter.name] = "i32"
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def column_calls(dtype: torch.dtype, k: int) -> Iterator[Callable[[], object]]:
    T, features, out, s = 4096, 5120, 13824, 256
    x, xs, dy = empty(T, features, dtype=dtype), empty(T, s, dtype=dtype), empty(T, out, dtype=dtype)
    A, B, cols = empty(k, s), empty(out, k), empty(s, dtype=torch.int64)
    yield lambda: columns.column_gather(x, cols, 16)
    yield lambda: columns.column_grad(dy, xs, A, B, 0.5)
    yield lambda: columns.column_linear_(dy, xs, A, B, 0.5)
    yield lambda: columns.column_scatter_(x, dy, cols, A, B, 0.5, 16)
    weight, base = empty(out, features, dtype=dtype), empty(out, s, dtype=dtype)
    yield lambda: columns.column_fold_(weight, base, cols, A, B, 0.5, 16)


def expert_calls(dtype: torch.dtype, k: int) -> Iterator[Callable[[], object]]:
    """For the gate_up_proj of Qwen3-30B-A3B: 4,096 tokens with 8 of 128 experts each."""
    S, E, features, out, s = 32768, 128, 2048, 1536, 256
    x, xs, dy = empty(S, features, dtype=dtype), empty(S, s, dtype=dtype), empty(S, out, dtype=dtype)
    A, B = empty(E, k, s), empty(E, out, k)
    cols, ends = empty(s, dtype=torch.int64), empty(E, dtype=torch.int64)
    yield lambda: grouped_columns.grouped_column_grad(dy, xs, ends, A, B, 0.5)
    yield lambda: grouped_columns.grouped_column_linear_(dy, xs, ends, A, B, 0.5)
    yield lambda: grouped_columns.grouped_column_scatter_(x, dy, ends, cols, A, B, 0.5, 16)
    weight, base = empty(E, out, features, dtype=dtype), empty(E, out, s, dtype=dtype)
    yield lambda: grouped_columns.grouped_column_fold_(weight, base, cols, A, B, 0.5, 16)


def row_calls(kind: str, beta: float, head: bool) -> Iterator[Callable[[], object]]:
    T, V, k = 1024, 151936, 20
    labels, weights = empty(T, dtype=torch.int64), (empty(T), empty(T), empty(T))
    ids, logprobs = (empty(T, k, dtype=torch.int64), empty(T, k)) if kind == "top-k" else (None, None)
    teacher = empty(T, V) if kind == "dense" else None
    bias, scale, softcap = (empty(V), 0.5, 30.0) if head else (None, 1.0, None)
    logits = empty(T, V)
    dz = logits.view(torch.bfloat16)[:, :V]  # over the logits, as in the loss
    for parameters in (weights, (None, None, None)):  # one for each row, or a factor alone
        yield lambda parameters=parameters: divergence_rows.divergence_rows_(
            logits, dz, labels, *parameters, ids, logprobs, teacher, bias, beta, scale, softcap, 0.3, 0.1, 2.0
        )


def launches(monkeypatch: pytest.MonkeyPatch, calls: Iterator[Callable[[], object]]) -> list[Launch]:
    """Each distinct kernel launch of these calls."""
    seen: dict[str, Launch] = {}

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launch = Launch(kernel, args, {"enable_fp_fusion": True} | options)
        seen[f"{launch.source().hash()} {options}"] = launch

    for module in (columns, grouped_columns, divergence_rows, scale):
        monkeypatch.setattr(module, "_launch", record)
    for call in calls:
        call()
    return list(seen.values())


def spilled_bytes(log: str) -> int:
    """The bytes of spilled registers that the assembler reports, run by Triton with its own flags."""
    ((stores, loads),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(stores) + int(loads)


def assert_stores_wait_for_loads(ttgir: str) -> None:
    """A store over values that any warp loaded comes after a barrier. (Losses are stored as single values.)"""
    stores, waits = 0, True
    for line in ttgir.splitlines():
        if "tt.load" in line:
            waits = False
        elif "barrier" in line:
            waits = True
        elif "tt.store" in line and "tensor<" in line:
            stores += 1
            assert waits, line
    assert stores > 0


def compiled(launch: Launch, arch: int) -> tuple[Any, int]:
    """The kernel, within the shared memory of that GPU, and the bytes that it spills."""
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=launch.options)
    assert kernel.metadata.shared <= (SHARED_LIMIT | OLD)[arch] * 1024, f"{launch.kernel.__name__} on sm_{arch}"
    return kernel, spilled_bytes(log.getvalue())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")  # to the standard output


# fp16 and fp32 on the two tightest GPUs only: sm_80 needs the most registers, sm_120 has the least shared memory.
@pytest.mark.parametrize(
    "dtype, k, arch",
    [(torch.bfloat16, k, arch) for k in (2, 20) for arch in SHARED_LIMIT]
    + [(dtype, 20, arch) for dtype in (torch.float16, torch.float32) for arch in (80, 120)],
)
def test_column_kernels_fit_the_registers_and_shared_memory(dtype, k, arch, monkeypatch):
    spilled = {"project_kernel": 0}
    for launch in launches(monkeypatch, chain(column_calls(dtype, k), expert_calls(dtype, k))):
        name = launch.kernel.__name__
        spilled[name] = spilled.get(name, 0) + compiled(launch, arch)[1]
    assert spilled.pop("project_kernel") == SPILLED.get((dtype, k, arch), 0)
    assert not any(spilled.values()), spilled


@pytest.mark.parametrize("arch", (80, 90))
def test_sums_of_products_are_rounded(arch, monkeypatch):
    """Tensor cores truncate what they add, so they must start from 0, not from the running sum."""
    for launch in launches(monkeypatch, column_calls(torch.float16, 2)):
        if launch.kernel in (columns.project_kernel, columns.contract_kernel):
            ttir = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=launch.options).asm[
                "ttir"
            ]
            products, additions = (len(re.findall(op, ttir)) for op in (r"= tt\.dot ", r"= arith\.addf "))
            assert products == 3 * additions > 0  # two additions and six products of pieces for each product


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize(
    "kind, beta, head",
    (
        ("text", 0.0, False),
        ("top-k", 0.0, True),
        ("top-k", 0.3, False),
        ("dense", 0.0, False),
        ("dense", 1.0, False),
        ("dense", 0.3, True),
    ),
)
def test_row_kernels_fit_the_registers_and_shared_memory(kind, beta, head, arch, monkeypatch):
    for launch in launches(monkeypatch, row_calls(kind, beta, head)):
        kernel, spilled = compiled(launch, arch)
        assert spilled == 0, launch.kernel.__name__
        if launch.kernel is not divergence_rows.weighted_loss_kernel:  # it overwrites nothing
            assert_stores_wait_for_loads(kernel.asm["ttgir"])


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_fits_the_registers(dtype, arch, monkeypatch):
    x, narrow = empty(128256, 4096, dtype=dtype), empty(128256, 4096, dtype=torch.bfloat16)
    calls = iter([lambda: scale.scaled_(x, x, empty(1)), lambda: scale.scaled_(narrow, x, empty(1))])
    assert all(compiled(launch, arch)[1] == 0 for launch in launches(monkeypatch, calls))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_without_products_fit_an_old_gpu(dtype, monkeypatch):
    named = zip(OPS, column_calls(dtype, 20), strict=True)
    calls = [call for name, call in named if name not in ops.ON_TENSOR_CORES]
    x = empty(8192, 4096, dtype=dtype)
    calls += [*row_calls("top-k", 0.0, True), *row_calls("dense", 0.3, False), lambda: scale.scaled_(x, x, empty(1))]
    made = [compiled(launch, arch)[1] for arch in OLD for launch in launches(monkeypatch, iter(calls))]
    assert len(calls) == 7 and max(made) <= 48


def test_fold_does_not_fuse_its_multiply_and_add(monkeypatch):
    """A fused multiply-add would not round the product, so a fold would differ from the CPU's."""
    (fold,) = launches(monkeypatch, (call for i, call in enumerate(column_calls(torch.bfloat16, 2)) if i == 4))
    for fused in (False, True):
        options = fold.options | {"enable_fp_fusion": fused}
        sass = triton.compile(fold.source(), target=GPUTarget("cuda", 80, 32), options=options).asm["sass"]
        assert ("FFMA" in sass) == fused and "FMUL" in sass
    assert not fold.options["enable_fp_fusion"]
