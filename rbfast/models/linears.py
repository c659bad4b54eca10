"""Linear layers of a model: which ones a delta can change, their shapes, and fingerprints of their weights."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rbfast.models.experts import experts_in, stacks_of, weight_owner
from rbfast.models.unfit import Unfit, unfit_linears
from rbfast.models.weight_use import WeightUse, has_weight, is_conv1d, is_plain, stored_weight, weight_use

_SAMPLE = 4096  # weights read per matrix for its fingerprint


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DataParallel and DistributedDataParallel. Its module names are
    those that adapter files use."""
    while True:
        if "_orig_mod" in model._modules:  # not isinstance: importing OptimizedModule takes seconds
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its name, without the prefixes that torch.compile adds; the model itself is "". Expert stacks
    (`rbfast.models.experts`) are included by the names of their weights."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        modules[_strip_compile_prefix(name)] = module
        modules |= {_strip_compile_prefix(f"{name}.{key}"): stack for key, stack in stacks_of(module).items()}
    return modules


def _strip_compile_prefix(name: str) -> str:
    """The name of a module or parameter without the `_orig_mod` that torch.compile(submodule) inserts."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer (quantised or not) or of each expert of a stack; None for any other module."""
    if not has_weight(module) or isinstance(module, nn.Bilinear):
        return None
    if is_conv1d(module):
        weight: Any = module.weight
        return weight.shape[1], weight.shape[0]
    out_features, in_features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (out_features, in_features) if isinstance(out_features, int) and isinstance(in_features, int) else None


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as [in, out], like GPT-2's Conv1D."""
    return _use_of(module).kind == "transposed"


def matrix_view(module: nn.Module) -> Tensor | None:
    """The weight as a writable view [out, in], or [E, out, in] for a stack of experts. None if a delta cannot be folded
    in: the weight is quantised, sharded, on meta or computed in every forward, or the layer does more than multiply."""
    return _as_matrix(module, stored_weight(module))


def why_not_folded(module: nn.Module) -> str:
    """Why `matrix_view` returns None, as a clause."""
    reason = _use_of(module).reason
    return f"it {reason}" if reason else "its weight is quantised, sharded or offloaded"


def unsharded(tensor: Tensor) -> Tensor:
    """The tensor; if it is sharded over processes, the gathered whole. Then every process must call this."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_spread(model: nn.Module) -> bool:
    """Whether the layers of a model are on several devices, as with `device_map="auto"`."""
    return len({*(getattr(model, "hf_device_map", None) or {}).values()}) > 1


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are sharded over processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _use_of(module: nn.Module) -> WeightUse:
    shape = matrix_shape(module)
    assert shape is not None, "only linear layers use a weight as a matrix"
    return weight_use(module, shape)


def _as_matrix(module: nn.Module, weight: Any) -> Tensor | None:
    if not is_plain(weight) or weight.is_meta:
        return None
    kind = _use_of(module).kind
    if kind not in ("linear", "transposed"):
        return None
    view = weight.detach().mT if kind == "transposed" else weight.detach()
    return view if tuple(view.shape[-2:]) == matrix_shape(module) else None


def fingerprint(module: nn.Module) -> str | None:
    """A digest of an evenly spaced sample of a weight, rounded to bf16 so that fp32 and bf16 loads of one model agree.

    None for a weight that cannot be compared bit by bit: a quantised one, or one computed in every forward.
    """
    stored = stored_weight(module)
    weight = None if stored is None else _as_matrix(module, unsharded(stored))
    if weight is None:
        return None
    # By index: flattening would copy a transposed stack, a gigabyte in gpt-oss.
    every = torch.arange(0, weight.numel(), max(1, weight.numel() // _SAMPLE), device=weight.device)
    sample = weight[torch.unravel_index(every, weight.shape)].to(torch.bfloat16).cpu()
    return hashlib.blake2b(sample.view(torch.int16).numpy().tobytes(), digest_size=8).hexdigest()


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Shape:
    """One matrix [out_features, in_features], or a stack of `experts` of them. Those of one `group` share an input."""

    out_features: int
    in_features: int
    group: int
    experts: int | None = None

    def values(self, rank: int, support: int) -> int:
        """The number of values that a delta trains: those of A and B."""
        return rank * (self.experts or 1) * (self.out_features + support)


def all_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its name, whether it can have a delta or not."""
    return {name: module for name, module in named_modules(model).items() if name and matrix_shape(module) is not None}


def unfit(model: nn.Module) -> dict[str, Unfit]:
    """The linear layers that cannot have a delta, with the reasons."""
    return unfit_linears(model, {name: (m, matrix_shape(m)) for name, m in all_linears(model).items()})  # type: ignore[misc]


def select_linears(model: nn.Module, targets: str | Sequence[str] = "all-linear") -> dict[str, nn.Module]:
    """The linear layers to adapt, selected by PEFT's rules: a list holds names or suffixes of names, a string is a
    regex that must match a whole name, and "all-linear" is every linear layer except the output head, layers that text
    does not run through (see `non_text_linears`), and layers that cannot have a delta (see `unfit`).

    Raises ValueError if the model has no linear layer, or if a target matches none or one that cannot have a delta.
    """
    linears = all_linears(model)
    if not linears:
        raise ValueError(
            f"expected a model with linear layers (nn.Linear, Conv1D, or a module with in_features, out_features and "
            f"a weight), found none in {type(model).__name__}"
        )
    unfit_layers = unfit(model)
    if targets == "all-linear":
        head, excluded = head_module(model), {*unfit_layers, *non_text_linears(model)}
        chosen = {name: module for name, module in linears.items() if name not in excluded and module is not head}
        if not chosen:
            raise ValueError(
                f"no linear layer of {type(model).__name__} except its output head can have a delta: "
                + "; ".join(why.reason for why in list(unfit_layers.values())[:3])
            )
        return chosen
    chosen = _match_targets(linears, targets)
    check_fit(unfit_layers, chosen)
    return chosen


