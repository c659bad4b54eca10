"""The examples of a run: its traces, checked and encoded."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.data.chat_template import default_instruction
from rbfast.data.encoding import Example, encode_all
from rbfast.data.instruction import Instruction, instruction_named
from rbfast.data.trace import Trace
from rbfast.models.student import rotary_embeddings
from rbfast.training.distill_config import DistillConfig
from rbfast.utils.processes import is_first_process
from rbfast.utils.progress import bar
from rbfast.utils.records import show


def check_items(items: object, kind: type, reader: str) -> None:
    """Raises TypeError if an item is of another kind. reader: the function that reads a file of such items."""
    given = [items] if isinstance(items, str | Path) else items
    for other in (item for item in given if not isinstance(item, kind)):  # type: ignore[attr-defined]
        raise TypeError(f"expected a list of {kind.__name__}, got {show(other)}: {reader}(FILE) reads one from a file")


def encode_traces(
    traces: Sequence[Trace], tokenizer: PreTrainedTokenizerBase, config: DistillConfig, quiet: bool = True
) -> tuple[list[Example], list[tuple[Trace, str]]]:
    """As `encode_all`, with the config's settings. Raises ValueError if no trace can be trained on."""
    with bar("encoding", quiet or not is_first_process()) as progress:
        examples, skipped = encode_all(
            progress.track(traces, description=""),
            tokenizer,
            max_tokens=config.max_tokens,
            instruction=instruction_of(tokenizer, config),
            turns=config.turns,
        )
    if not examples:
        raise ValueError(f"none of the {len(traces)} traces can be trained on{_first_reason(skipped)}")
    return examples, skipped


def encode_held_out(
    traces: Sequence[Trace], tokenizer: PreTrainedTokenizerBase, config: DistillConfig
) -> list[Example]:
    """Encodes held-out traces. Warns if some cannot be measured."""
    if not traces:
        return []
    examples, skipped = encode_traces(traces, tokenizer, config)
    if skipped and is_first_process():
        warnings.warn(
            f"{len(skipped)} of {len(traces)} held-out traces are not measured{_first_reason(skipped)}", stacklevel=3
        )
    return examples


def check_positions(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Raises ValueError if the model has a position table (GPT-2, OPT) and an example is longer: the run would fail at
    that example. Warns if one is longer than the model's max_position_embeddings."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(len(example.input_ids) for example in examples)
    if limit is None or longest <= limit:
        return
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not model.get_input_embeddings())
    if any(0 <= table.num_embeddings - limit <= 2 for table in tables):  # OPT's table has two rows more
        raise ValueError(
            f"the longest trace has {longest} tokens, but {type(model).__name__} has {limit} positions: "
            f"set max_tokens (--max-tokens) to {limit}, which leaves longer traces out"
        )
    if all(rope["rope_type"] == "default" for rope in rotary_embeddings(config)):  # others stretch the positions
        beyond = sum(len(example.input_ids) > limit for example in examples)
        warnings.warn(
            f"{beyond} of {len(examples)} traces are longer than the {limit} positions that this model was made for "
            f"(max_position_embeddings; the longest has {longest} tokens): it may write worse beyond them; set "
            f"max_tokens (--max-tokens) to {limit} to leave these traces out",
            stacklevel=3,
        )


def instruction_of(tokenizer: PreTrainedTokenizerBase, config: DistillConfig) -> Instruction:
    return default_instruction(tokenizer) if config.instruction is None else instruction_named(config.instruction)


def _first_reason(skipped: Sequence[tuple[Trace, str]]) -> str:
    return f"; the first: {skipped[0][1]}" if skipped else ""
