"""SparseAdapter: low-rank deltas on chosen columns of a frozen model.

    adapter = SparseAdapter.attach(model, density=0.003)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    model(...).loss.backward(); optimizer.step()        # the deltas fold into the weights by themselves
    adapter.save_pretrained("out/")

A delta runs in one of two ways. Folded, it is written into the frozen weight after every optimizer step: the forward is
the base's own, and the backward keeps `x[:, cols]` and reads dy once. Beside the weight (a quantised base), it adds
`scale * (x[:, cols] A^T) B^T` to the output. No module is replaced and the base's state_dict() keeps its keys.

Without gradients the hooks of a folded delta do nothing, but calling them takes time: `unhooked(model)` takes them off
for a block, and so does `rbfast.evaluating(model)`, in which all completions of ours are written.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from rbfast import ops
from rbfast.adapter import adapter_files
from rbfast.adapter.adapter_files import AdapterConfig, Delta
from rbfast.adapter.column_scores import ColumnScores
from rbfast.adapter.footprint import Footprint
from rbfast.adapter.placement import DEFAULT_DENSITY, plan
from rbfast.models.linears import bytes_of, count_parameters, is_transposed, left_out, matrix_shape, matrix_view

Mode = Literal["auto", "fold", "side"]
_DELTA = "_rbfast_delta"  # the attribute of a linear that holds its ColumnDelta


class _SharedGather:
    """Gathers a group's support once for all its matrices, as long as they are given the same, unchanged tensor."""

    def __init__(self) -> None:
        self.members = 0
        self._kept: tuple[weakref.ref, int, Tensor] | None = None  # the input, its version, and its columns
        self._left = 0  # members that have yet to ask for them

    def __call__(self, x: Tensor, cols: Tensor, run: int, dtype: torch.dtype) -> Tensor:
        if self.members == 1 or torch.compiler.is_compiling():  # a compiler merges equal gathers itself
            return _gather(x, cols, run, dtype)
        if (
            self._kept is None
            or self._kept[0]() is not x
            or self._kept[1] != x._version
            or self._kept[2].dtype != dtype
        ):
            self._kept = weakref.ref(x, self._drop), x._version, _gather(x, cols, run, dtype)
            self._left = self.members
        xs = self._kept[2]
        self._left -= 1
        if self._left == 0:
            self._kept = None
        return xs

    def _drop(self, dead: weakref.ref) -> None:
        if self._kept is not None and self._kept[0] is dead:
            self._kept = None


def _gather(x: Tensor, cols: Tensor, run: int, dtype: torch.dtype) -> Tensor:
    x = x.detach()
    return ops.column_gather(x.reshape(-1, x.shape[-1]), cols, run).to(dtype)


