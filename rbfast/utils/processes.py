"""The processes of a run, as torchrun starts them."""

import os


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this one writes and prints for all. A RANK that a shell was left with says nothing of a lone process."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"
