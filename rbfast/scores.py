"""Scores: what a model's gradient on reasoning traces says of each column of each matrix.

    scores = score(model, batches, loss_fn)
    scores.save("scores.safetensors")

Matrices that read the same input (q, k, v; gate, up) form a group, found by watching the forward pass.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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

from rbfast.columns import dtype_name, from_json, matrix_shape
from rbfast.files import replacing
from rbfast.seal import check_seal, seal

FORMAT = "rbfast-scores"
VERSION = 2
Method = Literal["gradient", "factored", "activation"]
METHODS = ("gradient", "factored", "activation")


@dataclass(frozen=True)
class Shape:
    """One matrix [out_features, in_features] and the group it shares its input with."""

    out_features: int
    in_features: int
    group: int


@dataclass(frozen=True)
class Scores:
    """By matrix: columns [in] fp32, the score of each input."""

    method: str
    batches: int
    base_model_name_or_path: str | None
    shapes: dict[str, Shape]
    columns: dict[str, Tensor]

    def shapes_of(self, matrices: Mapping[str, Shape]) -> dict[str, Shape]:
        """The scored shapes of these matrices. Raises ValueError, naming it, for one that differs or was not scored."""
        for name, shape in matrices.items():
            came = self.shapes.get(name)
            if came is None:
                raise ValueError(f"{name} was not scored; score this model with the same targets")
            if (came.out_features, came.in_features) != (shape.out_features, shape.in_features):
                raise ValueError(f"{name} was scored as {came}, here it is {shape}; score this model")
        return {name: self.shapes[name] for name in matrices}

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, to a temporary name and then renamed."""
        header = {"format": FORMAT, "version": VERSION, "method": self.method, "batches": self.batches}
        header |= {"base_model_name_or_path": self.base_model_name_or_path}
        header |= {"matrices": {name: asdict(shape) for name, shape in self.shapes.items()}}
        tensors = {f"{name}.columns": column for name, column in self.columns.items()}
        with replacing(path) as file:
            file.write(seal(save_tensors(tensors, metadata={"rbfast": json.dumps(header)})))

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Reads a file written by save(). Raises FileNotFoundError, and ValueError for one that is none."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: expected a file of scores, found none")
        try:
            data = Path(path).read_bytes()
            tensors, metadata = load_tensors(data), check_seal(data)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error}); score the model again") from error
        header = _header(path, metadata)
        shapes = {name: from_json(Shape, entry, f"{path}: {name}") for name, entry in header["matrices"].items()}
        columns = {
            name: _checked(path, tensors, f"{name}.columns", (shape.in_features,)) for name, shape in shapes.items()
        }
        return cls(header["method"], header["batches"], header["base_model_name_or_path"], shapes, columns)


