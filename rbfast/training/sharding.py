"""A frozen base sharded over processes: each holds a part of every weight, and a layer is whole only while it runs.

    model, tokenizer = load_student("their/model")      # under torchrun, in CPU memory
    shard(model, device="cuda")                         # before an adapter is attached; the rest is as usual
    distill(model, tokenizer, traces, "runs/first")

Only the base is sharded (FSDP2, `torch.distributed.fsdp.fully_shard`). The adapter is small: it runs beside the
weights, whole on every process, and DDP reduces its gradients, so checkpoints are those of an unsharded run.
"""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from rbfast.adapter.attachable import check_attachable
from rbfast.models.linears import is_sharded
from rbfast.models.student import backbone_of


def shard(model: PreTrainedModel, over: int | None = None, device: str | None = None) -> None:
    """Shards a model's weights over processes, in place. Every process calls this with the same model.

    A model that transformers sharded at loading (`distributed_config=`) keeps its shards, and only gets `run_backbone`,
    its forward without the head.

    Args:
        over: the number of consecutive processes that share a copy of the model; None is all. The processes of one node
            are a good choice if it has room for a copy: then no base weight crosses the network.
        device: the type of device for the shards ("cuda", "cpu"); None is the model's.

    Raises:
        ValueError: there is only one process, the number of processes is not a multiple of `over`, the model has an
            adapter attached, or it does not name the class of its layers.
    """
    check_attachable(model)
    if not is_sharded(model):
        _shard_weights(model, over, torch.device(device or model.device).type)
    model.run_backbone = MethodType(_run_backbone, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_backbone")


def _shard_weights(model: PreTrainedModel, over: int | None, device: str) -> None:
    PartialState(cpu=device == "cpu")  # joins the process group that torchrun or accelerate started
    if not dist.is_initialized():
        raise ValueError("a model is sharded over processes, but this is the only one: start several with torchrun")
    processes = dist.get_world_size()
    over = processes if over is None else over
    if over < 1 or processes % over:
        raise ValueError(f"over (--shard) must divide the number of processes, {processes}, got {over}")
    layers = set(model._no_split_modules or ())
    units = [module for module in model.modules() if type(module).__name__ in layers]
    if not units:
        raise ValueError(f"{type(model).__name__} cannot be sharded: it names no class of layers (_no_split_modules)")
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if ends[1] is not None and ends[0].weight is not ends[1].weight:
        units += ends  # otherwise they would be gathered for the backward, which does not need them
    mesh = init_device_mesh(device, (processes // over, over), mesh_dim_names=("copy", "part"))["part"]
    for module in (*reversed(units), model):  # inner modules first
        # Resharding leaves no weight whole after a forward, so nothing can write into a temporary copy.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _run_backbone(model: PreTrainedModel, **inputs: Any) -> Any:
    """The forward without the head. Registered as a forward method of the root, it gathers weights outside layers."""
    return backbone_of(model)(**inputs)
