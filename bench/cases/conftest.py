"""The options of the cases: --device, --toy, --peers, --record."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import registry
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rbfast")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="device whose cases to run")
    group.addoption("--toy", action="store_true", help="tiny sizes, on the CPU if there is no GPU")
    group.addoption("--peers", action="store_true", help="run the peers too, not only rbfast and its floor")
    group.addoption("--record", type=Path, help="add a line of JSON for each case to this file")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", registry.cases(metafunc.config.getoption("--device")), ids=str)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> registry.Place:
    """Without a GPU, the GPU's cases run on the CPU as toys only."""
    device, is_toy = request.config.getoption("--device"), request.config.getoption("--toy")
    if device == "cuda" and not torch.cuda.is_available():
        if not is_toy:
            pytest.skip("no GPU: use --toy to try the case on the CPU")
        device = "cpu"
    return registry.Place(device, is_toy)


@pytest.fixture
def with_peers(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--peers")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    path = request.config.getoption("--record")

    def write(found: dict[str, Any]) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")

    return write
