"""What each CUDA kernel compiles to: registers, shared memory and spills for every GPU generation.

python bench/experiments kernel_resources            # for docs/kernels.md; needs nvcc, not a GPU; takes minutes
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "90a", "100", "120")


@dataclass(frozen=True)
class Resources:
    """What one kernel uses on one architecture. shared_bytes is its static shared memory."""

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


def compile_file(path: Path, architecture: str) -> list[Resources]:
    """Compiles a .cu file for one architecture, with warnings as errors, and parses ptxas's report on each kernel."""
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem={folder}" for folder in include_paths())]
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [
        "-Werror",
        "all-warnings",
        "-Xptxas",
        "-v",
        "-gencode",
        f"arch=compute_{architecture},code=sm_{architecture}",
    ]
    done = subprocess.run(
        [nvcc() or "nvcc", "-cubin", "-o", os.devnull, *flags, *includes, str(path)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed on {path.name} for sm_{architecture}:\n{done.stderr[-4000:]}")
    return list(_parse(_demangle(done.stderr), architecture))


def _demangle(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def _parse(log: str, architecture: str) -> Iterator[Resources]:
    for entry in log.split("Compiling entry function")[1:]:
        name = re.search(r"\(anonymous namespace\)::(\w+(?:<[^>]*>)?)", entry)
        assert name is not None, entry
        used, shared = re.search(r"Used (\d+) registers", entry), re.search(r"(\d+) bytes smem", entry)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        assert used is not None and stack is not None, entry
        yield Resources(
            _plain(name[1]),
            architecture,
            int(used[1]),
            int(shared[1]) if shared else 0,
            int(stack[1]),
            int(stack[2]) + int(stack[3]),
        )


def _plain(name: str) -> str:
    """A kernel's readable name."""
    for kind, said in enumerate(("forward", "reverse", "js")):
        name = name.replace(f"(rbfast::Kind){kind}", said).replace(f"(rbfast::(anonymous namespace)::Kind){kind}", said)
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace("float", "fp32")


def all_resources() -> list[Resources]:
    """Resources of every kernel on every architecture, two compilers at a time."""
    jobs = [(path, name) for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) for name in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return [found for part in pool.map(lambda job: compile_file(*job), jobs) for found in part]


def table(found: list[Resources]) -> str:
    """Markdown: a row per kernel, with registers / spilled bytes for each architecture."""
    lines = ["| kernel | " + " | ".join(f"sm_{name}" for name in ARCHITECTURES) + " |", "| --- " * 5 + "|"]
    by_name: dict[str, dict[str, Resources]] = {}
    for resources in found:
        by_name.setdefault(resources.kernel, {})[resources.architecture] = resources
    for kernel, used in sorted(by_name.items()):
        cells = (f"{used[name].registers} / {used[name].spill_bytes}" for name in ARCHITECTURES)
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    if nvcc() is None:
        print("nvcc was not found: put it on the PATH, or set CUDA_HOME", file=sys.stderr)
        return 2
    print("registers of a thread / bytes spilled\n\n" + table(all_resources()))
    return 0
