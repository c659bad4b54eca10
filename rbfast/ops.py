"""The registry of ops: schemas, fakes and the reference for each; native libraries add faster kernels per device.

The torch dispatcher chooses: a native kernel where one is loaded for the device (_C for the CPU, _C_cuda for CUDA),
else the reference. Ops whose name ends in an underscore write into their first argument. All tensors of a call share a
device; A and B are fp32.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rbfast import products, reference

_LIBRARY = torch.library.Library("rbfast", "DEF")
_SCHEMAS = {
    "column_gather": "(Tensor x, Tensor cols) -> Tensor",
    "column_grad": "(Tensor dy, Tensor xs, Tensor A, Tensor B, float scale) -> (Tensor, Tensor)",
    "column_linear_": "(Tensor(a!) y, Tensor xs, Tensor A, Tensor B, float scale) -> ()",
    "column_scatter_": "(Tensor(a!) dx, Tensor dy, Tensor cols, Tensor A, Tensor B, float scale) -> ()",
    "column_fold_": "(Tensor(a!) weight, Tensor base_columns, Tensor cols, Tensor A, Tensor B, float scale) -> ()",
    "head_forward_": "(Tensor(a!) logits, Tensor hidden, Tensor weight) -> ()",
    "head_backward": "(Tensor dz, Tensor weight) -> Tensor",
    "head_grad_": "(Tensor(a!) dW, Tensor dz, Tensor hidden) -> ()",
    "divergence_rows_": "(Tensor(a!) logits, Tensor(b!)? dz, Tensor labels, Tensor weight, Tensor ce_weight, "
    "Tensor temperature, Tensor? ids, Tensor? logprobs, Tensor? teacher, Tensor? bias, "
    "float beta, float logit_scale, float? softcap) -> (Tensor, Tensor)",
}


_PRODUCTS = ("head_forward_", "head_backward", "head_grad_")  # on CUDA, torch's own GEMMs: nobody writes better ones


def _load(name: str) -> ctypes.CDLL | None:
    """Loads rbfast/{name}.*so if it was built. One that is there but cannot be loaded raises: it is not ignored."""
    built = sorted(Path(__file__).parent.glob(f"{name}.*so"))
    if not built:
        return None
    torch.ops.load_library(built[0])
    return ctypes.CDLL(str(built[0]))


for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
for _name in _PRODUCTS:
    _LIBRARY.impl(_name, getattr(products, _name), "CUDA")
_NATIVE = _load("_C")
_CUDA = _load("_C_cuda") if torch.version.cuda else None  # it asks torch for CUDA streams, which a CPU torch lacks

column_gather = torch.ops.rbfast.column_gather
column_grad = torch.ops.rbfast.column_grad
column_linear_ = torch.ops.rbfast.column_linear_
column_scatter_ = torch.ops.rbfast.column_scatter_
column_fold_ = torch.ops.rbfast.column_fold_
head_forward_ = torch.ops.rbfast.head_forward_
head_backward = torch.ops.rbfast.head_backward
head_grad_ = torch.ops.rbfast.head_grad_
divergence_rows_ = torch.ops.rbfast.divergence_rows_


@torch.library.register_fake("rbfast::column_gather", lib=_LIBRARY)
def _(x: Tensor, cols: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], cols.shape[0])


@torch.library.register_fake("rbfast::column_grad", lib=_LIBRARY)
def _(dy: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(A), torch.empty_like(B)


@torch.library.register_fake("rbfast::head_backward", lib=_LIBRARY)
def _(dz: Tensor, weight: Tensor) -> Tensor:
    return reference.wide(dz).new_empty(dz.shape[0], weight.shape[1])


@torch.library.register_fake("rbfast::divergence_rows_", lib=_LIBRARY)
def _(logits: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0])


for _name in ("column_linear_", "column_scatter_", "column_fold_", "head_forward_", "head_grad_"):
    torch.library.register_fake(f"rbfast::{_name}", lambda *args: None, lib=_LIBRARY)


class _ColumnTap(torch.autograd.Function):
    """The identity on y [..., out], whose backward computes dA and dB of a delta that is already in the weight."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(xs, A, B)
        ctx.scale = scale
        return y.detach()  # an alias that autograd does not count as a view, so that y may be changed in place later

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xs, A, B = ctx.saved_tensors
        dA, dB = column_grad(dy.reshape(-1, dy.shape[-1]), xs, A, B, ctx.scale)
        return dy, None, dA, dB, None


class _ColumnSide(torch.autograd.Function):
    """y [..., out] + scale * (xs A^T) B^T, where xs [T, s] are the columns `cols` of x [..., in]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, xs: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(xs, cols, A, B)
        ctx.scale, ctx.x_shape, ctx.x_dtype = scale, x.shape, x.dtype
        out = y.clone(memory_format=torch.contiguous_format)
        column_linear_(out.view(-1, out.shape[-1]), xs, A, B, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xs, cols, A, B = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = None
        if ctx.needs_input_grad[1]:
            dx = rows.new_zeros(rows.shape[0], ctx.x_shape[-1])
            column_scatter_(dx, rows, cols, A, B, ctx.scale)
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        dA, dB = column_grad(rows, xs, A, B, ctx.scale)
        return dy, dx, None, None, dA, dB, None


column_tap = _ColumnTap.apply
column_side = _ColumnSide.apply


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels use (RBFAST_CPU_ISA forces one), or None where they are not built."""
    if _NATIVE is None:
        return None
    _NATIVE.rbfast_cpu_isa.restype = ctypes.c_char_p
    name = _NATIVE.rbfast_cpu_isa()
    return name.decode() if name else None


def implementations(device: str = "cpu") -> dict[str, str]:
    """For each op, what a call on "cpu" or "cuda" tensors runs; where that is the reference on CUDA, why."""
    if device == "cuda":
        return {name: "torch.mm, fp32 output" if name in _PRODUCTS else _on_cuda() for name in _SCHEMAS}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name: f"native ({cpu_isa()})" if has_kernel(f"rbfast::{name}", "CPU") else "reference" for name in _SCHEMAS}


def _on_cuda() -> str:
    if _CUDA is not None:
        return "CUDA C++"
    if not torch.version.cuda:
        return "reference (this torch is built without CUDA)"
    return "reference (_C_cuda is not built: reinstall with nvcc on the PATH and RBFAST_CUDA=1)"
