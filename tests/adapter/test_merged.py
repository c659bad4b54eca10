"""A merged checkpoint is a plain one: transformers alone loads it, and it writes the tokens the adapter wrote."""

import subprocess
import sys

import pytest
import torch
from tiny import tiny_model
from tiny_models import attach, disturb
from transformers import AutoModelForCausalLM

PROMPT = list(range(5, 17))


def written(model):
    return model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0].tolist()


@pytest.fixture
def trained():
    model = tiny_model()
    base = written(model)
    adapter = attach(model)
    disturb(adapter, size=1.0)
    assert written(model) != base, "the adapter must matter for this test to mean much"
    return model, adapter


@pytest.mark.slow
def test_it_loads_without_this_library_and_writes_the_same_tokens(trained, tmp_path):
    model, adapter = trained
    expected = written(model)
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


def test_its_weights_are_the_ones_it_was_trained_with(trained, tmp_path):
    model, adapter = trained
    folded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter.merge()
    model.save_pretrained(tmp_path)
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, folded[name]), name
