"""Files that are in a local folder or in a repository of the Hugging Face hub.

local_copy("owner/name", ["adapter_config.json", "adapter_model.safetensors"])
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options | {"disable": True})

    try:
        with _only_errors():
            return Path(snapshot_download(str(name), allow_patterns=list(files), tqdm_class=NoBar))
    except HFValidationError:  # a name such as runs/a--b
        return Path(name)
    except OSError:
        raise
    except Exception as error:  # of the HTTP client: a proxy that fails, a reply that breaks off
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _only_errors() -> Iterator[None]:
    """Silences the hub's warnings: it warns if a repository has none of the files, and most have no prompt.json."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
