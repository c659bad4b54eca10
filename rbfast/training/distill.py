"""From traces to a trained adapter in one call: encode, place, train, save. The same call resumes an interrupted run.

```python
model, tokenizer = load_student("smollm2-135m")
run = distill(model, tokenizer, read_traces("reason1k.jsonl"), "runs/first", DistillConfig(epochs=2))
```

The folder of a run holds `run.json` (its settings and traces; at the end also its cost), the adapter, `log.json`
(losses by role, of held-out traces too), `skipped.jsonl` (traces that did not fit, with the reason), and, during
training, `checkpoints/`.
"""

import json
import math
import random
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from rbfast.adapter.adapter_files import adapter_digest
from rbfast.adapter.column_scores import ColumnScores, Method, score_columns
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.chat_template import write_prompt
from rbfast.data.encoding import Example, collate, to_device
from rbfast.data.instruction import saved_instruction
from rbfast.data.signal_store import SignalStore
from rbfast.data.spans import ROLES
from rbfast.data.trace import Trace
from rbfast.models.checkpointing import checkpointing
from rbfast.models.linears import is_sharded
from rbfast.models.student import evaluation_mode, final_hidden, packs, preserve_mode
from rbfast.training.arguments import DeviceArguments, check_trackers
from rbfast.training.batches import batches_by_tokens
from rbfast.training.checkpoints import KEPT, check_disk_space, last_checkpoint, remove_checkpoints
from rbfast.training.distill_config import SCHEDULES, DistillConfig
from rbfast.training.examples import check_items, check_positions, encode_held_out, encode_traces, instruction_of
from rbfast.training.held_out import evaluation_arguments, split_held_out, strip_timings
from rbfast.training.objective import Objective, role_counts, sums_by_role, token_losses
from rbfast.training.plan import Plan, make_plan, tokens_in
from rbfast.training.resume import check_same_folder, check_same_run, digest_records, run_settings
from rbfast.training.run_folder import LOG, RUN, SKIPPED
from rbfast.training.trainer import DistillTrainer, StopAtNaN
from rbfast.training.training_bar import TrainingBar
from rbfast.utils.files import check_output, lock_folder, write_text
from rbfast.utils.processes import is_first_process, process_count
from rbfast.utils.records import read_json


