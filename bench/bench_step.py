"""A whole training step of SmolLM2-135M: forward, loss, backward, optimizer, and whatever a trainer does besides.

    pytest bench/bench_step.py --benchmark-json=runs/bench/step.json

Two sequences of 256 tokens, so that nobody pads. `text` is the cross-entropy of the text alone: rbfast's DistillTrainer
and TRL's SFTTrainer with LoRA (neither builds whole logits). `teacher` is the forward KL to a teacher of the student's
size that runs in every step: the loop of rbfast's README and TRL's GKDTrainer with LoRA; and, with the teacher's top-k
log-probs read from a file in place of running it, DistillTrainer. Gradient checkpointing, TRL's default, is off for
everybody. TRL's DistillationTrainer has no place here: it writes the completions itself in every step.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from adapters import fresh_student, sparse, trained
from measure import TOY, Step, absent, race, versions
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from rbfast.data.encoding import IGNORE, NO_ROLE, Example, collate
from rbfast.loss.distill_loss import DistillLoss
from rbfast.loss.teacher_signal import Dense
from rbfast.models.student import fast_dtype, final_hidden, head_of
from rbfast.training.trainer import DistillTrainer

SEQUENCES, TOKENS, PROMPT, ROUNDS, K = 2, (16 if TOY else 256), 8, 5, 20
SETTINGS = dict(
    max_steps=1,
    per_device_train_batch_size=SEQUENCES,
    learning_rate=1e-4,
    gradient_checkpointing=False,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,
)


def sequences(vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))


def examples(vocabulary: int, with_teacher: bool) -> list[Example]:
    """rbfast's form of the batch: labels shifted, all of it after the prompt is reasoning."""
    made = []
    for ids in sequences(vocabulary).numpy():
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
    """Seconds of a trainer's last step: without its start, its end and the reading of the batch."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def step_of(trainer: Any) -> Step:
    clock = Clock()
    trainer.add_callback(clock)

    def step() -> float:
        trainer.train()
        return clock.seconds

    return step


def distill_trainer(with_teacher: bool) -> Step:
    model, _ = fresh_student()
    args = TrainingArguments(output_dir=tempfile.mkdtemp(), **SETTINGS)
    data = examples(model.config.vocab_size, with_teacher)
    return step_of(DistillTrainer(model, sparse(model), args, data))


def a_teacher() -> PreTrainedModel:
    """The student, sharper: another distribution at the student's price."""
    teacher, _ = fresh_student()
    with torch.no_grad():
        teacher.model.norm.weight.mul_(1.2)
    return teacher


def readme_loop() -> Step:
    """Student and teacher run in every step, their logits never whole."""
    (model, _), teacher = fresh_student(), a_teacher()
    adapter, loss_fn = sparse(model), DistillLoss()
    optimizer = torch.optim.AdamW(trained(adapter), lr=1e-4)
    batch = collate(examples(model.config.vocab_size, with_teacher=False))
    ids, positions, labels = batch["input_ids"], batch["position_ids"], batch["labels"].view(-1)

    def step() -> None:
        with torch.no_grad():
            told = Dense(final_hidden(teacher, ids, positions), head_of(teacher).weight)
        loss_fn(final_hidden(model, ids, positions), head_of(model).weight, labels, told).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear")


def sft_trainer() -> Step:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = fresh_student()
    rows = sequences(model.config.vocab_size).tolist()
    data = Dataset.from_list([{"input_ids": ids, "labels": [IGNORE] * PROMPT + ids[PROMPT:]} for ids in rows])
    args = SFTConfig(output_dir=tempfile.mkdtemp(), bf16=False, **SETTINGS)
    return step_of(SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=lora()))


def gkd_trainer() -> Step:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    model, tokenizer = fresh_student()
    ids = sequences(model.config.vocab_size)
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "prompts": ids[:, :PROMPT]}
    args = GKDConfig(output_dir=tempfile.mkdtemp(), lmbda=0.0, beta=0.0, bf16=False, **SETTINGS)
    trainer = GKDTrainer(
        model,
        a_teacher(),
        args,
        data_collator=lambda _: dict(batch),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in ids.tolist()]),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    return step_of(trainer)


MAKERS: dict[str, dict[str, Callable[[], Step]]] = {
    "text": {
        "rbfast": lambda: distill_trainer(with_teacher=False),
        "TRL SFT": sft_trainer,
    },
    "teacher": {
        "rbfast": readme_loop,
        "rbfast, top-k from a file": lambda: distill_trainer(with_teacher=True),
        "TRL GKD": gkd_trainer,
    },
}


@pytest.mark.parametrize("signal", MAKERS)
def test_a_whole_step(benchmark: BenchmarkFixture, signal: str) -> None:
    steps = {}
    for who, make in MAKERS[signal].items():
        try:
            steps[who] = make()
        except Exception as error:
            if who.startswith("rbfast"):
                raise
            steps[who] = absent(error)
    group = f"step, {signal}, SmolLM2-135M, {SEQUENCES} x {TOKENS} tokens, {fast_dtype()}"
    race(benchmark, group, steps, ROUNDS, versions=versions(("torch", "transformers", "peft", "trl")))
