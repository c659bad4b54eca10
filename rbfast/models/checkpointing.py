"""Gradient checkpointing: a layer keeps only its input, and runs again for its backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_FUNCTION = "_gradient_checkpointing_func"  # what a layer calls to run with checkpointing


def checkpointed_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that support checkpointing."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Turns on gradient checkpointing within the block, in training mode or not; restores the previous state after it.

    Raises:
        ValueError: the model does not support it.
    """
    layers = checkpointed_layers(model)
    if not model.supports_gradient_checkpointing or not layers:
        raise ValueError(f"{type(model).__name__} does not support gradient checkpointing: train it without")
    # Not with the model's own method, which also leaves a permanent hook on the embeddings.
    before = [
        (layer, layer.training, layer.gradient_checkpointing, getattr(layer, _FUNCTION, None)) for layer in layers
    ]
    for layer in layers:
        _set_checkpointing(layer, True, partial(checkpoint, use_reentrant=False))
        layer.training = True  # only the layer's own flag, which it reads; its submodules keep their mode
    try:
        yield
    finally:
        for layer, training, is_on, function in before:
            _set_checkpointing(layer, is_on, function)
            layer.training = training


def _set_checkpointing(layer: GradientCheckpointingLayer, is_on: bool, function: Callable[..., Any] | None) -> None:
    layer.gradient_checkpointing = is_on
    setattr(layer, _FUNCTION, function)
