"""Greedy completions of many prompts, through the model's own `generate`.

A batch shrinks while it runs: as soon as half of its rows have finished, `generate` is stopped, the finished rows leave
the batch and the key-value cache, and it goes on with the rest. A row that never stops then costs a small batch's time,
not a whole one's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from rbfast.trace import end_of_turn


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt: the text, its number of tokens, whether the limit cut it."""

    text: str
    tokens: int
    truncated: bool


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """One greedy completion per prompt, in the order of `prompts`.

    Prompts carry their own special tokens, as `format_prompt` writes them. Those of similar length share a batch,
    longest first, so that padding is short and too little memory shows at once.

    Args:
        progress: called with (prompts done, prompts in all) after each batch.

    Raises:
        ValueError: a prompt whose completion would not fit the model's positions.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
    encoded = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    _check_positions(encoded, max_new_tokens, model)
    greedy = _greedy(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]), reverse=True)
    completions: dict[int, Completion] = {}
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for row, written in zip(rows, _run(model, [encoded[i] for i in rows], greedy, max_new_tokens), strict=True):
                text = str(tokenizer.decode(written, skip_special_tokens=True))
                completions[row] = Completion(text, len(written), written[-1] not in greedy["eos_token_id"])
            if progress is not None:
                progress(len(completions), len(order))
    finally:
        model.train(training)
    return [completions[i] for i in range(len(prompts))]


def _check_positions(encoded: list[list[int]], max_new_tokens: int, model: PreTrainedModel) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, encoded), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} more were asked for, "
            f"but the model has {limit} positions: lower max_new_tokens or leave that prompt out"
        )


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Plain greedy decoding, whatever sampling the model's own settings ask for; stops at any end of turn it knows."""
    ends = model.generation_config.eos_token_id
    # What the student is trained to end with need not be among the ends that its settings name (a base model's, say).
    stops = {end_of_turn(tokenizer), *(ends if isinstance(ends, list) else [ends])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)
    return {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": sorted(stops), "pad_token_id": pad}


class _RoomyLayer(DynamicLayer):
    """A cache layer that grows into spare room.

    Its parent copies the whole cache at every token, which on a CPU costs more than the model's matrix products.
    """

    keys: torch.Tensor
    values: torch.Tensor
    spare = 64
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
                grown.append(new.new_empty(*new.shape[:2], total + self.spare, new.shape[-1]))
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


def _cache(model: PreTrainedModel) -> Cache:
    """The model's own kind of cache, with room to grow where every layer keeps all of its past."""
    cache = DynamicCache(config=model.config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        return Cache(layer_class_to_replicate=_RoomyLayer)
    return cache


class _HalfDone(StoppingCriteria):
    """Stops the whole batch once half of its rows have written an end token."""

    def __init__(self, stops: torch.Tensor):
        self.stops = stops
        self.finished: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ended = torch.isin(input_ids[:, -1], self.stops)
        self.finished = ended if self.finished is None else self.finished | ended
        return torch.full_like(self.finished, bool(2 * self.finished.sum() >= len(self.finished)))


def _run(
    model: PreTrainedModel, prompts: list[list[int]], greedy: dict[str, Any], max_new_tokens: int
) -> list[list[int]]:
    """The tokens written after each prompt, the end token included."""
    device, pad = model.device, greedy["pad_token_id"]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    stops = torch.tensor(greedy["eos_token_id"], device=device)
    written: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=device)
    cache = _cache(model)
    while len(rows) and ids.shape[1] < width + max_new_tokens:
        before = ids.shape[1]
        left = width + max_new_tokens - before
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=GenerationConfig(**greedy, max_new_tokens=left, return_dict_in_generate=True),
            stopping_criteria=StoppingCriteriaList([_HalfDone(stops)]),
        )
        ids, cache = output.sequences, output.past_key_values
        ended = torch.isin(ids[:, before:], stops)
        # A row that ended is padded to the width of the others: keep up to its first end token.
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, ids.shape[1] - before)
        for row, length, new in zip(rows.tolist(), lengths.tolist(), ids[:, before:].tolist(), strict=True):
            written[row] += new[:length]
        keep = (~ended.any(1)).nonzero()[:, 0]
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - before)], dim=1)[keep]
        ids, rows = ids[keep], rows[keep]
        cache.batch_select_indices(keep)
    return written
