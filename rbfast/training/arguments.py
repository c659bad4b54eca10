"""TrainingArguments for a model that is already on its training device, and checks that trackers are installed and that
no other training runs in this process."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

_DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"
_TRAINING = threading.RLock()


@dataclass
class DeviceArguments(TrainingArguments):
    """Trains on `train_device`.

    By default the Trainer takes the first GPU, whatever device was requested, and wraps the model in nn.DataParallel if
    this process sees several GPUs.

    Args:
        ddp_timeout: seconds that processes wait for each other. In on-policy rounds one of them may wait an hour for
            the teacher's server: five tries of a request, each with ten minutes of silence and a pause.
    """

    train_device: str = "cpu"
    ddp_timeout: int = 7200

    @cached_property
    def _setup_devices(self) -> torch.device:
        device = torch.device(self.train_device)
        self.use_cpu = device.type == "cpu"
        with sole_training(), _accelerate_on(device):
            if self.use_cpu:  # the Trainer connects GPUs with ddp_timeout, but CPUs with torch's 30 minutes
                PartialState(cpu=True, timeout=self.ddp_timeout_delta)
            super()._setup_devices  # noqa: B018  (it initialises torch.distributed)
        self._n_gpu = 0 if self.use_cpu else 1
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device


@contextmanager
def sole_training() -> Iterator[None]:
    """Raises RuntimeError if another thread of this process is in such a block.

    accelerate keeps one state per process, which says whether a batch is the last of its step: two trainings at a time
    would make each other skip optimizer steps.
    """
    if not _TRAINING.acquire(blocking=False):
        raise RuntimeError(
            "another thread of this process is training, and two at a time would disturb each other: train one after "
            "the other, or in separate processes"
        )
    try:
        yield
    finally:
        _TRAINING.release()


@contextmanager
def _accelerate_on(device: torch.device) -> Iterator[None]:
    """Makes accelerate initialise itself on this device within the block."""
    before = os.environ.get(_DEVICE_VARIABLE)
    os.environ[_DEVICE_VARIABLE] = str(device)
    try:
        yield
    finally:
        del os.environ[_DEVICE_VARIABLE]
        if before is not None:
            os.environ[_DEVICE_VARIABLE] = before


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a name that transformers does not know, ImportError for a tracker that is not installed."""
    for tracker in get_reporting_integration_callbacks(list(names)):
        try:
            tracker()
        except RuntimeError as error:
            raise ImportError(str(error)) from None
