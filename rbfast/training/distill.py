"""From traces to a trained adapter in one call: encode, place, train, save. The same call resumes an interrupted run.

```python
model, tokenizer = load_student("smollm2-135m")
run = distill(model, tokenizer, read_traces("reason1k.jsonl"), "runs/first", DistillConfig(epochs=2))
```

The folder of a run holds `run.json` (its settings and traces; in the end what it cost), the adapter, `log.json`
(losses by role, of held-out traces too), `skipped.jsonl` (traces that did not fit, with the reason), and `checkpoints/`
while it is under way.
"""

import json
import math
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rbfast.adapter.adapter_files import adapter_digest
from rbfast.adapter.column_scores import METHODS, ColumnScores, Method, score_columns
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.chat_template import default_instruction, write_prompt
from rbfast.data.encoding import Example, collate, encode_all, to_device
from rbfast.data.instruction import Instruction, instruction_named
from rbfast.data.signal_store import SignalStore
from rbfast.data.spans import ROLES
from rbfast.data.trace import Trace
from rbfast.models.checkpointing import checkpointing
from rbfast.models.linears import is_sharded
from rbfast.models.student import evaluation_mode, final_hidden, mode_kept, packs, rotary_embeddings
from rbfast.training.arguments import DeviceArguments, check_trackers
from rbfast.training.batches import batches_by_tokens
from rbfast.training.checkpoints import KEPT, check_room, last_checkpoint, remove_checkpoints
from rbfast.training.held_out import measuring, part, without_times
from rbfast.training.objective import Objective, role_counts, sums_by_role, token_losses
from rbfast.training.plan import Plan, make_plan
from rbfast.training.resume import asked_of, check_same_folder, check_same_run, digest_of
from rbfast.training.run_folder import LOG, RUN, SKIPPED
from rbfast.training.trainer import DistillTrainer, StopAtNaN
from rbfast.training.training_bar import Bar
from rbfast.utils.files import write_text
from rbfast.utils.processes import is_first_process, process_count
from rbfast.utils.records import check_numbers, read_json, show

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # as transformers names them


@dataclass(frozen=True)
class DistillConfig:
    """What a run depends on, besides the model and the traces.

    Attributes:
        density: trainable values / all parameters of the base, at most.
        rank, support: the shape of each delta; None leaves the split of the budget to the adapter.
        placement: "random", or by scores from `placement_traces` traces: "gradient", "factored", "activation"
            (docs/training.md).
        batch_size, accumulation: traces per batch, and batches per optimizer step, of each process.
        tokens_per_batch: in place of batch_size, as many traces as have so many tokens together, at most; a longer one
            is alone in its batch.
        gradient_checkpointing: keep only what goes into a layer, and run the layer again for its backward.
        warmup: the share of the steps before the peak learning rate.
        schedule: how the learning rate falls from its peak: to zero along a line or a cosine, or not at all.
        max_tokens: longer traces are left out and listed, never cut.
        instruction: what a prompt says after the problem: "answer", "boxed", "none" or a text; None is "boxed" for a
            student whose chat template thinks, else "answer".
        turns: "last" trains the last reply of a conversation, "all" every reply.

    Raises:
        TypeError: a field that must be a number is none.
        ValueError: a number out of its range, or an unknown placement.
    """

    density: float = 0.003
    rank: int | None = None
    support: int | None = None
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
        if not 0 <= self.seed < 2**32:  # what NumPy takes
            raise ValueError(f"seed must be at least 0 and below 2**32, got {self.seed}")
        if self.placement not in (*METHODS, "random"):
            raise ValueError(f"placement must be one of {', '.join(METHODS)} or random, got {self.placement!r}")
        if self.turns not in ("last", "all"):
            raise ValueError(f"turns must be last or all, got {self.turns!r}")
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {self.schedule!r}")


