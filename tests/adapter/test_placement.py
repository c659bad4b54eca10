"""Placement: the matrices that get a delta, the split of the budget, and columns drawn at random or by scores."""

import pytest
import torch
from qwen_shapes import QWEN_7B, QWEN_7B_PARAMETERS
from tiny_models import gpt2, llama, vision_model
from torch import nn

from rbfast.adapter.column_scores import ColumnScores
from rbfast.adapter.placement import (
    DEFAULT_RANK,
    LARGE_WIDTH,
    START_NORM,
    allocate,
    place_random,
    place_scored,
    run_length,
)
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.models.linears import Shape, count_parameters, select_linears

SHAPES = {"q": Shape(24, 24, 0), "k": Shape(12, 24, 0), "up": Shape(40, 24, 1), "down": Shape(24, 40, 2)}


def spent(shapes, rank, supports):
    return sum(rank * (shape.out_features + supports[name]) for name, shape in shapes.items())


def runs_of(cols, run):
    """The indices of the aligned runs that the columns consist of; fails if they do not."""
    runs = cols.view(-1, run)
    assert torch.equal(runs, runs[:, :1] + torch.arange(run)) and (runs[:, 0] % run == 0).all()
    return (runs[:, 0] // run).tolist()


@pytest.mark.parametrize("budget", range(136, 1200, 37))
@pytest.mark.parametrize("rank", [None, 1, 2, 3])
def test_the_split_stays_within_the_budget_and_no_further_run_fits(budget, rank):
    if rank is not None and spent(SHAPES, rank, dict.fromkeys(SHAPES, 8)) > budget:
        with pytest.raises(ValueError, match=rf"the budget is {budget} trained values; rank {rank} with 8 column"):
            allocate(SHAPES, budget, rank)
        return
    k, supports = allocate(SHAPES, budget, rank)
    assert rank is None or k == rank
    assert spent(SHAPES, k, supports) <= budget
    assert supports["q"] == supports["k"]  # one group, one support
    assert all(support % 8 == 0 for support in supports.values())
    assert max(supports.values()) - min(supports.values()) <= 8 or supports["q"] == 24
    left = budget - spent(SHAPES, k, supports)
    assert supports["down"] == 40 or left < k * 8 * len(SHAPES)


@pytest.mark.parametrize("budget", range(400, 3000, 97))
def test_the_split_counts_every_expert(budget):
    shapes = {"stack": Shape(24, 40, 0, 4), "down": Shape(24, 40, 1)}
    rank, supports = allocate(shapes, budget)
    assert sum(shape.values(rank, supports[name]) for name, shape in shapes.items()) <= budget


def test_a_support_is_no_narrower_than_the_rank():
    shapes = {name: Shape(64, 64, group) for group, name in enumerate("ab")}
    assert allocate(shapes, 2 * 20 * (64 + 32), rank=20) == (20, {"a": 32, "b": 32})
    with pytest.raises(ValueError, match=r"rank 20 with 32 column\(s\) in each of 2 matrices needs 3,840"):
        allocate(shapes, 3839, rank=20)
    with pytest.raises(ValueError, match=r"rank must be at most the support \(16\), got 20"):
        allocate(shapes | {"c": Shape(64, 16, 2)}, 10**6, rank=20)


@pytest.mark.parametrize(("width", "widest"), [(LARGE_WIDTH - 16, LARGE_WIDTH - 16), (LARGE_WIDTH, LARGE_WIDTH // 8)])
def test_support_is_capped_at_an_eighth_from_the_large_width_on(width, widest):
    assert allocate({"a": Shape(64, width, 0)}, 10**6, rank=2) == (2, {"a": widest})


def test_the_default_rank_follows_the_budget():
    assert allocate(SHAPES, 140)[0] == 1
    assert allocate(SHAPES, 300)[0] == DEFAULT_RANK
    rank, supports = allocate(SHAPES, 1600)
    assert rank > DEFAULT_RANK and supports["q"] < 24


@pytest.mark.parametrize(("width", "run"), [(576, 16), (576 + 8, 8), (18944, 16), (50, 2), (7, 1), (16, 16)])
def test_run_length_is_the_largest_power_of_two_dividing_the_width(width, run):
    assert run_length(width) == run
    shapes = {"only": Shape(10, width, 0)}
    _, supports = allocate(shapes, 10 + width, rank=1)
    assert supports == {"only": width // 8 if width >= LARGE_WIDTH else width}
    half = run_length(width) * (width // run_length(width) // 2) or width
    runs = runs_of(place_random(shapes, 1, {"only": half}, seed=0)["only"].cols, run)
    assert len(runs) == len(set(runs)) == half // run and max(runs) < width // run


class Counted(dict):
    """Shapes that count the passes over all of them."""

    walks = 0

    def values(self):
        self.walks += 1
        return super().values()

    def items(self):
        self.walks += 1
        return super().items()


def test_passes_over_the_shapes_do_not_grow_with_the_model():
    walks = []
    for layers in (1, 100):
        shapes = Counted({f"{i}.{name}": shape for i in range(layers) for name, shape in SHAPES.items()})
        allocate(shapes, 1000 * layers)
        walks.append(shapes.walks)
    assert walks[0] == walks[1]


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("density", [0.0005, 0.003, 0.011, 0.05])
def test_large_model_takes_at_most_an_eighth_of_its_inputs(density, rank):
    budget = int(density * QWEN_7B_PARAMETERS)
    k, supports = allocate(QWEN_7B, budget, rank)
    assert spent(QWEN_7B, k, supports) <= budget
    assert max(supports.values()) <= 3584 // 8 and all(support % 16 == 0 for support in supports.values())
    if density >= 0.003:
        assert set(supports.values()) == {3584 // 8}
        assert rank or spent(QWEN_7B, k + 1, supports) > budget


def test_a_given_support_is_kept_and_capped_at_the_inputs():
    rank, supports = allocate(SHAPES, 700, support=30)
    assert supports == {"q": 24, "k": 24, "up": 24, "down": 30}
    assert spent(SHAPES, rank, supports) <= 700 < spent(SHAPES, rank + 1, supports)


def test_rank_is_capped_at_a_narrow_support():
    assert allocate(SHAPES, 10_000, support=2) == (2, dict.fromkeys(SHAPES, 2))


def test_smaller_of_two_equally_common_widths_sets_the_support():
    shapes = {"q": Shape(64, 2048, 0), "down": Shape(64, 1024, 1)}
    assert allocate(shapes, 10**6, rank=1)[1] == dict.fromkeys(shapes, 128)


def test_a_narrow_stack_of_experts_keeps_one_run():
    shapes = {"q": Shape(64, 1024, 0), "up": Shape(64, 1024, 1), "down": Shape(1024, 64, 2, experts=4)}
    assert allocate(shapes, 10**6, rank=1)[1]["down"] == 16


def test_all_linear_leaves_the_head_and_tied_weights_alone():
    names = set(select_linears(llama()))
    assert len(names) == 14 and not any("lm_head" in name for name in names)
    assert "lm_head" not in select_linears(llama(tie_word_embeddings=False))
    assert set(select_linears(gpt2())) == {
        f"transformer.h.{layer}.{name}"
        for layer in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_vision_layers_get_no_delta_unless_targeted():
    with pytest.warns(UserWarning) as warned:
        model = vision_model()
        adapter = SparseAdapter.attach(model, density=0.1)
    assert [str(w.message).partition(" layers")[0] for w in warned] == ["15 linear"]  # and none about stacks of experts
    assert len(adapter.sites()) == 14 and all("language_model" in name for name in adapter.sites())
    assert any("vision_tower" in name for name in adapter.left_out)
    adapter.detach()
    assert len(select_linears(model, r".*vision_tower.encoder.*mlp\.fc1")) == 2  # named explicitly, they get one


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


def test_random_placement_depends_on_the_seed_not_on_other_matrices():
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
    assert not any(torch.equal(first[name].A, other[name].A) for name in SHAPES)


def test_groups_of_equal_width_draw_different_columns_and_starts():
    shapes = {"o": Shape(4, 512, 0), "q": Shape(4, 512, 1)}
    starts = place_random(shapes, 2, dict.fromkeys(shapes, 64), seed=0)
    assert not torch.equal(starts["o"].cols, starts["q"].cols) and not torch.equal(starts["o"].A, starts["q"].A)


def test_scored_placement_takes_the_runs_with_the_largest_group_sum():
    columns = {"q": torch.zeros(48), "k": torch.zeros(48)}
    columns["q"][3] = 5.0  # the best column, in a run whose sum is not the largest
    columns["q"][16:32], columns["k"][32:48] = 0.2, 0.4
    shapes = {"q": Shape(4, 48, 0), "k": Shape(4, 48, 0)}
    scores = ColumnScores("gradient", 1, None, shapes, columns)
    starts = place_scored(scores, shapes, 1, {"q": 16, "k": 16}, 0)
    in_reverse = place_scored(scores, dict(reversed(shapes.items())), 1, {"q": 16, "k": 16}, 0)
    assert torch.equal(in_reverse["q"].cols, starts["q"].cols)
    assert runs_of(starts["q"].cols, 16) == runs_of(starts["k"].cols, 16) == [2]
    assert starts["q"].score == 0 and starts["k"].score == pytest.approx(6.4)
    wider = place_scored(scores, shapes, 1, {"q": 24, "k": 24}, 0)
    assert wider["q"].cols.tolist() == [*range(8), *range(32, 48)]  # all of 6.4, half of 5.0, none of 3.2
    assert torch.equal(wider["q"].A.norm(dim=1), torch.tensor([START_NORM]))


def test_ties_between_runs_go_to_the_lower_index():
    shapes = {"o": Shape(4, 64, 0)}
    scores = ColumnScores("gradient", 1, None, shapes, {"o": torch.ones(64)})
    assert place_scored(scores, shapes, 1, {"o": 32}, 0)["o"].cols.tolist() == list(range(32))


@pytest.mark.parametrize("support", [1, 10, 16, 20, 33])
def test_last_run_is_cut_if_the_support_is_no_multiple_of_it(support):
    shapes = {"o": Shape(4, 64, 0)}
    _, supports = allocate(shapes, 1000, rank=1, support=support)
    cols = place_random(shapes, 1, supports, seed=3)["o"].cols
    assert cols.numel() == support == supports["o"] and (cols.diff() > 0).all()
    counts = torch.bincount(cols // 16, minlength=4)
    assert sorted(counts[counts > 0].tolist(), reverse=True) == [16] * (support // 16) + [support % 16] * (
        support % 16 > 0
    )
    cut = cols[cols // 16 == int((counts == support % 16).nonzero()[0])] % 16 if support % 16 else torch.arange(0)
    assert torch.equal(cut, torch.arange(support % 16))
