"""Scores for every column of every matrix, from a model's gradients or activations on reasoning traces.

    scores = score_columns(model, batches, loss_fn)
    scores.save("scores.safetensors")

Matrices that read the same input (q, k, v; gate, up) form a group, found by watching the forward pass.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from rbfast.models.experts import ExpertStack, patch_forward, unpatch_forward
from rbfast.models.linears import Shape, dtype_name, matrix_shape, select_linears, shape_of, unwrapped
from rbfast.models.names import loaded_name
from rbfast.models.weight_use import input_of
from rbfast.ops import reference
from rbfast.utils.files import atomic_write
from rbfast.utils.records import from_json, to_json
from rbfast.utils.sealed import check_seal, seal

FORMAT = "rbfast-scores"
VERSION = 2
Method = Literal["gradient", "factored", "activation"]
METHODS = ("gradient", "factored", "activation")


@dataclass(frozen=True)
class ColumnScores:
    """Scores by name of matrix: columns [in] fp32, one score per input."""

    method: str
    batches: int
    base_model_name_or_path: str | None
    shapes: dict[str, Shape]
    columns: dict[str, Tensor]

    def shapes_of(self, matrices: Mapping[str, Shape]) -> dict[str, Shape]:
        """The scored shapes of these matrices. Raises ValueError, naming the matrix, if one differs or is missing."""
        for name, shape in matrices.items():
            scored = self.shapes.get(name)
            if scored is None:
                raise ValueError(f"{name} was not scored; score this model with the same targets")
            if replace(scored, group=shape.group) != shape:
                raise ValueError(f"{name} was scored as {scored}, here it is {shape}; score this model")
            column = self.columns.get(name)
            if column is None or column.shape != (shape.in_features,) or not torch.isfinite(column).all():
                got = "none" if column is None else f"{tuple(column.shape)} with {int(column.isfinite().sum())} finite"
                raise ValueError(f"{name}: expected {shape.in_features} finite scores, one per input, got {got}")
        return {name: self.shapes[name] for name in matrices}

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, atomically."""
        header = {"format": FORMAT, "version": VERSION, "method": self.method, "batches": self.batches}
        header |= {"base_model_name_or_path": self.base_model_name_or_path}
        header |= {"matrices": {name: to_json(shape) for name, shape in self.shapes.items()}}
        tensors = {f"{name}.columns": column for name, column in self.columns.items()}
        with atomic_write(path) as file:
            file.write(seal(save_tensors(tensors, metadata={"rbfast": json.dumps(header)})))

    @classmethod
    def load(cls, path: str | Path) -> "ColumnScores":
        """Reads a file written by save(). Raises FileNotFoundError if there is none, ValueError for any other file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: expected a file of scores, found none")
        try:
            data = Path(path).read_bytes()
            tensors, metadata = load_tensors(data), check_seal(data)
        except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
            raise ValueError(f"{path}: not a complete safetensors file ({error}); score the model again") from error
        header = _read_header(path, metadata)
        shapes = {name: from_json(Shape, entry, f"{path}: {name}") for name, entry in header["matrices"].items()}
        columns = {
            name: _checked_tensor(path, tensors, f"{name}.columns", (shape.in_features,))
            for name, shape in shapes.items()
        }
        return cls(header["method"], header["batches"], header["base_model_name_or_path"], shapes, columns)


def score_columns(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    method: Method = "gradient",
    targets: str | Sequence[str] = "all-linear",
) -> ColumnScores:
    """Scores every column of the target matrices by the gradient of `loss_fn(model, batch)`, a scalar.

    "gradient": sum over batches, and over a layer's runs in each, of sum_o G[o, c]^2, with G = dy^T x in fp32 (one
    dense G at a time).
    "factored": E[x_c^2] * sum_o E[dy_o^2], which needs no G. "activation": E[x_c^2], which needs no backward.
    The weights are frozen while it runs; the model is left unchanged. Raises ValueError for no batches, a loss that is
    not finite, and a loss without a gradient.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    base, needs_gradient = unwrapped(model), method != "activation"
    scorer = _Scorer(select_linears(base, targets), method)
    scored = 0
    # Compiled code would ignore our new hooks, and each call of a hook would trigger a recompilation.
    with _frozen_weights(model), scorer.attached(), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            with torch.set_grad_enabled(needs_gradient):
                loss = loss_fn(model, batch)
            if not math.isfinite(loss.item()):
                raise ValueError(f"batch {scored}: expected a finite loss, got {loss.item()}")
            if needs_gradient and not loss.requires_grad:
                raise ValueError(
                    "the loss has no gradient: loss_fn must return a loss of the model's outputs, outside no_grad; "
                    "reentrant gradient checkpointing must be off"
                )
            if needs_gradient:
                loss.backward()
            scored += 1
    if scored == 0:
        raise ValueError("expected at least one batch to score on, got none")
    return ColumnScores(method, scored, loaded_name(base), scorer.shapes(), scorer.columns_on_cpu())


