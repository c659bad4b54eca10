"""The real-size experiment on a toy: a plan, three training steps and a comparison of attention variants."""

import json

from experiments import real_size


def test_toy_run_finishes(capsys):
    assert real_size.main(["--toy"]) == 0
    output = capsys.readouterr().out
    assert "with gradient checkpointing (on)" in output
    result = json.loads(output.splitlines()[-1])
    assert len(result["seconds"]) == len(result["losses"]) == 3 and result["tokens"] == 256
    assert result["packed"]["difference"] == 0.0  # a CPU has only one variant
