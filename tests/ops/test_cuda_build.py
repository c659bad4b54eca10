"""Building the CUDA ops without a GPU: every kernel for every architecture, and the library with a CPU-only torch."""

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experiments.kernel_resources import ARCHITECTURES, Resources, all_resources, nvcc
from fresh_installs import ROOT, install, run, try_it

from rbfast import ops
from rbfast.ops import registry

pytestmark = pytest.mark.slow

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="nvcc is absent")
KERNELS = {"sweep": 24, "project_tile": 12, "gather": 9}
KERNELS |= {"update_columns": 12}
KERNELS |= {"prepare_rows": 1, "sparse_rows": 19, "sparse_streamed": 2, "finish_rows": 1}
KERNELS |= {"dense_rows": 15, "dense_streamed": 6, "finish_dense": 1}
# kernel: (threads per block, blocks that must at least fit an SM of 65536 registers).
RESIDENT = {"project_tile": (256, 1), "sparse_streamed": (512, 1), "dense_streamed": (256, 1)}
# (architecture, kernel): bytes spilled, stores and loads; 0: a stack frame without spills. As in docs/kernels.md.
SPILLED = {
    ("80", "sparse_rows<1, 256, 16, 2, true>"): 32,
    ("90a", "sparse_rows<1, 256, 16, 2, true>"): 52,
    ("90a", "sparse_rows<8, 256, 16, 2, true>"): 40,
    ("90a", "sparse_rows<8, 512, 16, 1, true>"): 40,
    ("100", "dense_rows<reverse, 8, 256, 16, 2>"): 0,
    ("120", "dense_rows<reverse, 8, 256, 16, 2>"): 192,
    ("120", "dense_rows<reverse, 8, 256, 7, 3>"): 16,
    ("120", "sparse_rows<8, 256, 16, 2, true>"): 64,
    ("120", "sparse_rows<8, 512, 16, 1, true>"): 64,
}


@pytest.fixture(scope="module")
def resources() -> list[Resources]:
    return all_resources()


@needs_nvcc
@pytest.mark.long
def test_every_kernel_compiles_for_every_architecture(resources: list[Resources]) -> None:
    for architecture in ARCHITECTURES:
        found = [r for r in resources if r.architecture == architecture]
        assert {name: sum(r.kernel.split("<")[0] == name for r in found) for name in KERNELS} == KERNELS
        assert len(found) == sum(KERNELS.values())


@needs_nvcc
@pytest.mark.long
def test_only_the_documented_kernels_spill(resources: list[Resources]) -> None:
    """A kernel that stops spilling must leave the list, here and in docs/kernels.md."""
    assert {(r.architecture, r.kernel): r.spill_bytes for r in resources if r.spill_bytes or r.stack_bytes} == SPILLED


@needs_nvcc
@pytest.mark.long
def test_as_many_blocks_fit_an_sm_as_the_launch_expects(resources: list[Resources]) -> None:
    for r in resources:
        name, _, arguments = r.kernel.rstrip(">").partition("<")
        threads, blocks = RESIDENT.get(name, (256, 2))
        if name == "sweep":  # <type, blocks of ranks, with both products>
            is_lean = "bf16" in arguments or ", 1," in arguments
            threads, blocks = 128, 4 if "false" in arguments else 3 if is_lean else 2
        if name in ("sparse_rows", "dense_rows"):  # <blocks, threads, vectors, resident, general>, <kind, blocks, ...>
            numbers = [int(x) for x in arguments.split(",") if x.strip().isdigit()]
            threads, blocks = numbers[1], min(numbers[3], 2) if "true" in arguments else numbers[3]
        assert (r.registers + 7) // 8 * 8 * threads * blocks <= 65536, r


