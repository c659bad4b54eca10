"""Datasets on the hub: `owner/name`, `owner/name:split` or `owner/name:config:split`; a split may be a slice.

for number, row in enumerate(load(place("openai/gsm8k:main:test[:100]", split="train"))): ...
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_PLACE = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:(?::(?P<config>[^:\[\]]+))?:(?P<split>(?:[^:\[\]]|\[[^\[\]]*\])+))?"
)
FORMS = "owner/name, owner/name:split or owner/name:config:split"


@dataclass(frozen=True)
class Place:
    """A split of a dataset, of one of its configs where it has several."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.name if self.config is None else f'{self.name}:{self.config}'}[{self.split}]"


def place(text: str, split: str) -> Place | None:
    """What `text` names, with `split` where it names none; None if it is not of one of the FORMS."""
    match = _PLACE.fullmatch(text)
    return match and Place(match["name"], match["config"], match["split"] or split)


def load(place: Place, streaming: bool = False) -> Iterable[dict[str, Any]]:
    """Its rows, one at a time as they arrive where `streaming`. Raises ValueError where they cannot be had."""
    import datasets

    whole = "[" not in place.split  # a slice cannot be streamed
    try:
        return datasets.load_dataset(place.name, place.config, split=place.split, streaming=streaming and whole)
    except (OSError, ValueError) as error:
        part = f"split {place.split}" if place.config is None else f"config {place.config}, split {place.split}"
        raise ValueError(
            f"the dataset {place.name} ({part}) could not be loaded: {error}; one of several configs is named as "
            f"owner/name:config:split"
        ) from error
