"""What a loss must read from its device, read at once: every read waits for the device, whatever its size.

The details of a fault are worked out only after a fault is found.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Question(NamedTuple):
    """A number that is on the device (int64 or float64, of no dimension), and which of its values are wrong.

    explain: says what is wrong and where; it may read from the device itself.
    """

    answer: Tensor
    is_wrong: Callable[[float], bool]
    explain: Callable[[], str]


def read_back(questions: Sequence[Question], numbers: Sequence[Tensor]) -> list[int]:
    """The int64 numbers, read together with the questions' answers: the one wait of a call.

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
