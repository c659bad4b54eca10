"""Whether an adapter can be attached to a model."""

import warnings

import torch
from torch import nn

from rbfast.adapter.column_delta import deltas_of
from rbfast.models.linears import unwrapped


def attachable(model: nn.Module) -> nn.Module:
    """The model without its wrappers, checked by `check_attachable`. Raises TypeError if it is not a module. Warns of
    DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model, such as load_student returns, got {type(model).__name__}: load it, then attach"
        )
    _warn_of_ddp(model)
    model = unwrapped(model)
    check_attachable(model)
    return model


def check_attachable(model: nn.Module) -> None:
    """Raises ValueError for a model that has an adapter attached (PEFT's included), has uninitialised lazy layers, is
    scripted, or is split by tensor parallelism."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("expected a module of Python code, got one made by torch.jit: attach before scripting it")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            f"this model is split over {model.tp_size} processes by tensor parallelism, which an adapter does not "
            "support: load it without tp_plan, and shard its weights with rbfast.training.sharding.shard"
        )
    if (first := next(deltas_of(model), None)) is not None:
        raise ValueError(
            f"this model has a SparseAdapter attached already (at {first[0]}), and takes one at a time: call its "
            "detach() or merge() first"
        )
    for name, module in model.named_modules():
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
            raise ValueError(
                f"{name or type(module).__name__} is a lazy layer without a weight: run the model once first"
            )
        if type(module).__module__.startswith("peft."):
            where = f" (a {type(module).__name__} at {name or 'the top'})"
            raise ValueError(
                f"this model has a PEFT adapter{where}: merge it with merge_and_unload(), or remove it with "
                "unload(), and attach to the model that it returns"
            )


def _warn_of_ddp(model: nn.Module) -> None:
    """Warns of DistributedDataParallel, which is silent if a backward reaches none of its parameters."""
    replicas = (m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel))
    if any(replica.process_group.size() > 1 for replica in replicas):
        warnings.warn(
            "DistributedDataParallel does not reduce the gradients of an adapter attached to the model inside it, so "
            "each process would train its own copy: attach first, then wrap a module that holds both, or sum the "
            "gradients of adapter.parameters() over the processes before each step",
            stacklevel=4,
        )
