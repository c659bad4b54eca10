"""Value checks on the device, read back together: every read synchronises with the device, whatever its size.

The details of an error are computed only after a check has failed.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Question(NamedTuple):
    """A number on the device (0-dimensional, int64 or float64), and which of its values are wrong.

    explain: returns the error message. It may read from the device.
    """

    answer: Tensor
    is_wrong: Callable[[float], bool]
    explain: Callable[[], str]


def read_back(questions: Sequence[Question], numbers: Sequence[Tensor]) -> list[int]:
    """The int64 numbers, read together with the answers: the only synchronisation of a call.

    Raises:
        ValueError: an answer is wrong.
    """
    asked = [*(question.answer for question in questions), *numbers]
    values = torch.stack([_as_bits(answer) for answer in asked]).tolist() if asked else []
    for question, value in zip(questions, values, strict=False):
        if question.is_wrong(_as_float(value) if question.answer.dtype == torch.float64 else value):
            raise ValueError(question.explain())
    return values[len(questions) :]


def _as_bits(answer: Tensor) -> Tensor:
    return answer.view(torch.int64) if answer.dtype == torch.float64 else answer


def _as_float(bits: int) -> float:
    return struct.unpack("d", struct.pack("q", bits))[0]
