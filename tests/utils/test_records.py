"""Checks of the settings of public dataclasses."""

from typing import Any

import numpy as np
import pytest

from rbfast import CurateConfig, Guide, Limits, Sampling
from rbfast.curation.curate import Weights
from rbfast.curation.decontaminate import Thresholds
from rbfast.evaluation.decoding import Decoding
from rbfast.on_policy.samples import Writing


@pytest.mark.parametrize(
    "kind, settings, message",
    (
        (Limits, {"budget": "5"}, "budget must be a whole number, got '5'"),
        (Limits, {"budget": 5, "reserve": 2.5}, r"reserve must be a whole number, got 2\.5"),
        (Limits, {"budget": 5, "verify_above": "2"}, "verify_above must be a number, got '2'"),
        (Sampling, {"samples": None}, "samples must be a whole number, got None"),
        (Sampling, {"top_p": "1"}, "top_p must be a number, got '1'"),
        (Decoding, {"max_new_tokens": 2.5}, r"max_new_tokens must be a whole number, got 2\.5"),
        (Writing, {"batch_size": True}, "batch_size must be a whole number, got True"),
        (CurateConfig, {"size": "1000"}, "size must be a whole number, got '1000'"),
        (Weights, {"quality": None}, "quality must be a number, got None"),
        (Thresholds, {"text": "0.5"}, r"text must be a number, got '0\.5'"),
    ),
)
def test_setting_of_a_wrong_type_is_refused_by_name(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kind(**settings)


def test_numbers_of_numpy_are_accepted() -> None:
    limits = Limits(np.int64(8), verify_above=np.float32(0.5))
    assert limits == Limits(8, verify_above=0.5) and type(limits.budget) is int
    assert Sampling(seed=[1, 2]).seed == [1, 2]


def test_name_of_one_intervention_is_not_a_sequence() -> None:
    with pytest.raises(TypeError, match="interventions must be a sequence of names, got 'wait'"):
        Guide(Limits(8), interventions="wait")