@needs_nvcc
@pytest.mark.long
def test_wheel_with_cuda_works_with_a_cpu_only_torch(
    fresh: Path, checkout: Path, quick_compiler: str, tmp_path: Path
) -> None:
    if torch.version.cuda:
        pytest.skip("this torch has CUDA; tests/ops/test_cuda.py tests the library itself")
    for_speed = {"CXX": quick_compiler, "NVCC_APPEND_FLAGS": "-Xcicc -O0 -Xptxas -O0 -Xcompiler -O0"}  # of the build
    install(fresh, ".", cwd=checkout, RBFAST_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0a", **for_speed)
    found = try_it(fresh, tmp_path)
    assert found["xs"] == [[2.0, 0.0], [5.0, 3.0]]
    assert found["gather"].startswith("native")
    (library,) = Path(found["file"]).parent.glob("_C_cuda.*so")
    assert str(checkout).encode() not in library.read_bytes(), "error messages would contain paths of the build"
    assert_registers_every_op(library, tmp_path)


def assert_registers_every_op(library: Path, tmp_path: Path) -> None:
    """Loads the library into this torch, behind a stub libtorch.so that provides what a CUDA torch's does.

    torch loads libraries with local symbols, so the library itself must depend on libtorch.so to find CUDA's streams.
    """
    needed = run("readelf", "-d", str(library), cwd=ROOT)
    assert "[libtorch.so]" in needed and "cuda" not in needed, needed
    source = """
int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return 0; }
int aoti_torch_create_cuda_guard(int device, void** guard) { *guard = 0; return 0; }
int aoti_torch_delete_cuda_guard(void* guard) { return 0; }
"""
    of_torch = Path(torch.__file__).parent / "lib"
    for name, code, linked in (
        ("libtorch_cuda.so", source, []),
        ("libtorch.so", "", [f"-L{tmp_path}", "-ltorch_cuda", f"-L{of_torch}", "-ltorch_cpu"]),
    ):
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-Wl,--no-as-needed", "-x", "c", "-", "-x", "none"]
        subprocess.run(["cc", *flags, *linked, "-o", tmp_path / name], input=code, text=True, check=True)
    program = """
import json, sys, torch
from rbfast.ops import registry
torch.ops.load_library(sys.argv[1])
print(json.dumps([n for n in registry._SCHEMAS if registry._has_kernel(n, "CUDA")]))
"""
    done = run(sys.executable, "-c", program, str(library), cwd=ROOT, LD_LIBRARY_PATH=f"{tmp_path}:{of_torch}")
    without = {"row_thresholds", "scaled_"}  # on CPUs only; in Triton, as the ops of stacked experts
    without |= {name for name in registry._SCHEMAS if name.startswith("grouped_")}
    assert set(json.loads(done.splitlines()[-1])) == set(registry._SCHEMAS) - without


def test_a_library_that_needs_a_cuda_torch_is_not_loaded_without_one() -> None:
    if torch.version.cuda:
        pytest.skip("this torch has CUDA")
    assert registry._CUDA is None
    assert ops.implementations("cuda")["column_grad"] == "none (this torch is built without a GPU)"
    built = sorted(Path(ops.__file__).parents[1].glob("_C_cuda.*so"))
    if built:
        needed = "aoti_torch_(get_current_cuda_stream|create_cuda_guard|delete_cuda_guard)"
        with pytest.raises(OSError, match=f"undefined symbol: {needed}"):
            ctypes.CDLL(str(built[0]), 2)  # RTLD_NOW


@pytest.mark.parametrize(
    "env, message",
    (
        ({"RBFAST_CUDA": "yes"}, "RBFAST_CUDA must be 1"),
        ({"RBFAST_CUDA": "1", "CUDA_HOME": "/nowhere"}, "RBFAST_CUDA=1 needs nvcc"),
    ),
)
def test_impossible_build_request_fails(env: dict[str, str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env={"PATH": _path()} | env, capture_output=True, text=True
    )
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.parametrize(
    "release, of_torch, asked, message",
    (
        ("12.6", "12.9", "", "targets 8.0;9.0+PTX"),
        ("12.8", "12.9", "", "targets 8.0;9.0a;10.0+PTX;12.0+PTX"),
        ("12.6", None, "1", "targets 8.0;9.0+PTX"),
        ("12.6", "13.0", "0", "targets none"),
        ("12.6", "13.0", "", "/bin/nvcc is of CUDA 12.6 (set CUDA_HOME); installing without the CUDA ops."),
        ("12.6", "13.0", "1", "RuntimeError: RBFAST_CUDA=1 needs nvcc of CUDA 13, to match torch, but "),
    ),
)
def test_build_targets_match_torch_and_nvcc(
    release: str, of_torch: str | None, asked: str, message: str, tmp_path: Path
) -> None:
    done = _targets(release, of_torch, asked, tmp_path)
    assert message in done.stdout + done.stderr
    assert (done.returncode != 0) == ("Error" in message)


def test_cuda_ops_cannot_be_asked_for_without_a_compiler(tmp_path: Path) -> None:
    done = _targets("12.8", "12.9", "1", tmp_path, CXX="none")
    assert "RBFAST_CUDA=1 needs a C++ compiler" in done.stderr and done.returncode != 0
    (tmp_path / "unasked").mkdir()
    assert _targets("12.8", "12.9", "", tmp_path / "unasked", CXX="none").returncode == 0


@pytest.mark.parametrize(
    "capabilities, asked, has_targets",
    (([(7, 5)], "", False), ([(7, 5)], "1", True), ([(7, 5), (8, 6)], "", True), ([], "", True)),
)
def test_build_leaves_the_cuda_ops_out_for_old_gpus(
    capabilities: list[tuple[int, int]], asked: str, has_targets: bool, tmp_path: Path
) -> None:
    given = f"""
torch.cuda.is_available = lambda: {bool(capabilities)}
torch.cuda.device_count = lambda: {len(capabilities)}
torch.cuda.get_device_capability = {capabilities}.__getitem__
"""
    output = _targets("12.8", "12.9", asked, tmp_path, given).stdout
    assert ("targets 8.0" in output) == has_targets
    assert ("_C_cuda needs a GPU of sm_80 or later" in output) != has_targets


def _targets(
    release: str,
    of_torch: str | None,
    asked: str,
    folder: Path,
    prepare: str = "torch.cuda.is_available = lambda: False",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """setup.py under a torch and an nvcc of these CUDA versions; it prints the GPUs that it would build for."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}'\necho '#$ TOP={folder}' >&2\n")
    nvcc.chmod(0o755)
    program = f"""
import os, runpy, torch
torch.version.cuda = {of_torch!r}
{prepare}
runpy.run_path("setup.py", run_name="__main__")
print("targets", os.environ.get("TORCH_CUDA_ARCH_LIST", "none"))
"""
    return subprocess.run(
        [sys.executable, "-c", program, "--version"],
        cwd=ROOT,
        env={"PATH": f"{_path()}:/usr/bin:/bin", "CUDA_HOME": str(folder), "RBFAST_CUDA": asked} | environment,
        capture_output=True,
        text=True,
    )


def _path() -> str:
    return str(Path(shutil.which("c++") or "/usr/bin/c++").parent)
