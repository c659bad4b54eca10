"""Stacked experts: the weights [experts, out, in] of a mixture of experts, as layers that can have a delta.

transformers keeps all experts of a layer in two parameters of one module, `gate_up_proj` and `down_proj`, and
multiplies by slices of them. An `ExpertStack` presents such a parameter as a layer, with hooks and a name, without
registering itself in the model. `patch_forward` replaces the module's forward by one that sorts the tokens by expert
and calls each stack once with all of them; `unpatch_forward` undoes that. Gate and biases stay the module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rbfast import ops

_STACKS = "_rbfast_stacks"  # the attribute of an experts module that holds the stacks it calls, by name
_FLAGS = ("has_gate", "has_bias", "is_transposed")  # set by transformers' decorator of expert classes
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # relative to the largest value


class ExpertStack(nn.Module):
    """One stacked weight, called with x [S, in], the rows of all experts sorted by expert, and ends [E] int64, the end
    of each expert's rows.

    Attributes:
        experts: the module that holds the weight, as its parameter `key`.
    """

    experts: nn.Module

    def __init__(self, experts: nn.Module, key: str) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # not a submodule
        self.key = key
        self.is_transposed = bool(experts.is_transposed)
        shape = self.weight.shape
        self.count = shape[0]
        self.out_features, self.in_features = shape[1:][::-1] if self.is_transposed else shape[1:]

    @property
    def weight(self) -> Tensor:
        """The weight as stored: [E, out, in], or [E, in, out] if transposed."""
        weight = self.experts._parameters[self.key]
        assert weight is not None
        return weight

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield self.key, self.weight  # type: ignore[misc]

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        weight = self.weight.mT if self.is_transposed else self.weight
        return ops.grouped_linear(x.to(weight.dtype), weight, ends)

    def patch_forward(self) -> None:
        """Makes the module call this stack in its forward."""
        running = self.experts.__dict__.setdefault(_STACKS, {})
        running[self.key] = self
        self.experts.__dict__.setdefault("forward", partial(_patched_forward, self.experts))

    def unpatch_forward(self) -> None:
        """Stops calling this stack, unless it still has hooks. After the last stack, restores the module's forward."""
        if self._forward_hooks or self._forward_pre_hooks:
            return
        running = self.experts.__dict__.get(_STACKS, {})
        running.pop(self.key, None)
        if not running and _STACKS in self.experts.__dict__:
            del self.experts.__dict__[_STACKS]
            if _is_patched(self.experts.__dict__["forward"]):  # otherwise accelerate has wrapped ours
                del self.experts.__dict__["forward"]

    def why_unfit(self) -> str:
        """Why the stack cannot have a delta, as a predicate of its name ("is quantised"); "" if it can."""
        own: Any = self.experts
        if type(self.weight) not in (Tensor, nn.Parameter) and not hasattr(self.weight, "full_tensor"):
            return "is quantised"
        if self.weight.dtype not in _TOLERANCE:
            return f"is kept in {str(self.weight.dtype).removeprefix('torch.')}"
        if _STACKS in own.__dict__:  # already patched, so it passed before
            return ""
        if getattr(own, "_is_expert_parallel", False):
            return "is spread over processes by expert"
        if "forward" in own.__dict__ and not _is_patched(own.__dict__["forward"]):
            return f"belongs to a {type(own).__name__} whose forward was replaced (by accelerate's offloading, say)"
        if self.weight.is_meta or hasattr(self.weight, "full_tensor"):  # there are no values to compare with
            return ""
        return _COMPARED[own] if own in _COMPARED else _COMPARED.setdefault(own, _compare_forwards(own))


_COMPARED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def stacks_of(module: nn.Module) -> dict[str, ExpertStack]:
    """The stacked weights of a module with experts, by parameter name; empty for any other module."""
    has_flags = all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS)
    if not has_flags or not hasattr(module, "_apply_gate"):
        return {}
    keys = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if not all((weight := module._parameters.get(key)) is not None and weight.dim() == 3 for key in keys):
        return {}
    running = module.__dict__.get(_STACKS, {})
    return {key: running.get(key) or ExpertStack(module, key) for key in keys}


def patch_forward(layer: nn.Module) -> None:
    """If the layer is an expert stack, makes its module call it, so that the hooks of the stack run."""
    if isinstance(layer, ExpertStack):
        layer.patch_forward()


def unpatch_forward(layer: nn.Module) -> None:
    """Undoes `patch_forward`. Call it after the hooks are removed."""
    if isinstance(layer, ExpertStack):
        layer.unpatch_forward()


def experts_in(layer: nn.Module) -> int | None:
    """The number of experts of a stack; None for any other layer."""
    return layer.count if isinstance(layer, ExpertStack) else None


def weight_owner(layer: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds a layer's weight as a parameter, and the parameter's name in it."""
    return (layer.experts, layer.key) if isinstance(layer, ExpertStack) else (layer, "weight")


def _patched_forward(experts: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    run = partial(_run_stacks, experts) if _STACKS in experts.__dict__ else _original_forward(experts)
    return run(*args, **kwargs)


def _is_patched(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func is _patched_forward


def _run_stacks(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a module with experts, by its stacks: hidden_states [T, H], top_k_index and weights [T, k]."""
    up, down = stacks_of(experts).values()
    # An unstable sort, as in transformers: the order of an expert's rows may change their last bits.
    chosen, order = top_k_index.reshape(-1).sort()
    # bincount would synchronise with the device.
    ends = torch.searchsorted(chosen, torch.arange(up.count, device=chosen.device, dtype=chosen.dtype), right=True)
    per_token = top_k_index.shape[-1]
    y = _add_bias(experts, up, up(hidden_states[order // per_token], ends), chosen)
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = _add_bias(experts, down, down(y, ends), chosen)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    y = (y * top_k_weights.reshape(-1)[order, None])[order.argsort()]
    # Sums a token's experts in a fixed order; index_add_ on a GPU is not deterministic.
    return y.view(len(hidden_states), per_token, y.shape[-1]).sum(1).to(hidden_states.dtype)


def _add_bias(experts: Any, stack: ExpertStack, y: Tensor, chosen: Tensor) -> Tensor:
    return y + getattr(experts, f"{stack.key}_bias")[chosen] if experts.has_bias else y


@torch.no_grad()
def _compare_forwards(experts: Any) -> str:
    """Runs `_run_stacks` and the module's own forward on a few tokens: "" if they agree, else why they do not."""
    up, _ = stacks_of(experts).values()
    weight = up.weight
    tokens, per_token = 3, min(2, up.count)
    numbers = torch.arange(tokens * up.in_features, dtype=torch.float32, device=weight.device).cos()
    x = numbers.view(tokens, -1).to(weight.dtype)
    index = torch.arange(tokens * per_token, device=weight.device).view(tokens, -1) % up.count
    weights = (0.2 + 0.1 * torch.arange(tokens * per_token, device=weight.device)).view(tokens, -1).to(weight.dtype)
    try:
        with torch.autocast(weight.device.type, enabled=False):
            expected = _original_forward(experts)(x, index, weights)
            actual = _run_stacks(experts, x, index, weights)
    except Exception as error:  # third-party code may raise anything
        return f"belongs to a {type(experts).__name__} whose forward fails on a few rows ({error})"
    apart = (actual.float() - expected.float()).abs().amax()
    if not apart <= _TOLERANCE[weight.dtype] * expected.float().abs().amax():
        return f"belongs to a {type(experts).__name__}, which does more to its experts than multiply and gate"
    return ""


def _original_forward(experts: nn.Module) -> Callable[..., Tensor]:
    return partial(type(experts).forward, experts)
