"""Scores against the dense gradient that autograd gives, and what placement makes of them."""

from pathlib import Path

import pytest
import torch
from tiny_models import MODELS, batch, llama
from torch import Tensor, nn

from rbfast.adapter import SparseAdapter
from rbfast.columns import is_transposed
from rbfast.placement import select_linears
from rbfast.scores import Scores, score


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).loss


def dense_gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """dW [out, in] of each matrix and batch, by autograd."""
    linears = select_linears(model)
    found: dict[str, list[Tensor]] = {name: [] for name in linears}
    for inputs in batches:
        weights = [module.weight for module in linears.values()]
        for (name, module), grad in zip(
            linears.items(), torch.autograd.grad(loss(model, inputs), weights), strict=True
        ):
            found[name].append(grad.T if is_transposed(module) else grad)
    return found


@pytest.mark.parametrize("family", MODELS)
def test_gradient_scores_are_the_squared_gradient_of_each_column(family: str) -> None:
    model, batches = MODELS[family](), [batch(seed=1), batch(seed=2)]
    scores = score(model, batches, loss)
    for name, grads in dense_gradients(model, batches).items():
        expected = sum(grad.double().square().sum(0) for grad in grads)
        assert torch.allclose(scores.columns[name].double(), expected, rtol=1e-4), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_factored_score_needs_no_gradient_of_a_weight() -> None:
    model, inputs, seen = llama(), batch(), {}
    linear = model.model.layers[1].mlp.down_proj

    def watch(_: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        seen["x"] = args[0]
        y.register_hook(lambda dy: seen.update(dy=dy))

    linear.register_forward_hook(watch)
    scores = score(model, [inputs], loss, method="factored")
    x, dy = seen["x"].flatten(0, 1).double(), seen["dy"].flatten(0, 1).double()
    expected = x.square().mean(0) * dy.square().mean(0).sum()
    assert torch.allclose(scores.columns["model.layers.1.mlp.down_proj"].double(), expected, rtol=1e-4)


def test_a_starts_along_the_gradients_leading_direction() -> None:
    model, inputs = llama(), batch(rows=1, tokens=2)  # one supervised token: the last layer's gradient has rank 1
    scores = score(model, [inputs], loss)
    adapter = SparseAdapter.attach(model, density=0.2, rank=1, placement=scores)
    (dense,) = dense_gradients(llama(), [inputs])["model.layers.1.mlp.up_proj"]
    site = adapter.sites()["model.layers.1.mlp.up_proj"]
    leading = torch.linalg.svd(dense[:, site.cols], full_matrices=False).Vh[0]
    assert abs(leading @ site.A.detach()[0]) > 0.99  # both have norm 1


def test_columns_with_the_highest_score_are_chosen_and_groups_share_them() -> None:
    model = llama()
    scores = score(model, [batch()], loss)
    adapter = SparseAdapter.attach(model, density=0.1, placement=scores)
    sites = adapter.sites()
    attention = [sites[f"model.layers.0.self_attn.{name}_proj"].cols for name in "qkv"]
    assert all(torch.equal(attention[0], cols) for cols in attention)
    total = sum(scores.columns[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    assert set(attention[0].tolist()) == set(total.topk(len(attention[0])).indices.tolist())
    groups = {name: shape.group for name, shape in scores.shapes.items()}
    assert groups["model.layers.0.mlp.gate_proj"] == groups["model.layers.0.mlp.up_proj"]
    assert groups["model.layers.0.self_attn.o_proj"] != groups["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("method", ["gradient", "factored", "activation"])
def test_scores_survive_a_file_and_place_the_same_bits(method: str, tmp_path: Path) -> None:
    placed = []
    for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
        score(llama(), [batch()], loss, method=method).save(path)
        adapter = SparseAdapter.attach(llama(), density=0.1, placement=path)
        placed.append(adapter.state_dict())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert all(torch.equal(placed[0][name], placed[1][name]) for name in placed[0])


def test_bad_scores_are_named(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ValueError, match="at least one batch"):
        score(model, [], loss)
    with pytest.raises(ValueError, match="finite loss"):
        score(model, [batch()], lambda model, inputs: loss(model, inputs) * float("nan"))
    with pytest.raises(ValueError, match="method must be one of"):
        score(model, [batch()], loss, method="best")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match='or placement="random"'):
        SparseAdapter.attach(model, placement="best")
    scores = score(model, [batch()], loss)
    with pytest.raises(ValueError, match="was scored as"):
        SparseAdapter.attach(llama(hidden_size=32), placement=scores)
    scores.save(tmp_path / "scores")
    (tmp_path / "scores").write_bytes((tmp_path / "scores").read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        Scores.load(tmp_path / "scores")
