"""How a layer uses its weight: y = x W^T, y = x W, or something else that may rule out a delta.

Class name and shape do not say: a square layer may multiply by its weight or by its transpose. So a layer with a
custom forward is run on one row, and the gradient of its weight shows what it does. nn.Linear and transformers'
Conv1D are known. A layer whose weight is quantised, sharded or on meta is judged by its class.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from rbfast.models.experts import ExpertStack

FOLDABLE = (torch.bfloat16, torch.float16, torch.float32)
_TOLERANCE = 4e-3  # tf32 rounds factors by 1e-3

Kind = Literal["linear", "transposed", "opaque", "unfit"]


class WeightUse(NamedTuple):
    """linear: y = x W^T. transposed: y = x W. opaque: a delta can only run beside the weight. unfit: no delta at all.

    reason: why a layer is opaque or unfit, as a predicate of its name ("computes its weight").
    """

    kind: Kind
    reason: str = ""


LINEAR, TRANSPOSED = WeightUse("linear"), WeightUse("transposed")


def weight_use(module: nn.Module, shape: tuple[int, int]) -> WeightUse:
    """What a layer of `shape` (out, in) does with its weight."""
    if isinstance(module, ExpertStack):
        reason = module.why_unfit()
        return WeightUse("unfit", reason) if reason else TRANSPOSED if module.is_transposed else LINEAR
    weight = stored_weight(module)
    if weight is None:
        return _use_of_computed(module)
    if weight.dtype == torch.float64:
        return WeightUse("unfit", "has a weight in float64, which deltas do not support: cast the model to float32")
    if not is_plain(weight):
        return TRANSPOSED if is_conv1d(module) else LINEAR
    if weight.dim() != 2:
        flat = " (flattened by FSDP1 or ZeRO-3? Use rbfast.training.sharding.shard)" if weight.dim() == 1 else ""
        return WeightUse("unfit", f"has a weight of shape {tuple(weight.shape)}, which is not a matrix{flat}")
    forward = _unwrapped_forward(module)
    if forward is nn.Linear.forward:
        return LINEAR
    if is_conv1d(module) and type(module).__module__ == "transformers.pytorch_utils":
        return TRANSPOSED
    if weight.is_meta or weight.is_inference():  # no values to run with, or autograd refuses the tensor
        return TRANSPOSED if is_conv1d(module) else LINEAR
    known = _PROBED.get(module)
    if known is None or known[0]() is not forward:
        known = _PROBED[module] = ref(forward), _probe(module, weight, shape)
    return known[1]


# The forward that was probed and its use. A weak reference: a forward set on the layer itself keeps the layer alive.
_PROBED: WeakKeyDictionary[nn.Module, tuple[ref[Callable[..., Any]], WeightUse]] = WeakKeyDictionary()


def stored_weight(module: nn.Module) -> Tensor | None:
    """The weight that a layer stores; None if it has none or computes it."""
    if isinstance(module, ExpertStack):
        return module.weight
    return module._parameters.get("weight", module._buffers.get("weight"))


def has_weight(module: nn.Module) -> bool:
    """Whether a layer stores a weight or computes one. This does not compute it."""
    return stored_weight(module) is not None or "weight" in module.__dict__ or hasattr(type(module), "weight")


def is_plain(weight: Any) -> bool:
    """Whether a weight is an ordinary tensor of a dtype that a delta can be folded into. It may be on meta."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in FOLDABLE


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's Conv1D, which stores its weight as [in, out] and has no in_features."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a layer was called with, by position or keyword."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not given or (not args and len(given) > 1):
        raise TypeError(
            f"a layer with a delta takes one tensor, got {len(args)} positional arguments and keywords {sorted(kwargs)}"
        )
    return given[0]


