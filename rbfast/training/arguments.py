"""TrainingArguments for a model that is already on its training device, and a check of the trackers they name."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

_DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"


@dataclass
class DeviceArguments(TrainingArguments):
    """Trains on `train_device`.

    By default the Trainer takes the first GPU, whatever device was requested, and wraps the model in nn.DataParallel if
    this process sees several GPUs.
    """

    train_device: str = "cpu"

    @cached_property
    def _setup_devices(self) -> torch.device:
        device = torch.device(self.train_device)
        self.use_cpu = device.type == "cpu"
        with _accelerate_on(device):
            super()._setup_devices  # noqa: B018  (it initialises torch.distributed)
        self._n_gpu = 0 if self.use_cpu else 1
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device


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
