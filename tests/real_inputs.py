"""Where the tests find real inputs: the folder named by RBFAST_DATA, else `../shared/data` beside the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("RBFAST_DATA", ROOT.parent / "shared" / "data"))


def data_path(name: str) -> Path:
    """The path of a real input; skips the test where it is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"real input {name} is absent (set RBFAST_DATA to the folder that holds it)")
    return path
