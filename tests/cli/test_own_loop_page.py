"""docs/own_loop.md: its Python, and its regexes for layer names."""

import re
from pathlib import Path

from tiny_runs import TOKENIZER, student

from rbfast.models.linears import select_linears

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own_loop.md").read_text(encoding="utf-8")


def test_python_of_the_page_runs(tmp_path, monkeypatch):
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.setattr("rbfast.models.student.load_student", lambda name: (student(), TOKENIZER))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block.replace("0.0012", "0.2"), names)  # a density for a tiny model
    assert all(line.score is not None for line in names["adapter"].summary())
    assert Path("scores.safetensors").is_file()


def test_regexes_of_the_page_select_only_attention():
    regexes = re.findall(r'targets=r"(.*?)"', PAGE)
    chosen = [set(select_linears(student(), regex)) for regex in regexes]
    assert len(regexes) == 2 and chosen[0] == chosen[1]
    assert len(chosen[0]) == 8 and all(".self_attn." in name for name in chosen[0])