@dataclass(frozen=True)
class Run:
    """A finished run: the attached adapter, the losses by step, the traces left out with the reason, the time spent
    on training (by the call that finished it), how many traces were trained on.

    An entry of `log_history` has `step` and `epoch`, and `loss` with `loss_{role}` of a training step or `eval_loss`
    with `eval_loss_{role}` of the held-out traces. The loss is the objective's, that of a role its tokens' mean
    cross-entropy in nats.
    `found` says that it was finished before, and only loaded; else there is the `plan`, if the base is not sharded.
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
    """Trains an adapter of `model` on `traces` and saves it in `out`; the model is left with the adapter attached, in
    the mode that it came in. After a failure or an interruption it is left as it came.

    Called again with the same arguments it resumes from the last checkpoint, or loads a finished run. It may
    resume under another number of processes, if an optimizer step takes as many traces as before (docs/distributed.md).

    Args:
        signals: a folder of log-probs that `rbfast teach` wrote, or the one that it is in; traces that it lacks teach
            by their text, and a warning says how many they are.
        teacher: a model with the student's tokens, run beside it, for tokens without signals.
        adapter: the folder of a trained adapter of this model to go on with, in place of a new one. It has a shape and
            columns of its own, so the config may name none. AdamW and the schedule begin anew.
        held_out: traces whose loss is measured before the first step, at every checkpoint and at the end; or the share
            of the problems in `traces` whose traces are measured, and not trained on.
        keep_best: end with the adapter of the checkpoint whose held-out loss was least, not with the last one.
        report_to: trackers that get the losses as they are logged, by transformers' names ("wandb", "tensorboard").

    Raises:
        ValueError: no trace fits `max_tokens`, or one is longer than the model's table of positions; `signals` holds
            none of them, `out` holds a run with other settings, model, traces or teacher, or a file that is broken, or
            it is not the same folder for all processes; `held_out` leaves none to train on or to measure, or there is
            `keep_best` without it; a gradient is NaN or infinite.
        TypeError: `traces` holds something else, or is the name of a file.
        OSError: the disk has no room for the checkpoints.
        ImportError: a tracker is not installed.
    """
    out, start = Path(out), time.monotonic()
    if keep_best and held_out is None:
        raise ValueError("keep_best compares checkpoints by the loss of held-out traces: give held_out too")
    check_trackers(report_to)
    first = is_first_process()  # of the processes, which share the folder
    _check_traces(traces)
    traces, measured = part(traces, held_out, config.seed)
    examples, skipped = _encoded(traces, tokenizer, config)
    measured_examples = _encoded_held_out(measured, tokenizer, config)
    _check_positions(model, [*examples, *measured_examples])
    asked = asked_of(model, traces, asdict(config))
    if measured:
        asked |= {"held_out": {"traces": len(measured), "digest": digest_of(measured), "keep_best": keep_best}}
    if signals is not None:
        otherwise = "their text alone" if teacher is None else "the running teacher"
        asked |= {"signals": _fill(examples, measured_examples, signals, otherwise)}
    if teacher is not None:
        asked |= {"teacher": teacher.config.name_or_path}
    if adapter is not None:
        asked |= {"adapter": _digest_to_go_on_with(adapter, config, out)}
    check_same_run(out, asked)
    checkpoint = last_checkpoint(out / "checkpoints")
    reporting = {"report_to": list(report_to) or "none", "run_name": out.name}
    if measured:
        reporting |= measuring(config.save_steps, keep_best, from_start=checkpoint is None)
    arguments = _arguments(out, model, config, examples, reporting)  # from here on the processes are connected
    check_same_folder(out, checkpoint)
    if (history := read_json(out / LOG, [{"step": int}])) is not None:
        return _found(model, out, history, skipped, len(examples))
    if first:  # before the long part, which a folder that cannot be written to would waste
        write_text(out / RUN, json.dumps(asked, indent=1))
        write_prompt(out, tokenizer, replace(_instruction(tokenizer, config), system=_shared_system(traces)))
    trained = _attach_adapter(model, examples, config, teacher, checkpoint or adapter)
    with mode_kept(model), _detached_on_failure(trained):
        if first:
            check_room(out, sum(parameter.numel() for parameter in trained.parameters()))
        plan = None if is_sharded(model) else _plan(model, trained, examples, len(skipped), config, teacher)
        if first and not quiet and plan is not None:
            print(plan, file=sys.stderr)
        progress = Bar(quiet or not first)
        trainer = _trainer(model, trained, arguments, examples, measured_examples, config, teacher, progress)
        with closing(progress), checkpointing(model) if config.gradient_checkpointing else nullcontext():
            trainer.train(resume_from_checkpoint=checkpoint)
        history = [without_times(entry) for entry in trainer.state.log_history if {"loss", "eval_loss"} & entry.keys()]
        run = Run(trained, history, skipped, time.monotonic() - start, len(examples), plan=plan)
        if first:
            _save(run, out, asked, examples, resumed=checkpoint is not None)
        trainer.accelerator.wait_for_everyone()
        return run


def _found(
    model: PreTrainedModel,
    out: Path,
    history: list[dict[str, float]],
    skipped: list[tuple[Trace, str]],
    traces: int,
) -> Run:
    """A run that is finished, with its adapter attached."""
    cost = read_json(out / RUN, {"seconds": (int, float)}) or {"seconds": 0.0}  # the file may have been removed
    trained = SparseAdapter.from_pretrained(model, out)
    if is_first_process():
        remove_checkpoints(out / "checkpoints")  # of a run that was killed while it removed them
    return Run(trained, history, skipped, cost["seconds"], traces, found=True)


@contextmanager
def _detached_on_failure(adapter: SparseAdapter) -> Iterator[None]:
    """A model with an adapter attached could not resume its run."""
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
    teacher: PreTrainedModel | None = None,
    adapter: str | Path | None = None,
    held_out: Sequence[Trace] | float | None = None,
) -> Plan:
    """What `distill` would take with these arguments; nothing is trained. Raises ValueError as it does for traces that
    do not fit."""
    _check_traces(traces)
    traces, _ = part(traces, held_out, config.seed)
    examples, skipped = _encoded(traces, tokenizer, config)
    _check_positions(model, examples)
    if adapter is not None:
        _check_shape_is_free(config, adapter)
    attached = _attach_adapter(model, examples, replace(config, placement="random"), teacher, adapter)
    try:
        return _plan(model, attached, examples, len(skipped), config, teacher)
    finally:
        attached.detach()


def _plan(
    model: PreTrainedModel,
    adapter: SparseAdapter,
    examples: Sequence[Example],
    left_out: int,
    config: DistillConfig,
    teacher: PreTrainedModel | None,
) -> Plan:
    """With batches as large as any that are trained (of so many tokens: those)."""
    if config.tokens_per_batch is None:
        examples = sorted(examples, key=lambda one: -len(one.input_ids))
    return make_plan(model, adapter, _batches(examples, config), config.gradient_checkpointing, teacher, left_out)


def _check_traces(traces: object) -> None:
    given = [traces] if isinstance(traces, str | Path) else traces
    for other in (trace for trace in given if not isinstance(trace, Trace)):  # type: ignore[attr-defined]
        raise TypeError(f"expected a list of Trace, got {show(other)}: read_traces(FILE) reads one from a file")


def _encoded(
    traces: Sequence[Trace], tokenizer: PreTrainedTokenizerBase, config: DistillConfig
) -> tuple[list[Example], list[tuple[Trace, str]]]:
    examples, skipped = encode_all(
        traces,
        tokenizer,
        max_tokens=config.max_tokens,
        instruction=_instruction(tokenizer, config),
        turns=config.turns,
    )
    if not examples:
        raise ValueError(f"none of the {len(traces)} traces can be trained on{_first_reason(skipped)}")
    return examples, skipped


def _encoded_held_out(
    traces: Sequence[Trace], tokenizer: PreTrainedTokenizerBase, config: DistillConfig
) -> list[Example]:
    """Warns of traces that are not measured."""
    if not traces:
        return []
    examples, skipped = _encoded(traces, tokenizer, config)
    if skipped and is_first_process():
        warnings.warn(
            f"{len(skipped)} of {len(traces)} held-out traces are not measured{_first_reason(skipped)}", stacklevel=3
        )
    return examples


def _check_positions(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Raises ValueError for an example that is longer than the model's table of positions, if it has one (GPT-2, OPT):
    the run would fail where that example comes. Warns of one that is longer than the model was made for."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(len(example.input_ids) for example in examples)
    if limit is None or longest <= limit:
        return
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not model.get_input_embeddings())
    if any(0 <= table.num_embeddings - limit <= 2 for table in tables):  # OPT's table has two rows more
        raise ValueError(
            f"the longest trace has {longest} tokens, and {type(model).__name__} has {limit} positions: "
            f"set max_tokens (--max-tokens) to {limit}, which leaves longer traces out"
        )
    if all(rope["rope_type"] == "default" for rope in rotary_embeddings(config)):  # others stretch the positions
        beyond = sum(len(example.input_ids) > limit for example in examples)
        warnings.warn(
            f"{beyond} of {len(examples)} traces are longer than the {limit} positions that this model was made for "
            f"(max_position_embeddings; the longest has {longest} tokens): it may write worse beyond them; max_tokens "
            f"(--max-tokens) {limit} leaves them out",
            stacklevel=3,
        )


def _instruction(tokenizer: PreTrainedTokenizerBase, config: DistillConfig) -> Instruction:
    return default_instruction(tokenizer) if config.instruction is None else instruction_named(config.instruction)


def _shared_system(traces: Sequence[Trace]) -> str:
    """The system prompt of all traces, which inference then needs too; empty if they differ."""
    systems = {trace.system or "" for trace in traces}
    return systems.pop() if len(systems) == 1 else ""


def _batches(examples: Sequence[Example], config: DistillConfig) -> list[Sequence[Example]]:
    if config.tokens_per_batch is not None:
        return [*batches_by_tokens(examples, config.tokens_per_batch, config.seed)]
    return [examples[start : start + config.batch_size] for start in range(0, len(examples), config.batch_size)]


def _trainer(
    model: PreTrainedModel,
    adapter: SparseAdapter,
    arguments: TrainingArguments,
    examples: Sequence[Example],
    measured: Sequence[Example],
    config: DistillConfig,
    teacher: PreTrainedModel | None,
    progress: Bar,
) -> DistillTrainer:
    """The trainer, with our bar in place of its printed lines."""
    trainer = DistillTrainer(
        model,
        adapter,
        arguments,
        examples,
        measured or None,
        objective=config.objective,
        teacher=teacher,
        tokens_per_batch=config.tokens_per_batch,
        callbacks=[progress, StopAtNaN()],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _save(run: Run, out: Path, asked: dict[str, Any], examples: Sequence[Example], resumed: bool) -> None:
    """Writes the adapter and what became of the run; its checkpoints go."""
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
    write_text(out / RUN, json.dumps(asked | cost, indent=1))
    write_text(out / LOG, json.dumps(run.log_history, indent=1, sort_keys=True))  # last: it ends the run
    remove_checkpoints(out / "checkpoints")


def trace_loss(model: PreTrainedModel, examples: Sequence[Example], batch_size: int = 8) -> dict[str, float]:
    """Mean cross-entropy per token of encoded traces, in nats: over each role, and over all tokens as `mean`. The model
    is in evaluation mode meanwhile."""
    objective, found = Objective(), torch.zeros(2, len(ROLES), dtype=torch.float64)
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = to_device(collate(examples[start : start + batch_size]), model.device)
            hidden = final_hidden(model, batch["input_ids"], batch["position_ids"], batch["lengths"])
            ce = token_losses(model, hidden, batch, torch.ones(len(ROLES)), objective).ce
            found += sums_by_role(batch, ce).cpu()
    sums, counts = found
    losses = {name: (sums[i] / counts[i]).item() for i, name in enumerate(ROLES)}
    return losses | {"mean": (sums.sum() / counts.sum()).item()}


def placement_scores(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: DistillConfig,
    method: Method = "gradient",
    teacher: PreTrainedModel | None = None,
) -> ColumnScores:
    """Where the gradient of the objective is, measured on a seeded sample of the traces."""
    chosen = random.Random(config.seed).sample(examples, min(config.placement_traces, len(examples)))
    batches = [collate(batch) for batch in _batches(chosen, config)]

    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        batch = to_device(batch, model.device)
        weights = config.objective.weights(0.0).to(model.device) / role_counts(batch).clamp(min=1)
        hidden = final_hidden(model, batch["input_ids"], batch["position_ids"], batch["lengths"])
        return token_losses(model, hidden, batch, weights, config.objective, teacher).loss

    packs(model)  # now, before scoring: its two examples are no traces
    with checkpointing(model) if config.gradient_checkpointing else nullcontext():
        return score_columns(model, batches, loss, method=method)


def _fill(
    examples: Sequence[Example], measured: Sequence[Example], signals: str | Path, otherwise: str
) -> dict[str, Any]:
    """Gives the examples their signals; says whose they are, and of how many that are trained on. Warns of those of
    these that have none."""
    within = Path(signals) / "signals"  # of the folder that `rbfast teach -o` was given
    store = SignalStore.open(within if within.is_dir() else signals)
    missing = len(store.fill(examples))
    store.fill(measured)
    if missing == len(examples):
        raise ValueError(
            f"{signals} holds log-probs of none of the {len(examples)} traces, which are looked up by token; "
            "was it made for other traces, or for a student with another tokenizer?"
        )
    without = sum(example.teacher_ids is None for example in examples)  # a trace may bring its own
    if without and is_first_process():
        warnings.warn(
            f"{without} of {len(examples)} traces have no log-probs in {signals}: they learn from {otherwise}",
            stacklevel=3,
        )
    return {"teacher": store.teacher, "k": store.k, "traces": len(examples) - missing}


def _digest_to_go_on_with(adapter: str | Path, config: DistillConfig, out: Path) -> str:
    _check_shape_is_free(config, adapter)
    if Path(adapter).resolve() == out.resolve():
        raise ValueError(f"{out} holds the adapter to go on with, which the run would replace; name another folder")
    return adapter_digest(adapter)


def _check_shape_is_free(config: DistillConfig, adapter: str | Path) -> None:
    """Raises ValueError for a config that would shape a new adapter, while a run goes on with a saved one."""
    for name in ("density", "rank", "support", "placement"):
        if getattr(config, name) != getattr(DistillConfig, name):
            raise ValueError(f"{name} is for a new adapter, the one in {adapter} has its own; name one of the two")


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
    method = config.placement
    start = "random" if method == "random" else placement_scores(model, examples, config, method, teacher)
    return SparseAdapter.attach(
        model, config.density, support=config.support, rank=config.rank, placement=start, seed=config.seed
    )


def _arguments(
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
        # The first step of a warmup has a rate of 0: a run too short for more than that does without.
        warmup_steps=config.warmup if config.warmup * steps > 1 else 0,
        lr_scheduler_type=_SCHEDULES[config.schedule],
        weight_decay=0.0,
        logging_steps=1,
        save_steps=config.save_steps,
        save_total_limit=KEPT,
        seed=config.seed,
        train_device=str(model.device),
        dataloader_pin_memory=False,
        ddp_broadcast_buffers=False,  # every process has the same, and they do not change
        ddp_find_unused_parameters=False,
        **others,
    )


def _first_reason(skipped: Sequence[tuple[Trace, str]]) -> str:
    return f"; the first: {skipped[0][1]}" if skipped else ""
