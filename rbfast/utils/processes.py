"""The processes of a run, from torchrun's environment variables."""

import os


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this process writes and prints for all. A single process ignores a stale RANK in its shell."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"
