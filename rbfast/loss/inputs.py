"""The checks of what DistillLoss is given. Shapes: T tokens, H hidden size, V vocabulary."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rbfast.loss.questions import Question
from rbfast.ops.dtypes import wide_dtype


def check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """Raises if shapes or dtypes do not fit."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [T, H], got {tuple(hidden.shape)}; flatten batch and sequence first")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"head_weight must be [V, {hidden.shape[1]}] to match hidden, got {tuple(weight.shape)}")
    for name, x in (("hidden", hidden), ("head_weight", weight)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(f"hidden and head_weight must both be float64 or neither, got {hidden.dtype}, {weight.dtype}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be [T] = [{len(hidden)}], one per row of hidden, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"head_bias must be [V] = [{len(weight)}], got {tuple(bias.shape)}")


def stack_parameters(hidden: Tensor, **parameters: float | Tensor) -> Tensor:
    """Floats or [T] tensors as rows of one tensor in the accumulation dtype, detached; numbers are checked here."""
    stacked = torch.empty(len(parameters), len(hidden), dtype=wide_dtype(hidden.dtype), device=hidden.device)
    for row, (name, value) in zip(stacked.unbind(), parameters.items(), strict=True):
        if isinstance(value, Tensor):
            if value.dim() > 0 and value.shape != hidden.shape[:1]:
                raise ValueError(f"{name} must be a float or [T] = [{len(hidden)}], got {tuple(value.shape)}")
            row.copy_(value.detach())
            continue
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite in every row")
        if name == "temperature" and value <= 0:
            raise ValueError("temperature must be positive in every row")
        row.fill_(value)
    return stacked


def value_questions(
    labels: Tensor, ignore_index: int, vocabulary: int, stacked: Tensor, parameters: Mapping[str, float | Tensor]
) -> list[Question]:
    """What may be wrong with labels [T] and with the parameters that are tensors, which `stacked` [n, T] holds."""
    if not len(labels):
        return []
    asked = _label_questions(labels, ignore_index, vocabulary)
    for row, (name, value) in zip(stacked.unbind(), parameters.items(), strict=True):
        if isinstance(value, Tensor):
            asked += _parameter_questions(name, row)
    return asked


def _label_questions(labels: Tensor, ignore_index: int, vocabulary: int) -> list[Question]:
    low, high = labels.masked_fill(labels == ignore_index, 0).aminmax()

    def explain() -> str:
        wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
        row = int(wrong.nonzero()[0])
        allowed = f"[0, {vocabulary}) or ignore_index {ignore_index}"
        return f"labels must be in {allowed}, got {int(labels[row])} at row {row}"

    return [Question(low, lambda label: label < 0, explain), Question(high, lambda label: label >= vocabulary, explain)]


def _parameter_questions(name: str, values: Tensor) -> list[Question]:
    low, high = (x.double() for x in values.aminmax())  # both NaN if any is
    asked = [
        Question(x, lambda v: not math.isfinite(v), lambda: f"{name} must be finite in every row") for x in (low, high)
    ]
    if name == "temperature":
        asked.append(Question(low, lambda v: v <= 0, lambda: f"{name} must be positive in every row"))
    return asked
