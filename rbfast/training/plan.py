"""The resources of a run (parameters, memory, batches), shown before it begins.

    print(make_plan(model, adapter, batches))

Activation memory is measured, not guessed from the architecture: two short rows run forward, and the difference of what
autograd saves for them gives the bytes per token.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from rbfast.adapter.column_delta import unhooked
from rbfast.adapter.column_scores import scoring_hooks
from rbfast.adapter.footprint import megabytes
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import Example
from rbfast.loss.chunking import logits_bytes
from rbfast.models.checkpointing import checkpointed_layers
from rbfast.models.linears import bytes_of, stored_tensors
from rbfast.models.packed_attention import describe_attention
from rbfast.models.student import final_hidden, head_of, packs

_ROWS = 64, 128  # tokens of the two measured rows
_USABLE = 0.92  # of a device's memory: the rest is for the driver and fragmentation


@dataclass(frozen=True)
class Plan:
    """A run in numbers. Memory in bytes, per process.

    Attributes:
        weights, teacher_weights: of the frozen models.
        adapter: A and B and the original columns. optimizer: the gradients and moments of A and B.
        tokens, batches: per epoch; largest: the tokens of the largest batch.
        left_out: traces that do not fit or cannot be rendered; not counted above.
        kept: activations of the largest batch, saved for its backward.
        kept_checkpointed: the same with gradient checkpointing; None if the model does not support it.
        loss: the logits of one chunk, and hidden states and their gradient.
        cache: the key-value cache while the student writes, in on-policy rounds; freed before it is trained.
        scoring: activations and loss while columns are scored by gradients, without gradient checkpointing; freed
            before the training. With gradient checkpointing scoring takes little more than the training, and it is 0.
        device, memory: the student's devices, and their memory together, None if unknown.
    """

    device: str
    parameters: int
    trained: int
    weights: int
    teacher_weights: int
    adapter: int
    optimizer: int
    tokens: int
    batches: int
    largest: int
    left_out: int
    kept: int
    kept_checkpointed: int | None
    is_checkpointed: bool
    loss: int
    cache: int
    scoring: int
    attention: str
    memory: int | None

    @property
    def fixed(self) -> int:
        return self.weights + self.teacher_weights + self.adapter + self.optimizer

    @property
    def needed(self) -> int:
        """The memory needed at the largest batch, or while the student writes or its columns are scored, if that is
        more."""
        return self.fixed + max(self._of_batch, self.cache, self.scoring)

    @property
    def _of_batch(self) -> int:
        kept = self.kept_checkpointed if self.is_checkpointed and self.kept_checkpointed else self.kept
        return kept + self.loss

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.needed <= _USABLE * self.memory

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"needed": self.needed, "fits": self.fits}

    def __str__(self) -> str:
        rows = {
            "student": f"{self.parameters:,} parameters, {megabytes(self.weights)}",
            "teacher": megabytes(self.teacher_weights),
            "adapter": f"{self.trained:,} trained ({self.trained / self.parameters:.3%}), {megabytes(self.adapter)}; "
            f"gradients and AdamW {megabytes(self.optimizer)}",
            "batches": f"{self.batches:,} per epoch of {self.tokens:,} tokens; the largest has {self.largest:,}",
            "left out": f"{self.left_out:,} of the traces: too long or impossible to render; a run lists them",
            "activations": self._activations(),
            "loss": megabytes(self.loss),
            "writing": f"about {megabytes(self.cache)} of key-value cache, freed before the student is trained",
            "scoring": f"about {megabytes(self.scoring)} to place the columns, freed before the student is trained",
            "attention": self.attention,
            "memory": self._memory(),
        }
        if not self.teacher_weights:
            del rows["teacher"]
        if not self.cache:
            del rows["writing"]
        if not self.scoring:
            del rows["scoring"]
        if not self.left_out:
            del rows["left out"]
        return "\n".join(f"{name:12} {text}" for name, text in rows.items())

    def _activations(self) -> str:
        kept = f"about {megabytes(self.kept)} at the largest batch"
        if self.kept_checkpointed is None:
            return kept
        with_it = f"{megabytes(self.kept_checkpointed)} with gradient checkpointing"
        return f"about {with_it} (on); {megabytes(self.kept)} without" if self.is_checkpointed else f"{kept}; {with_it}"

    def _memory(self) -> str:
        needed = f"about {megabytes(self.needed)} needed"
        if self.memory is None:
            return f"{needed} on {self.device}"
        needed += f" of {megabytes(self.memory)} on {self.device}"
        return f"{needed}: fits" if self.fits else f"{needed}: does not fit; {self._advice()}"

    def _advice(self) -> str:
        if self.fixed > _USABLE * (self.memory or 0):
            return f"the weights alone are too large: use --load-in 4bit{'' if self.cache else ', or --shard'}"
        if self.cache > self._of_batch:
            return "use a smaller --sample-batch-size"
        if self.kept_checkpointed is not None and not self.is_checkpointed:
            return "use --gradient-checkpointing"
        if self.cache:  # on-policy rounds
            return "use a smaller --batch-size or --max-new-tokens"
        return f"use --tokens-per-batch {self._tokens_that_fit()}, or shorter traces"

    def _tokens_that_fit(self) -> int:
        share = (_USABLE * (self.memory or 0) - self.fixed) / (self.needed - self.fixed)
        return max(1, int(share * self.largest))


def make_plan(
    model: PreTrainedModel,
    adapter: SparseAdapter,
    batches: Sequence[Sequence[Example]],
    is_checkpointed: bool = False,
    teacher: PreTrainedModel | None = None,
    left_out: int = 0,
    cache: int = 0,
    scored: int = 0,
) -> Plan:
    """The plan for training `adapter`, attached to `model`, on these batches. Runs two short rows through the model.

    cache: the bytes of the key-value cache while the student writes. scored: the tokens of the largest batch that the
    columns are scored on by gradients.
    """
    sizes = list(map(tokens_in, batches))
    footprint = adapter.footprint()
    per_token = _saved_bytes_per_token(model)
    layers = len(checkpointed_layers(model))
    devices = list(dict.fromkeys(x.device for x in (*model.parameters(), *model.buffers()) if not x.is_meta))
    head = head_of(model).weight
    vocabulary, hidden = head.shape
    largest = max(sizes)
    layer = per_token * largest // max(1, layers)
    inputs = layers * hidden * head.element_size() * largest
    teacher_vocabulary = 0 if teacher is None else head_of(teacher).weight.shape[0]

    def loss_bytes(tokens: int) -> int:
        logits = logits_bytes(tokens, vocabulary, model.device, teacher_vocabulary)
        return logits + tokens * hidden * (2 * head.element_size() + 4)

    scoring = 0
    if scored and not is_checkpointed:
        linears = {name: site.linear for name, site in adapter.sites().items()}
        with unhooked(model), scoring_hooks(linears):  # columns are scored before the adapter is attached
            while_scoring = _saved_bytes_per_token(model)
        scoring = while_scoring * scored + per_token * scored // max(1, layers) + loss_bytes(scored)
    return Plan(
        device=", ".join(map(str, devices)),
        parameters=adapter.parameters_of_base,
        trained=sum(parameter.numel() for parameter in adapter.parameters()),
        weights=footprint.base,
        teacher_weights=0 if teacher is None else bytes_of(teacher.parameters()),
        adapter=footprint.attached,
        optimizer=footprint.adamw,
        tokens=sum(sizes),
        batches=len(sizes),
        largest=largest,
        left_out=left_out,
        kept=per_token * largest + layer,  # + the gradients of a layer
        kept_checkpointed=inputs + 2 * layer if layers and model.supports_gradient_checkpointing else None,
        is_checkpointed=is_checkpointed,
        loss=loss_bytes(largest),
        cache=cache,
        scoring=scoring,
        attention=describe_attention(model, model.device)
        + ("" if packs(model) else "; the model runs one example at a time, which is slower"),
        memory=_memory_of(devices),
    )


def tokens_in(batch: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in batch)


def _saved_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that autograd saves per token of a row, excluding weights."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _ROWS[1]
    short, long = (min(n, longest * n // _ROWS[1]) for n in _ROWS)
    return max(0, _saved_bytes(model, long) - _saved_bytes(model, short)) // max(1, long - short)


def _saved_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes that autograd saves for a row of `tokens` tokens, weights included."""
    sizes: dict[int, int] = {}  # by the address of a storage

    def keep(x: Tensor) -> Tensor:
        for part in stored_tensors(x):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    ids = torch.arange(tokens, device=model.device)[None]
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda x: x):
        hidden = final_hidden(model, ids % model.config.get_text_config().vocab_size, ids, [tokens])
    del hidden  # until here the graph kept every storage alive, so no address was reused
    return sum(sizes.values())


def _memory_of(devices: Sequence[torch.device]) -> int | None:
    sizes = [_memory_of_one(device) for device in devices]
    return None if None in sizes else sum(filter(None, sizes))


def _memory_of_one(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