def score(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    method: Method = "gradient",
    targets: str | Sequence[str] = "all-linear",
) -> Scores:
    """Scores every column of the target matrices by what `loss_fn(model, batch)`, a scalar, says of it.

    "gradient": sum over batches of sum_o G[o, c]^2, with G = dy^T x in fp32 (one dense G at a time).
    "factored": E[x_c^2] * sum_o E[dy_o^2], which needs no G. "activation": E[x_c^2], which needs no backward.
    The weights are frozen while it runs; nothing of the model is changed. Raises ValueError for no batches, a loss that
    is not finite, and a loss that no matrix has a gradient of.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    watch = _Watch(select_linears(model, targets), method)
    scored = 0
    with _frozen(model), watch.watching():
        for batch in batches:
            with torch.set_grad_enabled(method != "activation"):
                loss = loss_fn(model, batch)
            if not math.isfinite(loss.item()):
                raise ValueError(f"batch {scored}: expected a finite loss, got {loss.item()}")
            if method != "activation" and not loss.requires_grad:
                raise ValueError(
                    "the loss has no gradient: loss_fn must return a loss of the model's outputs, outside no_grad; "
                    "reentrant gradient checkpointing must be off"
                )
            if method != "activation":
                loss.backward()
            watch.end_batch()
            scored += 1
    if scored == 0:
        raise ValueError("expected at least one batch to score on, got none")
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Scores(method, scored, base or None, watch.shapes(), watch.cpu())


def _header(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata.get("rbfast", "{}"))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path}: expected scores of version {VERSION} written by rbfast, got another file")
    kinds = {"method": str, "batches": int, "base_model_name_or_path": (str, NoneType), "matrices": dict}
    for name, kind in kinds.items():
        if name not in header or not isinstance(header[name], kind):  # type: ignore[arg-type]
            raise ValueError(f"{path}: {name} is missing or of another type; score the model again")
    return header


def _checked(path: str | Path, tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{path}: tensor {key} is missing; score the model again")
    tensor = tensors[key]
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        raise ValueError(f"{path}: {key}: expected {shape} float32, got {tuple(tensor.shape)} {dtype_name(tensor)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {key}: expected finite values, got NaN or infinity; score the model again")
    return tensor


class _Watch:
    """Hooks that see the input x and the output gradient dy of every matrix, and add up what the method needs."""

    def __init__(self, linears: Mapping[str, nn.Module], method: Method) -> None:
        self.linears, self.method = linears, method
        self.columns: dict[str, Tensor] = {}
        self._groups: dict[str, int] = {}
        self._numbers = count()
        self._inputs: dict[
            tuple[int, int], tuple[int, Tensor]
        ] = {}  # kept alive for a batch, so that an id is one input

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [m.register_forward_hook(partial(self._after, name)) for name, m in self.linears.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def end_batch(self) -> None:
        self._inputs.clear()

    def shapes(self) -> dict[str, Shape]:
        """Shapes with the groups seen, numbered in the model's order; a matrix that was never run is alone."""
        numbers: dict[object, int] = {}
        keys = {name: self._groups.get(name, name) for name in self.linears}
        shapes = {}
        for name, module in self.linears.items():
            out_features, in_features = matrix_shape(module)  # type: ignore[misc]
            shapes[name] = Shape(out_features, in_features, numbers.setdefault(keys[name], len(numbers)))
        return shapes

    def cpu(self) -> dict[str, Tensor]:
        """The columns in the model's order, with zeros for a matrix that was never run."""
        widths = {name: matrix_shape(module)[1] for name, module in self.linears.items()}  # type: ignore[index]
        return {name: self.columns.get(name, torch.zeros(width)).cpu() for name, width in widths.items()}

    def _after(self, name: str, module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        x = args[0].detach()
        self._group(name, args[0])
        if self.method == "activation":
            self._add(name, x.flatten(0, -2).float().square().mean(0))
            return None
        if not torch.is_grad_enabled():
            return None
        if not y.requires_grad:  # the first matrices: everything before them is frozen
            y = y.detach().requires_grad_().clone()
        y.register_hook(partial(self._backward, name, x))
        return y

    def _group(self, name: str, x: Tensor) -> None:
        number, _ = self._inputs.setdefault((id(x), x._version), (next(self._numbers), x))
        self._groups.setdefault(name, number)

    def _backward(self, name: str, x: Tensor, dy: Tensor) -> None:
        x, dy = x.flatten(0, -2).float(), dy.flatten(0, -2).float()
        if self.method == "factored":
            self._add(name, x.square().mean(0) * dy.square().mean(0).sum())
        else:
            self._add(name, (dy.T @ x).square().sum(0))

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.columns:
            self.columns[name] += value
        else:
            self.columns[name] = value


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def generator(seed: int, *what: str) -> torch.Generator:
    """Independent streams by name, so that what one matrix draws does not depend on which others are there."""
    digest = hashlib.blake2b(":".join((str(seed), *what)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def select_linears(model: nn.Module, targets: str | Sequence[str] = "all-linear") -> dict[str, nn.Module]:
    """The linear layers to adapt, by PEFT's rule: a list is exact-or-suffix, a string is a full-match regex, and
    "all-linear" is every linear but the output head, those whose weight is tied to another module's, and those of a
    Mamba mixer that may never run as a layer.

    Raises ValueError where the model has no linear layer or a target matches none.
    """
    linears = {name: module for name, module in model.named_modules() if name and matrix_shape(module) is not None}
    if not linears:
        raise ValueError(
            f"expected a model with linear layers (nn.Linear, Conv1D, or a module with in_features, out_features and "
            f"a weight), found none in {type(model).__name__}"
        )
    tied, bypassed = _tied_weights(model), _bypassed_linears(model)
    if targets == "all-linear":
        free = {name: m for name, m in linears.items() if id(m.weight) not in tied and id(m) not in bypassed}
        head = _head_of(model)
        chosen = {name: module for name, module in free.items() if module is not head}
        if not chosen:
            raise ValueError(f"every linear layer of {type(model).__name__} is its output head or tied; name targets")
        return chosen
    chosen = _match(linears, targets)
    for name, module in chosen.items():
        if id(module.weight) in tied:
            raise ValueError(f"the weight of {name} is tied to another module's: a delta would change both; omit it")
        if id(module) in bypassed:
            raise ValueError(f"a Mamba mixer may use the weight of {name} without running the layer; omit it")
    return chosen


def left_out(model: nn.Module, chosen: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Every weight of two or more dimensions, with its shape, that is of no chosen layer, embedding or output head:
    routers, stacked experts, convolutions, what is tied or bypassed."""
    modules, head = dict(model.named_modules()), _head_of(model)
    aside = [module for module in modules.values() if isinstance(module, nn.Embedding) or module is head]
    known = {id(module.weight) for module in (*aside, *(modules[name] for name in chosen))}
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    return {name: tuple(weight.shape) for name, weight in weights.items() if id(weight) not in known}


def stacked_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights [experts, ...] of mixtures of experts, which run through no linear layer."""
    return {
        f"{prefix}.{name}": weight
        for prefix, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
    }


def group_siblings(linears: Mapping[str, nn.Module]) -> dict[str, Shape]:
    """Shapes, with siblings of equal in_features guessed to share their input: for placements that saw no forward."""
    groups: dict[tuple[str, int], int] = {}
    shapes = {}
    for name, module in linears.items():
        out_features, in_features = matrix_shape(module)  # type: ignore[misc]
        key = name.rpartition(".")[0], in_features
        shapes[name] = Shape(out_features, in_features, groups.setdefault(key, len(groups)))
    return shapes


def _head_of(model: nn.Module) -> nn.Module | None:
    find_head = getattr(model, "get_output_embeddings", None)
    return find_head() if find_head else None


def _bypassed_linears(model: nn.Module) -> set[int]:
    """The linears of Mamba mixers but in_proj: dt_proj is multiplied by hand, and in training a fused kernel takes the
    weights of x_proj, dt_proj and out_proj. A hook on such a layer may never see its input."""
    mixers = [module for module in model.modules() if hasattr(module, "A_log") and hasattr(module, "D")]
    return {
        id(child)
        for mixer in mixers
        for name, child in mixer.named_children()
        if name != "in_proj" and matrix_shape(child) is not None
    }


def _tied_weights(model: nn.Module) -> set[int]:
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    return {key for key, count in names.items() if count > 1}


def _match(linears: Mapping[str, nn.Module], targets: str | Sequence[str]) -> dict[str, nn.Module]:
    examples = ", ".join(list(linears)[:3])
    if isinstance(targets, str):
        chosen = {name: module for name, module in linears.items() if re.fullmatch(targets, name)}
        if not chosen:
            raise ValueError(f"targets: the regex {targets!r} matches no linear layer; they are named like {examples}")
        return chosen
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise ValueError(f"targets: {target!r} names no linear layer; they are named like {examples}")
    if not targets:
        raise ValueError(f"targets: expected at least one name, got none; linear layers are named like {examples}")
    return {
        name: module
        for name, module in linears.items()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }
