"""On a GPU, the fold after every optimizer step: all 196 matrices of a 7B model at the default support."""

import torch
from harness import Step
from registry import Bar, Case, Contest, Place

from cases.models import qwen
from rbfast.adapter.sparse_adapter import SparseAdapter


def floor(adapter: SparseAdapter) -> Step:
    """A copy of the columns of every matrix."""
    columns = [site.base_columns for site in adapter.sites().values()]
    room = torch.empty(max(x.numel() for x in columns), dtype=columns[0].dtype, device=columns[0].device)

    def step() -> None:
        for x in columns:
            room[: x.numel()].view_as(x).copy_(x)

    return step


def make(place: Place) -> Contest:
    adapter = SparseAdapter.attach(
        qwen("7B", place, vocab_size=place.size(152064, 512)), placement="random", **density(place)
    )
    share = sum(m.columns * m.out_features for m in adapter.summary()) / sum(
        m.in_features * m.out_features for m in adapter.summary()
    )
    title = f"fold of {len(adapter.sites())} matrices of a 7B, {100 * share:.0f}% of the columns"
    return Contest(
        title,
        {"floor": floor(adapter), "rbfast": adapter.fold},
        (Bar("rbfast ms", "<=", 6.0),),
        rounds=10,
        values=lambda: {"kept columns / model": share},
    )


def density(place: Place) -> dict[str, float]:
    """The default density, except in a toy, which is too small for it."""
    return {"density": 0.05} if place.is_toy else {}


CASES = [Case("fold", "7B", make, ("cuda",))]