@dataclass(frozen=True)
class Run:
    """A finished run: the attached adapter, the losses by step, the traces left out with the reason, the seconds of the
    call that finished it, the number of traces trained on.

    An entry of `log_history` has `step` and `epoch`, and either `loss` and `loss_{role}` (a training step) or
    `eval_loss` and `eval_loss_{role}` (held-out traces). The loss is the objective's. The loss of a role is the mean
    cross-entropy of its tokens, in nats; in on-policy rounds their mean divergence from the teacher.
    found: the run had finished before and was only loaded. Otherwise `plan` is set, unless the base is sharded.
    """

    adapter: SparseAdapter
    log_history: list[dict[str, float]]
    skipped: list[tuple[Trace, str]]
    seconds: float
    traces: int
    found: bool = False
    plan: Plan | None = None


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    out: str | Path,
    config: DistillConfig = DistillConfig(),
    quiet: bool = False,
    *,
    signals: str | Path | None = None,
    teacher: PreTrainedModel | None = None,
    adapter: str | Path | None = None,
    held_out: Sequence[Trace] | float | None = None,
    keep_best: bool = False,
    report_to: Sequence[str] = (),
) -> Run:
    """Trains an adapter of `model` on `traces` and saves it in `out`. The model is left with the adapter attached, in
    its previous mode; after a failure or an interruption it is left unchanged.

    Called again with the same arguments, it resumes from the last checkpoint, or loads a finished run. The number of
    processes may change if an optimizer step still takes the same number of traces (docs/distributed.md).

    Args:
        signals: a folder of log-probs that `rbfast teach` wrote, or its parent. Traces without log-probs are trained on
            their text; a warning counts them.
        teacher: a model with the student's vocabulary that runs beside it, for tokens without signals.
        adapter: the folder or hub id of a trained adapter of this model to continue from, instead of a new one. It
            keeps its shape and columns, so the config must not set them. AdamW and the schedule start over.
        held_out: traces to measure the loss on, before the first step, at every checkpoint and at the end; or the share
            of the problems in `traces` to measure instead of training on them.
        keep_best: end with the adapter of the checkpoint with the lowest held-out loss, not the last one.
        report_to: trackers that get the losses as they are logged, by transformers' names ("wandb", "tensorboard").

    Raises:
        ValueError: no trace fits `max_tokens`, or one is longer than the model's position table; `signals` covers none
            of the traces; `out` holds a run with other settings, model, traces or teacher, or a damaged file, or is not
            the same folder on all processes, or another run writes into it; `held_out` leaves no trace to train on or
            to measure; `keep_best` is set without `held_out`; a gradient is NaN or infinite.
        TypeError: `traces` or `held_out` holds something other than Trace, or is a file name.
        OSError: the disk has no room for the checkpoints.
        ImportError: a tracker is not installed.
        RuntimeError: another thread of this process is training.
    """
    out, start = Path(out), time.monotonic()
    if keep_best and held_out is None:
        raise ValueError("keep_best compares checkpoints by the loss of held-out traces: give held_out too")
    check_trackers(report_to)
    check_items(traces, Trace, "read_traces")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher must be a model, got {type(teacher).__name__}: pass the log-probs of a function as the traces' "
            "signals, or to DistillLoss in a loop of your own"
        )
    config = with_instruction(config, adapter, model)
    traces, eval_traces = split_held_out(traces, held_out, config.seed)
    examples, skipped = encode_traces(traces, tokenizer, config, quiet)
    eval_examples = encode_held_out(eval_traces, tokenizer, config)
    check_positions(model, [*examples, *eval_examples])
    settings: dict[str, Any] = {"traces": len(traces), "traces_digest": digest_records(map(Trace.to_dict, traces))}
    if eval_traces:
        digest = digest_records(map(Trace.to_dict, eval_traces))
        settings |= {"held_out": {"traces": len(eval_traces), "digest": digest, "keep_best": keep_best}}
    if signals is not None:
        otherwise = "their text alone" if teacher is None else "the running teacher"
        settings |= {"signals": _add_signals(examples, eval_examples, signals, otherwise)}
    data = TrainingData(
        examples, eval_examples, skipped, settings, shared_system_prompt(trace.system for trace in traces)
    )
    return train_examples(
        model,
        tokenizer,
        data,
        out,
        config,
        quiet,
        teacher=teacher,
        adapter=adapter,
        keep_best=keep_best,
        report_to=report_to,
        start=start,
    )


@dataclass(frozen=True)
class TrainingData:
    """The encoded examples of a run.

    settings: their description in run.json. system: the system prompt that all share. is_on_policy: the student wrote
    them, so the logged loss of a role is its divergence: its cross-entropy would not show what the student learns.
    cache: the bytes of the key-value cache while it writes them.
    """

    examples: Sequence[Example]
    held_out: Sequence[Example]
    skipped: list[tuple[Trace, str]]
    settings: dict[str, Any]
    system: str = ""
    is_on_policy: bool = False
    cache: int = 0


