"""Complete many prompts through the model's own `generate`.

A batch shrinks while it runs: once half of its rows have finished, `generate` is stopped, the finished rows leave the
batch and the key-value cache, and decoding continues with the rest. So a row that never stops costs the time of a small
batch, not of the whole one. `decode` is that loop. A `Steering` decides what happens at each token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from rbfast.adapter.column_delta import unhooked
from rbfast.data.chat_template import end_of_turn
from rbfast.data.thinking import thinking_format
from rbfast.inference.cache import keep_rows, new_cache
from rbfast.models.linears import unwrapped
from rbfast.models.student import evaluation_mode

# The name of the cache in `generate`'s arguments and output; transformers 5.24 renamed it.
_CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"

_GENERATE_LOG = logging.getLogger("transformers.generation.utils")


@dataclass(frozen=True)
class Completion:
    """A completion: the text, the number of tokens, and whether the limit truncated it."""

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

    Prompts contain their own special tokens, as `format_prompt` writes them. Prompts of similar length share a batch,
    so there is little padding. The longest come first, so running out of memory shows at once.

    Args:
        progress: called with (prompts done, prompts in all) after each batch.

    Raises:
        ValueError: a prompt is empty, or its completion would exceed the model's positions.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
    encoded = encode_prompts(model, tokenizer, prompts, max_new_tokens)
    greedy = greedy_settings(model, tokenizer)
    completions: dict[int, Completion] = {}
    with evaluating(model):
        for rows in batches_by_length(encoded, batch_size):
            steering = Steering(len(rows), greedy["eos_token_id"], model.device)
            decode(model, [encoded[i] for i in rows], greedy, max_new_tokens, steering)
            for row, written in zip(rows, steering.written, strict=True):
                text = decode_text(tokenizer, written)
                completions[row] = Completion(text, len(written), written[-1] not in greedy["eos_token_id"])
            if progress is not None:
                progress(len(completions), len(encoded))
    return [completions[i] for i in range(len(prompts))]


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of generated tokens, without special tokens except those around the thinking."""
    tags, special = thinking_format(tokenizer), set(tokenizer.all_special_ids)
    marks = set(tokenizer(tags.opener + tags.closer, add_special_tokens=False).input_ids) if tags.thinks else set()
    if not special.intersection(marks):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return str(tokenizer.decode([n for n in ids if n in marks or n not in special], skip_special_tokens=False))


def encode_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """The token ids of each prompt. Raises ValueError if one is empty, or if a completion would exceed the model's
    positions."""
    encoded = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    if not all(encoded):
        raise ValueError(f"every prompt needs at least one token, got {prompts[encoded.index([])]!r}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, encoded), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} more were requested, "
            f"but the model has {limit} positions: lower max_new_tokens (a guide's budget) or leave that prompt out"
        )
    return encoded


