"""Builds the native CPU ops and text loops. Without a C++ compiler the package installs and runs on its references."""

import os
import shutil
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "0x020a000000000000"  # torch 2.10: one binary serves every later torch


def cpu_extension() -> CppExtension:
    """`rbfast/_C`: a library of ops for the torch dispatcher, not a Python module; the ISA is chosen at run time."""
    return CppExtension(
        "rbfast._C",
        [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cpu/*.cpp"))],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args=["-O3", "-Wall", "-fvisibility=hidden", "-ffp-contract=off", f"-fmacro-prefix-map={ROOT}=."],
        extra_link_args=["-s"],
        py_limited_api=True,
    )


def text_extension() -> Extension:
    """`rbfast/_text`: a Python module without torch, for this Python alone (pybind11 has no limited API)."""
    return Extension(
        "rbfast._text",
        ["csrc/text.cpp"],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        language="c++",
        extra_compile_args=["-O3", "-Wall", "-fvisibility=hidden", "-pthread", f"-fmacro-prefix-map={ROOT}=."],
        extra_link_args=["-s", "-pthread"],
    )


def extensions() -> list:
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        print("rbfast: no C++ compiler found (set CXX); installing without native ops. `rbfast info` will say so.")
        return []
    return [cpu_extension(), text_extension()]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    packages=["rbfast"],
)
