"""What counts as a matrix: which modules of a model a delta can change, their shapes, and how to tell them apart."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FOLDABLE = (torch.bfloat16, torch.float16, torch.float32)
_SAMPLE = 4096  # weights read per matrix for its fingerprint


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, quantised ones included; None for every other module."""
    weight = getattr(module, "weight", None)
    if is_transposed(module) and isinstance(weight, Tensor):
        return weight.shape[1], weight.shape[0]
    shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
    known = weight is not None and isinstance(shape[0], int) and isinstance(shape[1], int)
    return (shape[0], shape[1]) if known and not isinstance(module, nn.Bilinear) else None  # type: ignore[return-value]


def matrix_view(module: nn.Module) -> Tensor | None:
    """The weight as a writable [out, in] view, or None if a delta cannot be folded in (quantised, sharded, meta)."""
    return _as_matrix(module, getattr(module, "weight", None))


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is sharded over processes: there every process has to call it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are spread over processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _as_matrix(module: nn.Module, weight: Any) -> Tensor | None:
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or weight.dtype not in FOLDABLE:
        return None
    view = weight.detach().T if is_transposed(module) else weight.detach()
    return view if tuple(view.shape) == matrix_shape(module) else None


def fingerprint(module: nn.Module) -> str | None:
    """Of an evenly spaced sample of a weight, rounded to bf16 so that fp32 and bf16 loads of one model agree.

    None for a quantised weight, which cannot be compared bit by bit.
    """
    weight = _as_matrix(module, whole(module.weight))  # type: ignore[arg-type]
    if weight is None:
        return None
    flat = weight.reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].to(torch.bfloat16).cpu().contiguous()
    return hashlib.blake2b(sample.view(torch.int16).numpy().tobytes(), digest_size=8).hexdigest()


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Shape:
    """One matrix [out_features, in_features] and the group it shares its input with."""

    out_features: int
    in_features: int
    group: int


def select_linears(model: nn.Module, targets: str | Sequence[str] = "all-linear") -> dict[str, nn.Module]:
    """The linear layers to adapt, by PEFT's rule: a list is exact-or-suffix, a string is a full-match regex, and
    "all-linear" is every linear but the output head, those whose weight is tied to another module's, and those of a
    Mamba mixer that may never run as a layer.

    Raises ValueError if the model has no linear layer or a target matches none.
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


def count_parameters(model: nn.Module) -> int:
    """All parameters of the base: tied ones once, a quantised matrix as the out * in values it represents."""
    counts = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        shape = matrix_shape(module)
        if shape is not None and matrix_view(module) is None:
            counts[id(module.weight)] = shape[0] * shape[1]
    return sum(counts.values())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What the tensors take, each once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
