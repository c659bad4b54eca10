"""The real student in float32, converted once: its GGUF file takes twenty seconds to read, its folder one second."""

from importlib.metadata import version

import pytest
from locks import locked
from real_inputs import ROOT


def student_folder() -> str:
    """The folder in build/student, which the first run on a machine creates. Skips if the student is not installed."""
    import torch

    from rbfast.models.gguf_files import gguf_path
    from rbfast.models.student import SMOLLM2, load_student

    try:
        file = gguf_path(SMOLLM2)
    except ImportError as absent:
        pytest.skip(str(absent))
    cache = ROOT / "build" / "student"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"smollm2-transformers-{version('transformers')}-{file.stat().st_mtime_ns}"
    with locked(cache / "lock"):
        if not folder.is_dir():
            unfinished = cache / "unfinished"
            for part in load_student(SMOLLM2, torch.float32):
                part.save_pretrained(unfinished)
            unfinished.rename(folder)
    return str(folder)
