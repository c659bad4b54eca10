"""Devices for the CUDA ops: the GPU, or without one, threads of the host (see cuda_on_host/)."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from locks import locked
from torch.utils.cpp_extension import include_paths

from rbfast import ops
from rbfast.ops import registry

ROOT = Path(__file__).resolve().parents[2]
# name -> clusters that fit at once (-1: it has none), bytes of shared memory per SM (which tell these devices apart),
# order of threads: 0 as numbered, 1 reversed, 2 random. Geforce has the least shared memory of any GPU; starved can
# hold almost nothing of a row; slice has too few SMs for a cluster; volta is too old for any kernel.
HOSTS = {"hopper": (2, 233472, 0), "ampere": (-1, 167936, 1), "geforce": (2, 102400, 2), "starved": (2, 20000, 2)}
HOSTS |= {"slice": (0, 200000, 0), "volta": (-1, 0, 0)}


@dataclass(frozen=True)
class Gpu:
    """A device: its name, the ops as they run there, and the torch device of their tensors."""

    name: str
    ops: Any
    device: str

    @property
    def is_real(self) -> bool:
        return self.device == "cuda"

    @property
    def called_for_any_device(self) -> Any:
        """The ops as the dispatcher calls them if any tensor of a call is on a GPU."""
        if self.is_real:
            return self.ops
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # stands for the GPU on the host
        calls = {name: functools.partial(getattr(self.ops, name).default.redispatch, key) for name in registry._SCHEMAS}
        return SimpleNamespace(**calls)


FLAGS = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-Drbfast=rbfast_on_host", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
IMITATION = ROOT / "tests/ops/cuda_on_host"


@functools.cache
def _host_library() -> ctypes.CDLL:
    """csrc/cuda compiled by g++ and loaded; its ops are torch.ops.rbfast_on_host, for CPU tensors.

    The build stays in build/cuda-on-host until a source changes; the workers of a test run share it.
    """
    sources = sorted([*(ROOT / "csrc").glob("cuda/*"), *(ROOT / "csrc").glob("*.h"), *IMITATION.iterdir()])
    flags = [*FLAGS, *_checks()]
    digest = hashlib.sha256(f"{flags} {torch.__version__}".encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda-on-host"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"host-{digest.hexdigest()[:16]}.so"
    failed = library.with_suffix(".failed")
    with locked(folder / "lock"):
        if failed.exists():  # else each of hundreds of tests would compile for a minute, in vain
            raise RuntimeError(f"these sources do not compile for the host; to try again, remove {failed}")
        if not library.exists():
            try:
                _compile(library, flags)
            except subprocess.CalledProcessError as error:
                if error.returncode > 0:  # not killed by a signal
                    failed.touch()
                raise
    namespace = torch.library.Library("rbfast_on_host", "DEF")
    _host_library.namespace = namespace  # type: ignore[attr-defined]  # keeps its ops alive
    for name, schema in registry._SCHEMAS.items():
        namespace.define(name + schema)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def _checks() -> list[str]:
    """Flags of UBSan, if the compiler has its library: a misaligned address ends the process, as on a GPU."""
    found = subprocess.run(["c++", "-print-file-name=libubsan.so"], check=True, capture_output=True, text=True).stdout
    return ["-fsanitize=undefined", "-fno-sanitize-recover=all"] if Path(found.strip()).is_absolute() else []


def _compile(library: Path, flags: list[str]) -> None:
    paths = [f"-I{IMITATION}", f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in include_paths())]
    with tempfile.TemporaryDirectory(prefix="rbfast-cuda-on-host-") as folder:

        def compiled(source: Path) -> Path:
            target = Path(folder, f"{source.stem}.o")
            subprocess.run(["c++", *flags, *paths, "-c", "-x", "c++", source, "-o", target], check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sorted((ROOT / "csrc/cuda").glob("*.cu"))))
        torch_libraries = Path(torch.__file__).parent / "lib"
        linked = [f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_libraries}"]
        linked.append("-Wl,--wrap=aoti_torch_empty_strided")
        subprocess.run(["c++", *flags, "-shared", *objects, "-o", Path(folder, "host.so"), *linked], check=True)
        shutil.move(Path(folder, "host.so"), library)


def host(name: str) -> Gpu:
    """The host, imitating one of HOSTS from now on."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler to run the CUDA ops on the host with")
    _host_library().imitate(*HOSTS[name])
    return Gpu(name, torch.ops.rbfast_on_host, "cpu")


def launches_on_host() -> int:
    """The number of kernels that the host has run so far."""
    return int(_host_library().launches())


def real() -> Gpu:
    """The GPU of this machine."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = ops.implementations("cuda")["column_grad"]
    assert found == "CUDA C++", f"this machine has a GPU, but column_grad runs as {found}"
    return Gpu("cuda", torch.ops.rbfast, "cuda")