def batches_by_length(encoded: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts of similar length, the longest first."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, at the speed of the base model if an adapter is folded into it; restores everything afterwards.

        with evaluating(model), torch.no_grad():
            model(**batch)                              # or model.generate(...)

    A folded adapter gets no gradients within the block (`rbfast.adapter.column_delta.unhooked`).
    """
    with evaluation_mode(model), unhooked(model), _contiguous_head_input(model):
        yield


@contextmanager
def _contiguous_head_input(model: PreTrainedModel) -> Iterator[None]:
    """Make the head's input contiguous on a CPU. For a prompt it is a strided view of the last tokens, which PyTorch
    multiplies by a frozen weight in batches, with a copy of the weight per row: 3.4 GB for 60 rows of a 135M model."""
    head = model.get_output_embeddings()
    if head is None or model.device.type != "cpu":
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]) if args else None)
    try:
        yield
    finally:
        hook.remove()


def greedy_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Settings for greedy decoding that override the model's generation config, except that its end tokens stop too."""
    ends = model.generation_config.eos_token_id
    # The generation config (a base model's, say) may lack the end of turn that the student is trained with.
    stops = {end_of_turn(tokenizer), *(ends if isinstance(ends, list) else [ends])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)
    return {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": sorted(stops), "pad_token_id": pad}


class Steering(StoppingCriteria):
    """Watches the tokens of a batch: which rows have ended, and when to shrink the batch.

    The base class lets the model write freely until an end token. `rbfast.inference.steering` does more.

    Attributes:
        rows: int64 [rows]; the original indices of the rows still in the batch.
        ended: bool [rows]; whether each of them is done.
        written: the tokens of every original row, up to its end token.
    """

    def __init__(self, rows: int, stops: Sequence[int], device: torch.device):
        self.rows = torch.arange(rows, device=device)
        self.ended = torch.zeros_like(self.rows, dtype=torch.bool)
        self.stops = torch.tensor(stops, device=device)
        self.written: list[list[int]] = [[] for _ in range(rows)]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.see(input_ids[:, -1])
        return torch.full_like(self.ended, self.pausing())

    def see(self, tokens: torch.Tensor) -> None:
        """Process the token that each row has just written, [rows]; a row that has ended writes padding."""
        self.ended = self.ended | torch.isin(tokens, self.stops)

    def pausing(self) -> bool:
        """Whether `generate` must stop now: half of the rows are done."""
        return bool(2 * self.ended.sum() >= len(self.ended))

    def processors(self) -> LogitsProcessorList:
        """The processors that change the logits before a token is chosen."""
        return LogitsProcessorList()

    def paused(self, batch: CachedBatch, new: torch.Tensor) -> None:
        """Called when `generate` has stopped, after writing `new` [rows, tokens]."""
        ends = torch.isin(new, self.stops)
        # A row that ended is padded to the width of the others: keep up to its first end token.
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1])
        for row, length, tokens in zip(self.rows.tolist(), lengths.tolist(), new.tolist(), strict=True):
            self.written[row] += tokens[:length]

    def keep(self, rows: torch.Tensor) -> None:
        """Called when the batch keeps only these of its rows [kept]."""
        self.rows, self.ended = self.rows[rows], self.ended[rows]


