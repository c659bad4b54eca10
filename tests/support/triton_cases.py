"""Calls of the Triton kernels: on a GPU, or on the CPU if TRITON_INTERPRET selects the interpreter."""

import os
from dataclasses import replace

import pytest
import torch
from column_cases import EPS32, Delta
from column_cases import run as run_columns
from torch import Tensor

from rbfast.kernels import columns, divergence_rows
from rbfast.ops import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU here: test_everything_under_the_interpreter runs this on the CPU",
)


def on_device(d: Delta) -> Delta:
    return replace(d.map(lambda t: t.to(DEVICE)), cols=d.cols.to(DEVICE))


def run_triton(name: str, d: Delta) -> tuple[Tensor, ...]:
    return tuple(result.cpu() for result in run_columns(name, on_device(d), columns))


def assert_below(name: str, error: Tensor, budget: Tensor) -> None:
    """Checks every element. The message gives the largest excess, so that a single run on a GPU suffices."""
    is_over = ~(error <= budget)
    if is_over.any():
        share, at = (error / budget).masked_fill(~is_over, 0.0).nan_to_num(torch.inf).flatten().max(0)
        sizes = f"error {float(error.flatten()[at]):.3g}, budget {float(budget.flatten()[at]):.3g}"
        count = f"{int(is_over.sum())} of {list(error.shape)} over the budget"
        raise AssertionError(f"{name}: {count}, by up to {float(share):.3g} times at {int(at)} ({sizes})")


def assert_within_budget(name: str, d: Delta) -> None:
    """Checks every element; the budget: plain torch's error, half an ulp of the result, an fp32 ulp of the terms."""
    truths, plains = run_columns(name, d.map(Tensor.double), reference), run_columns(name, d, reference)
    sizes = run_columns(name, d.map(lambda t: t.double().abs()), reference)
    for i, (ours, plain, truth, size) in enumerate(zip(run_triton(name, d), plains, truths, sizes, strict=True)):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        budget = (plain - truth).abs() + torch.finfo(ours.dtype).eps / 2 * truth.abs() + EPS32 * size
        assert_below(f"{name}, result {i}", (ours - truth).abs(), budget + torch.finfo(ours.dtype).tiny)


class OnDevice:
    """divergence_rows_ for rows that live on the CPU."""

    @staticmethod
    def divergence_rows_(logits: Tensor, dz: Tensor | None, *rest: object) -> tuple[Tensor, ...]:
        z, *moved = (x.to(DEVICE) if isinstance(x, Tensor) else x for x in (logits, *rest))
        gradient = None if dz is None else torch.empty_like(dz, device=DEVICE)
        losses = divergence_rows.divergence_rows_(z, gradient, *moved)
        if dz is not None:
            dz.copy_(gradient)
        return tuple(x.cpu() for x in losses)
