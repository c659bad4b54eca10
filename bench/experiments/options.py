"""The fields of an experiment's settings as options of its command line."""

import argparse
from dataclasses import fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds an option for each field of a dataclass, with its default. The field's `metadata["help"]` is the help."""
    for option in fields(kind):
        default: Any = option.default
        many, flag = isinstance(default, tuple), "--" + option.name.replace("_", "-")
        shown = " ".join(map(str, default)) if many else default
        text = f"{option.metadata.get('help', '')} (default: {shown})".strip()
        value = type(default[0] if many else default)
        parser.add_argument(flag, type=value, default=default, nargs="+" if many else None, help=text)


def read_options(args: argparse.Namespace, kind: type[Settings]) -> Settings:
    """Returns the dataclass with the values of the options that `add_options` added."""
    given = {option.name: getattr(args, option.name) for option in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
