"""A merged checkpoint loads with transformers alone, and generates the tokens that the adapter did."""

import subprocess
import sys

import pytest
import torch
from tiny import tiny_model
from tiny_models import attach, disturb
from transformers import AutoModelForCausalLM

PROMPT = list(range(5, 17))


def generated(model):
    return model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0].tolist()


@pytest.fixture
def trained():
    model = tiny_model()
    base = generated(model)
    adapter = attach(model)
    disturb(adapter, size=1.0)
    assert generated(model) != base, "the adapter must change the tokens, or this test proves nothing"
    return model, adapter


@pytest.mark.slow
def test_merged_checkpoint_generates_the_same_tokens_without_rbfast(trained, tmp_path):
    model, adapter = trained
    expected = generated(model)
    adapter.merge()
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r});"
        f"print(model.generate(torch.tensor([{PROMPT}]), max_new_tokens=24, do_sample=False)[0].tolist());"
        "assert not any(name.startswith('rbfast') for name in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert output.stdout.splitlines()[-1] == str(expected)


def test_merged_weights_equal_the_trained_ones(trained, tmp_path):
    model, adapter = trained
    folded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter.merge()
    model.save_pretrained(tmp_path)
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, folded[name]), name
