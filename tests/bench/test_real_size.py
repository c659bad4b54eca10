"""The experiment at real size, on a toy: it plans, trains three steps and compares the ways to attend."""

import json

from experiments import real_size


def test_a_toy_runs_to_its_end(capsys):
    assert real_size.main(["--toy"]) == 0
    said = capsys.readouterr().out
    assert "with gradient checkpointing (on)" in said
    found = json.loads(said.splitlines()[-1])
    assert len(found["seconds"]) == len(found["losses"]) == 3 and found["tokens"] == 256
    assert found["packed"]["difference"] == 0.0  # a CPU has one way
