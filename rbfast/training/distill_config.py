"""The settings of a run of `distill`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rbfast.adapter.column_scores import METHODS
from rbfast.training.objective import Objective
from rbfast.utils.records import check_numbers

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # as transformers names them


@dataclass(frozen=True)
class DistillConfig:
    """The settings of a run, apart from the model and the traces.

    Attributes:
        density: trainable values / all parameters of the base, at most.
        rank, support: the shape of each delta; None lets the adapter choose it within the budget.
        targets: the linear layers to train, by PEFT's rules: names or their ends, a regex, or "all-linear".
        placement: "random", or by scores from `placement_traces` traces: "gradient", "factored", "activation"
            (docs/training.md).
        epochs: passes over the traces.
        batch_size, accumulation: traces per batch, and batches per optimizer step, on each process.
        tokens_per_batch: the most tokens in a batch, instead of batch_size. A longer trace is alone in its batch.
        gradient_checkpointing: keep only the input of each layer, and rerun the layer for its backward.
        learning_rate: AdamW's, at its peak.
        warmup: the share of the steps before the peak learning rate.
        schedule: the decay of the learning rate from its peak: linear or cosine to zero, or constant.
        max_tokens: longer traces are left out and listed, never cut.
        save_steps: optimizer steps between checkpoints, and between measurements of held-out traces.
        seed: of the columns, their initial values, and the order of the traces.
        instruction: the text after the problem in a prompt: "answer", "boxed", "none" or a text. None is the one that
            the adapter or merged model to continue from was trained with, else "boxed" if the student's chat template
            has thinking, and "answer" otherwise.
        turns: "last" trains the last reply of a conversation, "all" every reply.

    Raises:
        TypeError: a field that must be a number is not one.
        ValueError: a number is out of range, or the placement is unknown.
    """

    density: float = 0.003
    rank: int | None = None
    support: int | None = None
    targets: str | Sequence[str] = "all-linear"
    placement: Literal["gradient", "factored", "activation", "random"] = "random"
    placement_traces: int = 64
    epochs: float = 1.0
    batch_size: int = 8
    tokens_per_batch: int | None = None
    accumulation: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-2
    warmup: float = 0.05
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_tokens: int = 4096
    save_steps: int = 50
    seed: int = 0
    instruction: str | None = None
    turns: Literal["last", "all"] = "last"
    objective: Objective = field(default_factory=Objective)

    def __post_init__(self) -> None:
        check_numbers(self)
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", [*self.targets])  # as JSON returns it
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1 (the share of trained values), got {self.density}")
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be at least 0 and below 1 (a share of the steps), got {self.warmup}")
        counts = ("rank", "support", "placement_traces", "batch_size", "tokens_per_batch", "accumulation", "max_tokens")
        for name in (*counts, "save_steps"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:  # NumPy's range
            raise ValueError(f"seed must be at least 0 and below 2**32, got {self.seed}")
        if self.placement not in (*METHODS, "random"):
            raise ValueError(
                f"placement must be one of {', '.join(METHODS)} or random (an adapter attached with scores of your own "
                f"can be saved and continued from), got {self.placement!r:.60}"
            )
        if self.turns not in ("last", "all"):
            raise ValueError(f"turns must be last or all, got {self.turns!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
