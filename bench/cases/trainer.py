"""A whole training step: forward, loss, backward, optimizer, and the trainer's overhead.

On a CPU, SmolLM2-135M with two sequences of 256 tokens, so that none is padded. `text` is the cross-entropy of the text
alone: rbfast's DistillTrainer and TRL's SFTTrainer with LoRA (neither builds whole logits). `teacher` is the forward KL
to a teacher of the student's size that runs in every step: the loop of rbfast's README and TRL's GKDTrainer with LoRA;
and, with the teacher's top-k log-probs read from a file in place of running it, DistillTrainer. Gradient checkpointing,
TRL's default, is off for all. TRL's DistillationTrainer is left out: it generates the completions itself in every step.

On a GPU, a student of the shape of Qwen2.5-0.5B on text, 4,096 tokens, the last step of three: DistillTrainer with
SparseAdapter, and the same trainer with PEFT's LoRA of as many values.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Step, absent, settle
from peers.adapters import fresh_student, sparse, trained
from registry import Bar, Case, Contest, Place
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from cases.fold import density
from cases.models import lora, qwen
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import IGNORE, NO_ROLE, Example, collate
from rbfast.loss.distill_loss import DistillLoss
from rbfast.loss.teacher_signal import Dense
from rbfast.models.student import final_hidden, head_of
from rbfast.training.trainer import DistillTrainer

SEQUENCES, PROMPT, K = 2, 8, 20
SETTINGS = dict(
    max_steps=1,
    per_device_train_batch_size=SEQUENCES,
    learning_rate=1e-4,
    gradient_checkpointing=False,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
ON_CPU = SETTINGS | dict(use_cpu=True)


def sequences(vocabulary: int, tokens: int) -> Tensor:
    return torch.randint(vocabulary, (SEQUENCES, tokens), generator=torch.Generator().manual_seed(0))


def examples(vocabulary: int, tokens: int, with_teacher: bool) -> list[Example]:
    """The batch as rbfast's examples: labels are shifted, and everything after the prompt is reasoning."""
    made = []
    for ids in sequences(vocabulary, tokens).numpy():
        labels = np.append(ids[1:], IGNORE)
        labels[: PROMPT - 1] = IGNORE
        roles = np.where(labels == IGNORE, NO_ROLE, 1)
        signal: dict[str, Any] = {}
        if with_teacher:
            rows = np.flatnonzero(labels != IGNORE)
            top = np.stack([np.random.default_rng(row).choice(vocabulary, K, replace=False) for row in rows])
            signal = dict(teacher_ids=top, teacher_rows=rows)
            signal["teacher_logprobs"] = np.full(top.shape, np.log(0.9 / K), dtype=np.float32)
        made.append(Example(ids, labels, roles, **signal))
    return made


