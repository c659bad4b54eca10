"""A cache of the Hugging Face hub with given repositories, on a machine without a connection."""

import shutil
from pathlib import Path

import pytest


def use_hub_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Makes `cache` the hub's cache, and forbids requests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def add_repository(cache: Path, name: str, files: Path) -> None:
    """Adds the repository `name` (owner/name) with the files of a folder to a cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0a1b2c")
    shutil.copytree(files, repository / "snapshots/0a1b2c")
