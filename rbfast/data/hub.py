"""Datasets on the hub: `owner/name`, `owner/name:split` or `owner/name:config:split`; a split may be a slice.

for number, row in enumerate(load_rows(parse_name("openai/gsm8k:main:test[:100]", split="train"))): ...
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_NAME = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:(?::(?P<config>[^:\[\]]+))?:(?P<split>(?:[^:\[\]]|\[[^\[\]]*\])+))?"
)
FORMS = "owner/name, owner/name:split or owner/name:config:split"
# The benchmarks' datasets and splits. AIME 24 has the columns id, problem, solution, answer ("025", zero-padded), url
# and year; AIME 25 has problem, answer and id; 30 rows each.
BENCHMARKS = {
    "math-500": "HuggingFaceH4/MATH-500:test",
    "aime24": "HuggingFaceH4/aime_2024:train",
    "aime25": "math-ai/aime25:test",
    "gsm8k": "openai/gsm8k:main:test",
}


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset, and its config if it has several."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.name if self.config is None else f'{self.name}:{self.config}'}[{self.split}]"


def parse_name(text: str, split: str) -> HubDataset | None:
    """The dataset that `text` names, with `split` as the default; None if `text` has none of the FORMS."""
    match = _NAME.fullmatch(text)
    return match and HubDataset(match["name"], match["config"], match["split"] or split)


def load_rows(dataset: HubDataset, streaming: bool = False) -> Iterable[dict[str, Any]]:
    """The rows of a dataset, streamed if `streaming`. Raises ValueError if they cannot be loaded."""
    import datasets

    whole = "[" not in dataset.split  # a slice cannot be streamed
    try:
        return datasets.load_dataset(dataset.name, dataset.config, split=dataset.split, streaming=streaming and whole)
    except (OSError, ValueError) as error:
        part = f"split {dataset.split}" if dataset.config is None else f"config {dataset.config}, split {dataset.split}"
        raise ValueError(
            f"the dataset {dataset.name} ({part}) could not be loaded: {error}; if it has several configs, "
            "name one: owner/name:config:split"
        ) from error
