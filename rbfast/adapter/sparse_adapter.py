"""SparseAdapter: low-rank deltas on chosen columns of a frozen model.

    adapter = SparseAdapter.attach(model, density=0.003)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    model(...).loss.backward(); optimizer.step()        # the deltas fold into the weights automatically
    adapter.save_pretrained("out/")

A delta runs in one of two ways. Folded, it is written into the frozen weight after every optimizer step: the forward is
the base's own, and the backward keeps `x[:, cols]` and reads dy once. Beside the weight (a quantised base), it adds
`scale * (x[:, cols] A^T) B^T` to the output. No module is replaced and the base's state_dict() keeps its keys.

The deltas themselves are in `column_delta`.
"""

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from rbfast.adapter import adapter_files
from rbfast.adapter.adapter_files import AdapterConfig, Delta
from rbfast.adapter.attachable import attachable
from rbfast.adapter.bypass_watch import BypassWatch
from rbfast.adapter.column_delta import ColumnDelta, delta_of, fold_all
from rbfast.adapter.column_scores import ColumnScores
from rbfast.adapter.footprint import Footprint
from rbfast.adapter.placement import DEFAULT_DENSITY, plan_adapter
from rbfast.adapter.shared_gather import SharedGather
from rbfast.models.experts import ExpertStack, weight_owner
from rbfast.models.linears import (
    bytes_of,
    check_fit,
    count_parameters,
    dtype_name,
    is_transposed,
    left_out,
    matrix_view,
    named_modules,
    unfit,
    unsharded,
    why_not_folded,
)
from rbfast.models.names import MERGED
from rbfast.models.weight_use import stored_weight
from rbfast.utils.overlap import Overlap

Mode = Literal["auto", "fold", "side"]


@dataclass(frozen=True)
class MatrixSummary:
    """One line of SparseAdapter.summary(). values: how many are trained. score: None for random placement."""

    name: str
    out_features: int
    in_features: int
    columns: int
    rank: int
    values: int
    score: float | None


