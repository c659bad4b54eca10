"""The jobs of cli_jobs on the CPU and on the pretend accelerator.

`python jobs.py FOLDER` prints the outcome of each job, by device.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import dispatch_model
from cli_jobs import Setup, run_jobs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretend_device import install
from rbfast.models import student
from rbfast.models.student import load_student

OPTIONS = {"options": ("--dtype", "float32"), "adapter": ("--density", "0.2", "--rank", "3", "--support", "8")}


def load_spread(*args: Any, device: str = "cpu", **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_student`. "auto" spreads the layers over two devices; accelerate itself only looks for GPUs."""
    model, tokenizer = load_student(*args, **options)
    if device == "auto":
        names = [
            "model.embed_tokens",
            "model.rotary_emb",
            *(f"model.layers.{i}" for i in range(len(model.model.layers))),
        ]
        half = len(names) // 2 + 1
        places = dict.fromkeys(names, "pretend:1") | dict.fromkeys(names[:half], "pretend:0")
        dispatch_model(model, places | {"model.norm": "pretend:1", "lm_head": "pretend:0"})  # the head is tied
    return model, tokenizer


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    install()
    gc.freeze()  # otherwise garbage collection in a job would copy memory that forks share
    ended = {}
    for device in ("cpu", "pretend", "auto"):
        setup = Setup(folder / device, device, **OPTIONS)
        setup.folder.mkdir()
        setup.prepare()
        with patch.object(student, "load_student", load_spread):
            ended[device] = run_jobs(setup)
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
