"""The on-policy experiment, run completely with a tiny random student."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from experiments import on_policy
from tiny import tiny_model, tiny_tokenizer

SETTINGS = on_policy.Settings(
    families=("leg_counting",), taught=4, few=2, problems=4, rounds=2, held_out=2, max_new_tokens=4, batch_size=2
)


def load() -> tuple[object, object]:
    model = tiny_model()
    model.config.max_position_embeddings = 2048
    return model, tiny_tokenizer()


def test_every_arm_takes_the_same_steps_from_the_same_student(tmp_path: Path) -> None:
    settings = replace(SETTINGS, density=0.05)
    records = on_policy.run(tmp_path, settings, load, quiet=True)
    assert [record["who"] for record in records] == ["teacher", "student", *on_policy.ARMS]
    assert [record["n"] for record in records] == [2] * 5
    steps = {record["who"]: record["steps"] for record in records}
    assert {steps[arm] for arm in on_policy.ARMS} == {2}
    started = {json.loads((tmp_path / arm / "run.json").read_text())["adapter"] for arm in on_policy.ARMS}
    assert len(started) == 1
    assert on_policy.run(tmp_path, settings, load, quiet=True) == records
    with pytest.raises(ValueError, match="was made with"):
        on_policy.run(tmp_path, replace(settings, later_rate=1.0), load, quiet=True)
    data = on_policy.make_data(settings)
    trained = {trace.problem for trace in (*data.taught, *data.few)} | {one.text for one in data.questions}
    assert len(trained) == 10 and not trained & {problem.question for problem in data.held_out}
