"""Packages that only some commands need: imported at first use, with what to install if one is missing. And what to do
if this package's own compiled code is missing."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parents[2]  # of the package


def how_to_build() -> str:
    """What to do if compiled code of this package is missing."""
    if (_ROOT / "setup.py").is_file():
        return (
            f"rbfast was imported from its sources in {_ROOT}: run in another folder to use an installed rbfast, or "
            "build it there by `pip install -e .` with a C++ compiler on the PATH"
        )
    return "reinstall with a C++ compiler on the PATH"


def need(module: str, purpose: str, install: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        purpose: what needs it, as the subject of a sentence: "problems of generated tasks".
        install: what `pip install` takes.

    Raises:
        ImportError: the package is absent, or it is there and cannot be imported; the message says which, and why.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except Exception as error:  # whatever a package does as it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ImportError(f"{purpose} need the package {package}: pip install {install}") from None
        raise ImportError(
            f"{purpose} need the package {package}, which is installed but cannot be imported: {said(error)}"
        ) from error


def said(error: Exception) -> str:
    """An error's kind and words on one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
