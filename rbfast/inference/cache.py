"""The key-value cache of a batch: `generate` extends it, and rows that have ended are dropped from it."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rbfast.models.student import evaluation_mode

_SHORT, _LONG = 8, 16  # tokens of the two texts whose cache is measured


class _PreallocatedLayer(DynamicLayer):
    """A cache layer with preallocated room.

    `DynamicLayer` copies the whole cache at every token. On a CPU that costs more than the model's matrix products. The
    room grows by a share: torch keeps the memory that a GPU has freed, and a block of every 64 tokens would add up to
    many times the cache.
    """

    keys: torch.Tensor
    values: torch.Tensor
    room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        if self.room is None or total > self.room[0].shape[-2]:
            grown = []
            for past, new in ((self.keys, key_states), (self.values, value_states)):
                grown.append(new.new_empty(*new.shape[:2], total + max(64, total // 4), new.shape[-1]))
                if length:
                    grown[-1][:, :, :length] = past
            self.room = grown[0], grown[1]
        self.room[0][:, :, length:total] = key_states
        self.room[1][:, :, length:total] = value_states
        self.keys, self.values = self.room[0][:, :, :total], self.room[1][:, :, :total]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.room = None


def new_cache(model: PreTrainedModel) -> Cache | None:
    """The model's own kind of cache, with preallocated room if every layer keeps all its tokens.

    None if a layer is recurrent (Mamba, linear attention): its state cannot drop rows or forget tokens.
    """
    cache = DynamicCache(config=model.config)
    if any(hasattr(layer, "conv_states") for layer in cache.layers):
        return None
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        return Cache(layer_class_to_replicate=_PreallocatedLayer)
    return cache


def keep_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Keep these rows [kept] of a cache, like `batch_select_indices`. Its layers may be on several devices."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.batch_select_indices(rows if layer.keys is None else rows.to(layer.keys.device))


def cache_bytes(model: PreTrainedModel, texts: int, tokens: int) -> int:
    """The memory of the cache of so many texts of `tokens` tokens each, extrapolated from two short texts."""
    total = 0
    for short, long in zip(_layers_after(model, _SHORT), _layers_after(model, _LONG), strict=True):
        kept = min(tokens, getattr(long, "sliding_window", None) or tokens)
        per_token = (_bytes_of(long) - _bytes_of(short)) / (_LONG - _SHORT)
        total += round(_bytes_of(long) + per_token * (kept - _LONG))
    return texts * total


@torch.no_grad()
def _layers_after(model: PreTrainedModel, tokens: int) -> list[Any]:
    """The layers of the cache after a text of this length; none if the model has another kind of cache."""
    ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    with evaluation_mode(model):
        output = model(ids, use_cache=True)
    caches = [value for value in output.values() if isinstance(value, Cache)]
    return list(caches[0].layers) if caches else []


def _bytes_of(layer: Any) -> int:
    return sum(x.numel() * x.element_size() for x in _tensors(vars(layer)))


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for part in held.values() if isinstance(held, dict) else held:
            yield from _tensors(part)
