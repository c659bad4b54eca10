"""Real inputs for the tests: in the folder named by RBFAST_DATA, or else in `../shared/data` beside the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("RBFAST_DATA", ROOT.parent / "shared" / "data"))


def data_path(name: str) -> Path:
    """The path of a real input. Without the folder the test is skipped; with it, a missing file is a failure."""
    if not DATA.is_dir():
        pytest.skip(f"real inputs are absent (set RBFAST_DATA to the folder that holds {name})")
    path = DATA / name
    assert path.exists(), f"{path} is missing from the folder of real inputs"
    return path