def _use_of_computed(module: nn.Module) -> WeightUse:
    """The use of a weight that the layer does not store: computed in each forward, or an inner layer's."""
    is_made = "parametrizations" in module._modules or "weight" in module.__dict__
    inner = [stored_weight(child) for child in module.modules() if child is not module]
    if not is_made and any(weight is not None and weight is module.weight for weight in inner):
        return WeightUse("unfit", "wraps a layer and exposes that layer's weight as its own")
    return WeightUse("opaque", "computes its weight (weight norm, spectral norm, a parametrization, pruning)")


def _unwrapped_forward(module: nn.Module) -> Callable[..., Any]:
    """The function that runs, without accelerate's wrapper that moves weights."""
    own = module.__dict__.get("forward")
    return type(module).forward if own is None or "_hf_hook" in module.__dict__ else own


def _probe(module: nn.Module, weight: Tensor, shape: tuple[int, int]) -> WeightUse:
    use = _use_in_mode(module, weight, shape, training=False)
    if use in (LINEAR, TRANSPOSED) and _use_in_mode(module, weight, shape, training=True) != use:
        return WeightUse("opaque", "does more in training than multiply by its weight (dropout?)")
    return use


def _use_in_mode(module: nn.Module, weight: Tensor, shape: tuple[int, int], training: bool) -> WeightUse:
    out_features, in_features = shape
    count = torch.arange(max(shape), device=weight.device, dtype=torch.float32)
    x, dy = count[:in_features].cos().to(weight.dtype), (0.7 * count[:out_features]).sin().to(weight.dtype)
    errors = []
    for row in (x[None, None], x[None]):  # a batch of sequences, else tokens in a row
        try:
            with _leaf_weight(module, weight, training) as leaf:
                y = module.forward(row)
                if not isinstance(y, Tensor):
                    return WeightUse("unfit", f"returns a {type(y).__name__}, not a tensor")
                if y.shape != (*row.shape[:-1], out_features):
                    return WeightUse("unfit", f"turns an input {tuple(row.shape)} into {tuple(y.shape)}")
                return _use_by_gradient(y, leaf, x, dy)
        except Exception as error:  # third-party code may raise anything: report it as the reason
            errors.append(f"{type(error).__name__}: {error}")
    return WeightUse("unfit", f"fails on a single row ({errors[0]})")


def _use_by_gradient(y: Tensor, leaf: Tensor, x: Tensor, dy: Tensor) -> WeightUse:
    if not y.requires_grad:
        return WeightUse("unfit", "gives the same output whatever its weight is")
    (gradient,) = torch.autograd.grad(y, leaf, dy.expand_as(y).to(y.dtype), allow_unused=True)
    if gradient is None or not gradient.any():
        return WeightUse("unfit", "gives the same output whatever its weight is")
    tolerance = max(_TOLERANCE, 4 * torch.finfo(leaf.dtype).eps)
    for use, expected in ((LINEAR, torch.outer(dy, x)), (TRANSPOSED, torch.outer(x, dy))):
        if gradient.shape == expected.shape and (gradient - expected).norm() <= tolerance * expected.norm():
            return use
    return WeightUse("opaque", "does more to its weight than multiply by it")


@contextmanager
def _leaf_weight(module: nn.Module, weight: Tensor, training: bool) -> Iterator[Tensor]:
    """Within the block a leaf tensor with the same values replaces the layer's weight, and the layer is in training or
    evaluation mode. Afterwards its modes, its buffers and the random number generators are restored."""
    store: Any = module._parameters if "weight" in module._parameters else module._buffers
    before = [(part, part.training, dict(part._buffers)) for part in module.modules()]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(weight.device.type, enabled=False),
        torch.random.fork_rng([weight.device] if weight.is_cuda else []),
    ):
        leaf = nn.Parameter(weight.detach())
        for part, _, buffers in before:
            part.training = training
            copies = {name: x.clone() for name, x in buffers.items() if x is not None and x is not weight}
            part._buffers.update(copies)  # the layer may update them
        store["weight"] = leaf
        try:
            yield leaf
        finally:
            store["weight"] = weight
            for part, mode, buffers in before:
                part.training = mode
                part._buffers.update(buffers)
