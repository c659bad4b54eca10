"""Checks of the inputs of DistillLoss. Shapes: T tokens, H hidden size, V vocabulary."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rbfast.loss.parameters import RowParameter
from rbfast.loss.value_checks import ValueCheck

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(**given: object) -> None:
    """Raises if one is not a tensor: a list, say, or the head module in place of its weight."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")


def check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """Raises if shapes, dtypes or devices do not fit."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [T, H], got {tuple(hidden.shape)}; flatten batch and sequence first")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"head_weight must be [V, {hidden.shape[1]}] to match hidden, got {tuple(weight.shape)}")
    for name, x in (("hidden", hidden), ("head_weight", weight)):
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(f"hidden and head_weight must both be float64 or neither, got {hidden.dtype}, {weight.dtype}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be [T] = [{hidden.shape[0]}], one per row of hidden, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"head_bias must be [V] = [{weight.shape[0]}], got {tuple(bias.shape)}")
    check_devices(hidden, head_weight=weight, labels=labels, head_bias=bias)


def check_logit_settings(logit_scale: float, softcap: float | None, of: str = "") -> None:
    """Raises for a scale or a softcap that gives no distribution."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap{of} must be positive and finite, or None, got {softcap}")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale{of} must be finite, got {logit_scale}")


def check_devices(hidden: Tensor, **given: Tensor | None) -> None:
    """Raises if one is on another device than hidden. With an offloaded weight (on meta) a product would silently
    compute nothing."""
    for name, x in given.items():
        if x is not None and x.device != hidden.device:
            where = "meta, where an offloaded weight has no values" if x.is_meta else x.device
            raise ValueError(f"{name} must be on {hidden.device} like the student's hidden, got one on {where}")


def input_checks(
    labels: Tensor, is_ignored: Tensor, ignore_index: int, vocabulary: int, parameters: Mapping[str, RowParameter]
) -> list[ValueCheck]:
    """The checks of the labels [T] that are not ignored, and of parameters that have values [T]."""
    if not labels.shape[0]:
        return []
    checks = _label_checks(labels, is_ignored, ignore_index, vocabulary)
    for name, parameter in parameters.items():
        if parameter.values is not None:
            checks += _parameter_checks(name, parameter.values)
    return checks


def _label_checks(labels: Tensor, is_ignored: Tensor, ignore_index: int, vocabulary: int) -> list[ValueCheck]:
    low, high = labels.masked_fill(is_ignored, 0).aminmax()

    def explain() -> str:
        wrong = ((labels < 0) | (labels >= vocabulary)) & ~is_ignored
        row = int(wrong.nonzero()[0])
        allowed = f"[0, {vocabulary}) or ignore_index {ignore_index}"
        return f"labels must be in {allowed}, got {int(labels[row])} at row {row}"

    return [
        ValueCheck(low, lambda label: label < 0, explain),
        ValueCheck(high, lambda label: label >= vocabulary, explain),
    ]


def _parameter_checks(name: str, values: Tensor) -> list[ValueCheck]:
    low, high = (x.double() for x in values.aminmax())  # both NaN if any is

    def explain(wanted: str, wrong: Tensor) -> str:
        row = int(wrong.nonzero()[0])
        return f"{name} must be {wanted} in every row, got {float(values[row])} at row {row}"

    checks = [
        ValueCheck(x, lambda v: not math.isfinite(v), lambda: explain("finite", ~values.isfinite()))
        for x in (low, high)
    ]
    if name == "temperature":
        checks.append(ValueCheck(low, lambda v: v <= 0, lambda: explain("positive", values <= 0)))
    return checks