def train_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    out: Path,
    config: DistillConfig,
    quiet: bool = False,
    *,
    teacher: PreTrainedModel | None = None,
    adapter: str | Path | None = None,
    keep_best: bool = False,
    report_to: Sequence[str] = (),
    progress: TrainingBar | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    start: float,
) -> Run:
    """The training of `distill`, on encoded examples. callbacks: the trainer calls them after `progress`. start:
    `time.monotonic()` at the start of the call."""
    is_first = is_first_process()  # all processes share the folder, and only the first one writes
    examples = data.examples
    settings = run_settings(model, asdict(config)) | data.settings
    if teacher is not None:
        settings |= {"teacher": teacher.config.name_or_path}
    if adapter is not None:
        settings |= {"adapter": _starting_adapter_digest(adapter, config, out)}
    check_same_run(out, settings)
    # A run that was killed while it removed its checkpoints is finished, but may have left a partial one.
    checkpoint = None if (out / LOG).exists() else last_checkpoint(out / "checkpoints")
    reporting = {"report_to": list(report_to) or "none", "run_name": out.name}
    if data.held_out:
        reporting |= evaluation_arguments(config.save_steps, keep_best, from_start=checkpoint is None)
    arguments = _training_arguments(out, model, config, examples, reporting)  # from here on the processes are connected
    check_same_folder(out, checkpoint)
    if (history := read_json(out / LOG, [{"step": int}])) is not None:
        return _load_finished_run(model, out, history, data.skipped, len(examples))
    if is_first:  # before the long part: fail early if the folder is not writable
        check_output(out, folder=True)
    trained = _attach_adapter(model, examples, config, teacher, checkpoint or adapter)
    with preserve_mode(model), _detach_on_failure(trained), lock_folder(out) if is_first else nullcontext():
        if is_first:  # not earlier: a run that fails to start must not tie its folder to its settings
            write_text(out / RUN, json.dumps(settings, indent=1))
            write_prompt(out, tokenizer, replace(instruction_of(tokenizer, config), system=data.system))
            check_disk_space(out, sum(parameter.numel() for parameter in trained.parameters()))
        plan = None if is_sharded(model) else _plan_batches(model, trained, data, config, teacher)
        if is_first and not quiet and plan is not None:
            print(plan, file=sys.stderr)
        progress = progress or TrainingBar(quiet or not is_first)
        trainer = _make_trainer(model, trained, arguments, data, config, teacher, [progress, *callbacks])
        with closing(progress), checkpointing(model) if config.gradient_checkpointing else nullcontext():
            trainer.train(resume_from_checkpoint=checkpoint)
        history = [strip_timings(entry) for entry in trainer.state.log_history if {"loss", "eval_loss"} & entry.keys()]
        run = Run(trained, history, data.skipped, time.monotonic() - start, len(examples), plan=plan)
        if is_first:
            _save(run, out, settings, examples, resumed=checkpoint is not None)
        trainer.accelerator.wait_for_everyone()
        return run


def _load_finished_run(
    model: PreTrainedModel,
    out: Path,
    history: list[dict[str, float]],
    skipped: list[tuple[Trace, str]],
    traces: int,
) -> Run:
    """Loads a finished run and attaches its adapter."""
    cost = read_json(out / RUN, {"seconds": (int, float)}) or {"seconds": 0.0}  # the file may have been removed
    trained = SparseAdapter.from_pretrained(model, out)
    if is_first_process():
        remove_checkpoints(out / "checkpoints")  # left if the run was killed while removing them
    return Run(trained, history, skipped, cost["seconds"], traces, found=True)


@contextmanager
def _detach_on_failure(adapter: SparseAdapter) -> Iterator[None]:
    """Detaches the adapter if the block fails: a run cannot resume on a model with an adapter attached."""
    try:
        yield
    except BaseException:  # a KeyboardInterrupt too: in a notebook the model lives on
        adapter.detach()
        raise


def plan_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    config: DistillConfig = DistillConfig(),
    quiet: bool = False,
    *,
    teacher: PreTrainedModel | None = None,
    adapter: str | Path | None = None,
    held_out: Sequence[Trace] | float | None = None,
) -> Plan:
    """The resources that `distill` would need with these arguments. Trains nothing. Raises ValueError as `distill` does
    for traces that do not fit."""
    check_items(traces, Trace, "read_traces")
    config = with_instruction(config, adapter, model)
    traces, eval_traces = split_held_out(traces, held_out, config.seed)
    examples, skipped = encode_traces(traces, tokenizer, config, quiet)
    check_positions(model, [*examples, *encode_held_out(eval_traces, tokenizer, config)])
    return plan_examples(model, TrainingData(examples, [], skipped, {}), config, teacher, adapter)


def plan_examples(
    model: PreTrainedModel,
    data: TrainingData,
    config: DistillConfig,
    teacher: PreTrainedModel | None = None,
    adapter: str | Path | None = None,
) -> Plan:
    """The resources that `train_examples` would need with these arguments."""
    if adapter is not None:
        _check_no_shape_options(config, adapter)
    attached = _attach_adapter(model, data.examples, replace(config, placement="random"), teacher, adapter)
    scored = 0
    if config.placement in ("gradient", "factored"):
        scored = max(map(tokens_in, _scored_batches(data.examples, config)))
    try:
        return _plan_batches(model, attached, data, config, teacher, scored)
    finally:
        attached.detach()


