"""A pretend accelerator: tensors in host memory and ops that fall back to the CPU, but on a separate device.

    from pretend_device import install
    device = install()                      # torch.device("pretend", 0); compiles pretend.cpp into build/ once, 40 s
    model.to(device)                        # from here on mixing its tensors with the CPU's raises, as on a GPU

It does not test speed, streams or kernels: our ops run their CPU kernels. It stays until the process ends.
"""

import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
import types
from hashlib import blake2b
from pathlib import Path

import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

NAME = "pretend_device_native"
SOURCE = Path(__file__).with_name("pretend.cpp")
BUILD = Path(__file__).parents[3] / "build" / "pretend_device"


@functools.cache
def install() -> torch.device:
    """Registers the device "pretend" in torch."""
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(_built()))
    extension = importlib.util.module_from_spec(importlib.util.spec_from_loader(NAME, loader))
    loader.exec_module(extension)
    torch.utils.rename_privateuse1_backend("pretend")
    extension.install()
    torch._register_device_module("pretend", _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    return torch.device("pretend", 0)


def _built() -> Path:
    """The library, compiled for this torch and Python. A build that is killed does not block later ones."""
    named = b"%b %b %b" % (SOURCE.read_bytes(), torch.__version__.encode(), sysconfig.get_config_var("SOABI").encode())
    library = BUILD / f"{blake2b(named, digest_size=8).hexdigest()}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        folders = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
        flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-DTORCH_EXTENSION_NAME={NAME}"]
        libraries = [f"-L{TORCH_LIB_PATH}", "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
        subprocess.run(["c++", *flags, *folders, str(SOURCE), *libraries, "-o", str(unfinished)], check=True)
        unfinished.replace(library)
    return library


def _module() -> types.ModuleType:
    """The functions that torch expects in `torch.pretend`."""
    module = types.ModuleType("torch.pretend")
    module.is_available = lambda: True
    module.current_device = lambda: 0
    module.device_count = lambda: 2
    module.device = contextlib.nullcontext
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module
