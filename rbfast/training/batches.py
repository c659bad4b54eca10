"""Batches with a limit on tokens. Which traces share a batch is decided once for a run.

batches = batches_by_tokens(examples, 16384, seed=0)     # each is trained as one packed row
"""

import random
from collections.abc import Sequence
from itertools import chain
from typing import Any

from rbfast.data.encoding import Example, collate

_OPEN_BATCHES = 32  # batches still being filled; each trace scans all of them, and more would fill little better


def batches_by_tokens(examples: Sequence[Example], tokens: int, seed: int) -> list[list[Example]]:
    """Batches of at most `tokens` tokens, with each trace in one of them. A longer trace is alone in its batch.

    The traces are shuffled, and each goes into the first batch with room for it. The same examples, tokens and seed
    give the same batches, on every process and after a restart. A trainer shuffles the order of batches, not their
    content.
    """
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    batches: list[list[Example]] = []
    room: list[int] = []
    for number in order:
        length = len(examples[number].input_ids)
        first = max(0, len(batches) - _OPEN_BATCHES)
        at = next((i for i in range(first, len(batches)) if length <= room[i]), None)
        if at is None:
            at = len(batches)
            batches.append([])
            room.append(tokens)
        batches[at].append(examples[number])
        room[at] -= length
    return batches


def collate_items(items: Sequence[Example | list[Example]]) -> dict[str, Any]:
    """Packs items, which are examples or lists of examples, into one row."""
    return collate(list(chain.from_iterable(item if isinstance(item, list) else [item] for item in items)))
