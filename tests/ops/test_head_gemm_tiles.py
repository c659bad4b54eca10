"""The head's products by tiles, on any CPU: the kernel of AMX machines with its instructions emulated."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fenced import fenced_at_end, fenced_at_start
from head_products import SHAPES, assert_product, draw
from torch import Tensor

from rbfast import ops

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/ops/tiles_on_any_cpu.cpp"
PANEL = 32
# More of k than is packed at a time, more rows, more columns, and more of both.
LONG = ((40, 5000, 50), (70, 64, 2100), (1100, 40, 60), (33, 130, 1500), (100, 4090, 70))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("tiles") / "tiles.so"
    flags = ["-O3", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def product(library: ctypes.CDLL, c: Tensor, a: Tensor, b: Tensor, resumed: bool, cut: int | None = None) -> Tensor:
    """C [m, n] from A [m, k] and B [k, n], views of bf16 matrices of any strides; `cut`: rectangles of that height."""
    (m, k), n = a.shape, b.shape[1]
    strides = [ctypes.c_int64(s) for s in (*a.stride(), b.stride(1), b.stride(0))]
    for top in range(0, m, cut or m):
        for left, right in ((0, n),) if cut is None else ((0, PANEL), (PANEL, n)):
            area = (ctypes.c_int64 * 4)(top, min(top + (cut or m), m), min(left, n), min(right, n))
            library.product(
                ctypes.c_void_p(a.data_ptr()), *strides[:2], ctypes.c_void_p(b.data_ptr()), *strides[2:],
                ctypes.c_void_p(c.data_ptr()), ctypes.c_int64(n), ctypes.c_int64(k), resumed, area,
            )  # fmt: skip
    return c


def check_products(shape: tuple[int, int, int], run: Callable[[Tensor, Tensor, Tensor, bool], Tensor]) -> list[Tensor]:
    """head_forward_, head_backward_ and head_grad_ of a shape T, H, V, checked against fp64."""
    T, H, V = shape
    hidden, weight, dz = (draw(*s, dtype=torch.bfloat16, seed=i) for i, s in enumerate(((T, H), (V, H), (T, V))))
    start = draw(V, H, dtype=torch.float32, seed=3)
    cases = ((hidden, weight.T, None), (dz, weight, None), (dz.T, hidden, start))
    results = []
    for a, b, before in cases:
        c = torch.full((len(a), b.shape[1]), torch.nan) if before is None else before.clone()
        results.append(run(c, a, b, before is not None))
        assert_product(results[-1], a, b, before)
    return results


@pytest.mark.parametrize("shape", [*SHAPES, *LONG])
def test_products_match_fp64(emulated, shape):
    check_products(shape, lambda c, a, b, resumed: product(emulated, c, a, b, resumed))


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_bits_do_not_depend_on_the_rectangle(emulated, shape):
    whole = check_products(shape, lambda c, a, b, resumed: product(emulated, c, a, b, resumed))
    parts = check_products(shape, lambda c, a, b, resumed: product(emulated, c, a, b, resumed, cut=PANEL))
    assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))


def test_strides_of_a_wider_matrix(emulated):
    wide = draw(40, 300, dtype=torch.bfloat16)
    weight, dz = draw(130, 70, dtype=torch.bfloat16, seed=1), wide[:, 100:230]
    gradient = product(emulated, torch.empty(40, 70), dz, weight, False)
    assert_product(gradient, dz, weight)
    assert torch.equal(gradient, product(emulated, torch.empty(40, 70), dz.contiguous(), weight, False))


def test_values_beside_the_operands_are_not_read(emulated):
    """NaNs beside the operands must not enter a product, not even times zero."""
    wide = torch.full((40, 300), torch.nan, dtype=torch.bfloat16)
    wide[3:36, 101:230] = draw(33, 129, dtype=torch.bfloat16)
    x, weight = wide[3:36, 101:230], draw(129, 50, dtype=torch.bfloat16, seed=1)
    assert_product(product(emulated, torch.empty(33, 50), x, weight, False), x, weight)
    assert_product(product(emulated, torch.empty(50, 33), weight.T.contiguous(), x.T, False), weight.T, x.T)
    other = draw(33, 40, dtype=torch.bfloat16, seed=2)
    assert_product(product(emulated, torch.zeros(129, 40), x.T, other, True), x.T, other)


@pytest.mark.parametrize("fenced", (fenced_at_end, fenced_at_start))
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_no_memory_outside_the_tensors_is_touched(emulated, shape, fenced):
    def inside(x: Tensor) -> Tensor:
        return fenced(x) if x.is_contiguous() else fenced(x.T).T

    check_products(shape, lambda c, a, b, resumed: product(emulated, inside(c), inside(a), inside(b), resumed))


@pytest.mark.parametrize("shape", [*SHAPES, *LONG])
def test_amx_matches_the_emulation_bitwise(emulated, shape, monkeypatch):
    monkeypatch.setenv("RBFAST_CPU_ISA", "amx")
    if ops.cpu_isa() != "amx":
        pytest.skip("this CPU has no amx")

    def on_this_machine(c: Tensor, a: Tensor, b: Tensor, resumed: bool) -> Tensor:
        if resumed:
            ops.head_grad_(c, a.T, b)
            return c
        if b.stride(0) == 1 and b.shape[1] != 1:
            ops.head_forward_(c, a, b.T)
            return c
        ops.head_backward_(c, a, b)
        return c

    theirs = check_products(shape, lambda c, a, b, resumed: product(emulated, c, a, b, resumed))
    assert all(torch.equal(x, y) for x, y in zip(check_products(shape, on_this_machine), theirs, strict=True))


# The answer of a Linux kernel without AMX, or of a sandbox that blocks the request.
REFUSAL = """
#include <errno.h>
long syscall(long number, long code) { errno = ENOSYS; return -1; }
"""


@pytest.mark.slow
def test_machine_that_refuses_amx_falls_back(tmp_path):
    if ops.cpu_isa() != "amx":
        pytest.skip("this CPU has no amx, or RBFAST_CPU_ISA is set")
    library = tmp_path / "refusal.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)], input=REFUSAL, text=True, check=True)
    program = "from rbfast import ops; print(ops.cpu_isa())"
    env = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["avx512_bf16"]
