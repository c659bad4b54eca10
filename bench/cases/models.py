"""Models of random weights for the cases on a GPU, in bf16 and frozen, made where they run."""

from typing import Any

import torch
from registry import Place
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

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
    torch.manual_seed(0)
    with torch.device(place.device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**config | overrides), dtype=torch.bfloat16)
    return model.requires_grad_(False).eval()


def lora(model: PreTrainedModel, rank: int) -> list[torch.nn.Parameter]:
    """PEFT's LoRA put into every linear but the head; what it trains. Raises ImportError without PEFT."""
    from peft import LoraConfig, inject_adapter_in_model

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=linears), model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:  # fp32 masters, as get_peft_model has them
        parameter.data = parameter.data.float()
    return parameters
