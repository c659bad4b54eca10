"""The adapters a user would pick instead, each as PEFT makes it on every linear of a model.

    adapter = ADAPTERS["LoRA r=16"](model)      # raises ImportError without PEFT
    optimizer = torch.optim.AdamW(trained(adapter))

LoRA and SHiRA at r=1 and MiSS at r=2 (its r must be even) train fewer values than SparseAdapter at its default density;
their next size is over that budget.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.models.student import SMOLLM2, load_student

DENSITY = 0.003


_load = cache(load_student)  # reading the file takes longer than ten training steps


def fresh_student() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen SmolLM2-135M with its own memory, and its tokenizer."""
    model, tokenizer = _load(SMOLLM2)
    return deepcopy(model).requires_grad_(False), tokenizer


def sparse(model: nn.Module, density: float = DENSITY) -> SparseAdapter:
    return SparseAdapter.attach(model, density, placement="random")


def peft_adapter(config: str, **settings: Any) -> Callable[[nn.Module], nn.Module]:
    def attach(model: nn.Module) -> nn.Module:
        import peft

        return peft.get_peft_model(model, getattr(peft, config)(target_modules="all-linear", **settings))

    return attach


ADAPTERS: dict[str, Callable[[nn.Module], Any]] = {
    "rbfast": sparse,
    "LoRA r=1": peft_adapter("LoraConfig", r=1),
    "LoRA r=16": peft_adapter("LoraConfig", r=16),
    "SHiRA r=1": peft_adapter("ShiraConfig", r=1, random_seed=0),
    "MiSS r=2": peft_adapter("MissConfig", r=2),
}


def trained(adapter: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in adapter.parameters() if parameter.requires_grad]