class Clock(TrainerCallback):
    """Seconds of a trainer's last step, without start-up, teardown and reading the batch."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        settle()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        settle()
        self.seconds = time.perf_counter() - self.start


def step_of(trainer: Any) -> Step:
    clock = Clock()
    trainer.add_callback(clock)

    def step() -> float:
        trainer.train()
        return clock.seconds

    return step


def distill_trainer(tokens: int, with_teacher: bool) -> Step:
    model, _ = fresh_student()
    args = TrainingArguments(output_dir=tempfile.mkdtemp(), **ON_CPU)
    data = examples(model.config.vocab_size, tokens, with_teacher)
    return step_of(DistillTrainer(model, sparse(model), args, data))


def a_teacher() -> PreTrainedModel:
    """The student with sharper logits: another distribution at the same cost."""
    teacher, _ = fresh_student()
    with torch.no_grad():
        teacher.model.norm.weight.mul_(1.2)
    return teacher


def readme_loop(tokens: int) -> Step:
    """Student and teacher run in every step; their logits are never built whole."""
    (model, _), teacher = fresh_student(), a_teacher()
    adapter, loss_fn = sparse(model), DistillLoss()
    optimizer = torch.optim.AdamW(trained(adapter), lr=1e-4)
    batch = collate(examples(model.config.vocab_size, tokens, with_teacher=False))
    ids, positions, labels = batch["input_ids"], batch["position_ids"], batch["labels"].view(-1)

    def step() -> None:
        with torch.no_grad():
            signal = Dense(final_hidden(teacher, ids, positions), head_of(teacher).weight)
        loss_fn(final_hidden(model, ids, positions), head_of(model).weight, labels, signal).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lora_16() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear")


def sft_trainer(tokens: int) -> Step:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = fresh_student()
    rows = sequences(model.config.vocab_size, tokens).tolist()
    data = Dataset.from_list([{"input_ids": ids, "labels": [IGNORE] * PROMPT + ids[PROMPT:]} for ids in rows])
    args = SFTConfig(output_dir=tempfile.mkdtemp(), bf16=False, **ON_CPU)
    return step_of(SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=lora_16()))


def gkd_trainer(tokens: int) -> Step:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    model, tokenizer = fresh_student()
    ids = sequences(model.config.vocab_size, tokens)
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "prompts": ids[:, :PROMPT]}
    args = GKDConfig(output_dir=tempfile.mkdtemp(), lmbda=0.0, beta=0.0, bf16=False, **ON_CPU)
    trainer = GKDTrainer(
        model,
        a_teacher(),
        args,
        data_collator=lambda _: dict(batch),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in ids.tolist()]),
        processing_class=tokenizer,
        peft_config=lora_16(),
    )
    return step_of(trainer)


MAKERS: dict[str, dict[str, Callable[[int], Step]]] = {
    "text": {
        "rbfast": partial(distill_trainer, with_teacher=False),
        "TRL SFT": sft_trainer,
    },
    "teacher": {
        "rbfast": readme_loop,
        "rbfast, top-k from a file": partial(distill_trainer, with_teacher=True),
        "TRL GKD": gkd_trainer,
    },
}


def made(make_step: Callable[[], Step]) -> Step:
    try:
        return make_step()
    except Exception as error:  # a peer's failure is a finding; ours fails the case
        return absent(error)


def on_cpu(place: Place, signal: str) -> Contest:
    tokens = place.size(256, 16)
    return Contest(
        f"step, {signal}, SmolLM2-135M, {SEQUENCES} x {tokens} tokens, {place.dtype}",
        {who: made(partial(make, tokens)) for who, make in MAKERS[signal].items()},
        rounds=5,
    )


# ---- a student of half a billion parameters, on a GPU ----


class Peft(nn.Module):
    """A model's LoRA parameters in place of a SparseAdapter."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.values = nn.ParameterList(parameters)


def sft(place: Place, tokens: int, lora_rank: int | None) -> tuple[Step, int]:
    """The step, and how many values it trains."""
    model = qwen("0.5B", place)
    adapter: Any = (
        SparseAdapter.attach(model, placement="random", **density(place))
        if lora_rank is None
        else Peft(lora(model, lora_rank))
    )
    # A Trainer starts by emptying the GPU's memory cache. The last of three steps finds it filled, as most steps do.
    settings = SETTINGS | dict(max_steps=3)
    args = TrainingArguments(output_dir=tempfile.mkdtemp(), use_cpu=place.device == "cpu", **settings)
    data = examples(model.config.vocab_size, tokens, with_teacher=False)
    values = sum(parameter.numel() for parameter in trained(adapter))
    return step_of(DistillTrainer(model, adapter, args, data)), values


def on_gpu(place: Place) -> Contest:
    tokens = place.size(4096 // SEQUENCES, 16)
    ours, values = sft(place, tokens, None)
    notes = {"rbfast": f"{values:,} values"}
    try:
        _, per_rank = sft(place, tokens, 1)
        rank = max(1, round(values / per_rank))
        theirs, _ = sft(place, tokens, rank)
        notes["LoRA"] = f"r={rank}, {rank * per_rank:,} values"
    except ImportError as error:
        theirs = absent(error)
    return Contest(
        f"SFT step of a 0.5B student, {SEQUENCES} x {tokens} tokens",
        {"rbfast": ours, "LoRA": theirs},
        (Bar("rbfast / LoRA", "<=", 0.7),),
        rounds=7,
        is_host_bound=True,
        notes=notes,
    )


CASES = [
    *(Case("trainer", signal, partial(on_cpu, signal=signal), ("cpu",)) for signal in MAKERS),
    Case("trainer", "0.5B", on_gpu, ("cuda",)),
]
