"""Small random models for the tests, one per family of architectures, and adapters on them."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rbfast.adapter.sparse_adapter import SparseAdapter

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
_SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
_SIZES |= dict(max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None)
_SIZES |= dict(initializer_range=0.15)  # large enough for softcaps, windows and routers to matter
_DENSE = dict(intermediate_size=40, num_key_value_heads=2)
_GPT2 = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=4)
_EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
# By family: the model type, and its config besides the sizes above. Windows are shorter than the examples.
FAMILIES = {
    "llama": ("llama", _DENSE),
    "llama-tied": ("llama", _DENSE | dict(tie_word_embeddings=True)),
    "qwen2": ("qwen2", _DENSE | dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", _DENSE | dict(head_dim=12)),
    "mistral": ("mistral", _DENSE | dict(sliding_window=6)),
    "gemma2": (
        "gemma2",
        _DENSE
        | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=6)
        | dict(final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    ),
    "gemma3": (
        "gemma3_text",
        _DENSE
        | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=6, final_logit_softcapping=3.0)
        | dict(layer_types=["sliding_attention", "full_attention"]),
    ),
    "phi": ("phi", _DENSE),
    "phi3": ("phi3", _DENSE),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-untied": ("gpt2", _GPT2 | dict(tie_word_embeddings=False)),
    "gpt-neox": ("gpt_neox", dict(intermediate_size=40)),
    "falcon": ("falcon", dict(ffn_hidden_size=40)),
    "falcon-alibi": ("falcon", dict(ffn_hidden_size=40, alibi=True, multi_query=False)),
    "olmo2": ("olmo2", _DENSE),
    "granite": ("granite", _DENSE | dict(logits_scaling=4.0, embedding_multiplier=3.0)),
    "cohere": ("cohere", _DENSE | dict(logit_scale=0.5)),
    "mixtral": ("mixtral", _DENSE | _EXPERTS),
    "qwen2-moe": (
        "qwen2_moe",
        _DENSE
        | _EXPERTS
        | dict(shared_expert_intermediate_size=24, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
    "qwen3-moe": ("qwen3_moe", _DENSE | _EXPERTS | dict(head_dim=12)),
    "gpt-oss": ("gpt_oss", _DENSE | _EXPERTS | dict(head_dim=8, sliding_window=6)),
    "falcon-h1": ("falcon_h1", _DENSE | _MAMBA2 | dict(mamba_d_ssm=64, lm_head_multiplier=0.3)),
    "bamba": ("bamba", _DENSE | _MAMBA2 | dict(attn_layer_indices=[1])),
    "jamba": (
        "jamba",
        _DENSE | _EXPERTS | dict(mamba_d_state=8, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1),
    ),
    "lfm2": (
        "lfm2",
        _DENSE | dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    ),
}


def family(name, dtype=torch.float32, **overrides):
    """A model of FAMILIES, with the same weights every time."""
    model_type, config = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **_SIZES | config | overrides))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # zeros would hide a forgotten bias
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def vision_model(model_type="gemma3"):
    """A model with a vision tower beside its text model: Gemma 3 from 4B on, Mistral 3, Qwen2.5-VL."""
    text = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, head_dim=8, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    vision = dict(hidden_size=32, intermediate_size=48)
    if model_type == "qwen2_5_vl":
        text |= dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4))
        vision |= dict(depth=2, num_heads=4, out_hidden_size=32)
    else:
        text |= dict(model_type="mistral") if model_type == "mistral3" else {}
        vision |= dict(num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


def batch(rows=2, tokens=11, seed=0):
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def attach(model, **options):
    return SparseAdapter.attach(model, **{"density": 0.1, "placement": "random"} | options)


def disturb(adapter, size=0.1, seed=1):
    """Moves every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    adapter.fold()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def train(model, adapter, steps=3, optimizer=None):
    """Takes steps on two alternating batches; returns the losses."""
    optimizer = optimizer or torch.optim.AdamW(adapter.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        loss = model(**batch(seed=step % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def losses_of_steps(adapter, loss_of, steps=4):
    """The loss before each of some training steps."""
    optimizer, losses = torch.optim.AdamW(adapter.parameters(), lr=0.03), []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
