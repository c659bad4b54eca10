"""A Llama and its LoRA as GGUF files, like those of llama.cpp's converters, which no package ships."""

import json

import gguf
import torch
from safetensors.torch import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = 128  # byte tokens: ASCII only, because llama.cpp holds back incomplete characters
VOCABULARY = len(SPECIAL) + _BYTES


def write_llama(model, path) -> None:
    """The model in fp32, with a vocabulary of bytes."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(_BYTES))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * _BYTES])  # unknown, control, bytes
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_name(name), _rows(name, tensor, config).numpy())
    _write(writer)


def write_lora(folder, config, path) -> None:
    """The LoRA that export_lora wrote into `folder`."""
    header = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(header["lora_alpha"]))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        rows = _rows(module, tensor, config) if part == "lora_B" else tensor
        writer.add_tensor(f"{_name(module + '.weight')}.{part.lower()}", rows.numpy())
    _write(writer)


def _name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in _OUTER:
        return f"{_OUTER[module]}.weight"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[inner]}.weight"


def _rows(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """Reorders the rows of queries and keys for llama.cpp's rotary embedding, which pairs neighbours, not halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[key] for key in heads if key in name), None)
    tensor = tensor.detach().float()
    if count is not None:
        tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    return tensor.contiguous()


def _write(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
