"""Every causal language model of transformers that can be built tiny: attach, train, save, load, merge."""

import re

import pytest
import torch
from every_causal_lm import MODEL_TYPES, VOCABULARY, tiny
from tiny_models import losses_of_steps

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.loss.distill_loss import DistillLoss
from rbfast.models.student import final_hidden, head_of

pytestmark = pytest.mark.filterwarnings("ignore")  # about experts, examples run alone, and those of transformers

# Text halves of larger models, a router that returns a tuple, attention output that is viewed as a matrix, caps and
# scales of the logits under other names, an attention mask of the model's own.
UNUSUAL = ["llama4", "mllama", "phimoe", "afmoe", "jetmoe", "recurrent_gemma", "inkling_text", "doge"]

_HEAD = "does more to its logits than a bias, a scale and a softcap named in its config"
_LAYERS = "`per_layer_config` keys must be integer layer indices"
_CONFIGS = "Multiple valid text configs were found in the model config"

# Model types that fail, and the error. First those that rbfast refuses, as their head has several layers. Then those
# that cannot be built tiny from their config alone or do not run by themselves, which says nothing about rbfast.
FAILING = {
    "bert": _HEAD,
    "big_bird": _HEAD,
    "camembert": _HEAD,
    "data2vec-text": _HEAD,
    "electra": _HEAD,
    "ernie": _HEAD,
    "megatron-bert": _HEAD,
    "modernbert-decoder": _HEAD,
    "prophetnet": _HEAD,
    "rembert": _HEAD,
    "roberta": _HEAD,
    "roberta-prelayernorm": _HEAD,
    "roformer": _HEAD,
    "xlm-roberta": _HEAD,
    "xlm-roberta-xl": _HEAD,
    "bailing_hybrid": "is invalid for input of size",
    "blt": "stays large",
    "cohere_compass_text": "full_attention",
    "dbrx": "no attribute 'rope_theta'",
    "dots1": "empty() takes 1 positional argument",
    "dots3_note": _LAYERS,
    "gemma3n": "must have an explicit intermediate size for every layer",
    "gemma4": _LAYERS,
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",
    "gemma4_unified": _LAYERS,
    "gemma4_unified_assistant": _LAYERS,
    "musicgen": _CONFIGS,
    "musicgen_melody": _CONFIGS,
    "qwen4_exp": "unsupported operand type(s) for //",
    "reformer": "Make sure that config.axial_pos_embds factors",
    "roc_bert": "stays large",
    "xmod": "Input language unknown",
    "zamba": "issue with your definition of `tie_weights_keys`",
    "zamba2": "must match the size of tensor b",
}

IDS = torch.arange(3, 23)[None] % VOCABULARY
POSITIONS = torch.cat([torch.arange(8), torch.arange(12)])[None]


def train(model, adapter):
    def loss_of():
        hidden, head = final_hidden(model, IDS, POSITIONS), head_of(model)
        loss_fn = DistillLoss(softcap=head.softcap, logit_scale=head.logit_scale)
        return loss_fn(hidden, head.weight, IDS[0].roll(-1), ce_weight=1.0, head_bias=head.bias).loss

    return losses_of_steps(adapter, loss_of)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def check_life_cycle(model_type, folder):
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
    model.requires_grad_(False)  # torch chooses a kernel by this flag too
    assert torch.equal(logits(model), trained)
    adapter.unmerge()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_unusual_models_attach_train_save_load_and_merge(model_type, tmp_path):
    check_life_cycle(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in UNUSUAL])
def test_other_models_attach_train_save_load_and_merge(model_type, tmp_path):
    if model_type not in FAILING:
        check_life_cycle(model_type, tmp_path)
        return
    with pytest.raises(Exception, match=re.escape(FAILING[model_type])):
        check_life_cycle(model_type, tmp_path)


def test_every_model_listed_as_failing_exists():
    """A newer transformers may have dropped a model."""
    pytest.importorskip("transformers", minversion="5.23")  # an older one lacks the newest models
    assert [name for name in FAILING if name not in MODEL_TYPES] == []
