"""`rbfast info`: which implementations this installation runs, and the size of an adapter of a model."""

import argparse
from typing import Any

from rbfast.cli.common import Command, print_result

_USE_TRITON = "reinstall rbfast with RBFAST_CUDA=0 to run Triton and plain torch"


def run_info(args: argparse.Namespace) -> int:
    return _installation(args) if args.model is None else _model(args)


def _installation(args: argparse.Namespace) -> int:
    import torch

    import rbfast
    from rbfast import ops
    from rbfast.curation import text
    from rbfast.utils.packages import how_to_build

    facts: dict[str, Any] = {
        "rbfast": rbfast.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_isa": ops.cpu_isa(),
        "cpu_isa_reason": ops.cpu_isa_reason(),
        "text": text.implementation(),
        "ops": ops.implementations(),
        "gpu_ops": _gpu_ops(),
    }
    shown = {name: value for name, value in facts.items() if name not in ("ops", "gpu_ops")}
    lines = [f"{name}: {'none' if value is None else value}" for name, value in shown.items()]
    for title, key in (("on the CPU", "ops"), ("on a GPU", "gpu_ops")):
        lines += [f"{title}:"] + [f"  {name}: {implementation}" for name, implementation in facts[key].items()]
    if "reference" in (*facts["ops"].values(), facts["text"]):
        lines.append(f"Some of the native CPU code, which is far faster, is not built: {how_to_build()}.")
    return print_result(args, facts, "\n".join(lines))


def _gpu_ops() -> dict[str, str]:
    """The implementation of each op on this machine's GPU. The registry does not check its compute capability, because
    that would start CUDA."""
    import torch

    from rbfast import ops

    kinds = ops.implementations("cuda")
    if not torch.cuda.is_available() or not ops.is_old_gpu(torch.device("cuda")):
        return kinds
    found = "this GPU is sm_{}{}".format(*torch.cuda.get_device_capability())

    def on_this_gpu(name: str) -> str:
        if kinds[name] == "CUDA C++":
            return f"none (the CUDA C++ needs sm_80, {found}: {_USE_TRITON})"
        if name not in ops.ON_TENSOR_CORES or not kinds[name].startswith("triton"):
            return kinds[name]
        one = name.removeprefix("grouped_")  # plain torch calls this op for each expert
        return f"reference (the Triton kernel needs sm_80, {found})" if one == name else on_this_gpu(one)

    return {name: on_this_gpu(name) for name in kinds}


def _model(args: argparse.Namespace) -> int:
    from rbfast.adapter.footprint import outline
    from rbfast.models.student import load_without_weights

    plan = outline(load_without_weights(args.model))
    footprint = plan.footprint
    facts = {
        "model": args.model,
        "parameters": plan.parameters,
        "weight_bytes": {"bfloat16": 2 * plan.parameters, "float32": 4 * plan.parameters},
        "matrices": plan.matrices,
        "support": plan.support,
        "rank": plan.rank,
        "trained_values": plan.values,
        "kept_bytes": footprint.kept,
        "value_bytes": footprint.values,
        "adamw_bytes": footprint.adamw,
        "share_of_base": footprint.share,
    }
    narrowest, widest = plan.support
    columns = f"{narrowest}" if narrowest == widest else f"{narrowest} to {widest}"
    lines = [
        f"{args.model}: {plan.parameters:,} parameters, "
        f"{2 * plan.parameters / 1e9:.2f} GB in bfloat16, {4 * plan.parameters / 1e9:.2f} GB in float32",
        f"adapter by default: rank {plan.rank} on {columns} columns of {plan.matrices} matrices, "
        f"{plan.values:,} trained values ({plan.values / plan.parameters:.3%})",
        f"its memory, in bfloat16: {footprint}",
    ]
    return print_result(args, facts, "\n".join(lines))


def _add_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", nargs="?", help="show the adapter and the memory of this model, without loading it")


INFO = Command(
    name="info",
    summary="Show which implementation of each op is active, or the size of an adapter of a model.",
    example="rbfast info smollm2-135m",
    add_arguments=_add_arguments,
    run=run_info,
)
