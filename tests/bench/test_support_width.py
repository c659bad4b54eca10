"""The comparison of support widths: equal trained values, and a table at the best rate."""

import argparse

from experiments.support_width import arms, table
from tiny_models import llama

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.models.linears import count_parameters


def test_widths_have_about_equal_trained_values():
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)
    args = argparse.Namespace(seeds=2, densities=[0.2], shares=[0.25, 0.5, 1.0], rates=[0.1, 0.2])
    chosen = list(arms(llama(**sizes), args))
    assert len(chosen) == 2 * 3 * 2 and {arm.support for arm in chosen} == {16, 32, 64}
    for arm in chosen:
        model = llama(**sizes)
        adapter = SparseAdapter.attach(model, 1.0, support=arm.support, rank=arm.rank, seed=arm.seed)
        one_rank = sum(row.values for row in adapter.summary()) / arm.rank
        assert abs(arm.rank * one_rank - 0.2 * count_parameters(model)) <= one_rank / 2


def test_table_takes_the_best_rate_over_the_common_seeds():
    line = {"density": 0.003, "support": 16, "rank": 2, "values": 1000}
    losses = {(0, 0.01): 1.0, (1, 0.01): 1.2, (0, 0.02): 0.9, (1, 0.02): 1.1, (2, 0.02): 5.0}
    text = table([line | {"seed": seed, "rate": rate, "mean": loss} for (seed, rate), loss in losses.items()])
    assert text.splitlines()[2] == "| 0.3% | 16 | 2 | 1,000 | 0.02 | 2.3333 | 0.9000, 1.1000, 5.0000 |"
