"""Imports of optional packages, with advice if one of them, or rbfast's own compiled code, is missing."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parents[2]  # of the package


def how_to_build() -> str:
    """What to do if rbfast's compiled code is missing, as text for a message."""
    if (_ROOT / "setup.py").is_file():
        return (
            f"rbfast was imported from its sources in {_ROOT}: run in another folder to use an installed rbfast, or "
            "build it there by `pip install -e .` with a C++ compiler on the PATH"
        )
    return "reinstall with a C++ compiler on the PATH"


def import_optional(module: str, purpose: str, install: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        purpose: what needs it, as a plural subject: "problems of generated tasks".
        install: the argument of `pip install`.

    Raises:
        ImportError: the package is missing, or installed but cannot be imported; the message says which, and why.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except Exception as error:  # a package may raise anything at import
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ImportError(f"{purpose} need the package {package}: pip install {install}") from None
        raise ImportError(
            f"{purpose} need the package {package}, which is installed but cannot be imported: {error_line(error)}"
        ) from error


def error_line(error: Exception) -> str:
    """An error's type and message on one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
