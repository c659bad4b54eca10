"""The native CPU ops for Arm, where their vectors are of four floats: compiled and linked by a cross compiler.

`apt-get install g++-aarch64-linux-gnu` brings it.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMPILER = "aarch64-linux-gnu-g++"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Werror",
    "-ffp-contract=off",
    f"-I{ROOT / 'csrc'}",
]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def test_every_source_compiles_and_needs_no_kernel_of_x86(tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    headers = [f"-isystem{path}" for path in include_paths()]
    objects = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        objects.append(str(tmp_path / f"{source.stem}.o"))
        command = [COMPILER, *FLAGS, STABLE_ABI, *headers, "-c", str(source), "-o", objects[-1]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    library = str(tmp_path / "_C.so")
    subprocess.run([COMPILER, "-shared", "-Wl,--unresolved-symbols=ignore-all", *objects, "-o", library], check=True)
    lines = subprocess.run(
        ["nm", "-C", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines and not [line for line in lines if "rbfast" in line]
