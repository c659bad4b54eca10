"""The processes of a run, from torchrun's environment variables."""

import os


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def process_index() -> int:
    """The number of this process. A single process ignores a stale RANK in its shell."""
    return int(os.environ.get("RANK", 0)) if process_count() > 1 else 0


def is_first_process() -> bool:
    """Whether this process writes and prints for all."""
    return process_index() == 0
