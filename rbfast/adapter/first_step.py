"""What only a training step shows of a model: layers whose weight is used past them, and layers that learn nothing.

A forward such as `F.linear(x, self.a.weight)` uses the weight of `a` and never runs `a`. With a delta folded in, its
output is right, and the delta has no gradient. Nothing in the model says so. So from the first forward with gradients
on, the weight of each layer that has not run yet takes part in the backward: if a gradient reaches it there, that is an
error. Layers that run stop taking part, so a model without the fault computes nothing more than otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rbfast.models.weight_use import own_weight

_STEPS = 2  # of the optimizer: the first may start in the middle of a forward


class Site(Protocol):
    """The delta of one matrix, as far as it is watched (a ColumnDelta)."""

    A: nn.Parameter
    B: nn.Parameter
    linear: nn.Module
    watch: BypassWatch | None


class BypassWatch:
    """Watches the layers of sites by name, until each has run or two steps were made."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._waiting = {id(site): (name, site) for name, site in sites.items()}
        self._hooks: dict[int, RemovableHandle] = {}
        self._begun, self._steps = False, 0
        for site in sites.values():
            site.watch = self

    def saw(self, site: Site) -> None:
        """The layer of this site is about to run."""
        self._forget(site)
        if not self._begun:
            self._begun = True
            for name, other in self._waiting.values():
                self._mark(name, other)

    def step(self, sites: Mapping[str, Site]) -> None:
        """An optimizer has made a step. Warns, after the first one with gradients, of sites that got none."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        if all(site.A.grad is None and site.B.grad is None for site in sites.values()):
            return
        self._steps += 1
        if self._steps == 1:
            _warn_of_idle([name for name, reached in _reached(sites).items() if not reached], len(sites))
        if self._steps >= _STEPS:
            self.end()

    @property
    def is_over(self) -> bool:
        return self._steps >= _STEPS

    def end(self) -> None:
        self._steps = _STEPS
        for _, site in list(self._waiting.values()):
            self._forget(site)

    def _mark(self, name: str, site: Site) -> None:
        weight = own_weight(site.linear)
        if type(weight) is nn.Parameter and weight.is_floating_point() and weight.is_leaf and not weight.is_inference():
            weight.requires_grad_(True)
            self._hooks[id(site)] = weight.register_hook(lambda grad: _refuse(name))

    def _forget(self, site: Site) -> None:
        site.watch = None
        self._waiting.pop(id(site), None)
        hook = self._hooks.pop(id(site), None)
        if hook is not None:
            hook.remove()
            site.linear.weight.requires_grad_(False)


def _refuse(name: str) -> None:
    raise RuntimeError(
        f"the model uses the weight of {name} without running that layer, so its delta would learn nothing; detach the "
        "adapter, and leave the layer out of targets"
    )


def _reached(sites: Mapping[str, Site]) -> dict[str, bool]:
    """Which sites have a gradient other than 0; one wait for the device."""
    found = {name: [x.grad for x in (site.A, site.B) if x.grad is not None] for name, site in sites.items()}
    sizes: list[Tensor] = [
        torch.stack([grad.abs().amax() for grad in grads]).amax() for grads in found.values() if grads
    ]
    values = iter(torch.stack([size.to(sizes[0].device) for size in sizes]).tolist())
    return {name: bool(grads) and next(values) != 0 for name, grads in found.items()}  # NaN is not 0


def _warn_of_idle(names: list[str], total: int) -> None:
    if names:
        warnings.warn(
            f"{len(names)} of {total} matrices got no gradient in the first step (the first is {names[0]}): no token "
            "reached them (an expert, a tower that did not run), or the output does not depend on them; if that is so "
            "in every step, name the others as targets",
            stacklevel=4,
        )
