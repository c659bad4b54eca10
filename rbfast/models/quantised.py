"""4-bit and 8-bit weights: the config with which transformers quantises a model at loading.

Uses bitsandbytes if it is installed (NF4, LLM.int8()), else torchao (int4 in groups of 32 columns, int8 by row). An
adapter runs beside such weights.
"""

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from rbfast.utils.packages import import_optional

Bits = Literal["4bit", "8bit"]
BITS = get_args(Bits)
_GROUP = 32


def quantisation(bits: Bits, dtype: torch.dtype) -> QuantizationConfigMixin:
    """The config for `from_pretrained(quantization_config=)`; products run in `dtype`.

    Raises:
        ValueError: `bits` is neither "4bit" nor "8bit".
        ImportError: neither package is installed, or the installed one cannot be imported.
    """
    if bits not in BITS:
        raise ValueError(f"weights may be loaded in {' or '.join(BITS)}, got {bits!r}")
    package = next((name for name in ("bitsandbytes", "torchao") if find_spec(name)), None)
    if package is None:
        raise ImportError(f"weights in {bits} need the package bitsandbytes, or torchao: pip install bitsandbytes")
    import_optional(package, f"weights in {bits}", package)
    if package == "torchao":
        return _by_torchao(bits)
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _by_torchao(bits: Bits) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if bits == "8bit":
        return TorchAoConfig(Int8WeightOnlyConfig())
    four = torch.int4  # type: ignore[attr-defined]
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(_GROUP)))
