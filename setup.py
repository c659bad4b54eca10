"""Builds the native CPU ops. Without a C++ compiler the package still installs and runs on its torch reference."""

import os
import shutil
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "0x020a000000000000"  # torch 2.10: one binary serves every later torch


def cpu_extension() -> CppExtension:
    """`rbfast/_C`: a library of ops for the torch dispatcher, not a Python module; the ISA is chosen at run time."""
    return CppExtension(
        "rbfast._C",
        [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp"))],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args=["-O3", "-Wall", "-fvisibility=hidden", "-ffp-contract=off", f"-fmacro-prefix-map={ROOT}=."],
        extra_link_args=["-s"],
        py_limited_api=True,
    )


def extensions() -> list:
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        print("rbfast: no C++ compiler found (set CXX); installing without native ops. `rbfast info` will say so.")
        return []
    return [cpu_extension()]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    # kernels/ has no __init__.py: with one, a repository root on sys.path would hide the hub's `kernels` package from
    # transformers. The symlink rbfast/kernels makes it importable as rbfast.kernels in every kind of install.
    packages=["rbfast", "rbfast.kernels"],
)
