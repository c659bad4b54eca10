"""Every causal language model of transformers, as small as its config allows."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = sorted({name: kind for kind, name in reversed(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())}.values())
VOCABULARY = 61
_LARGEST = 4_000_000  # parameters

_SIZES = {
    32: "hidden_size d_model n_embd dim embedding_size emb_dim hidden_dim q_lora_rank kv_lora_rank lru_width "
    "attention_hidden_size",
    48: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "shared_intermediate_size",
    24: "dff moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks num_key_value_heads "
    "num_global_key_value_heads num_experts_per_tok moe_topk moe_k num_experts_per_token linear_num_key_heads "
    "linear_num_value_heads swa_num_key_value_heads",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts index_n_heads mamba_n_heads swa_num_attention_heads",
    8: "head_dim global_head_dim qk_nope_head_dim v_head_dim attention_head_dim kv_channels qk_rope_head_dim "
    "index_head_dim rotary_dim hidden_size_per_layer_input laurel_rank time_step_rank d_state state_size "
    "mamba_d_state linear_key_head_dim linear_value_head_dim swa_head_dim",
    16: "mamba_d_head",
    64: "max_position_embeddings n_positions n_ctx max_seq_len index_topk sliding_window attention_window_size "
    "attention_chunk_size",
    1: "n_group topk_group first_k_dense_replace n_shared_experts moe_layer_start_index",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_SMALL |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_SMALL |= dict.fromkeys(("initializer_range", "init_std"), 0.15)  # large enough for every part to matter


_HEADS, _PAIR = dict(head_dim=8), ["conv", "full_attention"]
# What a config needs, besides sizes, to be consistent.
_OWN = {
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "ministral": _HEADS,
    "nemotron": dict(num_key_value_heads=2),
    "lfm2_moe": dict(layer_types=_PAIR),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16),
    "deepseek_v2": dict(num_experts_per_tok=2, n_routed_experts=4),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "roc_bert": dict(enable_pronunciation=False, enable_shape=False),
    "rembert": dict(input_embedding_size=32, output_embedding_size=32),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "dots3_note_text": dict(num_key_value_heads=4),
}


def tiny(model_type: str):
    """The same random model every time.

    Raises RuntimeError if the model stays large, and what transformers raises for an inconsistent config.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if count > _LARGEST:
        raise RuntimeError(f"stays large: {count:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()


def tiny_config(model_type: str):
    plain = AutoConfig.for_model(model_type)
    config = AutoConfig.for_model(model_type, **_shrunk(plain) | _OWN.get(model_type, {}))
    text = config.get_text_config()
    for name in ("is_decoder", "add_cross_attention"):
        if hasattr(text, name):
            setattr(text, name, name == "is_decoder")
    return config


def _shrunk(config) -> dict:
    """The arguments of a smaller config, nested ones included."""
    found = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found[name] = value.to_dict() | _shrunk(value)
        elif name in _SMALL and isinstance(value, float):
            found[name] = _SMALL[name]
        elif name in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            found[name] = min(value, _SMALL[name])
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types") and isinstance(value, list):
            found[name] = [*dict.fromkeys(value), *value][:2]
    if "kv_lora_rank" in found and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]  # of latent attention
    return found
