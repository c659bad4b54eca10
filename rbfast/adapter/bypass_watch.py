"""Checks in the first two optimizer steps for layers that are bypassed, and for layers that get no gradient.

A forward such as `F.linear(x, self.a.weight)` uses the weight of `a` and never runs `a`. With a delta folded in, the
output is right, but the delta gets no gradient. Inspecting the model does not reveal this. So after the first optimizer
step, the weight of each layer whose delta got no gradient is made to require one. If at the second step the weight has
a gradient and the delta still has none, the layer is bypassed, which is an error. If such a layer runs after all, its
weight is frozen again first, so a sound model computes nothing extra.

The gradient decides, not the forward hook: hooks cannot report from compiled parts of a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from rbfast.models.linears import unsharded
from rbfast.models.weight_use import stored_weight

_STEPS = 2  # optimizer steps: the first shows which layers are idle, the second whether their weights are used


class Site(Protocol):
    """What BypassWatch needs of a ColumnDelta."""

    A: nn.Parameter
    B: nn.Parameter
    linear: nn.Module
    watch: BypassWatch | None


class BypassWatch:
    """Watches the deltas of an adapter for two optimizer steps."""

    def __init__(self) -> None:
        self._marked: dict[int, tuple[str, Site, nn.Parameter]] = {}
        self._steps = 0

    def on_forward(self, site: Site) -> None:
        """Called when the layer of a marked site is about to run."""
        self._unmark(site)

    def on_step(self, sites: Mapping[str, Site]) -> None:
        """Called after an optimizer step with the sites it trained, by name. Steps without gradients and frozen sites
        do not count. The first step warns of sites without a gradient. The second raises RuntimeError if a weight is
        used without running its layer."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        sites = {name: site for name, site in sites.items() if _is_trained(site)}
        if all(map(_is_idle, sites.values())):
            return
        self._steps += 1
        if self._steps == 1:
            _warn_of_idle([name for name, reached in _has_gradient(sites).items() if not reached], len(sites))
            for name, site in sites.items():
                if _is_idle(site):
                    self._mark(name, site)
            return
        marked = [entry for entry in self._marked.values() if _is_trained(entry[1])]
        bypassed = [name for name, site, weight in marked if weight.grad is not None and _is_idle(site)]
        self.end()
        if bypassed:
            raise RuntimeError(
                f"the model uses the weight of {bypassed[0]} without running that layer, so its delta learns nothing; "
                "detach the adapter, and leave the layer out of targets"
            )

    @property
    def is_over(self) -> bool:
        return self._steps >= _STEPS

    def end(self) -> None:
        self._steps = _STEPS
        for _, site, _ in list(self._marked.values()):
            self._unmark(site)

    def _mark(self, name: str, site: Site) -> None:
        weight = stored_weight(site.linear)
        if type(weight) is not nn.Parameter or weight.requires_grad:  # do not freeze a weight that others train
            return
        if weight.is_floating_point() and weight.is_leaf and not weight.is_inference():
            weight.requires_grad_(True)
            self._marked[id(site)] = name, site, weight
            site.watch = self

    def _unmark(self, site: Site) -> None:
        site.watch = None
        _, _, weight = self._marked.pop(id(site))
        weight.requires_grad_(False)
        weight.grad = None


def _is_trained(site: Site) -> bool:
    return site.A.requires_grad or site.B.requires_grad


def _is_idle(site: Site) -> bool:
    return site.A.grad is None and site.B.grad is None


def _has_gradient(sites: Mapping[str, Site]) -> dict[str, bool]:
    """Which sites have a non-zero gradient, found with one device synchronisation."""
    gradients = {
        name: [unsharded(x.grad) for x in (site.A, site.B) if x.grad is not None] for name, site in sites.items()
    }
    sizes: list[Tensor] = [
        torch.stack([grad.abs().amax() for grad in grads]).amax() for grads in gradients.values() if grads
    ]
    values = iter(torch.stack([size.to(sizes[0].device) for size in sizes]).tolist())
    return {name: bool(grads) and next(values) != 0 for name, grads in gradients.items()}  # NaN is not 0


def _warn_of_idle(names: list[str], total: int) -> None:
    if names:
        warnings.warn(
            f"{len(names)} of {total} matrices got no gradient in the first step (the first is {names[0]}): no token "
            "reached them (an expert, a tower that did not run), or the output does not depend on them; if that is so "
            "in every step, name only the others as targets",
            stacklevel=4,
        )
