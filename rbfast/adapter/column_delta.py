"""The delta of one matrix: its parameters, and the hooks that run it folded into the weight or beside it.

    with unhooked(model), torch.no_grad():              # a folded delta adds nothing to the cost of a forward
        model(...)

Without gradients the hooks of a folded delta do nothing, but calling them takes time. `unhooked(model)` removes them
for a block. So does `rbfast.evaluating(model)`, which all decoding in rbfast uses.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rbfast import ops
from rbfast.adapter.adapter_files import Delta
from rbfast.adapter.bypass_watch import BypassWatch
from rbfast.adapter.shared_gather import SharedGather
from rbfast.models.experts import ExpertStack, patch_forward, unpatch_forward, weight_owner
from rbfast.models.linears import is_transposed, matrix_shape, matrix_view, named_modules
from rbfast.models.weight_use import input_of, stored_weight
from rbfast.utils.overlap import Overlap

_META = torch.device("meta")
_UNHOOKED = Overlap()
_DELTA = "_rbfast_delta_"  # + the weight's name: the attribute of its module that holds the ColumnDelta
# Three parts. The first changes when the weight is written (None: the layer computes its weight). The second changes
# when A or B is written (`A.data = x` changes only the address). The third changes when either moves to a device.
_Versions = tuple[tuple[int, int, torch.dtype] | None, tuple[int, int, int, int], tuple[torch.device, torch.device]]
_NEVER = -1, -1, 0, 0  # a second part that no delta has
_WRITTEN = (
    "the weight of a {kind} was changed while a delta is folded into it, and it matches neither the base nor the base "
    'plus the delta; detach the adapter before you change the base, or attach with mode="side"'
)


class ColumnDelta(nn.Module):
    """The delta of one matrix and the hooks that run it. Parameters A [k, s] and B [out, k], buffer cols [s]; for a
    stack of E experts (`rbfast.models.experts`): A [E, k, s] and B [E, out, k].

    Beside the weight (`is_folded` is False) it never writes to the weight. Otherwise it keeps the weight's original
    columns in `base_columns`, and is in one of three states:

    - folded: the weight holds the base plus the delta; `_versions()` equals `_versions_at_fold`;
    - stale: A, B or the weight was written or moved since, so the two differ; the next forward or load folds again;
    - restored: the weight is the base's; `_versions_at_fold` has _NEVER, so the next forward folds if `enabled`.
    """

    A: nn.Parameter
    B: nn.Parameter
    cols: Tensor
    base_columns: Tensor
    linear: nn.Module

    def __init__(self, linear: nn.Module, delta: Delta, scale: float, fold: bool, gather: SharedGather) -> None:
        super().__init__()
        object.__setattr__(self, "linear", linear)  # not a submodule: the base stays outside the adapter's state
        device = next((_execution_device(linear, t.device) for t in (*linear.parameters(), *linear.buffers())), None)
        # Contiguous, whatever the source: fused optimizers pair values, gradients and moments by memory offset.
        with torch.inference_mode(False):
            self.A, self.B = (
                nn.Parameter(torch.empty(part.shape, dtype=torch.float32, device=device).copy_(part))
                for part in (delta.A, delta.B)
            )
            self.register_buffer("cols", delta.cols.to(device, copy=True))
        self.register_buffer("base_columns", None, persistent=False)
        self.scale, self.is_folded, self.enabled = scale, fold, True
        shape = matrix_shape(linear)
        assert shape is not None, "only matrices get a delta"
        self.run = ops.run_of(delta.cols, shape[1])
        self._view_cache: tuple[tuple[Any, ...], bool] = (), False  # the last _view_key(), and whether it is transposed
        self._versions_at_fold = self._versions()
        self._versions_at_forward: _Versions | None = None  # of the last forward, or of a later fold
        self.watch: BypassWatch | None = None
        self._refused_load: tuple[str, Tensor] | None = None  # why a weight was not loaded, and the weight
        self.gather = gather
        gather.members.append(self)
        self._hooks: list[RemovableHandle] = []
        self._load_hooks: list[RemovableHandle] = []

    @property
    def weight(self) -> Tensor:
        """The base's weight as a writable view [out, in], or [E, out, in] for experts. Reading it first moves the delta
        to the weight's device."""
        self.follow_base()
        own, key = stored_weight(self.linear), self._view_key()
        if own is not None and key == self._view_cache[0]:
            return own.detach().mT if self._view_cache[1] else own.detach()
        view = matrix_view(self.linear)
        if view is None:
            raise RuntimeError(
                "the base's weight is no longer a plain floating tensor of at most 32 bits; detach the adapter before "
                'you change or shard it, or attach with mode="side"'
            )
        self._view_cache = key, is_transposed(self.linear)
        return view

    def _view_key(self) -> tuple[Any, ...]:
        """What `matrix_view` depends on, as a cache key: `matrix_view` itself takes longer than a fold."""
        weight: Any = stored_weight(self.linear)
        if weight is None:
            return ()
        forward = self.linear.__dict__.get("forward")
        return type(weight), weight.dtype, weight.shape, weight.is_meta, type(self.linear), forward

    def follow_base(self) -> None:
        """Moves the delta to the base's device: model.to(device) does not reach it."""
        device = self._device()
        if device not in (self.factors[0].device, _META):
            self.to(device)

    def _device(self) -> torch.device:
        weight = stored_weight(self.linear)
        stored = weight if weight is not None else next(self.linear.parameters(), self.factors[0])
        return _execution_device(self.linear, stored.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ColumnDelta":
        """Moves but never casts: A and B stay fp32, and the kept columns keep the base's bits."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def fold(self) -> None:
        """Writes W0[:, cols] + scale * B A into the weight."""
        fold_all([self])

    def _mark_folded(self) -> None:
        # Not by attribute: nn.Module.__setattr__ is slow.
        self.__dict__["_versions_at_fold"] = self.__dict__["_versions_at_forward"] = self._versions()

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the original columns back, bitwise, if any are kept. The next forward of an enabled delta folds."""
        if self._buffers["base_columns"] is None:
            return
        weight_version, _, devices = self._versions_at_fold
        self._versions_at_fold, self._versions_at_forward = (weight_version, _NEVER, devices), None
        weight = self.weight
        self._match_base_dtype(weight)
        self._write(weight, self.base_columns, self.cols, self.A[..., :0, :], self.B[..., :0])

    def _write(self, weight: Tensor, base_columns: Tensor, cols: Tensor, A: Tensor, B: Tensor) -> None:
        fold = ops.column_fold_ if weight.dim() == 2 else ops.grouped_column_fold_
        fold(weight, base_columns, cols, A, B, self.scale, self.run)

    def _match_base_dtype(self, weight: Tensor) -> None:
        """Casts the kept columns to the weight's dtype: the model may have been cast."""
        columns: Any = self._buffers["base_columns"]
        if columns.dtype != weight.dtype:
            self.base_columns = columns.to(weight.dtype)

    def _versions(self) -> _Versions:
        # Every forward calls this, so stored_weight and factors are inlined.
        own: Any = self._parameters
        a, b = own["A"], own["B"]
        delta = a._version, b._version, a.data_ptr(), b.data_ptr()
        weight: Tensor | None = self.linear._parameters.get("weight")
        if weight is None and (weight := stored_weight(self.linear)) is None:
            return None, delta, (self._device(), a.device)
        version = 0 if weight.is_inference() else weight._version
        return (id(weight), version, weight.dtype), delta, (weight.device, a.device)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, without nn.Module's attribute lookup, which is too slow for every forward."""
        own: Any = self._parameters
        return own["A"], own["B"]

    @property
    def attached(self) -> bool:
        return delta_of(self.linear) is self

    def attach(self) -> None:
        """Attaches to the matrix. `restore` and `release` undo it, even if it was interrupted."""
        owner, key = weight_owner(self.linear)
        owner.__dict__[_DELTA + key] = self  # not a submodule either
        if self.is_folded:
            self.keep_base_columns()
            try:
                self.fold()
            except Exception:  # a weight that cannot be written to cannot be restored either
                self._buffers["base_columns"] = None
                raise
            self._load_hooks.append(owner.register_load_state_dict_pre_hook(self._before_load))
            self._load_hooks.append(owner.register_load_state_dict_post_hook(self._after_load))
        self.hook()

    def keep_base_columns(self) -> None:
        """Keeps the columns of the base's weight, unless they are kept already."""
        if self._buffers["base_columns"] is None:
            self.base_columns = self.weight.index_select(-1, self.cols)

    def hook(self) -> None:
        """Puts the hooks on the matrix. Our hook runs first, because the delta belongs to the matrix's own output."""
        self.unhook()
        patch_forward(self.linear)
        self._hooks.append(self.linear.register_forward_pre_hook(self._pre_forward))
        self._hooks.append(self.linear.register_forward_hook(self._post_forward, prepend=True, with_kwargs=True))

    def unhook(self) -> None:
        """Removes the hooks. Without gradients a folded delta needs none: it is already in the weight."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        unpatch_forward(self.linear)

    def release(self) -> None:
        """Detaches from the matrix permanently."""
        self.unhook()
        for hook in self._load_hooks:
            hook.remove()
        if self.attached:
            owner, key = weight_owner(self.linear)
            del owner.__dict__[_DELTA + key]
        self.__dict__.pop("adapter_reference", None)

    @torch.no_grad()
    def folded_columns(self) -> Tensor:
        """The columns [(E,) out, s] that fold() writes, bitwise."""
        base = self.base_columns.to(self.weight.dtype)
        folded = torch.empty_like(base)
        all_columns = torch.arange(base.shape[-1], device=base.device)
        self._write(folded, base, all_columns, self.A, self.B)
        return folded

    @torch.no_grad()
    def count_survivors(self) -> tuple[int, int]:
        """(number of weights that the fold changes, number that it would change without rounding)."""
        folded = self.folded_columns()
        wanted, changed = self.B @ self.A != 0, folded != self.base_columns.to(folded.dtype)
        return int((wanted & changed).sum()), int(wanted.sum())

    def _pre_forward(self, linear: nn.Module, args: tuple) -> None:
        if not self.enabled or torch.compiler.is_compiling():
            return
        if self._versions_at_forward != self._versions():
            self.follow_base()
            self.fold_if_stale()
            self._versions_at_forward = self._versions()
        if self.watch is not None and torch.is_grad_enabled():
            self.watch.on_forward(self)

    def fold_if_stale(self) -> None:
        """Folds if A, B or the base's weight changed since the last fold.

        Raises RuntimeError if the weight holds neither the base's columns nor the folded ones.
        """
        if not (self.is_folded and self.enabled):
            return
        (weight, delta, _), (folded_weight, folded_delta, _) = self._versions(), self._versions_at_fold
        is_written = weight != folded_weight and self._has_real_weight()
        if is_written and not self.is_delta_written():  # if A or B changed too, there is nothing to compare
            self._check_written_base()
        if is_written or delta != folded_delta:
            self.fold()

    def is_delta_written(self) -> bool:
        """Whether A or B was written in place since the last fold. A move alone changes their addresses, not their
        versions."""
        return self._versions()[1][:2] != self._versions_at_fold[1][:2]

    def _has_real_weight(self) -> bool:
        """Whether the weight is a real tensor: neither on meta (offloaded) nor a stand-in."""
        weight: Any = self.linear.weight
        return type(weight) in (Tensor, nn.Parameter) and not weight.is_meta

    @torch.no_grad()
    def _check_written_base(self) -> None:
        """Raises RuntimeError if a weight that other code wrote holds neither the base's nor the folded columns."""
        columns = self.weight.index_select(-1, self.cols)
        is_cast = columns.dtype != self.base_columns.dtype
        if not (is_cast or self.is_base_or_folded(columns)):
            raise RuntimeError(_WRITTEN.format(kind=type(weight_owner(self.linear)[0]).__name__))

    def is_base_or_folded(self, columns: Tensor) -> bool:
        known = self.base_columns, self.folded_columns()
        return any(torch.equal(columns, ours.to(columns.dtype)) for ours in known)

    @torch.no_grad()
    def _before_load(
        self, owner: nn.Module, state: dict[str, Any], prefix: str, local: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Refuses a weight that is neither the base nor the base with this delta: it has an unknown delta. If the
        adapter is a submodule of the model, the same call may load that delta next (`_load_from_state_dict`)."""
        linear, key = self.linear, prefix + weight_owner(self.linear)[1]
        current: Any = linear.weight
        weight, new = matrix_view(linear), state.get(key)
        if weight is None or not isinstance(new, Tensor) or new.shape != current.shape or new.is_meta:
            return
        self.fold_if_stale()
        columns = new.detach().mT if is_transposed(linear) else new.detach()
        dtype = new.dtype if local.get("assign_to_params_buffers") else weight.dtype
        columns = columns.to(weight.device, dtype).index_select(-1, self.cols)
        if not self.is_base_or_folded(columns):
            refusal = f"{key}: " + _WRITTEN.format(kind=type(owner).__name__)
            lists[-1].append(refusal)
            self._refused_load = refusal, new.detach()
            state[key] = current.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Folds, and withdraws the refusal if the refused weight is the base with the delta just loaded."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        refused, self._refused_load = self._refused_load, None
        if not (self.is_folded and self.enabled and self.attached):
            return
        self.fold()
        weight: Any = self.linear.weight
        if refused and refused[0] in args[-1] and torch.equal(refused[1].to(weight.device, weight.dtype), weight):
            args[-1].remove(refused[0])

    def _after_load(self, owner: nn.Module, incompatible: Any) -> None:
        if matrix_view(self.linear) is not None:
            (self.fold if self.enabled else self.restore)()

    def _post_forward(self, linear: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        if not self.enabled or (self.is_folded and not torch.is_grad_enabled()):
            return None
        if not isinstance(y, Tensor):
            raise TypeError(
                f"a {type(linear).__name__} with a delta returned a {type(y).__name__}, expected a tensor; leave it "
                "out of targets"
            )
        x, (a, b) = input_of(args, kwargs), self.factors
        cols: Any = self._buffers["cols"]
        ends = args[1] if isinstance(linear, ExpertStack) else None
        if self.is_folded and ends is None:
            return self.gather.tap(self, y, x, cols, self.run)
        xs = self.gather(x, cols, self.run, y.dtype)
        if self.is_folded:
            return ops.column_tap(y, xs, a, b, self.scale, ends)
        # FSDP with mixed precision hands A and B to the forward in bf16.
        return ops.column_side(y, x, xs, cols, a.float(), b.float(), self.scale, self.run, ends)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a SparseAdapter and the model that it is attached to can be neither copied nor pickled: call "
            "adapter.merge() or adapter.detach() first, or keep the adapter with adapter.save_pretrained(dir). To "
            "average weights, average clones of adapter.parameters()"
        )


@torch.no_grad()
def fold_all(sites: Iterable[ColumnDelta]) -> None:
    """`fold()` for many sites: one op call for all matrices of a device and scale, and one per stack of experts."""
    together: dict[tuple[torch.device, float], list[ColumnDelta]] = {}
    weights = {}
    for site in sites:
        weight = weights[site] = site.weight
        site._match_base_dtype(weight)
        if weight.dim() == 3:
            site._write(weight, site.base_columns, site.cols, site.A, site.B)
        else:
            together.setdefault((weight.device, site.scale), []).append(site)
    for (_, scale), members in together.items():
        tensors: list[Any] = [(site._buffers, site._parameters) for site in members]  # nn.Module's attributes are slow
        ops.column_fold_all_(
            [weights[site] for site in members],
            [buffers["base_columns"] for buffers, _ in tensors],
            [buffers["cols"] for buffers, _ in tensors],
            [parameters["A"] for _, parameters in tensors],
            [parameters["B"] for _, parameters in tensors],
            scale,
            [site.run for site in members],
        )
    for site in weights:
        site._mark_folded()


def _execution_device(linear: nn.Module, device: torch.device) -> torch.device:
    """The device that a layer runs on: its weight's, or, if accelerate offloads the weight (meta), the device that
    accelerate moves it to for each forward."""
    if device != _META:
        return device
    hook = weight_owner(linear)[0].__dict__.get("_hf_hook")
    targets = (getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,)))
    return next((torch.device(target) for target in targets if target is not None), device)


def delta_of(linear: nn.Module) -> ColumnDelta | None:
    """The delta that is attached to a matrix."""
    owner, key = weight_owner(linear)
    return owner.__dict__.get(_DELTA + key)


def deltas_of(model: nn.Module) -> Iterator[tuple[str, ColumnDelta]]:
    """The deltas attached to a model, as (name of the matrix, delta)."""
    for name, module in named_modules(model).items():
        if (delta := delta_of(module)) is not None:
            yield name, delta


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Removes the hooks of folded deltas within the block, so that a forward costs what the base's does.

    Not for a backward, which would give the adapter no gradients. Optimizer steps and load_state_dict()
    fold as usual. After changing parameters by hand, call adapter.fold(). Deltas beside the weight keep their hooks.
    Blocks may nest, and the adapter may be disabled, merged or detached within one.
    """
    with _UNHOOKED.block(model, partial(_without_hooks, model)):
        yield


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    sites = [site for _, site in deltas_of(model) if site.is_folded and site._hooks]
    for site in sites:
        site.fold_if_stale()
    try:
        for site in sites:
            site.unhook()
        yield
    finally:
        for site in sites:
            if site.attached:
                site.hook()
