"""A minimal trainer: transformers.Trainer with the hierarchical objective, an adapter, and padding-free batches.

    examples, left_out = encode_all(traces, tokenizer)                       # from rbfast.data.encoding
    trainer = DistillTrainer(model, adapter, args, train_dataset=examples)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))   # from rbfast.training.checkpoints

The objective is L = l_S mean_S + l_T mean_T + l_A mean_A over strategic, tactical and answer tokens, with denominators
that are global over the accumulated batch and over all processes. The forward stops at the last hidden state: full
logits never exist (see `rbfast.loss.distill_loss`).
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from rbfast.adapter.adapter_files import read_adapter
from rbfast.adapter.column_delta import deltas_of
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import Example, mask_targets_from
from rbfast.data.spans import ROLES
from rbfast.models.linears import head_module, is_sharded, is_spread
from rbfast.models.student import final_hidden
from rbfast.training.arguments import sole_training
from rbfast.training.batches import batches_by_tokens, collate_items
from rbfast.training.checkpoints import UNFINISHED, checkpoints_in, write_digests
from rbfast.training.objective import Objective, role_counts, sums_by_role, token_losses
from rbfast.utils.files import name_file_in_errors
from rbfast.utils.memory import trim_memory

_TORCH_SAVE_ERRORS = "PytorchStreamWriter", "inline_container.cc"  # in the messages of torch.save on a full disk
# Options of a Trainer that have no effect here.
_UNUSED_OPTIONS = "compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"
_UNUSED_ARGUMENTS = "label_smoothing_factor", "neftune_noise_alpha"
_TRIM_EVERY = 8  # steps
_MAX_WEIGHT = 4096.0  # of a token's loss in an fp16 student; fp16 ends at 65504


class Student(nn.Module):
    """Base model and adapter as one module. Its parameters, for optimizers, clipping and DDP, are the adapter's.

    The frozen base is not a submodule: a Trainer walks over all parameters several times a step, and DDP copies them.
    """

    model: PreTrainedModel
    accepts_loss_kwargs = True  # our loss divides by counts that already span the accumulated batch

    def __init__(self, model: PreTrainedModel, adapter: SparseAdapter) -> None:
        super().__init__()
        self.adapter, self.config = adapter, model.config
        self.__dict__["model"] = model
        self._trained = list(adapter.parameters())
        if is_spread(model):
            self.hf_device_map = model.hf_device_map  # a Trainer does not move a model that has one

    def forward(self, input_ids: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Last hidden states [T, H] of a packed row [1, T]."""
        return final_hidden(self.model, input_ids, position_ids, lengths)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Cached: a Trainer asks for them several times a step, and an adapter has two modules per matrix."""
        return iter(self._trained) if recurse else super().parameters(recurse)

    def train(self, mode: bool = True) -> "Student":
        if self.model.training != mode:
            self.model.train(mode)
        return self if self.training == mode else super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Student":
        """Applies `fn` to the base too (for `to(device)` and the like), unless it is sharded or on several devices."""
        if not (is_sharded(self.model) or is_spread(self.model)):
            self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Delegates to the base. Trainers up to transformers 5.22 call it by this name."""
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
        logs_divergence: bool = False,
        **kwargs: Any,
    ) -> None:
        """args: copied, so the caller's are not changed.
        tokens_per_batch: the most tokens in a batch; overrides the batch sizes in args.
        logs_divergence: log the mean divergence from the teacher as the loss of a role, not the mean cross-entropy.

        Raises:
            ValueError: a Trainer option is set that has no effect here (on its loss, logits or embeddings); the teacher
                is the student, or the adapter is not attached to the model.
            TypeError: the examples are a stream, which has no length.
        """
        _refuse_unused(args, kwargs)
        _check_inputs(model, adapter, train_dataset, teacher)
        args = copy(args)
        items: Sequence[Example] | Sequence[list[Example]] = train_dataset
        eval_items: Sequence[Example] | Sequence[list[Example]] | None = eval_dataset
        if tokens_per_batch is not None:
            items = batches_by_tokens(train_dataset, tokens_per_batch, args.seed)
            eval_items = eval_dataset and batches_by_tokens(eval_dataset, tokens_per_batch, args.seed)
            args.per_device_train_batch_size = args.per_device_eval_batch_size = 1  # a batch is an item
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        self.objective: Objective = objective or Objective()
        self.adapter, self._items, self._logs_divergence = adapter, len(items), logs_divergence
        self._scales_gradients, self._gradient_scale = False, torch.ones(())  # True while an fp16 student trains
        self._student = model  # unwrapping the trained module in every step would walk over all of it
        self.teacher = teacher if teacher is None else teacher.eval().requires_grad_(False)
        # Sums of CE (or divergence) and token counts since the last log.
        self._role_sums = torch.zeros(2, len(ROLES), dtype=torch.float64, device=args.device)
        # Sums of losses, CE and token counts in an evaluation.
        self._eval_sums = torch.zeros(3, len(ROLES), dtype=torch.float64, device=args.device)
        # During training: whether non-finite losses are kept out of the log; the sum of losses since the last entry.
        self._filters_log, self._loss_since_log = False, torch.zeros((), device=args.device)
        super().__init__(
            model=Student(model, adapter),
            args=args,
            data_collator=collate_items,
            train_dataset=items,
            eval_dataset=eval_items,
            **kwargs,
        )
        self.add_callback(_UpdateBestPath())
        if model.device.type == "cpu":
            self.add_callback(_TrimMemory())
        if self.is_fsdp_enabled:
            raise ValueError(
                "the Trainer's FSDP cannot shard the frozen base alone: launch without it, and call "
                "rbfast.training.sharding.shard(model) "
                "before the adapter is attached (`rbfast distill --shard PROCESSES`)"
            )
        if self.accelerator.num_processes > 1:
            self._check_same_columns()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, except that `training_step` keeps NaN and infinite losses out of the log, on the device.
        The Trainer's own filter (`logging_nan_inf_filter`) synchronises with a GPU twice a step.

        Raises RuntimeError if another thread of this process is training."""
        self._filters_log, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        self._loss_since_log.zero_()
        hooks = []
        if self._student.dtype == torch.float16:
            hooks = [parameter.register_hook(self._unscale) for parameter in self.adapter.parameters()]
        self._scales_gradients = bool(hooks)
        try:
            with sole_training():
                return super().train(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            self._scales_gradients = False
            self._filters_log, self.args.logging_nan_inf_filter = False, self._filters_log

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a batch, for the log. A non-finite one is replaced by the mean of those since the last entry."""
        with self._sharing_gradients():
            loss = super().training_step(*args, **kwargs)
        if self._filters_log:
            mean = self._loss_since_log / (1 + self.state.global_step - self._globalstep_last_logged)
            loss = torch.where(loss.isfinite(), loss, mean)
            self._loss_since_log += loss
        return loss

    def _sharing_gradients(self) -> AbstractContextManager[None]:
        if isinstance(self.adapter, SparseAdapter) and not self._scales_gradients:  # _unscale needs every gradient
            return self.adapter.sharing_gradients()
        return nullcontext()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with these metrics: the loss over all tokens, independent of batching, with the role
        weights of the end of training, so that losses of different steps are comparable; and the CE of each role.

        An evaluation does not change the random numbers that training draws next."""
        before = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = before or self._filters_log
        self._eval_sums.zero_()
        try:
            with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
                output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = before
        losses, ce, counts = self.accelerator.reduce(self._eval_sums, "sum").cpu()
        metrics = output.metrics or {}
        for name in [name for name in metrics if name.endswith("_loss")]:
            metrics[name] = self._weighted_loss(losses, counts).item()
            metrics |= {f"{name}_{role}": (ce[i] / counts[i]).item() for i, role in enumerate(ROLES) if counts[i]}
        return output

    def _weighted_loss(self, sums: Tensor, counts: Tensor) -> Tensor:
        return (self.objective.weights(1.0, sums.device) * sums / counts.clamp(min=1)).sum()

    def _check_same_columns(self) -> None:
        """Raises if the processes chose different columns: gradients are averaged by position."""
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
            self._drop_repeated_labels(batch_samples[-1], size, self._items % (size * self.args.world_size))
        counts = torch.stack([role_counts(batch) for batch in batch_samples]).sum(0)
        return self.accelerator.reduce(counts.to(device), "sum")

    def _drop_repeated_labels(self, batch: dict[str, Any], size: int, left: int) -> None:
        """Removes the labels of repeated items. Every process gets the same number of batches of `size` items. If only
        `left` items remain for the last batches, the epoch's first items fill them up; these must not count twice."""
        own = max(left - size * self.args.process_index, 0)
        if left and own < size:
            mask_targets_from(batch, sum(batch["lengths"][:own]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        """The training loss of a batch. `model` is the `Student`; `num_items_in_batch` has token counts by role [3]."""
        counts = role_counts(inputs) if num_items_in_batch is None else num_items_in_batch
        progress = self.state.global_step / max(self.state.max_steps, 1)
        weights = self.objective.weights(progress, counts.device) / counts.clamp(min=1)
        hidden = model(inputs["input_ids"], inputs["position_ids"], inputs["lengths"])
        if self._scales_gradients:
            self._gradient_scale = self._scale_for(hidden, torch.where(counts > 0, weights, 0.0).max())
            weights = weights * self._gradient_scale
        out = token_losses(self._student, hidden, inputs, weights, self.objective, self.teacher)
        out = out._replace(loss=out.loss.to(self.args.device))
        if self._scales_gradients:
            out = out._replace(loss=_WithScaledGradient.apply(out.loss, self._gradient_scale))
        self._role_sums += sums_by_role(inputs, out.divergence if self._logs_divergence else out.ce)
        # DDP averages gradients over processes, while the denominators already span them.
        loss = out.loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss

    def _scale_for(self, hidden: Tensor, largest: Tensor) -> Tensor:
        """The scale of gradients in an fp16 student: a power of two near the step's number of tokens, which the loss
        divides by. Without the scale many gradients would underflow. The scale times `largest`, the largest weight of a
        token, stays far below fp16's maximum."""
        tokens = hidden.shape[0] * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return torch.log2(_MAX_WEIGHT / largest).clamp(max=math.log2(max(tokens, 1))).floor().exp2()

    def _unscale(self, gradient: Tensor) -> Tensor:
        return gradient / self._gradient_scale.to(gradient.device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):  # type: ignore[override]
        with torch.no_grad():
            inputs = self._prepare_inputs(inputs)
            loading = self.accelerator.gradient_state
            if self.accelerator.num_processes > 1 and loading.end_of_dataloader:
                self._drop_repeated_labels(inputs, self.args.eval_batch_size, max(loading.remainder, 0))
            hidden = model(inputs["input_ids"], inputs["position_ids"], inputs["lengths"])
            alike = torch.ones(len(ROLES), device=hidden.device)
            out = token_losses(self._student, hidden, inputs, alike, self.objective, self.teacher, "none")
            losses, counts = sums_by_role(inputs, out.loss)
            self._eval_sums += torch.stack([losses, sums_by_role(inputs, out.ce)[0], counts])
        return self._weighted_loss(losses, counts), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the loss of each role added."""
        if "loss" in logs:
            sums, counts = self.accelerator.reduce(self._role_sums, "sum").cpu()
            logs |= {f"loss_{role}": (sums[i] / counts[i]).item() for i, role in enumerate(ROLES) if counts[i]}
            self._role_sums.zero_()
            self._loss_since_log.zero_()
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
        """Writes the checkpoint under a temporary name, then renames it: a killed run leaves no partial checkpoint."""
        final = Path(str(self.args.output_dir))
        self.args.output_dir = str(final / UNFINISHED)
        try:
            if self.args.should_save:
                shutil.rmtree(self.args.output_dir, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            with name_file_in_errors(final):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process writes its random state
            name = f"checkpoint-{self.state.global_step}"
            self._update_best_name(final, final / UNFINISHED / name)
            if self.args.should_save:
                write_digests(final / UNFINISHED / name)
                shutil.rmtree(final / name, ignore_errors=True)
                os.replace(final / UNFINISHED / name, final / name)
                self._drop_old_checkpoints(final / name)
        except RuntimeError as error:
            if not any(writer in str(error) for writer in _TORCH_SAVE_ERRORS):
                raise
            raise OSError(f"{final}: a checkpoint could not be written, is the disk full? {error}") from error
        finally:
            self.args.output_dir = str(final)

    def _update_best_name(self, folder: Path, written: Path) -> None:
        """If the checkpoint just written is the best one, records its final name."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == written:
            self.state.best_model_checkpoint = str(folder / written.name)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _drop_old_checkpoints(self, written: Path) -> None:
        """Keeps `save_total_limit` checkpoints: the one just written, the best if there is one, then the newest others.
        One just written is not the newest if the run resumed from before a damaged one."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        checkpoints = checkpoints_in(written.parent)
        kept = {written, *(path for path in checkpoints if best is not None and path.name == Path(best).name)}
        others = [path for path in checkpoints if path not in kept]
        for path in others[: max(0, len(checkpoints) - limit)] if limit else []:
            shutil.rmtree(path)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _check_inputs(model: nn.Module, adapter: nn.Module, train_dataset: object, teacher: nn.Module | None) -> None:
    # A benchmark may pass a peer's adapter, which another library attached.
    if isinstance(adapter, SparseAdapter):
        attached = {id(delta) for _, delta in deltas_of(model)}
        if attached != {id(site) for site in adapter.sites().values()}:
            raise ValueError(
                "the adapter is not attached to this model (merged or detached, or another model's), so it would learn "
                "nothing: attach one with SparseAdapter.attach or from_pretrained"
            )
        head = head_module(model)
        if name := next((name for name, site in adapter.sites().items() if site.linear is head), None):
            raise ValueError(
                f"{name} is the output head: the loss uses its weight without running the layer, so its delta would "
                "learn nothing; leave it out of targets"
            )
    if teacher is model:
        raise ValueError(
            "the teacher is the student itself, with the adapter in it, so it could teach nothing: load the teacher as "
            "a separate model"
        )
    if not isinstance(train_dataset, Sized):
        raise TypeError(
            f"train_dataset: expected a sequence of examples, got {type(train_dataset).__name__}; make it a list"
        )


def _refuse_unused(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    unused = [name for name in _UNUSED_OPTIONS if options.get(name) is not None]
    unused += [name for name in _UNUSED_ARGUMENTS if getattr(args, name)]
    if unused:
        raise ValueError(
            f"{' and '.join(unused)} would have no effect: the loss is the objective's, there are no logits, and the "
            "embeddings are the base's; leave it out, and measure accuracy with rbfast.evaluation"
        )


class _WithScaledGradient(torch.autograd.Function):
    """x / scale, with the gradient passed through undivided, so that gradients stay scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        return x / scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return upstream, None


class _UpdateBestPath(TrainerCallback):
    """Updates the path of the best checkpoint, which is stale if the folder was moved."""

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)


class StopAtNaN(TrainerCallback):
    """Raises ValueError at the first step whose gradient is NaN or infinite: the adapter would not recover.

    Reads the log, so `logging_steps` must be 1.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if not math.isfinite((logs or {}).get("grad_norm", 0.0)):
            raise ValueError(
                f"the gradient of step {state.global_step} is NaN or infinite, so the training has diverged: train "
                "into another folder, with a lower learning rate, or in bfloat16 or float32 if the model is float16"
            )


class _TrimMemory(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step % _TRIM_EVERY == 0:
            trim_memory()
