"""The jobs of cli_jobs on the pretend accelerator, and beside it on the CPU.

`python jobs.py FOLDER` prints, by device and job, how they ended.
"""

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from cli_jobs import Setup, run_jobs

from pretend_device import install

OPTIONS = {"options": ("--dtype", "float32"), "adapter": ("--density", "0.2", "--rank", "3", "--support", "8")}


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a fork has none of the threads that the process had before
    install()
    gc.freeze()  # jobs collect garbage: keep them from touching, and so copying, memory that forks share
    ended = {}
    for device in ("cpu", "pretend"):
        setup = Setup(folder / device, device, **OPTIONS)
        setup.folder.mkdir()
        setup.prepare()
        ended[device] = run_jobs(setup)
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
