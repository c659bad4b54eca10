"""Every causal language model of transformers that can be built tiny: attach, train, save, load, merge."""

import re

import pytest
import torch
from every_causal_lm import MODEL_TYPES, VOCABULARY, tiny

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.loss.distill_loss import DistillLoss
from rbfast.models.student import final_hidden, head_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of experts, of what runs one at a time, and transformers' own

# Text halves of larger models, a router that returns a tuple, attention that is looked at as a matrix, caps and scales
# of the logits under other names, an attention mask of the model's own.
PECULIAR = ["llama4", "mllama", "phimoe", "afmoe", "jetmoe", "recurrent_gemma", "inkling_text", "doge"]

# What cannot be built tiny from its config alone, or cannot be trained, and the error that says so.
FAILING: dict[str, str] = {}

IDS = torch.arange(3, 23)[None] % VOCABULARY
POSITIONS = torch.cat([torch.arange(8), torch.arange(12)])[None]


def train(model, adapter, steps=4):
    optimizer, losses = torch.optim.AdamW(adapter.parameters(), lr=0.03), []
    for _ in range(steps):
        hidden, head = final_hidden(model, IDS, POSITIONS), head_of(model)
        loss_fn = DistillLoss(softcap=head.softcap, logit_scale=head.logit_scale)
        loss = loss_fn(hidden, head.weight, IDS[0].roll(-1), ce_weight=1.0, head_bias=head.bias).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def life(model_type, folder):
    model = tiny(model_type)
    base = logits(model)
    adapter = SparseAdapter.attach(model, density=0.2, rank=1)
    losses = train(model, adapter)
    assert losses[-1] < losses[0]
    trained = logits(model)
    assert not torch.equal(trained, base)
    adapter.save_pretrained(folder)
    again = tiny(model_type)
    SparseAdapter.from_pretrained(again, folder)
    assert torch.equal(logits(again), trained)
    adapter.merge()
    model.requires_grad_(False)  # torch chooses a product by this flag too
    assert torch.equal(logits(model), trained)
    adapter.unmerge()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("model_type", PECULIAR)
def test_a_peculiar_one_lives_too(model_type, tmp_path):
    life(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in PECULIAR])
def test_it_attaches_trains_saves_loads_and_merges(model_type, tmp_path):
    if model_type not in FAILING:
        life(model_type, tmp_path)
        return
    with pytest.raises(Exception, match=re.escape(FAILING[model_type])):
        life(model_type, tmp_path)


def test_only_models_that_transformers_has_are_listed():
    """A newer transformers may have dropped one."""
    assert [name for name in FAILING if name not in MODEL_TYPES] == []
