"""Files that are in a local folder or in a repository of the Hugging Face hub.

local_copy("owner/name", ["adapter_config.json", "adapter_model.safetensors"])
"""

import re
from collections.abc import Sequence
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local_copy(name: str | Path, files: Sequence[str]) -> Path:
    """The folder `name`; if there is none and the name is a hub id (owner/name), a local folder with the `files` that
    the repository has, downloaded if necessary.

    Raises OSError if the hub returns no such repository.
    """
    if Path(name).exists() or not _HUB_ID.fullmatch(str(name)):
        return Path(name)
    from huggingface_hub import snapshot_download  # here, because it takes 0.3 s

    return Path(snapshot_download(str(name), allow_patterns=list(files)))
