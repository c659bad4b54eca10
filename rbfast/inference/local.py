"""Guided inference with a Hugging Face model: batched, the key-value cache kept across interventions.

```python
guide = guide_for(tokenizer, budget=1024)
[[solution]] = guided(model, tokenizer, [format_prompt(problem, tokenizer)], guide)
[votes] = guided(model, tokenizer, [prompt], guide, samples=16, temperature=0.8, seed=1)
majority([answer_key(solution.text) for solution in votes]).answer
```

A text is put in by choosing its tokens for the model, one a step; what is struck stays in the cache, but the row no
longer attends to it and it takes up no position. Nothing is ever read twice, and each row goes its own way in a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from rbfast.data.encoding import end_of_turn
from rbfast.grading.grade import answer_key, without_tags
from rbfast.inference.decoding import (
    Batch,
    Steering,
    batches_by_length,
    decode,
    encode_prompts,
    evaluating,
    greedy_settings,
    new_cache,
)
from rbfast.inference.guide import Event, Guide, Order, Phase, Row, calibrated
from rbfast.inference.vote import decided

THINK_CLOSE = "</think>"
Listener = Callable[[int, str, str], None]


def guide_for(tokenizer: PreTrainedTokenizerBase, budget: int, **options: Any) -> Guide:
    """A guide with the markers that suit a tokenizer: `</think>` where it knows it, else a plain chain of thought.

    A plain chain of thought ends where its answer begins, at `<answer>`, as `format_prompt` asks for.
    """
    thinks = THINK_CLOSE in tokenizer.get_vocab() or THINK_CLOSE in str(tokenizer.chat_template or "")
    probe = "\n\n<answer>" if thinks else ""
    markers = {"close": THINK_CLOSE if thinks else "<answer>", "finish": "</answer>", "probe": probe}
    return Guide(budget, **markers | options)


@dataclass(frozen=True)
class Solution:
    """One guided completion.

    Attributes:
        text: all that is left of it, without special tokens; `thinking` and `answer` are its parts.
        tokens: the whole cost: what is left, what was struck, and `probe_tokens` thrown away after probes.
        truncated: the budget cut the answer.
        abandoned: the vote was decided before this sample ended.
        sentences: nats; the entropy's moving average at each end of a sentence of thinking, where it was measured.
    """

    text: str
    thinking: str
    answer: str
    ids: tuple[int, ...]
    tokens: int
    probe_tokens: int
    truncated: bool
    abandoned: bool
    events: tuple[Event, ...]
    sentences: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """A record for `json.dumps`; `thinking` and `answer` without their tags, which `text` keeps."""
        return asdict(self) | {"thinking": without_tags(self.thinking), "answer": without_tags(self.answer)}


class Vocabulary:
    """A tokenizer as a guide needs it: texts to tokens, tokens to pieces of text, ends of turn.

    Raises:
        ValueError: the tokenizer is not a fast one, or a marker of the guide cannot be written in its vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, guide: Guide, stops: Sequence[int]):
        if not tokenizer.is_fast:
            raise ValueError(f"guidance needs a fast tokenizer, got {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        self.stops = frozenset(stops)
        self.end = end_of_turn(tokenizer)
        self._encoded: dict[str, list[int]] = {}
        for name in ("close", "finish", "wait", "verify", "other", "wrap_up", "probe"):
            self._check(name, getattr(guide, name))

    def _check(self, name: str, text: str) -> None:
        ids = self.encode(text)
        back = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self.stops.intersection(ids) or text.strip() not in back:
            raise ValueError(
                f"{name} must be a text that the tokenizer can write, got {text!r}, which comes back as {back!r}: "
                "choose a marker that its vocabulary can spell"
            )

    def encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._encoded[text]

    def count(self, text: str) -> int:
        return len(self.encode(text))


class TokenRow:
    """A row over token ids: THINK -> FORCE(queue) -> ANSWER, a fold over the tokens it was fed.

    Attributes:
        queue: tokens to write before the model may choose again.
        ids: the tokens that are left, without what was struck.
        written: tokens fed, the struck ones included.
    """

    def __init__(self, guide: Guide, vocabulary: Vocabulary, listen: Callable[[str, str], None] | None = None):
        self.vocabulary = vocabulary
        self.row = Row(guide, vocabulary.count)
        self.queue: deque[int] = deque()
        self.ids: list[int] = []
        self.written = 0
        self.abandoned = False
        self._listen = listen
        self._stream = DecodeStream(skip_special_tokens=False)
        self._obey(self.row.start())

    @property
    def done(self) -> bool:
        return self.abandoned or (self.row.phase is Phase.DONE and not self.queue)

    @property
    def wants_probe(self) -> bool:
        return not self.queue and not self.done and self.row.wants_probe

    @property
    def key(self) -> str | None:
        """Its answer, as a vote counts it."""
        return answer_key(self.row.thinking + self.row.answer)

    def feed(self, token: int, entropy: float | None = None) -> int:
        """Takes the next token, which must be the queue's where there is one; returns how many tokens are struck."""
        self.written += 1
        self.ids.append(token)
        if self.queue:
            if token != self.queue.popleft():
                raise ValueError(f"expected a token that was to be put in, got {token}: the row was fed out of turn")
            return 0
        phase, ended = self.row.phase, token in self.vocabulary.stops
        piece = "" if ended else self._stream.step(self.vocabulary.tokenizer.backend_tokenizer, token) or ""  # type: ignore[attr-defined]
        order = self.row.write(piece, 1, entropy, ended)
        if self._listen and piece:
            self._listen(phase.value, piece)
        return self._obey(order)

    def probed(self, text: str, tokens: int) -> int:
        """Takes what was written to a probe; returns how many tokens are struck."""
        return self._obey(self.row.probed(text, tokens))

    def _obey(self, order: Order | None) -> int:
        if order is None:
            return 0
        if order.strike:
            del self.ids[-order.strike :]
        self.queue.extend(self.vocabulary.encode(order.text) if order.text else [])
        if order.end:
            self.queue.append(self.vocabulary.end)
        self._stream = DecodeStream(skip_special_tokens=False)
        if self._listen and order.text:
            self._listen(order.kind, order.text)
        return order.strike

    def solution(self) -> Solution:
        row = self.row
        return Solution(
            text=str(self.vocabulary.tokenizer.decode(self.ids, skip_special_tokens=True)),
            thinking=row.thinking,
            answer=row.answer,
            ids=tuple(self.ids),
            tokens=row.spent if not self.abandoned else self.written + row.probed_tokens,
            probe_tokens=row.probed_tokens,
            truncated=not row.finished,
            abandoned=self.abandoned,
            events=tuple(row.events),
            sentences=tuple(row.sentences),
        )


@dataclass(frozen=True)
class Sampler:
    """Draws tokens; a draw depends on the row's name, which holds the seed, and its step alone, never on the batch."""

    temperature: float
    top_p: float

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be above 0 and top_p in (0, 1], got {self.temperature}, {self.top_p}")

    def draw(self, scores: torch.Tensor, names: Sequence[str], steps: Sequence[int]) -> torch.Tensor:
        """A token [rows] for each row of `scores` [rows, V]."""
        chances, tokens = torch.softmax(scores.double() / self.temperature, dim=-1).sort(descending=True, stable=True)
        mass = chances.cumsum(-1)
        # The smallest set of tokens whose mass reaches top_p; the first is always in it.
        chances[(mass - chances) >= self.top_p] = 0.0
        mass = chances.cumsum(-1)
        draws = [self._uniform(f"{name}:{step}") for name, step in zip(names, steps, strict=True)]
        wanted = torch.tensor(draws, dtype=mass.dtype, device=mass.device)[:, None] * mass[:, -1:]
        place = torch.searchsorted(mass, wanted, right=True).clamp(max=mass.shape[1] - 1)
        return tokens.gather(1, place)[:, 0]

    @staticmethod
    def _uniform(name: str) -> float:
        return (int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 11) / 2**53


class GuidedSteering(Steering):
    """Steers each row of a batch by its own `TokenRow`.

    Args:
        names: of the rows, for the sampler.
        groups: int [rows]; samples of one prompt share a group, and a decided vote ends its group.
        entropies: whether the rows need to know how sure the model was of each token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: dict[str, Any],
        rows: Sequence[TokenRow],
        *,
        names: Sequence[str],
        groups: Sequence[int],
        sampler: Sampler | None = None,
        entropies: bool = False,
    ):
        super().__init__(len(rows), settings["eos_token_id"], model.device)
        self.model, self.settings = model, settings
        self.token_rows, self.names, self.groups = list(rows), list(names), list(groups)
        self.sampler, self.measures_entropy = sampler, entropies
        self.entropies: list[float | None] = [None] * len(rows)
        self.struck = [0] * len(rows)
        self.gone: dict[int, list[str | None]] = {}  # answers of samples that have left the batch, by group
        self.ended = torch.tensor([row.done for row in rows], device=model.device)

    def processors(self) -> LogitsProcessorList:
        return LogitsProcessorList([_Choose(self)])

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores [rows, V] with every token that is not the model's own greedy choice made the only one."""
        if self.measures_entropy:
            self.entropies = list(entropy(scores).tolist())
        forced = {i: row.queue[0] for i, row in enumerate(self.token_rows) if row.queue}
        if self.sampler is not None:
            drawn = self.sampler.draw(scores, self.names, [row.written for row in self.token_rows]).tolist()
            forced = dict(enumerate(drawn)) | forced
        for i, token in forced.items():
            scores[i] = -math.inf
            scores[i, token] = 0.0
        return scores

    def see(self, tokens: torch.Tensor) -> None:
        for i, (row, token) in enumerate(zip(self.token_rows, tokens.tolist(), strict=True)):
            if row.done:
                continue
            self.struck[i] = row.feed(token, self.entropies[i])
            if row.done:
                self._close_group(self.groups[i])
        self.ended = torch.tensor([row.done for row in self.token_rows], device=tokens.device)

    def _close_group(self, group: int) -> None:
        members = [row for row, g in zip(self.token_rows, self.groups, strict=True) if g == group]
        running = [row for row in members if not row.done]
        gone = self.gone.get(group, [])
        answers = gone + [row.key for row in members if row.done]
        if running and decided(answers, len(running)):
            for row in running:
                row.abandoned = True

    def pausing(self) -> bool:
        return any(self.struck) or any(row.wants_probe for row in self.token_rows) or super().pausing()

    def paused(self, batch: Batch, new: torch.Tensor) -> None:
        self._strike(batch)
        asking = [i for i, row in enumerate(self.token_rows) if row.wants_probe]
        if asking:
            self._probe(batch, asking)
            self._strike(batch)

    def _strike(self, batch: Batch) -> None:
        """The last tokens of the rows that say so are no longer attended to."""
        for i, count in enumerate(self.struck):
            if count:
                batch.mask[i, -count:] = 0
                # Any token that is no padding: `generate` warns of rows that end in padding.
                batch.ids[i, -count:] = self.token_rows[i].queue[0]
        self.struck = [0] * len(self.token_rows)

    def _probe(self, batch: Batch, asking: list[int]) -> None:
        vocabulary = self.token_rows[0].vocabulary
        texts = [vocabulary.encode(self.token_rows[i].row.probe_text) for i in asking]
        limit = self.token_rows[0].row.guide.probe_tokens
        written = _continue(self.model, batch, asking, texts, self.settings, limit)
        for i, put, ids in zip(asking, texts, written, strict=True):
            row = self.token_rows[i]
            text = str(vocabulary.tokenizer.decode(ids, skip_special_tokens=True))
            self.struck[i] = row.probed(text, len(put) + len(ids))

    def keep(self, rows: torch.Tensor) -> None:
        super().keep(rows)
        kept = set(rows.tolist())
        for i, row in enumerate(self.token_rows):
            if i not in kept and not row.abandoned:
                self.gone.setdefault(self.groups[i], []).append(row.key)
        for name in ("token_rows", "names", "groups", "entropies", "struck"):
            setattr(self, name, [item for i, item in enumerate(getattr(self, name)) if i in kept])


class _Choose(LogitsProcessor):
    def __init__(self, steering: GuidedSteering):
        self.steering = steering

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:  # type: ignore[override]
        return self.steering.choose(scores)


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """Nats [rows] of the distributions whose logits are `scores` [rows, V]; a logit may be -inf."""
    normalizer = torch.logsumexp(scores, dim=-1, keepdim=True)
    chances = (scores - normalizer).exp_()
    # 0 * -inf would be no number
    return normalizer[:, 0] - torch.linalg.vecdot(chances, scores.clamp(min=torch.finfo(scores.dtype).min))


def _continue(
    model: PreTrainedModel,
    batch: Batch,
    rows: Sequence[int],
    texts: Sequence[list[int]],
    settings: dict[str, Any],
    limit: int,
) -> list[list[int]]:
    """Greedy tokens, `limit` at most, that follow each text after its row; the batch stays as it is."""
    index = torch.tensor(rows, device=batch.ids.device)
    width, pad = max(map(len, texts)), settings["pad_token_id"]
    put = torch.tensor([[pad] * (width - len(text)) + text for text in texts], device=index.device)
    seen = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=index.device)
    cache = new_cache(model)
    for number, layer in enumerate(batch.cache.layers):
        if not isinstance(layer, DynamicLayer) or layer.is_sliding:
            raise ValueError(
                f"probes need a cache that keeps all of its past, got {type(layer).__name__}: probe_every=0"
            )
        cache.update(layer.keys[index], layer.values[index], number)  # type: ignore[index]
    branch = Batch(
        torch.cat([batch.ids[index], put], dim=1), torch.cat([batch.mask[index], seen.to(batch.mask)], dim=1), cache
    )
    output = model.generate(  # type: ignore[operator]
        branch.ids,
        attention_mask=branch.mask,
        past_key_values=branch.cache,
        generation_config=GenerationConfig(**settings, max_new_tokens=limit, return_dict_in_generate=True),
        **branch.positions(),
    )
    stops = set(settings["eos_token_id"])
    written = []
    for ids in output.sequences[:, branch.ids.shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
        written.append(ids[:end])
    return written


def guided(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    guide: Guide,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_size: int = 32,
    early_stop: bool = True,
    listen: Listener | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Solution]]:
    """`samples` guided completions of every prompt, in the order of `prompts`.

    Args:
        temperature: 0 for greedy decoding.
        seed: of the draws; one for each prompt, or one for all.
        batch_size: completions at a time, at most, a prompt's samples together.
        early_stop: abandon the samples of a prompt that can no longer change the majority.
        listen: called with (prompt, kind, text) for each piece as it is written; kind is `think`, `answer` or that of
            an intervention. For one sample a prompt.
        progress: called with (prompts done, prompts in all) after each batch.

    Raises:
        ValueError: numbers out of range, a prompt that would not fit the model's positions, a marker that the
            tokenizer cannot write, a budget too small for the wrap-up.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples and batch_size must be at least 1, got {samples} and {batch_size}")
    if samples > 1 and temperature == 0:
        raise ValueError("several samples of one prompt need a temperature above 0: greedy ones are all the same")
    sampler = None if temperature == 0 else Sampler(temperature, top_p)
    seeds = [f"{seed}:{i}" for i in range(len(prompts))] if isinstance(seed, int) else list(map(str, seed))
    settings = greedy_settings(model, tokenizer)
    vocabulary = Vocabulary(tokenizer, guide, settings["eos_token_id"])
    encoded = encode_prompts(model, tokenizer, prompts, guide.budget)
    solutions: dict[int, list[Solution]] = {}
    with evaluating(model):
        for batch in batches_by_length(encoded, max(1, batch_size // samples)):
            rows = [TokenRow(guide, vocabulary, listen and partial(listen, i)) for i in batch for _ in range(samples)]
            steering = GuidedSteering(
                model,
                settings,
                rows,
                names=[f"{seeds[i]}:{copy}" for i in batch for copy in range(samples)],
                groups=[i if early_stop else -1 - k for k, i in enumerate(i for i in batch for _ in range(samples))],
                sampler=sampler,
                entropies=guide.verify_above is not None,
            )
            decode(model, [encoded[i] for i in batch], settings, guide.budget, steering, copies=samples)
            for k, i in enumerate(batch):
                solutions[i] = [row.solution() for row in rows[k * samples : (k + 1) * samples]]
            if progress is not None:
                progress(len(solutions), len(prompts))
    return [solutions[i] for i in range(len(prompts))]


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    guide: Guide,
    *,
    quantile: float = 0.9,
) -> float:
    """The `verify_above` [nats] that a model's own unguided thinking exceeds at 1 - `quantile` of its sentence ends.

    Raises:
        ValueError: a quantile outside (0, 1), or no sentence end in what the model wrote.
    """

    def sentences(plain: Guide) -> list[float]:
        return [end for [solution] in guided(model, tokenizer, prompts, plain) for end in solution.sentences]

    return calibrated(guide, quantile, sentences)
