"""The demo at a toy size: the files it writes, resuming, and several seeds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import tiny_model_for
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from rbfast.demo import run


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    def load(name: str, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
        return tiny_model_for(tokenizer).to(dtype), tokenizer

    monkeypatch.setattr(run, "load_student", load)
    monkeypatch.setattr(run, "TRAIN", 4)
    monkeypatch.setattr(run, "HELD_OUT", 2)
    monkeypatch.setattr(run, "MAX_NEW_TOKENS", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_demo_writes_its_table_and_pictures_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run.run_demo(tmp_path, quiet=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert 0 < summary["trainable_percent"] <= 0.3
    assert summary["families"].keys() == set(run.FAMILIES)
    assert len(run.FAMILIES) >= 5
    for row in [*summary["families"].values(), summary["mean"]]:
        assert {"before", "after", "gain", "ci_low", "ci_high", "n"} <= row.keys()
        assert row["ci_low"] <= row["after"] - row["before"] <= row["ci_high"]
    assert summary["mean"]["n"] == 2 * len(run.FAMILIES)
    assert "Report of " in (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("losses.png", "placement.png", "accuracy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter_model.safetensors").exists()

    monkeypatch.setattr(run, "evaluate", lambda *_, **__: pytest.fail("a finished evaluation ran again"))
    again = run.run_demo(tmp_path, quiet=True)
    assert again["families"] == summary["families"]


@pytest.mark.usefixtures("toy")
def test_invalid_seed_is_refused_before_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: pytest.fail("evaluated before the seed was checked"))
    with pytest.raises(ValueError, match="seed must be at least 0"):
        run.run_demo(tmp_path, seed=-1, quiet=True)


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_several_seeds_are_pooled_in_one_table(tmp_path: Path) -> None:
    summary = run.run_seeds(tmp_path, range(3, 5), quiet=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    alone = [json.loads((tmp_path / f"seed{seed}" / "summary.json").read_text()) for seed in (3, 4)]
    assert summary["seeds"] == [3, 4] and summary["gains"] == [one["mean"]["gain"] for one in alone]
    assert summary["mean"]["n"] == sum(one["mean"]["n"] for one in alone)
    assert summary["mean"]["gain"] == pytest.approx(sum(summary["gains"]) / 2)
    assert {name: row["n"] for name, row in summary["families"].items()} == dict.fromkeys(run.FAMILIES, 4)
    settings = [json.loads((tmp_path / f"seed{seed}" / "run.json").read_text()) for seed in (3, 4)]
    assert settings[0] != settings[1]
    assert "Report of " in (tmp_path / "report.html").read_text(encoding="utf-8")
    run.print_summary(summary, Console())


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_folder_of_another_configuration_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.run_demo(tmp_path, quiet=True)
    monkeypatch.setattr(run, "CONFIG", replace(run.CONFIG, epochs=2.0))
    with pytest.raises(ValueError, match="holds another run"):
        run.run_demo(tmp_path, quiet=True)
