"""The registry of ops: schemas, fakes, the reference for each op, and faster kernels from native libraries and Triton.

The torch dispatcher chooses for each op and device: a native kernel if one is loaded, else on a GPU a Triton kernel
where it can run, else the reference. Ops whose name ends in an underscore write into their first argument. All tensors
of a call share a device; A and B are fp32. `run`: cols consists of aligned runs of that many consecutive columns, see
`run_of`.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rbfast.ops import head_gemm, reference
from rbfast.ops.dtypes import wide
from rbfast.utils.packages import how_to_build

LIBRARY = torch.library.Library("rbfast", "DEF")
_SCHEMAS = {
    "column_gather": "(Tensor x, Tensor cols, int run=1) -> Tensor",
    "column_grad": "(Tensor dy, Tensor xs, Tensor A, Tensor B, float scale) -> (Tensor, Tensor)",
    "column_grad_all": "(Tensor[] dy, Tensor xs, Tensor[] A, Tensor[] B, float scale) -> (Tensor[], Tensor[])",
    "column_linear_": "(Tensor(a!) y, Tensor xs, Tensor A, Tensor B, float scale) -> ()",
    "column_scatter_": "(Tensor(a!) dx, Tensor dy, Tensor cols, Tensor A, Tensor B, float scale, int run=1) -> ()",
    "column_fold_": "(Tensor(a!) weight, Tensor base_columns, Tensor cols, Tensor A, Tensor B, float scale, "
    "int run=1) -> ()",
    "column_fold_all_": "(Tensor(a!)[] weights, Tensor[] base_columns, Tensor[] cols, Tensor[] A, Tensor[] B, "
    "float scale, int[] runs) -> ()",
    "grouped_linear": "(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    "grouped_column_grad": "(Tensor dy, Tensor xs, Tensor ends, Tensor A, Tensor B, float scale) -> (Tensor, Tensor)",
    "grouped_column_linear_": "(Tensor(a!) y, Tensor xs, Tensor ends, Tensor A, Tensor B, float scale) -> ()",
    "grouped_column_scatter_": "(Tensor(a!) dx, Tensor dy, Tensor ends, Tensor cols, Tensor A, Tensor B, float scale, "
    "int run=1) -> ()",
    "grouped_column_fold_": "(Tensor(a!) weight, Tensor base_columns, Tensor cols, Tensor A, Tensor B, float scale, "
    "int run=1) -> ()",
    "head_forward_": "(Tensor(a!) logits, Tensor hidden, Tensor weight) -> ()",
    "head_backward_": "(Tensor(a!) d_hidden, Tensor dz, Tensor weight, Tensor? thresholds=None) -> ()",
    "row_thresholds": "(Tensor dz, float share) -> (Tensor, Tensor)",
    "head_grad_": "(Tensor(a!) dW, Tensor dz, Tensor hidden) -> ()",
    "scaled_": "(Tensor(a!) out, Tensor x, Tensor factor) -> ()",
    "divergence_rows_": "(Tensor(a!) logits, Tensor(b!)? dz, Tensor labels, Tensor? kl_weight, "
    "Tensor? ce_weight, Tensor? temperature, Tensor? ids, Tensor? logprobs, Tensor? teacher, Tensor? bias, "
    "float beta, float logit_scale, float? softcap, float kl_factor=1.0, float ce_factor=1.0, "
    "float temperature_factor=1.0) -> (Tensor, Tensor, Tensor)",
}

# For each op in Triton, its module in rbfast.kernels.
_TRITON_MODULES = {
    "column_gather": "columns",
    "column_grad": "columns",
    "column_linear_": "columns",
    "column_scatter_": "columns",
    "column_fold_": "columns",
    "grouped_column_grad": "grouped_columns",
    "grouped_column_linear_": "grouped_columns",
    "grouped_column_scatter_": "grouped_columns",
    "grouped_column_fold_": "grouped_columns",
    "divergence_rows_": "divergence_rows",
    "scaled_": "scale",
}
_OF_LISTS = {"column_grad_all": "column_grad", "column_fold_all_": "column_fold_"}  # for many matrices: the op for one
# Ops whose Triton kernels multiply on tensor cores. On a GPU before sm_80 Triton would multiply on plain cores:
# these kernels would spill up to 16 KB of registers per thread, and one would not fit the shared memory.
ON_TENSOR_CORES = (
    "column_grad",
    "column_grad_all",
    "column_linear_",
    "column_scatter_",
    "grouped_column_grad",
    "grouped_column_linear_",
    "grouped_column_scatter_",
)
OLDEST = (8, 0)  # the lowest compute capability that the CUDA ops support
_PRODUCTS = ("head_forward_", "head_backward_", "head_grad_")  # on CUDA torch's own GEMMs, which are fast enough


def _load_library(name: str) -> ctypes.CDLL | None:
    """Loads rbfast/{name}.*so if it was built. Raises if the file exists but cannot be loaded."""
    built = sorted(Path(__file__).parent.parent.glob(f"{name}.*so"))
    if not built:
        return None
    torch.ops.load_library(built[0])
    return ctypes.CDLL(str(built[0]))


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"rbfast::{name}", key)


def _why_no_triton() -> str | None:
    """Why Triton cannot run on any GPU of this machine; None if it can. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # It compiles a launcher for each kernel, by CC if that is set; its builds for Windows bring a compiler.
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if os.name == "posix" and not any(map(shutil.which, names)):
        return "Triton needs a C compiler: install gcc"
    return None


