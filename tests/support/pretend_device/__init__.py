"""A pretend accelerator: its tensors live in host memory and every op falls back to the CPU, but it is another device.

    from pretend_device import install
    device = install()                      # torch.device("pretend", 0); compiles pretend.cpp into build/ once, 40 s
    model.to(device)                        # from here on mixing its tensors with the CPU's raises, as on a GPU

It shows nothing of speed, streams or kernels: an op of ours runs its CPU kernel. It stays until the process ends.
"""

import contextlib
import functools
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

SOURCE = Path(__file__).with_name("pretend.cpp")
BUILD = Path(__file__).parents[3] / "build" / "pretend_device"


@functools.cache
def install() -> torch.device:
    """Makes torch know the device "pretend"."""
    BUILD.mkdir(parents=True, exist_ok=True)
    extension = load("pretend_device_native", [str(SOURCE)], extra_cflags=["-O0"], build_directory=str(BUILD))
    torch.utils.rename_privateuse1_backend("pretend")
    extension.install()
    torch._register_device_module("pretend", _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    return torch.device("pretend", 0)


def _module() -> types.ModuleType:
    """What torch asks of `torch.pretend`."""
    module = types.ModuleType("torch.pretend")
    module.is_available = lambda: True
    module.current_device = lambda: 0
    module.device_count = lambda: 1
    module.device = contextlib.nullcontext
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module
