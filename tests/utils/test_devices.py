"""Device names: available ones, absent ones and names without a number."""

import pytest
import torch

from rbfast.cli.main import main
from rbfast.data.readers import write_traces
from rbfast.data.trace import Trace
from rbfast.utils.devices import find_device


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", "cpu:x", "cud"])
def test_absent_device_is_refused_and_available_ones_are_listed(name):
    with pytest.raises(ValueError, match=rf"device '{name}' is not available \(.+\): use cpu"):
        find_device(name)


def test_absent_device_ends_a_command_before_anything_is_loaded(capsys):
    code = main(["distill", "no/model", "no-traces.jsonl", "-o", "nowhere", "--device", "cuda:99"])
    assert code == 2
    assert "cuda:99" in capsys.readouterr().err


def test_default_device_is_the_gpu_if_there_is_one():
    assert find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu") == torch.device("cpu")


def test_cuda_without_a_number_is_the_device_of_the_local_rank(monkeypatch):
    """Otherwise every process under torchrun would take the first device."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert find_device("cuda") == torch.device("cuda", 3)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    assert find_device("cpu") == torch.device("cpu")


def test_device_auto_is_refused_with_shards_or_several_processes(monkeypatch, capsys, tmp_path):
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
