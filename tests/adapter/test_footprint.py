"""The memory that an adapter takes beside its base: as planned from shapes, and as counted in its tensors."""

import pytest
import torch
from qwen_shapes import QWEN_7B, QWEN_7B_PARAMETERS
from tiny_models import MODELS, attach, family, llama
from transformers import AutoModelForCausalLM, Qwen2Config

from rbfast.adapter.footprint import outline, planned_footprint
from rbfast.adapter.placement import allocate
from rbfast.models.linears import group_siblings, select_linears


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*MODELS, "mixtral"])
def test_planned_footprint_matches_the_tensors(name, dtype):
    model = family(name, dtype) if name == "mixtral" else MODELS[name](dtype)
    base = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    shapes = group_siblings(select_linears(model))
    adapter = attach(model)
    footprint = adapter.footprint()
    rows = {row.name: row for row in adapter.summary()}
    supports = {row.name: row.columns for row in rows.values()}
    assert footprint == planned_footprint(shapes, next(iter(rows.values())).rank, supports, base, dtype.itemsize)
    assert footprint.values == 4 * sum(row.values for row in rows.values())
    kept = sum((shapes[name].experts or 1) * row.out_features * row.columns for name, row in rows.items())
    assert footprint.kept == kept * dtype.itemsize + 8 * sum(supports.values())


def test_side_delta_keeps_no_base_columns():
    adapter = attach(llama(), mode="side")
    assert adapter.footprint().kept == 8 * sum(row.columns for row in adapter.summary())


def test_adamw_footprint_matches_its_state():
    model = llama()
    adapter = attach(model)
    optimizer = torch.optim.AdamW(adapter.parameters())
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    assert adapter.footprint().adamw == moments + sum(parameter.grad.nbytes for parameter in adapter.parameters())


@pytest.mark.parametrize("density", [0.001, 0.003, 0.011, 0.03])
def test_an_adapter_of_a_7b_model_takes_at_most_a_sixth_of_it(density):
    rank, supports = allocate(QWEN_7B, int(density * QWEN_7B_PARAMETERS))
    plan = planned_footprint(QWEN_7B, rank, supports, 2 * QWEN_7B_PARAMETERS, 2)
    assert plan.share <= 1 / 6
    assert str(plan).startswith(f"{plan.attached / 1e9:.2f} GB beside the base's 15.23 GB ({plan.share:.1%}): ")


def test_outline_of_a_7b_model_needs_no_weights():
    sizes = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28)
    config = Qwen2Config(**sizes, num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    planned = outline(model)
    assert sorted(shape.in_features for shape in QWEN_7B.values()) == sorted(
        shape.in_features for shape in group_siblings(select_linears(model)).values()
    )
    assert (planned.parameters, planned.matrices, planned.support) == (QWEN_7B_PARAMETERS, 196, (448, 448))
    assert planned.values == planned.rank * sum(shape.out_features + 448 for shape in QWEN_7B.values())
    assert planned.values <= 0.003 * QWEN_7B_PARAMETERS and planned.footprint.share < 1 / 6
    assert planned.footprint.base == 2 * QWEN_7B_PARAMETERS  # bytes, in bf16
