"""Attention within each example of a packed row, for models that use PyTorch's scaled_dot_product_attention.

Packing eight examples behind one mask makes attention compute all T x T scores and discard seven eighths; on a CPU
that is half of a training step. Here each example is attended to by itself: on a GPU all of them in one call of
PyTorch's variable-length flash kernels, elsewhere one after the other. Without a `packing` argument this is
transformers' "sdpa", so a model may keep it after training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rbfast_packed"
NO_MASK = (1, 1, 1, 1)
ROW_MULTIPLE = 32  # the height of a tile of AMX, so that up to half of the added rows cost nothing
_FLASH_TAKES = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"


class NotPackable(RuntimeError):
    """A model's attention needs something that this module does not support (a mask or bias of its own)."""


@dataclass(frozen=True)
class Packing:
    """The boundaries of the n examples of a packed row [1, T].

    cuts: where each example begins, then T. on_device: the same, int32 [n + 1], if one kernel takes all examples at
    once. has_mask: transformers makes a mask for the row too.
    """

    cuts: list[int]
    on_device: Tensor | None = None
    has_mask: bool = False

    @property
    def longest(self) -> int:
        return max(b - a for a, b in pairwise(self.cuts))


def lengths_of(position_ids: Tensor) -> list[int]:
    """The lengths of the examples in a packed row [1, T], whose positions restart at 0. Synchronises with a GPU."""
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    return [b - a for a, b in pairwise([*starts, position_ids.shape[1]])]


def packed_inputs(model: PreTrainedModel, lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """The extra arguments of a model that `has_packed_attention`, for a row of examples of these lengths.

    If no example is longer than the attention window, no mask is needed, so a dummy of four dimensions is passed:
    transformers takes such a mask as it is, and nothing reads it. Without it, transformers would read the positions and
    build a mask of T x T.
    """
    packed = packing(lengths, device)
    window = _configured_window(model)
    if window is not None and packed.longest > window:
        return {"packing": replace(packed, has_mask=True)}
    return {"packing": packed, "attention_mask": torch.empty(NO_MASK, dtype=torch.bool, device=device)}


def packing(lengths: Sequence[int], device: torch.device) -> Packing:
    """The packing of examples of these lengths. Does not synchronise with the device."""
    cuts = list(accumulate(lengths, initial=0))
    if len(lengths) < 2 or not has_varlen_kernel(device):
        return Packing(cuts)
    on_host = torch.tensor(cuts, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    return Packing(cuts, on_host.to(device, non_blocking=True))


def spare_rows(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many rows to add to a 16-bit product of `rows` rows on a CPU, so that few sizes occur.

    oneDNN compiles a kernel for every new size and keeps it: about 0.6 MB, of which 0.3 MB stay until the process ends,
    whatever the limit of its cache. With examples of all lengths that is 20 to 40 MB a training step.
    """
    return -rows % ROW_MULTIPLE if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else 0


def has_varlen_kernel(device: torch.device) -> bool:
    """Whether this device has a kernel that takes examples of any lengths in one call."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available() or _flash_op() is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _flash_op() -> Callable[..., Any] | None:
    """The op behind torch.nn.attention.varlen, if this PyTorch has it with the expected arguments; else None.

    The wrapper runs the op and its backward through Python, which takes the host longer than the op itself.
    """
    op: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)
    arguments = () if op is None else op.default._schema.arguments
    by_place = " ".join(argument.name for argument in arguments if not argument.kwarg_only)
    by_name = {argument.name for argument in arguments if argument.kwarg_only}
    fits = by_place == _FLASH_TAKES and {"scale", "window_size_left", "window_size_right"} <= by_name
    return op.default if fits else None


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switches a model from "sdpa" to this module, if its attention can be replaced. Others rely on their mask."""
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and model._supports_attention_backend:
        config._attn_implementation = NAME


def drop_packed_attention(model: PreTrainedModel) -> None:
    """Undoes `use_packed_attention`."""
    if has_packed_attention(model):
        model.config.get_text_config()._attn_implementation = "sdpa"


def has_packed_attention(model: PreTrainedModel) -> bool:
    return model.config.get_text_config()._attn_implementation == NAME


def window_of(model: PreTrainedModel) -> int | None:
    """The longest example that needs no mask from transformers. None if no example needs one, or if all do."""
    return _configured_window(model) if has_packed_attention(model) else None


def describe_attention(model: PreTrainedModel, device: torch.device) -> str:
    """A description of the attention that a model uses for a packed row, for display."""
    if not has_packed_attention(model):
        return f"{model.config.get_text_config()._attn_implementation}, the model's own"
    if has_varlen_kernel(device):
        return "PyTorch's flash kernels, all examples of a batch in one call"
    return "scaled_dot_product_attention, one call per example; all other layers take the whole row"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, d], key and value [1, kv heads, T, d] -> [1, T, heads, d], by transformers' convention."""
    window = _window(module, kwargs)
    if packing is None or (window is not None and packing.longest > window):
        if attention_mask is not None and attention_mask.shape == NO_MASK:
            raise NotPackable(f"{type(module).__name__} has a window of {window} tokens that its config does not name")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is not None and attention_mask.shape != NO_MASK and window is None and not packing.has_mask:
        raise NotPackable(f"{type(module).__name__} builds its own attention mask")
    if kwargs.get("position_bias") is not None:
        raise NotPackable(f"{type(module).__name__} adds its own bias to the scores")
    if packing.on_device is not None and not dropout and _suits_flash(query, value):
        return _attend_varlen(query, key, value, packing, scaling), None
    parts = [
        _attend_alone(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], dropout, scaling)
        for a, b in pairwise(packing.cuts)
    ]
    return torch.cat(parts)[None], None  # contiguous, as some models need; cat of 4D parts would keep their strides


def _attend_alone(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """The attention [n, heads, d] within one example. Being causal, it ignores the rows added at the end."""
    rows = query.shape[2]
    if spare := spare_rows(rows, query.device, query.dtype):
        query, key, value = (pad(x, (0, 0, 0, spare)) for x in (query, key, value))
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[0, :, :rows].transpose(0, 1)


def _suits_flash(query: Tensor, value: Tensor) -> bool:
    size = query.shape[-1]  # of a head; DeepSeek's values have another
    return query.dtype in (torch.float16, torch.bfloat16) and size <= 256 and size % 8 == 0 and value.shape[-1] == size


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    flash, longest = _flash_op(), packing.longest
    assert flash is not None and packing.on_device is not None
    cuts = packing.on_device.to(query.device)  # a spread model has layers on other devices than its input
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    causal = {"is_causal": True, "window_size_left": -1, "window_size_right": 0}
    options = {"dropout_p": 0.0, "return_debug_mask": False, "scale": scaling}
    attended, *_ = flash(*rows, cuts, cuts, longest, longest, **causal, **options)
    return attended[None].contiguous()


def _window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """How many tokens back a token may attend. Some models (Qwen2-MoE, Llama 4) only put it into the mask; for them the
    config has it."""
    return kwargs["sliding_window"] if "sliding_window" in kwargs else _configured_window(module)


def _configured_window(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    config = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
