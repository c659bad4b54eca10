"""The native CPU ops with other compilers: the oldest GCC for x86-64, and for Arm, where vectors hold four floats, GCC
for Linux and clang for macOS.

`apt-get install g++-11 g++-aarch64-linux-gnu` and `pip install ziglang` install them.
"""

import importlib.util
import shutil
import subprocess
import sys
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


def objects_of(folder: Path, *compiler: str) -> list[str]:
    """Compiles every source into the folder."""
    headers = [f"-isystem{path}" for path in include_paths()]
    objects = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        objects.append(str(folder / f"{source.stem}.o"))
        command = [*compiler, *FLAGS, STABLE_ABI, *headers, "-c", str(source), "-o", objects[-1]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return objects


def test_every_source_compiles_for_arm_without_x86_kernels(tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    objects, library = objects_of(tmp_path, COMPILER), str(tmp_path / "_C.so")
    subprocess.run([COMPILER, "-shared", "-Wl,--unresolved-symbols=ignore-all", *objects, "-o", library], check=True)
    lines = subprocess.run(
        ["nm", "-C", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines and not [line for line in lines if "rbfast" in line]


def test_every_source_compiles_with_the_oldest_gcc(tmp_path: Path) -> None:
    if shutil.which("g++-11") is None:
        pytest.skip("no g++-11")
    objects_of(tmp_path, "g++-11")


def test_every_source_compiles_for_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("no ziglang")
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(tmp_path / "cache"))
    objects_of(tmp_path, sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos")
