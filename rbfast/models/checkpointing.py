"""Gradient checkpointing: a layer keeps only its input, and runs again for its backward."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpointed_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that can run again for their backward."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Turns on gradient checkpointing within the block, in training mode or not.

    Raises:
        ValueError: the model does not support it.
    """
    layers = checkpointed_layers(model)
    if not model.supports_gradient_checkpointing or not layers:
        raise ValueError(f"{type(model).__name__} does not support gradient checkpointing: train it without")
    # transformers 5.23 renamed it, and warns of the old name.
    _first_method(model, "activation_checkpointing_enable", "gradient_checkpointing_enable")({"use_reentrant": False})
    for layer in layers:
        layer.training = True  # only the layer's own flag, which it reads; its submodules keep their mode
    try:
        yield
    finally:
        _first_method(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()
        for layer in layers:
            layer.training = model.training


def _first_method(model: PreTrainedModel, *names: str):  # type: ignore[no-untyped-def]
    return next(getattr(model, name) for name in names if hasattr(model, name))
