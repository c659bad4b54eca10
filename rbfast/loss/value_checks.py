"""Value checks on the device, read back together: every read synchronises with the device, whatever its size.

The details of an error are computed only after a check has failed.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ValueCheck(NamedTuple):
    """A number on the device (0-dimensional, int64 or float64), and the test for a wrong value.

    explain: returns the error message. It may read from the device.
    """

    value: Tensor
    is_wrong: Callable[[float], bool]
    explain: Callable[[], str]


def read_back(checks: Sequence[ValueCheck], numbers: Sequence[Tensor]) -> list[int]:
    """The int64 numbers, read together with the checked values: the only synchronisation of a call.

    Raises:
        ValueError: a check fails.
    """
    wanted = [*(check.value for check in checks), *numbers]
    values = torch.stack([_as_bits(value) for value in wanted]).tolist() if wanted else []
    for check, value in zip(checks, values, strict=False):
        if check.is_wrong(_as_float(value) if check.value.dtype == torch.float64 else value):
            raise ValueError(check.explain())
    return values[len(checks) :]


def _as_bits(value: Tensor) -> Tensor:
    return value.view(torch.int64) if value.dtype == torch.float64 else value


def _as_float(bits: int) -> float:
    return struct.unpack("d", struct.pack("q", bits))[0]