def non_text_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of towers for images or sound, and of their projections into the text model. In a model that
    contains a text model (Gemma 3): every linear layer outside it, except the output head."""
    text = _text_part(model)
    if text is model:
        return {}
    inside = {*text.modules(), head_module(model)}
    return {name: module for name, module in all_linears(model).items() if weight_owner(module)[0] not in inside}


def _text_part(model: nn.Module) -> nn.Module:
    """The text model inside a multimodal model; any other model itself."""
    is_joined = getattr(getattr(model, "config", None), "text_config", None) is not None
    return model.get_decoder() if is_joined and head_module(model) is not None else model  # type: ignore[operator]


def check_fit(unfit_layers: Mapping[str, Unfit], chosen: Iterable[str]) -> None:
    """Raises ValueError, naming the layer, if a chosen layer cannot have a delta (is among `unfit_layers`)."""
    for name in chosen:
        if name in unfit_layers:
            raise ValueError(f"{unfit_layers[name].reason}; leave it out of targets")


def left_out(model: nn.Module, chosen: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of two or more dimensions outside the chosen layers, embeddings and output head:
    routers, stacked experts, convolutions, tied and bypassed layers."""
    modules, head = named_modules(model), head_module(model)
    excluded = [module for module in modules.values() if isinstance(module, nn.Embedding) or module is head]
    kept = (*excluded, *(modules[name] for name in chosen))
    known = {id(weight) for module in kept for weight in module.parameters()}
    weights = {_strip_compile_prefix(name): weight for name, weight in model.named_parameters() if weight.dim() > 1}
    return {name: tuple(weight.shape) for name, weight in weights.items() if id(weight) not in known}


def stacked_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights [experts, ...] of mixtures of experts, without those of towers that text does not run through."""
    text = set(_text_part(model).modules())
    return {
        f"{prefix}.{name}": weight
        for prefix, module in named_modules(model).items()
        if module in text
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and weight.shape[1] > 1 and not isinstance(module, nn.modules.conv._ConvNd)
    }


def group_siblings(linears: Mapping[str, nn.Module]) -> dict[str, Shape]:
    """Shapes with guessed groups: siblings of equal in_features are assumed to share their input. For placements that
    run no forward."""
    groups: dict[object, int] = {}
    shapes = {}
    for name, module in linears.items():
        shape = shape_of(module, 0)
        key = name if shape.experts else (name.rpartition(".")[0], shape.in_features)
        shapes[name] = replace(shape, group=groups.setdefault(key, len(groups)))
    return shapes


def shape_of(module: nn.Module, group: int) -> Shape:
    """The shape of a linear layer or a stack of experts."""
    out_features, in_features = matrix_shape(module)  # type: ignore[misc]
    return Shape(out_features, in_features, group, experts_in(module))


def head_module(model: nn.Module) -> nn.Module | None:
    """The output head, without the wrapper of torch.compile; None if the model has none."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    return None if head is None else unwrapped(head)


def _match_targets(linears: Mapping[str, nn.Module], targets: str | Sequence[str]) -> dict[str, nn.Module]:
    examples = ", ".join(list(linears)[:3])
    if isinstance(targets, str):
        try:
            chosen = {name: module for name, module in linears.items() if re.fullmatch(targets, name)}
        except re.error as error:
            raise ValueError(f"targets: {targets!r} is not a regex: {error}") from error
        if not chosen:
            raise ValueError(f"targets: the regex {targets!r} matches no linear layer; they are named like {examples}")
        return chosen
    if not isinstance(targets, Iterable):
        raise ValueError(
            f'targets: expected names, a regex or "all-linear", got {targets!r}; names are like {examples}'
        )
    chosen_names: set[str] = set()
    for target in targets:
        named = {name for name in linears if name == target or name.endswith(f".{target}")}
        if not named:
            raise ValueError(f"targets: {target!r} names no linear layer; they are named like {examples}")
        chosen_names |= named
    if not chosen_names:
        raise ValueError(f"targets: expected at least one name, got none; linear layers are named like {examples}")
    return {name: module for name, module in linears.items() if name in chosen_names}


def count_parameters(model: nn.Module) -> int:
    """The number of parameters of the base. Tied ones count once, a quantised matrix as the out * in values that it
    represents."""
    counts = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        weight, shape = stored_weight(module), matrix_shape(module)
        if shape is not None and weight is not None and not weight.is_floating_point():
            counts[id(weight)] = shape[0] * shape[1]
    return sum(counts.values())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The memory of the tensors, each counted once."""
    stored = (part for tensor in tensors for part in stored_tensors(tensor))
    return sum({id(part): part.numel() * part.element_size() for part in stored}.values())


def stored_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the memory of `tensor`: itself, or those that it wraps (a weight quantised by torchao, or
    the local part of a sharded one)."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, name), Tensor):  # a sharded tensor names its mesh too
            yield from stored_tensors(part)