@dataclass
class CachedBatch:
    """Rows that are being written: `ids` and `mask` [rows, width], and the cache of all tokens but the last.

    Without a cache, the model reads the rows again each time `generate` has been stopped.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    cache: Cache | None

    def given(self) -> dict[str, Any]:
        """Further arguments of `generate`: the cache, and the positions if a token within a row is masked.

        A masked token takes up no position. If there is none, `generate` sets the positions itself.
        """
        if self.cache is None:
            return {}
        if not bool((self.mask[:, 1:] < self.mask[:, :-1]).any()):
            return {_CACHE: self.cache}
        return {_CACHE: self.cache, "position_ids": (self.mask.cumsum(-1) - 1).clamp(min=0)}

    def keep(self, rows: torch.Tensor) -> None:
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        if self.cache is not None:
            keep_rows(self.cache, rows)

    def drop_masked(self, pad: int) -> None:
        """Remove the masked tokens, for a recurrent model, which cannot ignore them."""
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]
        if rows:
            self.ids, self.mask = _padded(rows, pad, self.ids.device)


def decode(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    settings: dict[str, Any],
    max_new_tokens: int,
    steering: Steering,
    *,
    copies: int = 1,
) -> None:
    """Generate after each prompt until its row has ended or has `max_new_tokens` tokens; `steering` receives them.

    Args:
        copies: rows per prompt, next to each other; the prompt is read once for all of them.
    """
    left, pad = max_new_tokens, settings["pad_token_id"]
    batch = _prefilled(model, prompts, pad, copies)
    while len(batch.ids) and left > 0:
        steered = {"stopping_criteria": StoppingCriteriaList([steering]), "logits_processor": steering.processors()}
        output = _generate(model, batch, settings, left, **steered)
        new = output.sequences[:, batch.ids.shape[1] :]
        left -= new.shape[1]
        batch.ids = output.sequences
        if batch.cache is not None:
            batch.cache = output[_CACHE]
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(new.shape)], dim=1)
        steering.paused(batch, new)
        running = (~steering.ended).nonzero()[:, 0]
        if len(running) < len(batch.ids):
            steering.keep(running)
            batch.keep(running)
        if batch.cache is None:
            batch.drop_masked(pad)


def _generate(
    model: PreTrainedModel, batch: CachedBatch, settings: dict[str, Any], max_new_tokens: int, **others: Any
) -> Any:
    config = GenerationConfig(**settings, max_new_tokens=max_new_tokens, return_dict_in_generate=True)
    with _without_padding_warning(batch):
        return _without_own_generation_config(model).generate(
            batch.ids, attention_mask=batch.mask, generation_config=config, **batch.given(), **others
        )


def _without_own_generation_config(model: PreTrainedModel) -> Any:
    """A shallow copy of the model with an empty generation config: `generate` reads unset options from the config.

    A checkpoint saved after training often has `use_cache: false`, with which `generate` would read the whole text into
    the cache at every token. Others set beams, penalties or a kind of cache. The model itself keeps its config: another
    thread may read it.
    """
    inner = unwrapped(model)  # a torch.compile wrapper would set the new config on the model
    plain: Any = object.__new__(type(inner))  # not copy(), which would construct FSDP2's classes anew
    plain.__dict__.update(inner.__dict__, generation_config=GenerationConfig())
    return plain


@contextmanager
def _without_padding_warning(batch: CachedBatch) -> Iterator[None]:
    """Suppress `generate`'s warning about right padding if some rows end in masked tokens.

    Steering masks struck tokens. `given` sets the positions, and the next tokens are forced, so nothing depends on
    them. A prompt of one token is all padding while the longer ones are read without their last token.
    """
    if bool(batch.mask[:, -1].all()):
        yield
        return

    def is_other(record: logging.LogRecord) -> bool:
        return "right-padding was detected" not in record.getMessage()

    _GENERATE_LOG.addFilter(is_other)
    try:
        yield
    finally:
        _GENERATE_LOG.removeFilter(is_other)


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and mask, [rows, width]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def _prefilled(model: PreTrainedModel, prompts: Sequence[list[int]], pad: int, copies: int) -> CachedBatch:
    ids, mask = _padded(prompts, pad, model.device)
    batch = CachedBatch(ids, mask, new_cache(model))
    if copies > 1:
        if ids.shape[1] > 1 and batch.cache is not None:
            start = CachedBatch(ids[:, :-1], mask[:, :-1], batch.cache)
            batch.cache = _generate(model, start, {"do_sample": False, "pad_token_id": pad}, 1)[_CACHE]
            batch.cache.batch_repeat_interleave(copies)
        batch.ids, batch.mask = (tensor.repeat_interleave(copies, dim=0) for tensor in (ids, mask))
    return batch


def continuation(
    model: PreTrainedModel,
    batch: CachedBatch,
    rows: Sequence[int],
    texts: Sequence[list[int]],
    settings: dict[str, Any],
    limit: int,
) -> list[list[int]]:
    """At most `limit` greedy tokens after each row and its text. The batch does not change.

    The texts must have the same number of tokens: padding within a row would take up room in a sliding window.
    """
    branch = _branch(batch, rows, texts, settings["pad_token_id"])
    output = _generate(model, branch, settings, limit)
    stops = set(settings["eos_token_id"])
    written = []
    for ids in output.sequences[:, branch.ids.shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
        written.append(ids[:end])
    return written


def _branch(batch: CachedBatch, rows: Sequence[int], texts: Sequence[list[int]], pad: int) -> CachedBatch:
    """A copy of some rows of a batch, each followed by a text."""
    index, added = torch.tensor(rows, device=batch.ids.device), torch.tensor(texts, device=batch.ids.device)
    ids = torch.cat([batch.ids[index], added], dim=1)
    mask = torch.cat([batch.mask[index], torch.ones_like(added)], dim=1)
    branch = CachedBatch(ids, mask, None)
    if batch.cache is None:
        branch.drop_masked(pad)
    else:
        branch.cache = copy(batch.cache)
        branch.cache.layers = [copy(layer) for layer in batch.cache.layers]
        keep_rows(branch.cache, index)  # copies keys and values
    return branch
