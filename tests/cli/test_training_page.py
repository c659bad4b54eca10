"""docs/training.md explains the options of `rbfast distill`, and its Python runs."""

import argparse
import re
from functools import partial
from pathlib import Path

from tiny_runs import TOKENIZER, TRACES, student

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.cli.main import _parser
from rbfast.data.readers import write_traces

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "training.md"
SHARED = {"--help", "--json", "--seed", "--out"}


def options() -> set[str]:
    [commands] = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    named = {name for action in commands.choices["distill"]._actions for name in action.option_strings}
    return {name for name in named if name.startswith("--")} - SHARED


def test_page_names_exactly_the_options_of_distill():
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.read_text(encoding="utf-8")))
    assert named == options()


def test_linked_pages_exist():
    for page in re.findall(r"\(([a-z_]+\.md)", PAGE.read_text(encoding="utf-8")):
        assert (ROOT / "docs" / page).is_file(), page


def test_python_of_the_page_runs(tmp_path, monkeypatch):
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setattr("rbfast.models.student.load_student", lambda name: (student(), TOKENIZER))
    monkeypatch.setattr(
        SparseAdapter, "attach", partial(SparseAdapter.attach, density=0.2)
    )  # a density for a tiny model
    monkeypatch.chdir(tmp_path)
    write_traces(tmp_path / "pool.jsonl", TRACES * 3)
    names: dict = {}
    exec(block.replace("=20", "=2"), names)
    history = names["trainer"].state.log_history
    assert any("eval_loss_strategic" in entry for entry in history) and any("loss_strategic" in e for e in history)
    assert SparseAdapter.from_pretrained(student(), tmp_path / "runs" / "own" / "best").sites()
