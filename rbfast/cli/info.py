"""`rbfast info`: which implementations this installation has."""

import argparse
from typing import Any

from rbfast.cli.common import Command, print_result


def run_info(args: argparse.Namespace) -> int:
    import torch

    import rbfast
    from rbfast import ops
    from rbfast.curation import text

    facts: dict[str, Any] = {
        "rbfast": rbfast.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_isa": ops.cpu_isa(),
        "text": text.implementation(),
        "ops": ops.implementations(),
        "gpu_ops": ops.implementations("cuda"),
    }
    lines = [f"{name}: {value}" for name, value in facts.items() if name not in ("ops", "gpu_ops")]
    for title, key in (("on the CPU", "ops"), ("on a GPU", "gpu_ops")):
        lines += [f"{title}:"] + [f"  {name}: {implementation}" for name, implementation in facts[key].items()]
    if facts["cpu_isa"] is None or facts["text"] == "reference":
        lines.append("The native CPU code is not all built: reinstall with a C++ compiler on the PATH for full speed.")
    return print_result(args, facts, "\n".join(lines))


INFO = Command(
    name="info",
    summary="Say which implementation of each op is active, on which machine.",
    example="rbfast info",
    add_arguments=lambda sub: None,
    run=run_info,
)
