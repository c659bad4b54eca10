"""docs/training.md and the pages that it names explain what `rbfast distill` can be told."""

import argparse
import re
from pathlib import Path

from rbfast.cli.main import _parser

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "training.md"
EVERY_COMMANDS = {"--help", "--json", "--seed", "--out"}


def options() -> set[str]:
    [commands] = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    named = {name for action in commands.choices["distill"]._actions for name in action.option_strings}
    return {name for name in named if name.startswith("--")} - EVERY_COMMANDS


def test_every_option_is_explained_and_no_other_is_named():
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.read_text(encoding="utf-8")))
    assert named == options()


def test_what_it_leaves_to_other_pages_is_there():
    for page in re.findall(r"\(([a-z_]+\.md)", PAGE.read_text(encoding="utf-8")):
        assert (ROOT / "docs" / page).is_file(), page
