"""A minimal trainer: transformers.Trainer with the hierarchical objective, an adapter, and padding-free batches.

    examples, left_out = encode_all(traces, tokenizer)                       # of rbfast.data.encoding
    trainer = DistillTrainer(model, adapter, args, train_dataset=examples)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))   # of rbfast.training.checkpoints

The objective is L = l_S mean_S + l_T mean_T + l_A mean_A over strategic, tactical and answer tokens, with denominators
that are global over the accumulated batch and over all processes. The forward stops at the last hidden state: full
logits never exist (see `rbfast.loss.distill_loss`).
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from rbfast.adapter.adapter_files import read_adapter
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import Example, mask_targets_from
from rbfast.data.spans import ROLES
from rbfast.models.linears import is_sharded
from rbfast.models.student import final_hidden
from rbfast.training.batches import batches_by_tokens, collate_items
from rbfast.training.checkpoints import UNFINISHED, checkpoints_in, write_digests
from rbfast.training.objective import Objective, role_counts, sums_by_role, token_losses
from rbfast.utils.memory import give_back

_WRITERS = "PytorchStreamWriter", "inline_container.cc"  # torch.save's, which tell of a full disk each in its words
_IDLE = "compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"  # a Trainer's, that we never call
_IDLE_ARGS = "label_smoothing_factor", "neftune_noise_alpha"
_GIVE_BACK_EVERY = 8  # steps
_MOST_WEIGHT = 4096.0  # of a token's loss in an fp16 student, whose greatest number is 65504


class Student(nn.Module):
    """Base model and adapter as one module whose parameters are the adapter's: what optimizers, clipping and DDP find.

    The frozen base is no submodule: a Trainer walks over all parameters several times a step, and DDP copies what it
    finds.
    """

    model: PreTrainedModel
    accepts_loss_kwargs = True  # our loss divides by counts that already span the accumulated batch

    def __init__(self, model: PreTrainedModel, adapter: SparseAdapter) -> None:
        super().__init__()
        self.adapter, self.config = adapter, model.config
        self.__dict__["model"] = model
        self._trained = list(adapter.parameters())

    def forward(self, input_ids: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Last hidden states [T, H] of a packed row [1, T]."""
        return final_hidden(self.model, input_ids, position_ids, lengths)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Found once: a Trainer asks for them several times a step, and an adapter has two modules a matrix."""
        return iter(self._trained) if recurse else super().parameters(recurse)

    def train(self, mode: bool = True) -> "Student":
        if self.model.training != mode:
            self.model.train(mode)
        return self if self.training == mode else super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Student":
        """Moves the base too, as `to(device)` and the like do to a submodule; a sharded one stays where it is."""
        if not is_sharded(self.model):
            self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Of the base; up to transformers 5.22 the Trainer reads this name of the module that it trains."""
        self.model.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self.model.activation_checkpointing_enable(**kwargs)


