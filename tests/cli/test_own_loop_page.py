"""docs/own_loop.md: its Python, and its regexes for layer names."""

import re
from pathlib import Path

import torch
from tiny_models import attach, batch, same_bits
from tiny_runs import TOKENIZER, student

from rbfast.models.linears import select_linears

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own_loop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_python_of_the_page_runs(tmp_path, monkeypatch):
    [_, _, block] = BLOCKS
    monkeypatch.setattr("rbfast.models.student.load_student", lambda name: (student(), TOKENIZER))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block.replace("0.0012", "0.2"), names)  # a density for a tiny model
    assert all(line.score is not None for line in names["adapter"].summary())
    assert Path("scores.safetensors").is_file()


def test_checkpoint_and_average_of_the_page_keep_the_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint, average, _ = BLOCKS

    def train(model, adapter, optimizer, seed):
        model(**batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: value.clone() for name, value in adapter.state_dict().items()}

    ends = []
    for _ in range(2):  # the second resumes from the first's checkpoint
        model = student()
        adapter = attach(model)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
        names = {"torch": torch, "adapter": adapter, "optimizer": optimizer}
        if not ends:
            train(model, adapter, optimizer, 0)
            exec(checkpoint, names)
        else:
            exec(checkpoint.partition("\n\n")[2], names)
        exec(average, names)
        ends.append(train(model, adapter, optimizer, 1))
    assert same_bits(*ends)


def test_regexes_of_the_page_select_only_attention():
    regexes = re.findall(r'targets=r"(.*?)"', PAGE)
    chosen = [set(select_linears(student(), regex)) for regex in regexes]
    assert len(regexes) == 2 and chosen[0] == chosen[1]
    assert len(chosen[0]) == 8 and all(".self_attn." in name for name in chosen[0])
