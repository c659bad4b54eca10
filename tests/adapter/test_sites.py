"""Layers with a computed weight or a custom forward: their delta is correct, or they are refused."""

import pytest
import torch
from layer_pairs import Pair, attach_full, check_gradients, layer, rows
from tiny_models import disturb
from torch import nn
from torch.nn.functional import dropout, linear
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from rbfast.adapter.column_scores import score_columns
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.models.weight_use import input_of

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")

COMPUTED = {
    "weight_norm": lambda: weight_norm(layer()),
    "spectral_norm": lambda: spectral_norm(layer()),
    "parametrized weight_norm": lambda: parametrizations.weight_norm(layer()),
    "parametrized spectral_norm": lambda: parametrizations.spectral_norm(layer()),
    "orthogonal": lambda: parametrizations.orthogonal(layer()),
    "pruned": lambda: prune.l1_unstructured(layer(), "weight", 0.5),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weight_gets_a_side_delta(kind, tmp_path):
    model = Pair(COMPUTED[kind]()).eval()
    before = model(rows()).detach()
    adapter = attach_full(model)
    assert {name: site.is_folded for name, site in adapter.sites().items()} == {"first": True, "layer": False}
    assert torch.equal(model(rows()), before) and not any(name.startswith("layer") for name in adapter.left_out)
    check_gradients(model, adapter, rows())
    assert not torch.allclose(model(rows()), before, rtol=1e-2)
    with pytest.raises(RuntimeError, match=r"cannot merge into layer: it computes its weight .* use export_lora"):
        adapter.merge()
    trained = model(rows()).detach()
    adapter.save_pretrained(tmp_path)
    adapter.detach()
    assert torch.equal(model(rows()), before)
    SparseAdapter.from_pretrained(model, tmp_path)
    assert torch.equal(model(rows()), trained)


def test_adapter_of_a_plain_weight_loads_onto_a_computed_one(tmp_path):
    attach_full(Pair(layer())).save_pretrained(tmp_path)
    adapter = SparseAdapter.from_pretrained(Pair(parametrizations.weight_norm(layer())), tmp_path)
    assert {name: site.is_folded for name, site in adapter.sites().items()} == {"first": True, "layer": False}


def test_a_computed_weight_is_not_counted_twice():
    plain, normed = Pair(layer()), Pair(parametrizations.weight_norm(layer()))
    scales = normed.layer.parametrizations.weight.original0.numel()
    assert attach_full(normed).parameters_of_base == attach_full(plain).parameters_of_base + scales


class TimesWeight(nn.Module):
    """Square, with the sizes of a linear layer, and y = x W."""

    def __init__(self, in_features=16, out_features=16, start=None):
        super().__init__()
        torch.manual_seed(2)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / 4 if start is None else start)

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("mode", ["fold", "side"])
@pytest.mark.parametrize("start", [None, torch.eye(16), torch.zeros(16, 16)], ids=["random", "identity", "zeros"])
def test_square_layer_with_a_transposed_weight_is_detected(start, mode):
    """By its gradient: with an identity or zeros as the weight, outputs cannot show it."""
    model = Pair(TimesWeight(start=start))
    adapter = attach_full(model, mode=mode, targets=["layer"])
    check_gradients(model, adapter, rows())
    trained = model(rows()).detach()
    adapter.merge()
    assert torch.allclose(model(rows()), trained, atol=1e-6)


def test_oblong_layer_with_a_transposed_weight_folds():
    model = Pair(TimesWeight(16, 6))
    adapter = attach_full(model)
    assert all(site.is_folded for site in adapter.sites().values())
    check_gradients(model, adapter, rows())


class OwnForward(nn.Linear):
    """y = x W^T, written out."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    """Multiplies its weight by a gain, so a folded delta would get a wrong gradient."""

    def forward(self, x):
        return linear(x, 3 * self.weight, self.bias)


class TakingRows(nn.Linear):
    """y = x W^T for 2D inputs only, as experts are called."""

    def forward(self, x):
        tokens, _ = x.shape
        return (x @ self.weight.T + self.bias).view(tokens, -1)


class Dropping(nn.Linear):
    """Drops some of its output in training. A folded delta would get the gradient without dropout."""

    def forward(self, x):
        return dropout(super().forward(x), 0.25, self.training)


def test_layer_with_output_dropout_gets_a_side_delta():
    model = Pair(Dropping(16, 8))
    adapter = attach_full(model)
    assert not adapter.sites()["layer"].is_folded
    check_gradients(model.eval(), adapter, rows())
    adapter.zero_grad()
    with torch.random.fork_rng():
        model.train()(rows()).square().sum().backward()
    site, dy = adapter.sites()["layer"], 2 * model(rows()).detach()
    xs = model.first(rows()).tanh()[:, site.cols]
    torch.testing.assert_close(site.B.grad, dy.T @ xs @ site.A.T)


class Counting(nn.Linear):
    """Counts its training forwards in a buffer, as layers that keep statistics of their inputs do."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return super().forward(x)


def test_trial_forward_leaves_buffers_unchanged():
    model = Pair(Counting(16, 8))
    seen = model.layer.seen
    assert attach_full(model).sites()["layer"].is_folded
    assert model.layer.seen is seen and seen == 0


