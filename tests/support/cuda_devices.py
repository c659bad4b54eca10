"""Where the tests run the CUDA ops: on the GPU, and without one as threads of the host (see cuda_on_host/)."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from rbfast import ops
from rbfast.ops import registry

ROOT = Path(__file__).resolve().parents[2]
# name -> whether it has clusters, bytes of shared memory of an SM, the order of its threads: 0 as numbered, 1 reversed,
# 2 at random. Geforce has the least that a GPU has; starved keeps next to nothing of a row.
HOSTS = {"hopper": (1, 233472, 0), "ampere": (0, 167936, 1), "geforce": (1, 102400, 2), "starved": (1, 20000, 2)}


@dataclass(frozen=True)
class Gpu:
    """name, the ops as they run there, and the torch device of their tensors."""

    name: str
    ops: Any
    device: str

    @property
    def is_real(self) -> bool:
        return self.device == "cuda"

    @property
    def called_for_any_device(self) -> Any:
        """The ops as the dispatcher calls them for a GPU, which it does if any tensor of a call is there."""
        if self.is_real:
            return self.ops
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # what stands for the GPU on the host
        calls = {name: functools.partial(getattr(self.ops, name).default.redispatch, key) for name in registry._SCHEMAS}
        return SimpleNamespace(**calls)


@functools.cache
def _host_library() -> ctypes.CDLL:
    """csrc/cuda compiled by g++ and loaded; its ops are torch.ops.rbfast_on_host, for CPU tensors."""
    folder = Path(tempfile.mkdtemp(prefix="rbfast-cuda-on-host-"))
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
    flags += ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
    defines = ["-Drbfast=rbfast_on_host", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    paths = [f"-I{ROOT / 'tests/ops/cuda_on_host'}", f"-I{ROOT / 'csrc'}", *(f"-isystem{p}" for p in include_paths())]
    libraries = Path(torch.__file__).parent / "lib"
    try:
        subprocess.run(
            ["c++", *flags, *defines, *paths, "-shared", "-o", folder / "host.so", "-x", "c++"]
            + [str(path) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
            + ["-x", "none", f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"],
            check=True,
        )
        namespace = torch.library.Library("rbfast_on_host", "DEF")
        _host_library.namespace = namespace  # type: ignore[attr-defined]  # it goes with its ops
        for name, schema in registry._SCHEMAS.items():
            namespace.define(name + schema)
        torch.ops.load_library(folder / "host.so")
        return ctypes.CDLL(str(folder / "host.so"))
    finally:
        shutil.rmtree(folder)


def host(name: str) -> Gpu:
    """The host, imitating one of HOSTS from now on."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler to run the CUDA ops on the host with")
    _host_library().imitate(*HOSTS[name])
    return Gpu(name, torch.ops.rbfast_on_host, "cpu")


def real() -> Gpu:
    """The GPU of this machine."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = ops.implementations("cuda")["column_grad"]
    assert found == "CUDA C++", f"this machine has a GPU, but column_grad runs as {found}"
    return Gpu("cuda", torch.ops.rbfast, "cuda")
