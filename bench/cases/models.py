"""Frozen models with random weights, for the cases on a GPU, created on their device."""

from typing import Any

import torch
from registry import Place
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3MoeConfig

# Qwen2.5: hidden size, intermediate size, layers, heads, key-value heads, vocabulary, tied embeddings
SIZES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "toy": (64, 160, 2, 4, 2, 512, True),
}


def qwen(name: str, place: Place, **overrides: Any) -> PreTrainedModel:
    hidden, intermediate, layers, heads, kv_heads, vocabulary, is_tied = SIZES["toy" if place.is_toy else name]
    config = dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=is_tied,
    )
    return _made(Qwen2Config(**config | overrides), place)


def mixture(place: Place) -> PreTrainedModel:
    """On a GPU two layers of Qwen3-30B-A3B, on a CPU two of half its width and a quarter of its experts."""
    is_large = place.device == "cuda" and not place.is_toy
    width = 2048 if is_large else place.size(1024, 64)
    config = Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=3 * width // 8,
        num_experts=128 if is_large else place.size(32, 4),
        num_experts_per_tok=8 if is_large else place.size(4, 2),
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        num_key_value_heads=place.size(4, 1),
        head_dim=place.size(128, 64),
        vocab_size=512,
    )
    return _made(config, place)


def _made(config: PreTrainedConfig, place: Place) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(place.device):
        model = AutoModelForCausalLM.from_config(config, dtype=place.dtype)
    return model.requires_grad_(False).eval()


def lora(model: PreTrainedModel, rank: int) -> list[torch.nn.Parameter]:
    """Adds PEFT's LoRA to every linear but the head, and to stacked experts; returns its parameters. Raises ImportError
    without PEFT."""
    from peft import LoraConfig, inject_adapter_in_model

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    has_stacks = any(name.endswith(stacks[0]) for name, _ in model.named_parameters())
    config = LoraConfig(r=rank, target_modules=linears, target_parameters=stacks if has_stacks else None)
    inject_adapter_in_model(config, model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:  # fp32 masters, as from get_peft_model
        parameter.data = parameter.data.float()
    return parameters
