"""The demo's line at a toy size: what it writes, and that it goes on where it stopped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rbfast import demo


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    def load(name: str, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
        )
        return LlamaForCausalLM(config).to(dtype), tokenizer

    monkeypatch.setattr(demo, "load_student", load)
    monkeypatch.setattr(demo, "TRAIN", 4)
    monkeypatch.setattr(demo, "HELD_OUT", 2)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 4)


@pytest.mark.usefixtures("toy")
def test_the_demo_writes_its_table_and_pictures_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = demo.run_demo(tmp_path, quiet=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert 0 < summary["trainable_percent"] <= 0.3
    assert summary["families"].keys() == set(demo.FAMILIES)
    assert len(demo.FAMILIES) >= 5
    for row in [*summary["families"].values(), summary["mean"]]:
        assert {"before", "after", "gain", "ci_low", "ci_high", "n"} <= row.keys()
        assert row["ci_low"] <= row["after"] - row["before"] <= row["ci_high"]
    assert summary["mean"]["n"] == 2 * len(demo.FAMILIES)
    assert "Report of " in (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("losses.png", "placement.png", "accuracy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter_model.safetensors").exists()

    monkeypatch.setattr(demo, "evaluate", lambda *_, **__: pytest.fail("a finished evaluation was made again"))
    again = demo.run_demo(tmp_path, quiet=True)
    assert again["families"] == summary["families"]


@pytest.mark.usefixtures("toy")
def test_another_configuration_does_not_reuse_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.run_demo(tmp_path, quiet=True)
    monkeypatch.setattr(demo, "CONFIG", replace(demo.CONFIG, epochs=2.0))
    with pytest.raises(ValueError, match="holds another run"):
        demo.run_demo(tmp_path, quiet=True)