def test_custom_forward_folds_only_if_it_is_a_plain_product():
    torch.manual_seed(0)
    for kind, folds in ((OwnForward, True), (Scaled, False), (TakingRows, True)):
        model = Pair(kind(16, 16))
        flags, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
        adapter = attach_full(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert adapter.sites()["layer"].is_folded == folds
        check_gradients(model, adapter, rows())
        adapter.detach()
        assert flags == [p.requires_grad for p in model.parameters()] and model.layer.training


def test_forward_is_tried_under_no_grad_and_again_after_replacement():
    model = Pair(OwnForward(16, 16))
    with torch.no_grad():
        adapter = attach_full(model)
    assert adapter.sites()["layer"].is_folded
    adapter.detach()
    layer = model.layer
    layer.forward = lambda x: linear(x, 3 * layer.weight, layer.bias)
    assert not attach_full(model).sites()["layer"].is_folded


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.topk(2, -1).indices


class Ignoring(nn.Linear):
    def forward(self, x):
        return x[..., : self.out_features] + self.bias


class Flat(nn.Linear):
    def forward(self, x):
        return super().forward(x).flatten()


class Stacked(nn.Module):
    in_features = out_features = 16

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x):
        return x @ self.weight[0]


class Wrapper(nn.Module):
    in_features, out_features = 16, 8

    def __init__(self):
        super().__init__()
        self.inner = layer()

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return self.inner(x)


def sharded_flat():
    module = nn.Linear(16, 16)
    module.weight = nn.Parameter(module.weight.data.flatten()[:128])
    return module


UNFIT = {
    "returns a tuple": (Router(16, 8), "layer returns a tuple, not a tensor"),
    "ignores its weight": (Ignoring(16, 8), "layer gives the same output whatever its weight is"),
    "flattens": (Flat(16, 8), r"layer turns an input \(1, 1, 16\) into \(8,\)"),
    "stack": (Stacked(), r"layer has a weight of shape \(2, 16, 16\), which is not a matrix"),
    "FSDP1": (
        sharded_flat(),
        r"layer has a weight of shape \(128,\), which is not a matrix \(flattened by FSDP1 or ZeRO-3",
    ),
    "wrapper": (Wrapper(), "layer wraps a layer and exposes that layer's weight as its own"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_layer_that_cannot_have_a_delta_is_skipped_with_a_warning(kind):
    module, reason = UNFIT[kind]
    model = Pair(module)
    with pytest.warns(UserWarning, match=f"1 linear layers cannot have a delta and stay as they are; .* {reason}"):
        adapter = attach_full(model)
    assert set(adapter.sites()) == ({"first", "layer.inner"} if kind == "wrapper" else {"first"})
    adapter.detach()
    with pytest.raises(ValueError, match=f"{reason}.*; leave it out of targets"):
        attach_full(model, targets=["first", "layer"])


def test_a_lazy_layer_has_to_run_first():
    model = Pair(nn.LazyLinear(8))
    with pytest.raises(ValueError, match="layer is a lazy layer without a weight: run the model once first"):
        attach_full(model)
    model(rows())
    assert set(attach_full(model).sites()) == {"first", "layer"}


def test_adapter_file_naming_an_unsuitable_layer_is_refused(tmp_path):
    attach_full(Pair(layer())).save_pretrained(tmp_path)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="layer returns a tuple"):
        SparseAdapter.from_pretrained(Pair(Router(16, 8)), tmp_path)


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 8)

    def forward(self, x):
        return self.a(input=x)


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_layer_may_take_its_input_as_a_keyword(mode):
    model = ByName()
    adapter = attach_full(model, mode=mode)
    check_gradients(model, adapter, rows())
    adapter.detach()
    scores = score_columns(model, [rows()], lambda model, x: model(x).square().sum())
    assert (scores.columns["a"] > 0).all()


def test_call_with_several_keyword_tensors_is_refused():
    with pytest.raises(TypeError, match=r"takes one tensor, got 0 positional arguments and keywords \['scale', 'x'\]"):
        input_of((), {"x": rows(), "scale": rows()})


class Turned(nn.Linear):
    """Its output is a transposed view."""

    def forward(self, x):
        return (self.weight @ x.mT).mT


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_output_may_have_any_memory_layout(mode):
    model, x = Pair(Turned(16, 8)), torch.stack([rows(), 2 * rows()])
    assert not model.layer(x).is_contiguous()
    check_gradients(model, attach_full(model, mode=mode), x)


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_a_model_made_in_inference_mode_runs_there(mode):
    with torch.inference_mode():
        model = Pair(OwnForward(16, 16))
        before, adapter = model(rows()), attach_full(model, mode=mode)
        assert set(adapter.sites()) == {"first", "layer"}
        disturb(adapter)
        assert not torch.equal(model(rows()), before)
        adapter.detach()
        assert torch.equal(model(rows()), before)


def test_layers_on_meta_are_accepted_without_a_trial():
    with torch.device("meta"):
        model = Pair(OwnForward(16, 16))
    adapter = attach_full(model)
    assert set(adapter.sites()) == {"first", "layer"} and not any(site.is_folded for site in adapter.sites().values())
