"""Builds the native ops for the CPU and for CUDA, and the text loops. What cannot be built is left out; its reference
implementation runs instead.

CUDA ops are built if torch has CUDA, nvcc has the same major version, and not all GPUs of this machine are too old for
them. RBFAST_CUDA=1 builds them even if torch has no CUDA, and fails if it cannot; RBFAST_CUDA=0 leaves them out.
TORCH_CUDA_ARCH_LIST chooses the GPUs. RBFAST_SANITIZE=1 builds the CPU code with AddressSanitizer and UBSan, for
tests/system/test_sanitizers.py.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, find_packages, setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")  # torch 2.10: one binary serves every later torch
GPUS = "8.0;9.0a;10.0+PTX;12.0+PTX"  # PTX of 10.0 is for 11.0
GPUS_BEFORE_BLACKWELL = "8.0;9.0+PTX"  # the most nvcc supports before 12.8; 9.0a has PTX for no later GPU
OLDEST_GPU = (8, 0)
SANITIZE = ["-fsanitize=address,undefined"] if os.environ.get("RBFAST_SANITIZE") == "1" else []
OPTIMIZE = ["-Og", "-g1", "-fno-sanitize-recover=all", *SANITIZE] if SANITIZE else ["-O3"]
LINK = SANITIZE or ["-s"]
HEADERS = ("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.inl")  # a change to one triggers a rebuild
HOST_FLAGS = ["-Wall", "-fvisibility=hidden", f"-fmacro-prefix-map={ROOT}=."]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def cpu_extension() -> CppExtension:
    """`rbfast/_C`: a library of ops for the torch dispatcher, not a Python module; the ISA is chosen at run time."""
    return CppExtension(
        "rbfast._C",
        sources("csrc/cpu/*.cpp"),
        depends=sources(*HEADERS),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[STABLE_ABI],
        extra_compile_args=[*OPTIMIZE, "-ffp-contract=off", *HOST_FLAGS],
        extra_link_args=LINK,
        py_limited_api=True,
    )


def text_extension() -> Extension:
    """`rbfast/_text`: a Python module without torch, built for this Python only (pybind11 has no limited API)."""
    return Extension(
        "rbfast._text",
        ["csrc/text.cpp"],
        depends=sources(*HEADERS),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        language="c++",
        extra_compile_args=[*OPTIMIZE, "-pthread", *HOST_FLAGS],
        extra_link_args=[*LINK, "-pthread"],
    )


def cuda_extension(toolkit: str, release: tuple[int, int]) -> CppExtension:
    """`rbfast/_C_cuda`. Links the CUDA runtime statically, so that it fits a torch of any CUDA of its major version."""
    cpp_extension.CUDA_HOME = toolkit  # a CPU-only torch leaves it empty, whatever the environment says
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", GPUS if release >= (12, 8) else GPUS_BEFORE_BLACKWELL)
    return CppExtension(
        "rbfast._C_cuda",
        sources("csrc/cuda/*.cu"),
        depends=sources(*HEADERS),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[STABLE_ABI, ("USE_CUDA", None)],
        # --threads=0: nvcc compiles a file for several GPUs at once.
        extra_compile_args={"cxx": [], "nvcc": ["-O3", "--threads=0", "-Xcompiler", ",".join(HOST_FLAGS)]},
        libraries=["cudart_static", "rt", "dl"],
        library_dirs=[f"{toolkit}/lib64", f"{toolkit}/lib"],
        # CUDA streams and guards come from libtorch_cuda. It is linked through libtorch.so, which a CPU-only torch has
        # too, but which is empty itself: the linker would drop it with --as-needed.
        extra_link_args=["-s", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"],
        py_limited_api=True,
    )


def toolkit_of(nvcc: str) -> str:
    """The folder that nvcc works from: the nvcc on the PATH may be a link or a script."""
    steps = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    ).stderr
    (top,) = [line.removeprefix("#$ TOP=") for line in steps.splitlines() if line.startswith("#$ TOP=")]
    return os.path.realpath(top)


def release_of(toolkit: str) -> tuple[int, int]:
    """The CUDA version of the toolkit's nvcc."""
    output = subprocess.run([f"{toolkit}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    ((major, minor),) = re.findall(r"release (\d+)\.(\d+)", output)
    return int(major), int(minor)


def has_only_old_gpus() -> bool:
    """Whether this machine has GPUs, none of which runs the CUDA ops."""
    if not torch.cuda.is_available():  # also if CUDA cannot start, where the query below would raise
        return False
    return all(torch.cuda.get_device_capability(gpu) < OLDEST_GPU for gpu in range(torch.cuda.device_count()))


def cuda_toolkit() -> tuple[str, tuple[int, int]] | None:
    """The folder of the CUDA toolkit to build with and its version, or None if the CUDA ops are left out."""
    asked = os.environ.get("RBFAST_CUDA", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"RBFAST_CUDA must be 1 (build the CUDA ops), 0 (leave them out) or unset, got {asked!r}")
    if asked == "0" or (asked == "" and not torch.version.cuda):
        return None
    of_torch = torch.version.cuda.split(".")[0] if torch.version.cuda else None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    problem = "nvcc was not found"
    if nvcc is not None:
        toolkit = toolkit_of(nvcc)
        release = release_of(toolkit)
        if of_torch in (None, str(release[0])):
            if asked == "1" or not has_only_old_gpus():
                return toolkit, release
            print(
                "rbfast: _C_cuda needs a GPU of sm_80 or later; installing without it (RBFAST_CUDA=1 builds it anyway)."
            )
            return None
        problem = f"{nvcc} is of CUDA {release[0]}.{release[1]}"
    needs = f"needs nvcc of CUDA {of_torch}, to match torch," if of_torch else "needs nvcc,"
    if asked == "1":
        raise RuntimeError(f"RBFAST_CUDA=1 {needs} but {problem}: put one on the PATH, or set CUDA_HOME to its toolkit")
    print(f"rbfast: _C_cuda {needs} but {problem} (set CUDA_HOME); installing without the CUDA ops.")
    return None


def extensions() -> list:
    toolkit = cuda_toolkit()
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        if os.environ.get("RBFAST_CUDA") == "1":
            raise RuntimeError("RBFAST_CUDA=1 needs a C++ compiler: install one, or set CXX")
        print("rbfast: no C++ compiler found (set CXX); installing without native ops. `rbfast info` will say so.")
        return []
    return [cpu_extension(), text_extension()] + ([cuda_extension(*toolkit)] if toolkit else [])


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    # kernels/ has no __init__.py: with one, a repository root on sys.path would hide the hub's `kernels` package from
    # transformers. The symlink rbfast/kernels makes it importable as rbfast.kernels in every kind of install.
    packages=[*find_packages(include=["rbfast", "rbfast.*"]), "rbfast.kernels"],
    package_data={"rbfast": ["py.typed"]},
)