def _plan_batches(
    model: PreTrainedModel,
    adapter: SparseAdapter,
    data: TrainingData,
    config: DistillConfig,
    teacher: PreTrainedModel | None,
    scored: int = 0,
) -> Plan:
    """The plan of a run. Without tokens_per_batch it batches the longest traces together, which is the worst case.

    scored: as in `make_plan`; 0 once the columns are placed.
    """
    examples = data.examples
    if config.tokens_per_batch is None:
        examples = sorted(examples, key=lambda one: -len(one.input_ids))
    batches, left_out = _batches(examples, config), len(data.skipped)
    return make_plan(model, adapter, batches, config.gradient_checkpointing, teacher, left_out, data.cache, scored)


def with_instruction(config: DistillConfig, adapter: str | Path | None, model: PreTrainedModel) -> DistillConfig:
    """The config with the instruction that the adapter or the model was trained with, unless it sets its own."""
    if config.instruction is not None:
        return config
    saved = saved_instruction(adapter, model.config.name_or_path)
    return config if saved is None else replace(config, instruction=saved.text or "none")


def shared_system_prompt(systems: Iterable[str | None]) -> str:
    """The system prompt of a whole run, which inference needs too; empty if the prompts of its examples differ."""
    distinct = {system or "" for system in systems}
    return distinct.pop() if len(distinct) == 1 else ""


def _batches(examples: Sequence[Example], config: DistillConfig) -> list[Sequence[Example]]:
    if config.tokens_per_batch is not None:
        return [*batches_by_tokens(examples, config.tokens_per_batch, config.seed)]
    return [examples[start : start + config.batch_size] for start in range(0, len(examples), config.batch_size)]


