"""Tiny random students on disk that carry a chat template of `thinking_templates`."""

from pathlib import Path

import torch
from thinking_templates import tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM


def save_student(folder: Path, template: str, *texts: str) -> Path:
    """A student with this template, whose settings name no end of turn but the base's own."""
    tokenizer = tokenizer_of(template, *texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