def scoring_hooks(linears: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
    """The hooks of scoring by gradients within the block, to measure what they keep for a backward."""
    return _Scorer(linears, "gradient").attached()


def _read_header(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata.get("rbfast", "{}"))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path}: expected scores of version {VERSION} written by rbfast, got another file")
    kinds = {"method": str, "batches": int, "base_model_name_or_path": (str, NoneType), "matrices": dict}
    for name, kind in kinds.items():
        if name not in header or not isinstance(header[name], kind):  # type: ignore[arg-type]
            raise ValueError(f"{path}: {name} is missing or has the wrong type; score the model again")
    return header


def _checked_tensor(path: str | Path, tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{path}: tensor {key} is missing; score the model again")
    tensor = tensors[key]
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        raise ValueError(f"{path}: {key}: expected {shape} float32, got {tuple(tensor.shape)} {dtype_name(tensor)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {key}: expected finite values, got NaN or infinity; score the model again")
    return tensor


class _Scorer:
    """Hooks that see the input x and the output gradient dy of every matrix, and accumulate the scores."""

    def __init__(self, linears: Mapping[str, nn.Module], method: Method) -> None:
        self.linears, self.method = linears, method
        self.columns: dict[str, Tensor] = {}
        self._groups: dict[str, int] = {}
        self._numbers = count()
        self._inputs: MutableMapping[Tensor, dict[int, int]] = WeakTensorKeyDictionary()  # the number of each version

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [
            m.register_forward_hook(partial(self._forward_hook, name), with_kwargs=True)
            for name, m in self.linears.items()
        ]
        for module in self.linears.values():
            patch_forward(module)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in self.linears.values():
                unpatch_forward(module)

    def shapes(self) -> dict[str, Shape]:
        """Shapes with the observed groups, numbered in the model's order. A matrix that never ran is its own group."""
        numbers: dict[object, int] = {}
        return {
            name: shape_of(module, numbers.setdefault(self._groups.get(name, name), len(numbers)))
            for name, module in self.linears.items()
        }

    def columns_on_cpu(self) -> dict[str, Tensor]:
        """The columns in the model's order, with zeros for a matrix that never ran."""
        widths = {name: matrix_shape(module)[1] for name, module in self.linears.items()}  # type: ignore[index]
        return {
            name: self.columns.get(name, torch.zeros(width, dtype=torch.float32, device="cpu")).cpu()
            for name, width in widths.items()
        }

    def _forward_hook(self, name: str, module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor | None:
        given = input_of(args, kwargs)
        self._assign_group(name, given)
        x = _as_rows(given.detach())
        if not len(x):  # an expert that no token reached: a mean over nothing is NaN
            return None
        if self.method == "activation":
            self._add(name, x.float().square().mean(0))
            return None
        if not torch.is_grad_enabled():
            return None
        if not y.requires_grad:  # true of the first matrices: everything before them is frozen
            y = y.detach().requires_grad_()
        experts = reference.rows_of_experts(args[1]) if isinstance(module, ExpertStack) else [(0, slice(None))]
        return _Watched.apply(y, x, partial(self._see_gradient, name, [rows for _, rows in experts]))

    def _assign_group(self, name: str, x: Tensor) -> None:
        versions = self._inputs.setdefault(x, {})
        number = versions.setdefault(0 if x.is_inference() else x._version, next(self._numbers))
        self._groups.setdefault(name, number)

    def _see_gradient(self, name: str, matrices: Sequence[slice], x: Tensor, dy: Tensor) -> None:
        """matrices: the rows of each matrix; one slice for a linear layer, one per expert for a stack."""
        x, dy = x.float(), _as_rows(dy).float()
        for rows in matrices:
            if self.method == "factored":
                share = len(x[rows]) / len(x)  # every token counts the same, whatever its expert
                self._add(name, share * x[rows].square().mean(0) * dy[rows].square().mean(0).sum())
            else:
                self._add(name, (dy[rows].T @ x[rows]).square().sum(0))

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.columns:
            self.columns[name] += value
        else:
            self.columns[name] = value


class _Watched(torch.autograd.Function):
    """The identity on y. Its backward calls see(x, dy). x is saved for it, so a checkpoint computes x again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, see: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.see = see
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.see(*ctx.saved_tensors, dy)
        return dy, None, None


def _as_rows(x: Tensor) -> Tensor:
    """Reshapes [..., n] to [T, n]."""
    return x.reshape(-1, x.shape[-1])


@contextmanager
def _frozen_weights(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