def _make_trainer(
    model: PreTrainedModel,
    adapter: SparseAdapter,
    arguments: TrainingArguments,
    data: TrainingData,
    config: DistillConfig,
    teacher: PreTrainedModel | None,
    callbacks: Sequence[TrainerCallback],
) -> DistillTrainer:
    """The trainer, without the lines and the bar that a Trainer prints."""
    trainer = DistillTrainer(
        model,
        adapter,
        arguments,
        data.examples,
        data.held_out or None,
        objective=config.objective,
        teacher=teacher,
        tokens_per_batch=config.tokens_per_batch,
        logs_divergence=data.is_on_policy,
        callbacks=[*callbacks, StopAtNaN()],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _save(run: Run, out: Path, settings: dict[str, Any], examples: Sequence[Example], resumed: bool) -> None:
    """Writes the adapter, the log and the cost of the run, then removes its checkpoints."""
    run.adapter.save_pretrained(out)
    reasons = (json.dumps(trace.to_dict() | {"reason": why}) + "\n" for trace, why in run.skipped)
    write_text(out / SKIPPED, "".join(reasons))
    cost = {
        "trainable_percent": run.adapter.trainable_percent,
        "tokens_per_epoch": sum(len(example.input_ids) for example in examples),
        "seconds": run.seconds,
        "resumed": resumed,
        "plan": None if run.plan is None else run.plan.to_dict(),
    }
    write_text(out / RUN, json.dumps(settings | cost, indent=1))
    write_text(out / LOG, json.dumps(run.log_history, indent=1, sort_keys=True))  # last: it marks the run as finished
    remove_checkpoints(out / "checkpoints")


def trace_loss(model: PreTrainedModel, examples: Sequence[Example], batch_size: int = 8) -> dict[str, float]:
    """Mean cross-entropy per token of encoded traces, in nats: for each role, and over all tokens as `mean`. Runs the
    model in evaluation mode."""
    objective, totals = Objective(), torch.zeros(2, len(ROLES), dtype=torch.float64, device="cpu")
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = to_device(collate(examples[start : start + batch_size]), model.device)
            hidden = final_hidden(model, batch["input_ids"], batch["position_ids"], batch["lengths"])
            ce = token_losses(model, hidden, batch, torch.ones(len(ROLES), device=hidden.device), objective).ce
            totals += sums_by_role(batch, ce).cpu()
    sums, counts = totals
    losses = {name: (sums[i] / counts[i]).item() for i, name in enumerate(ROLES)}
    return losses | {"mean": (sums.sum() / counts.sum()).item()}


def placement_scores(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: DistillConfig,
    method: Method = "gradient",
    teacher: PreTrainedModel | None = None,
) -> ColumnScores:
    """Column scores by the gradient of the objective, measured on a seeded sample of the traces."""
    batches = list(map(collate, _scored_batches(examples, config)))

    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        batch = to_device(batch, model.device)
        weights = config.objective.weights(0.0).to(model.device) / role_counts(batch).clamp(min=1)
        hidden = final_hidden(model, batch["input_ids"], batch["position_ids"], batch["lengths"])
        return token_losses(model, hidden, batch, weights, config.objective, teacher).loss

    packs(model)  # before scoring, which must not see its two test examples
    with checkpointing(model) if config.gradient_checkpointing else nullcontext():
        return score_columns(model, batches, loss, method=method, targets=config.targets)


def _scored_batches(examples: Sequence[Example], config: DistillConfig) -> list[Sequence[Example]]:
    chosen = random.Random(config.seed).sample(examples, min(config.placement_traces, len(examples)))
    return _batches(chosen, config)


def _add_signals(
    examples: Sequence[Example], eval_examples: Sequence[Example], signals: str | Path, otherwise: str
) -> dict[str, Any]:
    """Adds signals to the examples. Returns the signals' teacher, their k and how many training traces have them, for
    run.json. Warns of training traces without any."""
    subfolder = Path(signals) / "signals"  # of the folder that `rbfast teach -o` was given
    store = SignalStore.open(subfolder if subfolder.is_dir() else signals)
    missing = len(store.fill(examples))
    store.fill(eval_examples)
    if missing == len(examples):
        raise ValueError(
            f"{signals} holds log-probs of none of the {len(examples)} traces, which are looked up by token: use a "
            "folder made for these traces and this student's tokenizer"
        )
    without = sum(example.teacher_ids is None for example in examples)  # a trace may have its own
    if without and is_first_process():
        warnings.warn(
            f"{without} of {len(examples)} traces have no log-probs in {signals}: they learn from {otherwise}",
            stacklevel=3,
        )
    return {"teacher": store.teacher, "k": store.k, "traces": len(examples) - missing}


def _starting_adapter_digest(adapter: str | Path, config: DistillConfig, out: Path) -> str:
    _check_no_shape_options(config, adapter)
    if Path(adapter).resolve() == out.resolve():
        raise ValueError(f"{out} holds the adapter to continue from, which the run would replace; name another folder")
    return adapter_digest(adapter)


def _check_no_shape_options(config: DistillConfig, adapter: str | Path) -> None:
    """Raises ValueError if the config sets the shape of a new adapter, but the run continues from a saved one."""
    for name in ("density", "rank", "support", "targets", "placement"):
        if getattr(config, name) != getattr(DistillConfig, name):
            raise ValueError(f"{name} is for a new adapter, but the one in {adapter} has its own: give one of the two")


def _attach_adapter(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: DistillConfig,
    teacher: PreTrainedModel | None,
    saved: str | Path | None,
) -> SparseAdapter:
    """The adapter saved in a folder, or a new one."""
    if saved is not None:
        return SparseAdapter.from_pretrained(model, saved)
    placement: str | ColumnScores = "random"
    if config.placement != "random":
        placement = placement_scores(model, examples, config, config.placement, teacher)
    return SparseAdapter.attach(
        model,
        config.density,
        support=config.support,
        rank=config.rank,
        targets=config.targets,
        placement=placement,
        seed=config.seed,
    )


def _training_arguments(
    out: Path, model: PreTrainedModel, config: DistillConfig, examples: Sequence[Example], others: dict[str, Any]
) -> TrainingArguments:
    per_step = config.accumulation * process_count()
    steps = math.ceil(len(_batches(examples, config)) / per_step) * config.epochs
    return DeviceArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        # The first warmup step has a learning rate of 0, so a run with only one such step skips the warmup.
        warmup_steps=config.warmup if config.warmup * steps > 1 else 0,
        lr_scheduler_type=SCHEDULES[config.schedule],
        weight_decay=0.0,
        logging_steps=1,
        save_steps=config.save_steps,
        save_total_limit=KEPT,
        seed=config.seed,
        train_device=str(model.device),
        dataloader_pin_memory=False,
        ddp_broadcast_buffers=False,  # the buffers are the same on every process and do not change
        ddp_find_unused_parameters=False,
        **others,
    )
