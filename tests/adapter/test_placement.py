"""Placement: which matrices are chosen, how a budget is split, and that scores decide the same columns every time."""

import pytest
import torch
from tiny_models import gpt2, llama
from torch import nn

from rbfast.adapter.placement import DEFAULT_RANK, START_NORM, allocate, place_random
from rbfast.models.linears import Shape, count_parameters, select_linears

SHAPES = {"q": Shape(24, 24, 0), "k": Shape(12, 24, 0), "up": Shape(40, 24, 1), "down": Shape(24, 40, 2)}


def spent(shapes, rank, supports):
    return sum(rank * (shape.out_features + supports[name]) for name, shape in shapes.items())


@pytest.mark.parametrize("budget", range(110, 1200, 37))
@pytest.mark.parametrize("rank", [None, 1, 2, 3])
def test_the_split_stays_within_the_budget_and_no_further_column_fits(budget, rank):
    if rank is not None and spent(SHAPES, rank, dict.fromkeys(SHAPES, rank)) > budget:
        with pytest.raises(ValueError, match=rf"the budget is {budget} trained values; rank {rank} with {rank} column"):
            allocate(SHAPES, budget, rank)
        return
    k, supports = allocate(SHAPES, budget, rank)
    assert rank is None or k == rank
    assert spent(SHAPES, k, supports) <= budget
    assert supports["q"] == supports["k"]  # one group, one support
    assert max(supports.values()) - min(supports.values()) <= 1 or supports["q"] == 24
    left = budget - spent(SHAPES, k, supports)
    assert supports["down"] == 40 or left < k * len(SHAPES)


def test_the_default_rank_follows_the_budget():
    assert allocate(SHAPES, 110)[0] == 1
    assert allocate(SHAPES, 300)[0] == DEFAULT_RANK
    rank, supports = allocate(SHAPES, 1600)
    assert rank > DEFAULT_RANK and supports["q"] < 24


def test_a_given_support_is_kept_and_capped_at_the_inputs():
    rank, supports = allocate(SHAPES, 700, support=30)
    assert supports == {"q": 24, "k": 24, "up": 24, "down": 30}
    assert spent(SHAPES, rank, supports) <= 700 < spent(SHAPES, rank + 1, supports)


def test_all_linear_leaves_the_head_and_tied_weights_alone():
    names = set(select_linears(llama()))
    assert len(names) == 14 and not any("lm_head" in name for name in names)
    assert "lm_head" not in select_linears(llama(tie_word_embeddings=False))
    assert set(select_linears(gpt2())) == {
        f"transformer.h.{layer}.{name}"
        for layer in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_targets_are_exact_or_suffix_or_a_full_match():
    model = llama()
    assert set(select_linears(model, ["q_proj", "model.layers.1.mlp.up_proj"])) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert list(select_linears(model, r".*\.1\..*down_proj")) == ["model.layers.1.mlp.down_proj"]
    assert "lm_head" in select_linears(llama(tie_word_embeddings=False), ["lm_head"])


def test_tied_parameters_count_once():
    tied, free = llama(), llama(tie_word_embeddings=False)
    assert count_parameters(free) - count_parameters(tied) == tied.lm_head.weight.numel()
    assert count_parameters(nn.Linear(3, 5)) == 20


def test_random_placement_is_the_same_for_one_seed_whatever_else_is_placed():
    supports = dict.fromkeys(SHAPES, 5)
    first, again = (place_random(SHAPES, 2, supports, seed=1) for _ in range(2))
    fewer = place_random({"down": SHAPES["down"]}, 2, supports, seed=1)
    other = place_random(SHAPES, 2, supports, seed=2)
    for name, start in first.items():
        assert torch.equal(start.cols, again[name].cols) and torch.equal(start.A, again[name].A)
        assert (start.cols.diff() > 0).all() and start.cols.numel() == 5
        assert torch.allclose(start.A.norm(dim=1), torch.full((2,), START_NORM))
    assert torch.equal(first["down"].cols, fewer["down"].cols) and torch.equal(first["down"].A, fewer["down"].A)
    assert torch.equal(first["q"].cols, first["k"].cols)
    assert any(not torch.equal(first[name].cols, other[name].cols) for name in SHAPES)