@cache
def is_old_gpu(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU before sm_80. Starts CUDA."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) < OLDEST


def has_row_kernel(device: torch.device) -> bool:
    """Whether divergence_rows_ is a kernel on this GPU, not the reference, which makes fp64 copies of the logits."""
    return device.type == "cuda" and _has_kernel("divergence_rows_", "CUDA")


def _triton_op(name: str) -> Callable[..., Any]:
    """The Triton implementation of an op, but the reference on an old GPU if the op is one of ON_TENSOR_CORES.

    The first call imports Triton.
    """

    def call(*args: Any) -> Any:
        devices = {x.device for x in args if isinstance(x, Tensor)}
        if len(devices) > 1:
            got = " and ".join(sorted(map(str, devices)))
            raise ValueError(f"{name}: all tensors must be on one device, got {got}; move one with .to(device)")
        if name in ON_TENSOR_CORES and is_old_gpu(args[0].device):
            return getattr(reference, name)(*args)
        module = importlib.import_module(f"rbfast.kernels.{_TRITON_MODULES[name]}")
        with torch.cuda.device(args[0].device):  # Triton launches on the current device, not on that of its arguments
            return getattr(module, name)(*args)

    return call


def _register_triton() -> set[str]:
    """Registers Triton kernels for the ops without a native GPU kernel; returns their names."""
    if not (torch.version.cuda or torch.version.hip) or _NO_TRITON:
        return set()
    missing = {name for name in _TRITON_MODULES if not _has_kernel(name, "CUDA")}
    for name in sorted(missing):
        LIBRARY.impl(name, _triton_op(name), "CUDA")
    return missing


for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
# In order of preference: native libraries, Triton where they have no kernel, the reference for the rest.
_NATIVE = _load_library("_C")
# _C_cuda needs CUDA streams, which a CPU build of torch lacks.
_CUDA = _load_library("_C_cuda") if torch.version.cuda else None
_NO_TRITON = _why_no_triton()
_IN_TRITON = _register_triton()
if not torch.version.hip:
    for _name in _PRODUCTS:
        LIBRARY.impl(_name, getattr(head_gemm, _name), "CUDA")

# The overloads themselves: a call through the packet looks up the overload every time.
column_gather = torch.ops.rbfast.column_gather.default
column_grad = torch.ops.rbfast.column_grad.default
column_grad_all = torch.ops.rbfast.column_grad_all.default
column_linear_ = torch.ops.rbfast.column_linear_.default
column_scatter_ = torch.ops.rbfast.column_scatter_.default
column_fold_ = torch.ops.rbfast.column_fold_.default
column_fold_all_ = torch.ops.rbfast.column_fold_all_.default
grouped_linear = torch.ops.rbfast.grouped_linear.default
grouped_column_grad = torch.ops.rbfast.grouped_column_grad.default
grouped_column_linear_ = torch.ops.rbfast.grouped_column_linear_.default
grouped_column_scatter_ = torch.ops.rbfast.grouped_column_scatter_.default
grouped_column_fold_ = torch.ops.rbfast.grouped_column_fold_.default
head_forward_ = torch.ops.rbfast.head_forward_.default
head_backward_ = torch.ops.rbfast.head_backward_.default
head_grad_ = torch.ops.rbfast.head_grad_.default
scaled_ = torch.ops.rbfast.scaled_.default
row_thresholds = torch.ops.rbfast.row_thresholds.default
divergence_rows_ = torch.ops.rbfast.divergence_rows_.default


@torch.library.register_fake("rbfast::column_gather", lib=LIBRARY)
def _(x: Tensor, cols: Tensor, run: int = 1) -> Tensor:
    return x.new_empty(x.shape[0], cols.shape[0])


@torch.library.register_fake("rbfast::column_grad", lib=LIBRARY)
def _(dy: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape), B.new_empty(B.shape)


@torch.library.register_fake("rbfast::column_grad_all", lib=LIBRARY)
def _(
    dy: list[Tensor], xs: Tensor, A: list[Tensor], B: list[Tensor], scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    return [x.new_empty(x.shape) for x in A], [x.new_empty(x.shape) for x in B]


@torch.library.register_fake("rbfast::grouped_linear", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.register_fake("rbfast::grouped_column_grad", lib=LIBRARY)
def _(dy: Tensor, xs: Tensor, ends: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape), B.new_empty(B.shape)


@torch.library.register_fake("rbfast::row_thresholds", lib=LIBRARY)
def _(dz: Tensor, share: float) -> tuple[Tensor, Tensor]:
    return wide(dz).new_empty(dz.shape[0]), wide(dz).new_empty(dz.shape[0])


@torch.library.register_fake("rbfast::divergence_rows_", lib=LIBRARY)
def _(logits: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows), logits.new_empty(rows), logits.new_empty(rows)


for _name, _schema in _SCHEMAS.items():
    if _schema.endswith("-> ()"):
        torch.library.register_fake(f"rbfast::{_name}", lambda *args: None, lib=LIBRARY)


def run_of(cols: Tensor, in_features: int) -> int:
    """The longest run length r (16, 8, 4, 2 or 1) such that cols [s] consists of aligned runs.

    In runs of r, every r entries of cols are consecutive columns that start at a multiple of r; r divides s and
    in_features. Reads cols on the host: call it once.
    """
    host = cols.cpu()
    for run in (16, 8, 4, 2):
        if len(host) % run or in_features % run or len(host) == 0:
            continue
        runs = host.view(-1, run)
        if bool((runs[:, 0] % run == 0).all()) and bool((runs == runs[:, :1] + torch.arange(run, device="cpu")).all()):
            return run
    return 1


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use (RBFAST_CPU_ISA forces one). None if they are not built, or if
    RBFAST_CPU_ISA is invalid and every call to them raises."""
    if _NATIVE is None:
        return None
    _NATIVE.rbfast_cpu_isa.restype = ctypes.c_char_p
    name = _NATIVE.rbfast_cpu_isa()
    return name.decode() if name else None


def cpu_isa_reason() -> str:
    """Why `cpu_isa` is not a better instruction set, or why it is None."""
    if _NATIVE is None:
        return f"not built: {how_to_build()}"
    _NATIVE.rbfast_cpu_isa_reason.restype = ctypes.c_char_p
    return _NATIVE.rbfast_cpu_isa_reason().decode()


def uses_tiles(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the head's products of these tensors run in AMX tiles."""
    return hidden.device.type == "cpu" and hidden.dtype == weight.dtype == torch.bfloat16 and cpu_isa() == "amx"


def filter_helps(hidden: Tensor, weight: Tensor) -> bool:
    """Whether thresholds make head_backward_ faster for these tensors. GPUs and AMX tiles skip no entries."""
    return hidden.device.type == "cpu" and not uses_tiles(hidden, weight)


def uses_torch_products(device: torch.device) -> bool:
    """Whether head_gemm computes the head's products on this device, so that its functions may be called directly."""
    return device.type == "cuda" and not torch.version.hip


def implementations(device: str = "cpu") -> dict[str, str]:
    """For each op, the implementation that runs on this device ("cpu" or "cuda").

    'native (ISA)', 'CUDA C++', 'triton (VERSION)', 'torch.nn.functional.grouped_mm', 'torch.mm, fp32 output' or
    'reference (REASON)'; 'none (REASON)' if torch is built without GPU support or RBFAST_CPU_ISA is invalid.
    'reference' without a reason: the native code is not built (`cpu_isa_reason`).
    """
    if device == "cpu":
        return {name: _on_cpu(name) for name in _SCHEMAS}
    if not (torch.version.cuda or torch.version.hip):
        return dict.fromkeys(_SCHEMAS, "none (this torch is built without a GPU)")
    return {name: _on_gpu(name) for name in _SCHEMAS}


def _on_cpu(name: str) -> str:
    if name in ("scaled_", "grouped_linear"):
        return "reference (it is a call of torch)"
    name = name.removeprefix("grouped_")  # the grouped column ops call the plain op for each expert
    if not _has_kernel(name, "CPU"):
        return "reference"
    isa = cpu_isa()
    return "none (RBFAST_CPU_ISA is invalid)" if isa is None else f"native ({isa})"


def _on_gpu(name: str) -> str:
    if name == "grouped_linear":
        return "torch.nn.functional.grouped_mm"
    if name == "row_thresholds":
        return "reference (a filter saves a GPU nothing)"
    if name in _OF_LISTS and not _has_kernel(name, "CUDA"):  # calls the plain op for each matrix
        return _on_gpu(_OF_LISTS[name])
    if name in _IN_TRITON:
        return f"triton ({_triton_version()})"
    if name.startswith("grouped_column_"):  # calls the plain op for each expert
        return _on_gpu(name.removeprefix("grouped_"))
    if name in _PRODUCTS:
        return "reference (ROCm has no products with fp32 output)" if torch.version.hip else "torch.mm, fp32 output"
    return "CUDA C++" if _has_kernel(name, "CUDA") else f"reference (no CUDA C++; {_NO_TRITON})"


@cache
def _triton_version() -> str:
    distributions = importlib.metadata.packages_distributions()  # torch's builds for ROCm install another name
    return importlib.metadata.version(distributions.get("triton", ["triton"])[0])
