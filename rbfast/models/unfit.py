"""Which linear layers cannot have a delta, and why: the delta would change more than its layer, or would learn nothing.

A delta changes a layer's weight and learns from the layer's inputs and output gradients. So the weight must belong to
that layer alone, and all code that uses the weight must run the layer.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rbfast.models.weight_use import stored_weight, weight_use

Linears = Mapping[str, tuple[nn.Module, tuple[int, int]]]


class Unfit(NamedTuple):
    """Why a layer cannot have a delta. should_warn: attaching warns of it; the other reasons are common."""

    reason: str
    should_warn: bool


def unfit_linears(model: nn.Module, linears: Linears) -> dict[str, Unfit]:
    """The layers that cannot have a delta, by name. linears: (layer, (out, in)) by name."""
    tied, overlapping, bypassed = _tied_weights(model), _overlapping_weights(model), _bypassed_linears(model)
    unfit = {}
    for name, (module, shape) in linears.items():
        weight = stored_weight(module)
        if weight is not None and id(weight) in tied:
            unfit[name] = Unfit(f"the weight of {name} is tied to another module's: a delta would change both", False)
        elif id(module) in bypassed:
            reason, should_warn = bypassed[id(module)]
            unfit[name] = Unfit(reason.replace("NAME", name), should_warn)
        elif weight is not None and id(weight) in overlapping:
            unfit[name] = Unfit(
                f"the weight of {name} shares its memory with another one: a delta would change both", True
            )
        elif (use := weight_use(module, shape)).kind == "unfit":
            unfit[name] = Unfit(f"{name} {use.reason}", True)
    return unfit


def _tied_weights(model: nn.Module) -> set[int]:
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    return {key for key, count in names.items() if count > 1}


def _overlapping_weights(model: nn.Module) -> set[int]:
    """Ids of tensors that share memory with another, such as a decoder's weight that is a view of the encoder's."""
    spans: dict[torch.device, list[tuple[int, int, int]]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel():
            start = tensor.data_ptr()
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = start + (last + 1) * tensor.element_size()
            spans.setdefault(tensor.device, []).append((start, end, id(tensor)))
    return {key for on_device in spans.values() for pair in _overlaps(sorted(on_device)) for key in pair}


def _overlaps(spans: list[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Pairs of overlapping keys among sorted spans (start, end, key). Every span that overlaps another is in a pair."""
    widest = (0, 0, 0)
    for span in spans:
        if span[0] < widest[1]:
            yield widest[2], span[2]
        widest = max(widest, span, key=lambda one: one[1])


def _bypassed_linears(model: nn.Module) -> dict[int, Unfit]:
    """The layers, by id, whose weight other modules multiply by without running the layer, so that a delta may never
    see their input. In the reasons, NAME stands for the layer's name."""
    bypassed = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            reason = "nn.MultiheadAttention multiplies by the weight of NAME without running the layer"
            bypassed[id(module.out_proj)] = Unfit(reason, True)
        children = dict(module.named_children())
        if hasattr(module, "A_log") and hasattr(module, "D"):
            # The mixer multiplies by dt_proj's weight; in training a fused kernel takes x_proj, dt_proj and out_proj.
            reason = "a Mamba mixer may use the weight of NAME without running the layer"
            bypassed |= {id(child): Unfit(reason, False) for name, child in children.items() if name != "in_proj"}
        for name in children.keys() & _multiplied_by_hand(type(module)):
            reason = f"{type(module).__name__} multiplies by the weight of NAME without running the layer"
            bypassed.setdefault(id(children[name]), Unfit(reason, True))
        gain = module._parameters.get("A")
        if "dt_proj" in children and gain is not None and not gain.is_meta and not gain.any():
            reason = "NAME acts through exp(A softplus(y)), and has no effect here, where A is 0"  # Doge's masks
            bypassed[id(children["dt_proj"])] = Unfit(reason, True)
    return bypassed


_PRODUCT = re.compile(
    r"(?:@\s*|\b(?:linear|matmul|mm|addmm)\([^()]*(?:\([^()]*\)[^()]*)*?,\s*)self\.(\w+)\.weight\b(?!\.(?:dtype|shape|device))"
)


def _multiplied_by_hand(kind: type[nn.Module]) -> set[str]:
    """The attribute names of layers whose weight the code of a class multiplies by: `F.linear(x, self.gate.weight)`.

    Other spellings are found in the first two training steps (`rbfast.adapter.bypass_watch`).
    """
    return {name for base in kind.__mro__ if "forward" in vars(base) for name in _products_in(base)}


@cache
def _products_in(kind: type) -> frozenset[str]:
    if kind.__module__.startswith("torch."):
        return frozenset()
    functions = [function for function in vars(kind).values() if inspect.isfunction(function)]
    return frozenset(name for function in functions for name in _PRODUCT.findall(_source_of(function)))


def _source_of(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except OSError:  # no source, as for a class defined in a shell
        return ""
