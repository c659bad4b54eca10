"""Small random models for the tests, and adapters on them."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rbfast.adapter import SparseAdapter

VOCABULARY = 61


def llama(dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    config = dict(vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2)
    config |= dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(LlamaConfig(**config | overrides)).to(dtype)


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config).to(dtype)


MODELS = {"llama": llama, "gpt2": gpt2}


def batch(rows=2, tokens=11, seed=0):
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def attach(model, **options):
    return SparseAdapter.attach(model, **{"density": 0.1, "placement": "random"} | options)


def disturb(adapter, size=0.1, seed=1):
    """Gives every parameter a value that is not its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    adapter.fold()