class ColumnDelta(nn.Module):
    """The delta of one matrix, and the hooks that run it: parameters A [k, s] and B [out, k], buffer cols [s]."""

    A: nn.Parameter
    B: nn.Parameter
    cols: Tensor
    base_columns: Tensor
    linear: nn.Module

    def __init__(self, linear: nn.Module, delta: Delta, scale: float, fold: bool, gather: _SharedGather) -> None:
        super().__init__()
        object.__setattr__(self, "linear", linear)  # not a submodule: the base stays outside the adapter's state
        device = next((t.device for t in (*linear.parameters(), *linear.buffers())), None)
        # In one layout wherever they come from: fused optimizers pair values, gradients and moments by their place.
        self.A, self.B = (
            nn.Parameter(torch.empty(part.shape, dtype=torch.float32, device=device).copy_(part))
            for part in (delta.A, delta.B)
        )
        self.register_buffer("cols", delta.cols.to(device, copy=True))
        self.register_buffer("base_columns", None, persistent=False)
        self.scale, self.folds, self.enabled = scale, fold, True
        shape = matrix_shape(linear)
        assert shape is not None, "only matrices get a delta"
        self.run = ops.run_of(delta.cols, shape[1])
        self._versions: tuple[int, int] | None = None
        self._masters = (self.A, self.B)  # read in every forward: nn.Module's own attribute lookup is slow
        self._gather = gather
        gather.members += 1
        if fold:
            self.base_columns = self.weight.index_select(1, self.cols)
            self.fold()
        self._hooks: tuple[RemovableHandle, ...] = ()
        linear.__dict__[_DELTA] = self  # not a submodule either
        self.hook()

    @property
    def weight(self) -> Tensor:
        """The base's weight as a writable [out, in] view, and the delta brought to its device: ask for it first."""
        self._follow_base()
        view = matrix_view(self.linear)
        if view is None:
            raise RuntimeError("the base's weight is no longer a plain floating tensor; detach the adapter before that")
        return view

    def _follow_base(self) -> None:
        """Moves the delta to the base's device: model.to(device) does not reach it."""
        weight = self.linear.weight
        if isinstance(weight, Tensor) and weight.device != self._masters[0].device and not weight.is_meta:
            self.to(weight.device)

    @torch.no_grad()
    def fold(self) -> None:
        """Writes W0[:, cols] + scale * B A into the weight."""
        weight, base = self.weight, self.base_columns
        ops.column_fold_(weight, base.to(weight.dtype), self.cols, self.A, self.B, self.scale, self.run)
        self._versions = self.A._version, self.B._version

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the original columns back, bitwise."""
        weight = self.weight
        base, A, B = self.base_columns.to(weight.dtype), self.A[:0], self.B[:, :0]
        ops.column_fold_(weight, base, self.cols, A, B, self.scale, self.run)

    @property
    def attached(self) -> bool:
        return self.linear.__dict__.get(_DELTA) is self

    def hook(self) -> None:
        """Puts the hooks on the matrix. The delta belongs to the matrix's own output: nobody's hook comes before it."""
        after = self.linear.register_forward_hook(self._after, prepend=True)
        self._hooks = self.linear.register_forward_pre_hook(self._before), after

    def unhook(self) -> None:
        """Takes them off: where nothing asks for gradients a folded delta is in the weight and needs none."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def release(self) -> None:
        """Lets go of the matrix, for good."""
        self.unhook()
        del self.linear.__dict__[_DELTA]
        self._gather.members -= 1

    @torch.no_grad()
    def folded_columns(self) -> Tensor:
        """The columns [out, s] that fold() writes, bitwise."""
        weight = self.weight
        base = self.base_columns.to(weight.dtype)
        folded = torch.empty_like(base)
        every = torch.arange(base.shape[1], device=base.device)
        ops.column_fold_(folded, base, every, self.A, self.B, self.scale, self.run)
        return folded

    @torch.no_grad()
    def survivors(self) -> tuple[int, int]:
        """(how many weights the fold changes, how many it would change without rounding)."""
        folded = self.folded_columns()
        wanted, changed = self.scale * (self.B @ self.A) != 0, folded != self.base_columns.to(folded.dtype)
        return int((wanted & changed).sum()), int(wanted.sum())

    def _before(self, linear: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or not self.enabled:
            return
        self._follow_base()
        self.catch_up()

    def catch_up(self) -> None:
        """Folds what was changed since the last fold."""
        a, b = self._masters
        if self.folds and self.enabled and self._versions != (a._version, b._version):
            self.fold()

    def _after(self, linear: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        if not self.enabled or (self.folds and not torch.is_grad_enabled()):
            return None
        x = args[0]
        xs = self._gather(x, self.cols, self.run, y.dtype)
        if self.folds:
            return ops.column_tap(y, xs, self.A, self.B, self.scale)
        return ops.column_side(y, x, xs, self.cols, self.A, self.B, self.scale, self.run)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a model with a SparseAdapter attached can be neither copied nor pickled: call adapter.merge() or "
            "adapter.detach() first, or keep the adapter with adapter.save_pretrained(dir)"
        )


@dataclass(frozen=True)
class MatrixSummary:
    """One line of SparseAdapter.summary(): `values` are the trained ones, `score` is None for random placement."""

    name: str
    out_features: int
    in_features: int
    columns: int
    rank: int
    values: int
    score: float | None


class SparseAdapter(nn.Module):
    """Deltas attached to a model. Made by `attach` or `from_pretrained`; its parameters are `<module>.A` and `.B`.

    Where the model is moved to another device afterwards, its deltas follow with the next forward; before that, and
    before torch.compile, `adapter.to(device)` moves them.

    left_out: by name, the shape of every weight of two or more dimensions that has no delta; embeddings and head aside.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, deltas: Mapping[str, Delta], mode: Mode) -> None:
        super().__init__()
        check_free(model)
        modules = dict(model.named_modules())
        folds = {name: _folds(name, modules[name], mode) for name in deltas}
        self.config = config
        self._base_count, self._base_bytes = count_parameters(model), bytes_of(model.parameters())
        self.left_out = left_out(model, deltas)
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        gathers: dict[int, _SharedGather] = {}
        for name, delta in deltas.items():
            gather = gathers.setdefault(config.modules[name].group, _SharedGather())
            self._plant(name, ColumnDelta(modules[name], delta, config.scale, folds[name], gather))
        self._state: Literal["attached", "merged", "detached"] = "attached"
        self._disabled = 0
        self._follower = _follow_optimizers(self)

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

        placement: "random" columns, drawn for every group of matrices, or the best by ColumnScores (or a file of them).
        `support` and `rank` default to what fits (see placement.allocate). mode: "fold" writes the deltas into the
        weights, "side" adds them beside, "auto" folds wherever the weight is a plain bf16, fp16 or fp32 tensor. Warns
        of experts in stacked weights, which get no delta. Raises ValueError for a density outside (0, 1], one that
        nothing fits, a model without linear layers, and a model that has an adapter attached.
        """
        config, deltas = plan(model, density, support, rank, targets, placement, scale, seed)
        return cls(model, config, deltas, mode)

    @classmethod
    def from_pretrained(cls, model: nn.Module, directory: str | Path, mode: Mode = "auto") -> "SparseAdapter":
        """Attaches a saved adapter. Raises ValueError, naming the first mismatch, if it was made for another model."""
        config, deltas = adapter_files.read_adapter(directory)
        adapter_files.check_base(config, dict(model.named_modules()), directory)
        return cls(model, config, deltas, mode)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors; a failure leaves nothing half-written."""
        adapter_files.write_adapter(directory, self.config, self._deltas())

    def export_lora(self, directory: str | Path) -> None:
        """Writes the adapter as a standard LoRA, for PEFT, vLLM and llama.cpp."""
        transposed = {is_transposed(site.linear) for site in self.sites().values()}
        if len(transposed) > 1:
            raise ValueError("a LoRA file cannot hold both Conv1D and nn.Linear; attach to matrices of one kind")
        adapter_files.write_lora(directory, self.config, self._deltas(), transposed.pop())

    def sites(self) -> dict[str, ColumnDelta]:
        """The deltas by the name of the matrix they change."""
        return {name: site for name, site in self.named_modules() if isinstance(site, ColumnDelta)}

    def fold(self) -> None:
        """Writes every delta into its weight. Only needed after changing parameters by hand under torch.compile or in
        `unhooked`: optimizer steps, load_state_dict and, elsewhere, the next forward do it by themselves."""
        for site in self.sites().values():
            if site.folds and site.enabled:
                site.fold()

    def merge(self) -> None:
        """Leaves the weights as they were trained with, bitwise, and removes every hook: the model is a plain one.

        Raises RuntimeError for a base that cannot hold the deltas (quantised, sharded): export_lora() is for that.
        """
        self._require("attached", "merge")
        for name, site in self.sites().items():
            if matrix_view(site.linear) is None:
                raise RuntimeError(
                    f"cannot merge into {name}: its weight is quantised or sharded; use export_lora() instead"
                )
        for site in self.sites().values():
            if not site.folds:
                site.base_columns = site.weight.index_select(1, site.cols)
            site.fold()
        self._release("merged")

    def unmerge(self) -> None:
        """Undoes merge(): the original columns come back, bitwise. Raises RuntimeError if the weights changed since."""
        self._require("merged", "unmerge")
        for name, site in self.sites().items():
            if not torch.equal(site.weight.index_select(1, site.cols), site.folded_columns()):
                raise RuntimeError(f"cannot unmerge: {name} was changed after merge(); load the base model again")
        for site in self.sites().values():
            site.restore()
        self._state = "detached"

    def detach(self) -> None:
        """Restores the base bitwise, removes every hook and gives parameters their requires_grad back."""
        self._require("attached", "detach")
        for site in self.sites().values():
            if site.folds:
                site.restore()
        self._release("detached")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, bitwise, within the block. Blocks may nest."""
        self._require("attached", "disable")
        self._disabled += 1
        if self._disabled == 1:
            for site in self.sites().values():
                site.enabled = False
                if site.folds:
                    site.restore()
        try:
            yield
        finally:
            self._disabled -= 1
            if self._disabled == 0 and self._state == "attached":
                for site in self.sites().values():
                    site.enabled = True
                self.fold()

    @property
    def parameters_of_base(self) -> int:
        """All parameters of the base, of a quantised matrix the values that it stands for."""
        return self._base_count

    @property
    def trainable_percent(self) -> float:
        """Trained values per hundred parameters of the base."""
        return 100 * self._values() / self._base_count

    def print_trainable_parameters(self) -> None:
        """Prints trained values, the base's parameters, and their ratio in percent, in the form PEFT does."""
        print(
            f"trainable params: {self._values():,d} || all params: {self._base_count:,d} || "
            f"trainable%: {self.trainable_percent:.4f}"
        )

    def surviving_share(self) -> float:
        """The share of non-zero fp32 changes that survive the fold's rounding; 1 where there is no change to lose."""
        self._require("attached", "ask for the surviving share of")
        counts = [site.survivors() for site in self.sites().values() if site.folds]
        wanted = sum(count for _, count in counts)
        return sum(count for count, _ in counts) / wanted if wanted else 1.0

    def summary(self) -> list[MatrixSummary]:
        """What each matrix got, in the model's order."""
        rows = []
        for name, info in self.config.modules.items():
            values = info.rank * (info.out_features + info.support)
            rows.append(
                MatrixSummary(name, info.out_features, info.in_features, info.support, info.rank, values, info.score)
            )
        return rows

    def footprint(self) -> Footprint:
        """The memory that the adapter takes beside the base it was attached to."""
        values = bytes_of(self.parameters())
        return Footprint(self._base_bytes, bytes_of(self.buffers()), values, 3 * values)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self.fold()
        return result

    def _plant(self, name: str, site: ColumnDelta) -> None:
        """Registers a delta under the dotted name of its matrix, so that parameters are called `<module>.A`."""
        parent: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, site)

    def _values(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _deltas(self) -> dict[str, Delta]:
        return {name: Delta(site.cols, site.A.detach(), site.B.detach()) for name, site in self.sites().items()}

    def _require(self, state: str, verb: str) -> None:
        if self._state != state:
            raise RuntimeError(f"cannot {verb} this adapter: it must be {state}, and it is {self._state}")

    def _release(self, state: Literal["merged", "detached"]) -> None:
        for site in self.sites().values():
            site.release()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._follower()
        self._state = state

    def _follow(self, optimizer: Optimizer) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for site in self.sites().values():
            if site.folds and site.enabled and (id(site.A) in stepped or id(site.B) in stepped):
                site.fold()


def _folds(name: str, linear: nn.Module, mode: Mode) -> bool:
    if mode not in ("auto", "fold", "side"):
        raise ValueError(f'mode must be "auto", "fold" or "side", got {mode!r}')
    foldable = matrix_view(linear) is not None
    if mode == "fold" and not foldable:
        raise ValueError(f'mode "fold" needs a plain bf16, fp16 or fp32 weight, which {name} is not; use "auto"')
    return foldable and mode != "side"


def check_free(model: nn.Module) -> None:
    """Raises ValueError for a model that has an adapter attached."""
    if (first := next(_sites(model), None)) is not None:
        raise ValueError(
            f"this model has a SparseAdapter attached already (at {first[0]}); one at a time: call its detach() or "
            f"merge() first"
        )


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Within the block a folded adapter of `model` costs nothing: its hooks are off, and the forward is the base's own.

    For forwards without gradients: a backward would give the adapter none. Steps of an optimizer and load_state_dict()
    fold as ever; after changing parameters by hand call adapter.fold(). Deltas beside the weight keep their hooks.
    Blocks may nest, and the adapter may be disabled, merged or detached within one.
    """
    sites = [site for _, site in _sites(model) if site.folds and site._hooks]
    for site in sites:
        site.catch_up()
    for site in sites:
        site.unhook()
    try:
        yield
    finally:
        for site in sites:
            if site.attached:
                site.hook()


def _sites(model: nn.Module) -> Iterator[tuple[str, ColumnDelta]]:
    """The deltas attached to a model, with the names of their matrices."""
    for name, module in model.named_modules():
        if _DELTA in module.__dict__:
            yield name, module.__dict__[_DELTA]


def _follow_optimizers(adapter: SparseAdapter) -> weakref.finalize:
    """Folds after every step of an optimizer that holds the adapter's parameters, until called or the adapter dies."""
    reference = weakref.ref(adapter)

    def fold_after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        alive = reference()
        if alive is not None:
            alive._follow(optimizer)

    stop = weakref.finalize(adapter, register_optimizer_step_post_hook(fold_after_step).remove)
    stop.atexit = False
    return stop
