"""Names of devices: what there is, what there is not, and whose a name without a number is."""

import pytest
import torch

from rbfast.cli.main import main
from rbfast.data.readers import write_traces
from rbfast.data.trace import Trace
from rbfast.utils.devices import find_device


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", "cpu:x", "cud"])
def test_an_absent_device_is_refused_with_what_there_is(name):
    with pytest.raises(ValueError, match=rf"device '{name}' is not available \(.+\): use cpu"):
        find_device(name)


def test_an_absent_device_ends_a_command_before_it_loads_anything(capsys):
    code = main(["distill", "no/model", "no-traces.jsonl", "-o", "nowhere", "--device", "cuda:99"])
    assert code == 2
    assert "cuda:99" in capsys.readouterr().err


def test_without_a_name_it_is_the_gpu_or_the_cpu():
    assert find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu") == torch.device("cpu")


def test_a_name_without_a_number_is_the_processes_own_device(monkeypatch):
    """Under torchrun every process would else take the first device."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert find_device("cuda") == torch.device("cuda", 3)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    assert find_device("cpu") == torch.device("cpu")


def test_a_model_is_spread_by_one_process_or_by_several(monkeypatch, capsys, tmp_path):
    write_traces(tmp_path / "traces.jsonl", [Trace("1+1?", "1+1=2", "2")])
    auto = ["distill", "no/model", str(tmp_path / "traces.jsonl"), "-o", str(tmp_path / "run"), "--device", "auto"]
    assert main([*auto, "--shard", "1"]) == 2
    assert "--shard spreads a model over processes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(auto) == 2
    assert (
        "--device auto spreads a model over the GPUs of one process, but several processes run"
        in capsys.readouterr().err
    )