class DistillTrainer(Trainer):
    """Trains the adapter of a frozen model on encoded traces; logs the loss of each role; checkpoints are atomic."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: SparseAdapter,
        args: TrainingArguments,
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example] | None = None,
        objective: Objective | None = None,
        teacher: PreTrainedModel | None = None,
        tokens_per_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        """`tokens_per_batch`: a batch takes traces of so many tokens, however many args would have in it.

        Raises:
            ValueError: for what a Trainer does to its loss, its logits or its embeddings, which is not done here.
            TypeError: the examples are a stream, which has no length.
        """
        _refuse_idle(args, kwargs)
        if not isinstance(train_dataset, Sized):
            raise TypeError(
                f"train_dataset: expected a sequence of examples, got {type(train_dataset).__name__}; make it a list"
            )
        items: Sequence[Example] | Sequence[list[Example]] = train_dataset
        measured: Sequence[Example] | Sequence[list[Example]] | None = eval_dataset
        if tokens_per_batch is not None:
            items = batches_by_tokens(train_dataset, tokens_per_batch, args.seed)
            measured = eval_dataset and batches_by_tokens(eval_dataset, tokens_per_batch, args.seed)
            args.per_device_train_batch_size = args.per_device_eval_batch_size = 1  # a batch is an item
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        self.objective: Objective = objective or Objective()
        self.adapter, self._items = adapter, len(items)
        self._scales, self._gradient_scale = False, torch.ones(())  # while an fp16 student trains
        self._student = model  # to unwrap what is trained would walk over all of it, in every step
        self.teacher = teacher if teacher is None else teacher.eval().requires_grad_(False)
        # Summed CE and token counts since the last log.
        self._role_sums = torch.zeros(2, len(ROLES), dtype=torch.float64, device=args.device)
        # Of an evaluation: summed losses, CE and token counts.
        self._eval_sums = torch.zeros(3, len(ROLES), dtype=torch.float64, device=args.device)
        # While it trains, whether losses that are not finite are kept out of the log; the sum of those since the last.
        self._filters_log, self._unlogged = False, torch.zeros((), device=args.device)
        super().__init__(
            model=Student(model, adapter),
            args=args,
            data_collator=collate_items,
            train_dataset=items,
            eval_dataset=measured,
            **kwargs,
        )
        self.add_callback(_FindBest())
        if model.device.type == "cpu":
            self.add_callback(_GiveBack())
        if self.is_fsdp_enabled:
            raise ValueError(
                "here only the frozen base is sharded, which the Trainer's FSDP cannot do: launch without it, and call "
                "rbfast.training.sharding.shard(model) "
                "before the adapter is attached (`rbfast distill --shard PROCESSES`)"
            )
        if self.accelerator.num_processes > 1:
            self._check_same_columns()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. It keeps losses that are NaN or infinite out of the log (`logging_nan_inf_filter`), and
        reads each for that: two waits for a GPU in a step. Here `training_step` does so, on the device."""
        self._filters_log, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        self._unlogged.zero_()
        hooks = []
        if self._student.dtype == torch.float16:
            hooks = [parameter.register_hook(self._unscaled) for parameter in self.adapter.parameters()]
        self._scales = bool(hooks)
        try:
            return super().train(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            self._scales = False
            self._filters_log, self.args.logging_nan_inf_filter = False, self._filters_log

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a batch, for the log; if it is to be kept out, the mean of those since the last entry."""
        loss = super().training_step(*args, **kwargs)
        if self._filters_log:
            mean = self._unlogged / (1 + self.state.global_step - self._globalstep_last_logged)
            loss = torch.where(loss.isfinite(), loss, mean)
            self._unlogged += loss
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. The loss is that of all tokens, whatever the batches, with the weights that a training ends
        with, so that those of two steps can be compared; beside it the CE of each role, as a training logs it.

        The random numbers that the training draws next are those that it would draw without an evaluation."""
        before = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = before or self._filters_log
        self._eval_sums.zero_()
        try:
            with torch.random.fork_rng(devices=[]):  # a loader of data draws a seed
                output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = before
        losses, ce, counts = self.accelerator.reduce(self._eval_sums, "sum").cpu()
        metrics = output.metrics or {}
        for name in [name for name in metrics if name.endswith("_loss")]:
            metrics[name] = self._evaluated(losses, counts).item()
            metrics |= {f"{name}_{role}": (ce[i] / counts[i]).item() for i, role in enumerate(ROLES) if counts[i]}
        return output

    def _evaluated(self, sums: Tensor, counts: Tensor) -> Tensor:
        return (self.objective.weights(1.0, sums.device) * sums / counts.clamp(min=1)).sum()

    def _check_same_columns(self) -> None:
        """Gradients are averaged by position: on every process a position must be the same column."""
        cols = torch.cat([site.cols for site in self.adapter.sites().values()]).to(self.args.device)
        everyones = self.accelerator.gather(cols[None])
        if not bool((everyones == cols).all()):
            raise RuntimeError(
                "the processes placed their adapters on different columns; score once and give every process the file: "
                "SparseAdapter.attach(model, placement='scores.safetensors')"
            )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Supervised tokens per role [3], over the accumulated batch and all processes."""
        if self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last:
            size = self.args.train_batch_size
            self._leave_out_repeats(batch_samples[-1], size, self._items % (size * self.args.world_size))
        counts = torch.stack([role_counts(batch) for batch in batch_samples]).sum(0)
        return self.accelerator.reduce(counts.to(device), "sum")

    def _leave_out_repeats(self, batch: dict[str, Any], size: int, left: int) -> None:
        """Every process gets as many batches of `size` items: if only `left` are there for the last ones, they are
        filled up with the epoch's first items. They would count twice: they lose their labels."""
        own = max(left - size * self.args.process_index, 0)
        if left and own < size:
            mask_targets_from(batch, sum(batch["lengths"][:own]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        """The objective's loss of a packed batch. `model` is the `Student`, `num_items_in_batch` counts by role [3]."""
        counts = role_counts(inputs) if num_items_in_batch is None else num_items_in_batch
        progress = self.state.global_step / max(self.state.max_steps, 1)
        weights = self.objective.weights(progress, counts.device) / counts.clamp(min=1)
        hidden = model(inputs["input_ids"], inputs["position_ids"], inputs["lengths"])
        if self._scales:
            self._gradient_scale = self._scale_for(hidden, torch.where(counts > 0, weights, 0.0).max())
            weights = weights * self._gradient_scale
        out = token_losses(self._student, hidden, inputs, weights, self.objective, self.teacher)
        if self._scales:
            out = out._replace(loss=_WithScaledGradient.apply(out.loss, self._gradient_scale))
        if model.training:
            self._role_sums += sums_by_role(inputs, out.ce)
        # DDP averages gradients over processes, while the denominators already span them.
        loss = out.loss * self.accelerator.num_processes if model.training else out.loss
        return (loss, out) if return_outputs else loss

    def _scale_for(self, hidden: Tensor, largest: Tensor) -> Tensor:
        """What gradients are multiplied by on their way through an fp16 student: a power of two near the step's tokens,
        by which the loss divides them. Else many would be below the least number of fp16. The largest weight of a token
        stays far below its greatest."""
        tokens = hidden.shape[0] * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return torch.log2(_MOST_WEIGHT / largest).clamp(max=math.log2(max(tokens, 1))).floor().exp2()

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient / self._gradient_scale

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # type: ignore[override]
        with torch.no_grad():
            inputs = self._prepare_inputs(inputs)
            loading = self.accelerator.gradient_state
            if self.accelerator.num_processes > 1 and loading.end_of_dataloader:
                self._leave_out_repeats(inputs, self.args.eval_batch_size, max(loading.remainder, 0))
            hidden = model(inputs["input_ids"], inputs["position_ids"], inputs["lengths"])
            alike = torch.ones(len(ROLES), device=hidden.device)
            out = token_losses(self._student, hidden, inputs, alike, self.objective, self.teacher, "none")
            losses, counts = sums_by_role(inputs, out.loss)
            self._eval_sums += torch.stack([losses, sums_by_role(inputs, out.ce)[0], counts])
        return self._evaluated(losses, counts), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; beside the loss that of each role."""
        if "loss" in logs:
            sums, counts = self.accelerator.reduce(self._role_sums, "sum").cpu()
            logs |= {f"loss_{role}": (sums[i] / counts[i]).item() for i, role in enumerate(ROLES) if counts[i]}
            self._role_sums.zero_()
            self._unlogged.zero_()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.adapter.save_pretrained(str(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _, saved = read_adapter(resume_from_checkpoint)
        sites = self.adapter.sites()
        for name, site in sites.items():
            if name not in saved or not torch.equal(saved[name].cols, site.cols.cpu()):
                raise ValueError(
                    f"{resume_from_checkpoint} does not hold the adapter that is attached: {name} has other columns; "
                    "attach it with SparseAdapter.from_pretrained(model, checkpoint) before resuming"
                )
        with torch.no_grad():
            for name, site in sites.items():
                site.A.copy_(saved[name].A)
                site.B.copy_(saved[name].B)
        self.adapter.fold()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the whole checkpoint under another name, then renames it: a cut run leaves no half checkpoint."""
        final = Path(str(self.args.output_dir))
        self.args.output_dir = str(final / UNFINISHED)
        try:
            if self.args.should_save:
                shutil.rmtree(self.args.output_dir, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process adds the state of its random numbers
            name = f"checkpoint-{self.state.global_step}"
            self._keep_name_of_best(final, final / UNFINISHED / name)
            if self.args.should_save:
                write_digests(final / UNFINISHED / name)
                shutil.rmtree(final / name, ignore_errors=True)
                os.replace(final / UNFINISHED / name, final / name)
                self._drop_old_checkpoints(final)
        except RuntimeError as error:
            if not any(writer in str(error) for writer in _WRITERS):
                raise
            raise OSError(f"{final}: a checkpoint could not be written, is the disk full? {error}") from error
        finally:
            self.args.output_dir = str(final)

    def _keep_name_of_best(self, folder: Path, written: Path) -> None:
        """If the best checkpoint is the one that was just written, it will have another name soon."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == written:
            self.state.best_model_checkpoint = str(folder / written.name)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _drop_old_checkpoints(self, folder: Path) -> None:
        """Keeps as many as `save_total_limit`: the last, the best if there is one, and then the newest."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        found = checkpoints_in(folder)
        kept = {found[-1], *(path for path in found if best is not None and path.name == Path(best).name)}
        others = [path for path in found if path not in kept]
        for path in others[: max(0, len(found) - max(limit, len(kept)))] if limit else []:
            shutil.rmtree(path)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _refuse_idle(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    idle = [name for name in _IDLE if options.get(name) is not None]
    idle += [name for name in _IDLE_ARGS if getattr(args, name)]
    if idle:
        raise ValueError(
            f"{' and '.join(idle)} would have no effect: the loss is the objective's, there are no logits, and the "
            "embeddings are the base's; leave it out, and measure accuracy with rbfast.evaluation"
        )


class _WithScaledGradient(torch.autograd.Function):
    """x / scale, whose gradient in x is that of the quotient, not divided: so it goes on scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        return x / scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return upstream, None


class _FindBest(TrainerCallback):
    """A checkpoint holds the path of the best one, which a folder that was moved no longer has."""

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)


class StopAtNaN(TrainerCallback):
    """Ends a training at the first step whose gradient is NaN or infinite: no later one would mend the adapter.

    It reads what is logged, so `logging_steps` must be 1. Raises ValueError.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if not math.isfinite((logs or {}).get("grad_norm", 0.0)):
            raise ValueError(
                f"the gradient of step {state.global_step} is NaN or infinite, so the training has diverged: train "
                "with a lower learning rate, or a float16 model in bfloat16 or float32, into another folder"
            )


class _GiveBack(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step % _GIVE_BACK_EVERY == 0:
            give_back()
