"""Attention over a packed row, one example at a time, for models that use PyTorch's scaled_dot_product_attention.

Packing eight examples behind one mask makes attention compute all T x T scores and throw seven eighths away; on a CPU
that is half of a training step. Given the borders of the examples, each is attended to by itself. Without them this is
what transformers calls "sdpa", so a model may keep it for good.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rbfast_packed"


def borders(position_ids: Tensor) -> list[int]:
    """Where examples begin in a packed row [1, T], then T: positions restart at 0."""
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    return [*starts, position_ids.shape[1]]


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switches a model from "sdpa" to this module, where its attention can be exchanged; others pack by their mask."""
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and model._supports_attention_backend:
        config._attn_implementation = NAME


def drop_packed_attention(model: PreTrainedModel) -> None:
    """Undoes `use_packed_attention`."""
    if has_packed_attention(model):
        model.config.get_text_config()._attn_implementation = "sdpa"


def has_packed_attention(model: PreTrainedModel) -> bool:
    return model.config.get_text_config()._attn_implementation == NAME


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    example_borders: list[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, d], key and value [1, kv heads, T, d] -> [1, T, heads, d], by transformers' convention."""
    longest = max((b - a for a, b in _pairs(example_borders)), default=0)
    window = _window(module, kwargs)
    if not longest or (window is not None and longest > window):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    parts = [
        scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for a, b in _pairs(example_borders)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """How far a token may see. Some models (Qwen2-MoE, Llama 4) only put it into the mask: then the config tells."""
    if "sliding_window" in kwargs:
        return kwargs["sliding_window"]
    config = getattr(module, "config", None)
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)


def _pairs(cuts: list[int] | None) -> list[tuple[int, int]]:
    return list(pairwise(cuts)) if cuts else []


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