class SparseAdapter(nn.Module):
    """Deltas attached to a model. Create it with `attach` or `from_pretrained`. Its parameters are `<module>.A` and
    `.B`; those of stacks of experts are `stack<n>.A` and `.B`, numbered in the model's order.

    If the model moves to another device later, its deltas follow at the next forward. To move them earlier, or before
    torch.compile, call `adapter.to(device)`.

    left_out: by name, the shape of every weight of two or more dimensions without a delta, except embeddings and head.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, deltas: Mapping[str, Delta], mode: Mode) -> None:
        super().__init__()
        check_fit(unfit(model), deltas)
        modules = named_modules(model)
        folds = {name: _should_fold(name, modules[name], mode) for name in deltas}
        self.config = config
        self._base_parameters, self._base_bytes = count_parameters(model), bytes_of(model.parameters())
        self.left_out = left_out(model, deltas)
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A dict by name: walking the modules takes at least as long as folding a matrix.
        self._sites: dict[str, ColumnDelta] = {}
        self._state: Literal["attached", "merged", "detached"] = "attached"
        self._disabled, self._sharing = Overlap(), Overlap()
        self._watch = BypassWatch()
        try:
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            self._add_deltas(modules, deltas, folds)
            _reset_compiled_code()
            # From here on optimizer steps fold the deltas. Last, because another thread may step meanwhile.
            _ADAPTERS[id(self)] = self
        except BaseException:  # likely out of memory; the caller has no adapter to detach
            self.detach()
            raise

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        density: float = DEFAULT_DENSITY,
        support: int | None = None,
        rank: int | None = None,
        targets: str | Sequence[str] = "all-linear",
        placement: ColumnScores | str | Path = "random",
        mode: Mode = "auto",
        scale: float = 1.0,
        seed: int = 0,
    ) -> "SparseAdapter":
        """Freezes `model` and attaches new deltas of at most `density` times its parameters.

        The model may be wrapped by torch.compile or DistributedDataParallel. DistributedDataParallel reduces only the
        gradients of parameters that exist when it is created: to train on several processes, attach first, then wrap a
        module that holds both model and adapter.

        placement: "random" columns, drawn for every group of matrices, or the best by ColumnScores or a file of them.
        `support` and `rank` default to what fits (see placement.allocate). mode: "fold" writes the deltas into the
        weights; "side" runs them beside the weights; "auto" folds wherever the weight is a plain bf16, fp16 or fp32
        tensor that the layer multiplies by. "all-linear" is defined by `rbfast.models.linears.select_linears`: it
        excludes the head and any tower for images or sound. Warns of such towers, and of stacked experts and layers
        that cannot have a delta (`rbfast.models.linears.unfit`). Raises ValueError for a density outside (0, 1] or too
        small for any delta, a model without linear layers, and a model with an adapter attached (PEFT's included).
        """
        model = attachable(model)
        config, deltas = plan_adapter(model, density, support, rank, targets, placement, scale, seed)
        return cls(model, config, deltas, mode)

    @classmethod
    def from_pretrained(cls, model: nn.Module, name_or_path: str | Path, mode: Mode = "auto") -> "SparseAdapter":
        """Attaches a saved adapter.

        Args:
            name_or_path: its folder, or its hub id (owner/name).

        Raises:
            ValueError: it was made for another model (the message names the first mismatch), its files are not those
                of an adapter, or the model has an adapter attached.
            OSError: it is not there.
        """
        model = attachable(model)
        config, deltas = adapter_files.read_adapter(name_or_path)
        fingerprints = adapter_files.check_base(config, named_modules(model), name_or_path)
        config = adapter_files.on_base(config, dtype_name(next(model.parameters())), fingerprints)
        return cls(model, config, deltas, mode)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors; a failure leaves no partial file.

        If FSDP has sharded the adapter too, every process must call this (and export_lora), each with its own
        directory. Raises ValueError, naming the matrix, if A or B holds NaN or infinity; so do export_lora and merge.
        """
        adapter_files.write_adapter(directory, self.config, self._deltas())

    def export_lora(self, directory: str | Path, base: str | None = None) -> None:
        """Writes the adapter as a standard LoRA, for PEFT, vLLM and llama.cpp.

        base: the base model to name in the file, a hub id or a folder; by default the hub id the model was loaded by.
        A model from a folder or a GGUF file has none, and neither has one into which another adapter was merged: the
        file then names no base, and you must pass it to the loader.
        The exception is `smollm2-135m`, a GGUF file from PyPI: its file names the hub model it was quantised from.
        """
        single = (site.linear for site in self._sites.values() if not isinstance(site.linear, ExpertStack))
        transposed = set(map(is_transposed, single))
        if len(transposed) > 1:
            raise ValueError("a LoRA file cannot hold both Conv1D and nn.Linear; attach to matrices of one kind")
        adapter_files.write_lora(directory, self.config, self._deltas(), True in transposed, base)

    def sites(self) -> dict[str, ColumnDelta]:
        """The deltas, by the name of the matrix that each changes."""
        return dict(self._sites)

    def fold(self) -> None:
        """Writes every delta into its weight. Call it after writes through `.data` (`parameter.data.copy_(x)`, as some
        weight averaging does), and after any change by hand under torch.compile or in `unhooked`. Optimizer steps and
        load_state_dict fold automatically; after other changes the next forward does."""
        self._require_state("attached", "fold")
        fold_all(site for site in self._sites.values() if site.is_folded and site.enabled)

    def merge(self) -> None:
        """Keeps the weights that training used, bitwise, and removes every hook: the model is then a plain one.

        Raises RuntimeError for a base that cannot hold the deltas (quantised, sharded, weight-normed; use export_lora()
        there), and for a base whose weights were changed since attaching.
        """
        self._require_state("attached", "merge")
        for name, site in self._sites.items():
            if matrix_view(site.linear) is None:
                raise RuntimeError(
                    f"cannot merge into {name}: {why_not_folded(site.linear)}; use export_lora() instead"
                )
        adapter_files.check_finite(self._deltas())
        for site in self._sites.values():
            site.fold_if_stale()
        for site in self._sites.values():
            site.keep_base_columns()
        fold_all(self._sites.values())
        self._release("merged")
        self._count_merged(1)

    def unmerge(self) -> None:
        """Undoes merge(): restores the original columns bitwise. The model is then the base, without the adapter.

        Raises RuntimeError if the weights, A or B changed since, or if another adapter is attached.
        """
        self._require_state("merged", "unmerge")
        for name, site in self._sites.items():
            if delta_of(site.linear) is not None:
                raise RuntimeError(f"cannot unmerge: another adapter is attached at {name}; detach that one first")
            if not site.is_base_or_folded(site.weight.index_select(-1, site.cols)):
                changed = f"A or B of {name}" if site.is_delta_written() else f"the weight of {name}"
                raise RuntimeError(f"cannot unmerge: {changed} was changed after merge(); load the base model again")
        for site in self._sites.values():
            site.restore()
        self._count_merged(-1)
        self._state = "detached"

    def detach(self) -> None:
        """Restores the base bitwise, removes every hook and restores each parameter's requires_grad."""
        self._require_state("attached", "detach")
        for site in self._sites.values():
            site.restore()
        self._release("detached")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model is the base, bitwise. Blocks may nest. If a forward ran before the block, run its
        backward after the block: inside, it would use the base's weights; a folded delta raises RuntimeError."""
        self._require_state("attached", "disable")
        with self._disabled.block(self, self._disable):
            yield

    @contextmanager
    def sharing_gradients(self) -> Iterator[None]:
        """Within the block, matrices that get the same input, such as q, k and v, compute their gradients in one call:
        a third or half of the launches on a GPU. DistillTrainer uses it.

        For training steps only: each forward must have one backward, through the outputs of all matrices that ran and
        before A or B changes, and hooks of A and B must accept None. Forwards under non-reentrant checkpointing share
        nothing.
        """
        with self._sharing.block(self, self._share_gradients):
            yield

    @contextmanager
    def _share_gradients(self) -> Iterator[None]:
        gathers = {id(site.gather): site.gather for site in self._sites.values()}.values()
        try:
            for gather in gathers:
                gather.shares_gradients = True
            yield
        finally:
            for gather in gathers:
                gather.shares_gradients = False

    @contextmanager
    def _disable(self) -> Iterator[None]:
        guards = []
        try:
            for site in self._sites.values():
                site.enabled = False
                if site.is_folded:
                    site.restore()
                    trained = [factor for factor in site.factors if factor.requires_grad]
                    guards += [factor.register_hook(_refuse_backward) for factor in trained]
            yield
        finally:
            for guard in guards:
                guard.remove()
            if self._state == "attached":
                for site in self._sites.values():
                    site.enabled = True
                self.fold()

    @property
    def parameters_of_base(self) -> int:
        """The number of parameters of the base; a quantised matrix counts the values that it represents."""
        return self._base_parameters

    @property
    def trainable_percent(self) -> float:
        """Trained values as a percentage of the base's parameters."""
        return 100 * self._count_values() / self._base_parameters

    def print_trainable_parameters(self) -> None:
        """Prints trained values, the base's parameters, and their ratio in percent, in PEFT's format."""
        print(
            f"trainable params: {self._count_values():,d} || all params: {self._base_parameters:,d} || "
            f"trainable%: {self.trainable_percent:.4f}"
        )

    def surviving_share(self) -> float:
        """The share of non-zero fp32 changes that survive the fold's rounding; 1 if there are no changes."""
        self._require_state("attached", "compute the surviving share of")
        counts = [site.count_survivors() for site in self._sites.values() if site.is_folded]
        wanted = sum(count for _, count in counts)
        return sum(count for count, _ in counts) / wanted if wanted else 1.0

    def summary(self) -> list[MatrixSummary]:
        """One line per matrix, in the model's order."""
        return [
            MatrixSummary(name, info.out_features, info.in_features, info.support, info.rank, info.values, info.score)
            for name, info in self.config.modules.items()
        ]

    def footprint(self) -> Footprint:
        """The memory that the adapter takes in addition to its base."""
        values = bytes_of(self.parameters())
        return Footprint(self._base_bytes, bytes_of(self.buffers()), values, 3 * values)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's, then folds. Raises ValueError, before anything is written, if the state has other columns:
        their base values are not kept here. Raises RuntimeError if the adapter is merged or detached."""
        self._require_state("attached", "load a state into")
        return super().load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Checks columns before the deltas load their state, even if the adapter is a submodule of another module."""
        if prefix:  # in a model: a Trainer resumes with strict=False, and would silently continue with a new adapter
            _check_names({prefix + key for key in self.state_dict()}, {k for k in state_dict if k.startswith(prefix)})
        paths = {id(module): path for path, module in self.named_modules()}
        for name, site in self._sites.items():
            cols = state_dict.get(f"{prefix}{paths[id(site)]}.cols")
            if cols is not None and not torch.equal(cols.to(site.cols.device), site.cols):
                raise ValueError(
                    f"this state belongs to an adapter with other columns (first at {name}; another placement, seed "
                    "or shape): attach that adapter with SparseAdapter.from_pretrained"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _add_deltas(
        self, modules: Mapping[str, nn.Module], deltas: Mapping[str, Delta], folds: Mapping[str, bool]
    ) -> None:
        gathers: dict[int, SharedGather] = {}
        numbers = count()
        for name, delta in deltas.items():
            gather = gathers.setdefault(self.config.modules[name].group, SharedGather())
            site = ColumnDelta(modules[name], delta, self.config.scale, folds[name], gather)
            # When transformers saves a model, it splits every tensor named like a stack, including an adapter's.
            self._register(f"stack{next(numbers)}" if isinstance(site.linear, ExpertStack) else name, site)
            self._sites[name] = site
            site.attach()

    def _register(self, name: str, site: ColumnDelta) -> None:
        """Registers a delta under the dotted name of its matrix, so that parameters are called `<module>.A`.

        add_module would refuse names of our own methods, and a submodule of a model may be called `merge`.
        """
        parent: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            parent = parent._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        parent._modules[leaf] = site
        # Not a submodule. Keeps the adapter alive for callers that hold only its parameters: each step must still fold.
        site.__dict__["adapter_reference"] = self

    def _count_values(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _deltas(self) -> dict[str, Delta]:
        deltas = {
            name: Delta(site.cols, unsharded(site.A.detach()), unsharded(site.B.detach()))
            for name, site in self._sites.items()
        }
        adapter_files.check_whole(self.config, deltas)
        return deltas

    def _require_state(self, state: str, verb: str) -> None:
        if self._state != state:
            raise RuntimeError(f"cannot {verb} this adapter: it must be {state}, and it is {self._state}")

    def _release(self, state: Literal["merged", "detached"]) -> None:
        self._watch.end()
        for site in self._sites.values():
            site.release()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._state = state

    def _count_merged(self, change: int) -> None:
        """Updates the count of merged adapters: while there are any, the model's name does not name its weights."""
        for site in self._sites.values():
            owner, _ = weight_owner(site.linear)
            owner.__dict__[MERGED] = owner.__dict__.get(MERGED, 0) + change

    def _on_optimizer_step(self, optimizer: Optimizer) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self._state != "attached":
            factors = (factor for site in self._sites.values() for factor in site.factors)
            if any(factor.grad is not None and id(factor) in stepped for factor in factors):
                warnings.warn(
                    f"an optimizer trains an adapter that is {self._state}, which no longer changes the model: attach "
                    "an adapter, and give the optimizer its parameters",
                    stacklevel=4,
                )
            return
        if not stepped and any(parameter.grad is not None for parameter in self.parameters()):
            raise RuntimeError(  # a Trainer builds such an optimizer for a frozen model, and would train to the end
                "an optimizer without parameters made a step: the adapter's parameters are not part of the model; set "
                "model.adapter = adapter before you create a Trainer"
            )
        stepped_sites = {}
        for name, site in self._sites.items():
            if any(id(factor) in stepped for factor in site.factors):
                stepped_sites[name] = site
            weight = stored_weight(site.linear)
            if weight is None or id(weight) not in stepped or not weight.requires_grad or site.watch is not None:
                continue  # AdamW(model.parameters()) may hold frozen weights, and those that BypassWatch unfroze
            if isinstance(site.linear, ExpertStack):
                raise RuntimeError(
                    f"an optimizer trains the weight of {name}, a stack of experts, which has no gradient while it has "
                    "a delta: freeze it, or leave it out of targets"
                )
            if site.is_folded:
                raise RuntimeError(
                    f"an optimizer changed the weight of {name}, into which a delta is folded: freeze it, or attach "
                    'with mode="side"'
                )
        folding = [site for site in stepped_sites.values() if site.is_folded and site.enabled]
        _mark_written(folding)
        fold_all(folding)
        if stepped_sites and not self._watch.is_over:
            self._watch.on_step(stepped_sites)


def _check_names(ours: set[str], theirs: set[str]) -> None:
    if (missing := ours - theirs) and (others := theirs - ours):
        raise ValueError(
            f"this state has {min(others)} and no {min(missing)} ({len(missing)} names of the adapter are missing): it "
            "belongs to an adapter on other matrices, or transformers renamed the model's weights as it saved them, "
            "the adapter's included; in that case train with DistillTrainer, or use adapter.save_pretrained"
        )


def _reset_compiled_code() -> None:
    """Drops compiled code: torch.compile does not check for new hooks, so old code would run without ours."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()


def _should_fold(name: str, linear: nn.Module, mode: Mode) -> bool:
    if mode not in ("auto", "fold", "side"):
        raise ValueError(f'mode must be "auto", "fold" or "side", got {mode!r}')
    foldable = matrix_view(linear) is not None
    if mode == "fold" and not foldable:
        raise ValueError(
            f'mode "fold" needs a plain bf16, fp16 or fp32 weight, which {name} is not: {why_not_folded(linear)}; '
            'use "auto"'
        )
    return foldable and mode != "side"


def _refuse_backward(grad: Tensor) -> None:
    raise RuntimeError(
        "a backward inside adapter.disabled(), for a forward from before the block, would use the base's weights: call "
        "backward() after the block"
    )


def _mark_written(sites: Iterable[ColumnDelta]) -> None:
    """Tells autograd that the weights are written, because our ops bypass it. A pending backward of a forward that used
    the old weights then raises in autograd, instead of giving wrong gradients."""
    weights = (stored_weight(site.linear) for site in sites)
    torch.autograd.graph.increment_version([w for w in weights if w is not None])


def _fold_after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for reference in _ADAPTERS.valuerefs():
        if (adapter := reference()) is not None:
            adapter._on_optimizer_step(optimizer)


# Every live adapter (attached, merged or detached) by id, in order of attachment. They share one permanent hook: an
# adapter's own could vanish during a step, when garbage is collected, while torch iterates over its hooks.
_ADAPTERS: weakref.WeakValueDictionary[int, SparseAdapter] = weakref.WeakValueDictionary()
register_optimizer_step_post_hook(_fold_after_step)
