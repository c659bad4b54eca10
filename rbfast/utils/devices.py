"""Finding a device by name, and checking it before anything is loaded for it."""

import os

import torch


def find_device(name: str | None = None) -> torch.device:
    """The device called `name`, such as "cpu", "cuda:1" or "mps". None is a GPU if there is one, else the CPU.

    Under torchrun a name without an index is the process's own device of that type.

    Raises:
        ValueError: torch knows no device of this name, or this machine has none.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.index is None and device.type != "cpu" and "LOCAL_RANK" in os.environ:
            device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {name!r} is not available ({why}): use {' or '.join(_present())}") from None
    return device


def _present() -> list[str]:
    """The names of this machine's devices."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    names = [] if accelerator is None else [f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count())]
    return ["cpu", *names]
