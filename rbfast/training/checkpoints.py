"""Checkpoints of a training run: folders `checkpoint-STEP` with digests of their files.

    checkpoint = last_checkpoint("runs/first/checkpoints")          # for trainer.train(resume_from_checkpoint=...)

A checkpoint gets its name when it is complete, so a killed process leaves no partial one. The digests reveal later
damage, by a disk or a power cut.
"""

import errno
import json
import re
import shutil
import warnings
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from rbfast.adapter.footprint import megabytes
from rbfast.utils.files import write_text

DIGESTS = "digests.json"
KEPT = 2  # checkpoints, not counting the one that is being written
UNFINISHED = "unfinished"  # folder of the checkpoint that is being written
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    matches = ((match, path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name)))
    return [path for _, path in sorted(matches, key=lambda pair: int(pair[0][1]))]


def remove_checkpoints(folder: Path) -> None:
    """Removes all checkpoints, and then the folder if it is empty. Other files stay."""
    for path in [*checkpoints_in(folder), folder / UNFINISHED]:
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def check_disk_space(folder: Path, values: int) -> None:
    """Raises OSError if the disk has no room for the checkpoints and the adapter of a run that trains `values` fp32
    values. Otherwise the run would fail later, and its training would be lost. Existing checkpoints of a resumed run
    need no more room: later ones replace them."""
    checkpoint = 3 * 4 * values  # values and the two moments of AdamW
    found = min(KEPT, len(checkpoints_in(folder / "checkpoints")))
    needed = (KEPT + 1 - found) * checkpoint + 4 * values
    free = shutil.disk_usage(folder).free
    if free < needed:
        reason = f"{megabytes(free)} are free, but the checkpoints and the adapter need {megabytes(needed)}"
        raise OSError(errno.ENOSPC, f"{reason}; free some or name a folder on another disk", str(folder))


def write_digests(folder: Path) -> None:
    """Writes the last file of a checkpoint: the digests of all the others."""
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != DIGESTS}
    write_text(folder / DIGESTS, json.dumps(digests, indent=1))


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest intact checkpoint in a folder; None if there is no checkpoint. Warns if a newer one is damaged.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[str] = []
    for path in reversed(checkpoints_in(Path(folder))):
        damage = _find_damage(path)
        if damage is None:
            if damaged:
                warnings.warn(f"{damaged[0]}; resuming from {path}", stacklevel=2)
            return str(path)
        damaged.append(damage)
    if damaged:
        raise ValueError(f"{damaged[0]}, and no other checkpoint is intact; remove {folder} to train from the start")
    return None


def _find_damage(folder: Path) -> str | None:
    """Why a run cannot resume from a checkpoint; None if it can."""
    try:
        digests = dict(json.loads((folder / DIGESTS).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return f"{folder / DIGESTS} is missing or broken"
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            return f"{path} has changed since it was written"
    return None


def _digest(path: Path) -> str:
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()
