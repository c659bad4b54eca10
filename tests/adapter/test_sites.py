"""Layers that are linear by name only, or used in a way of their own: a delta is right there, or there is an error."""

import warnings

import pytest
import torch
from tiny_models import attach, batch, disturb, family, llama, same_bits, snapshot
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from rbfast.adapter.column_scores import score_columns
from rbfast.adapter.sparse_adapter import SparseAdapter

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")


class Pair(nn.Module):
    """A plain linear layer, and then the layer under test."""

    def __init__(self, layer, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer = nn.Linear(width, width), layer

    def forward(self, x):
        return self.layer(self.first(x).tanh())


def rows(width=16):
    return torch.randn(5, width, generator=torch.Generator().manual_seed(3))


def on(model, **options):
    return attach(model, **{"density": 1.0, "rank": 1, "support": 16} | options)


def layer(**options):
    torch.manual_seed(1)
    return nn.Linear(16, 8, **options)


def check_gradients(model, adapter, x):
    """The adapter's gradients are those of finite differences of the loss, so its deltas do what they say."""

    def loss():
        y = model(x).double()
        return (y - torch.linspace(-1, 1, y.numel()).view_as(y)).square().sum()

    disturb(adapter)
    loss().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        direction = parameter.grad / parameter.grad.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-2)
                adapter.fold()
                values.append(loss().item())
                parameter.sub_(direction, alpha=sign * 1e-2)
        adapter.fold()
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(parameter.grad.norm().item(), rel=5e-2), name


COMPUTED = {
    "weight_norm": lambda: weight_norm(layer()),
    "spectral_norm": lambda: spectral_norm(layer()),
    "parametrized weight_norm": lambda: parametrizations.weight_norm(layer()),
    "parametrized spectral_norm": lambda: parametrizations.spectral_norm(layer()),
    "orthogonal": lambda: parametrizations.orthogonal(layer()),
    "pruned": lambda: prune.l1_unstructured(layer(), "weight", 0.5),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_gets_its_delta_beside_it(kind, tmp_path):
    model = Pair(COMPUTED[kind]()).eval()
    before = model(rows()).detach()
    adapter = on(model)
    assert {name: site.folds for name, site in adapter.sites().items()} == {"first": True, "layer": False}
    assert torch.equal(model(rows()), before) and not any(name.startswith("layer") for name in adapter.left_out)
    check_gradients(model, adapter, rows())
    assert not torch.allclose(model(rows()), before, rtol=1e-2)
    with pytest.raises(RuntimeError, match=r"cannot merge into layer: it computes its weight .* use export_lora"):
        adapter.merge()
    written = model(rows()).detach()
    adapter.save_pretrained(tmp_path)
    adapter.detach()
    assert torch.equal(model(rows()), before)
    SparseAdapter.from_pretrained(model, tmp_path)
    assert torch.equal(model(rows()), written)


def test_a_computed_weight_is_not_counted_twice():
    plain, normed = Pair(layer()), Pair(parametrizations.weight_norm(layer()))
    scales = normed.layer.parametrizations.weight.original0.numel()
    assert on(normed).parameters_of_base == on(plain).parameters_of_base + scales


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
def test_a_square_layer_that_multiplies_from_the_left_is_seen_as_such(start, mode):
    """By what its gradient is: the values of an identity don't tell."""
    model = Pair(TimesWeight(start=start))
    adapter = on(model, mode=mode, targets=["layer"])
    check_gradients(model, adapter, rows())
    written = model(rows()).detach()
    adapter.merge()
    assert torch.allclose(model(rows()), written, atol=1e-6)


def test_an_oblong_one_folds_too():
    model = Pair(TimesWeight(16, 6))
    adapter = on(model)
    assert all(site.folds for site in adapter.sites().values())
    check_gradients(model, adapter, rows())


class OwnForward(nn.Linear):
    """y = x W^T, written out."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    """A weight that is multiplied by a gain: folding would give it a wrong gradient."""

    def forward(self, x):
        return linear(x, 3 * self.weight, self.bias)


def test_a_layer_with_a_forward_of_its_own_folds_if_it_only_multiplies():
    torch.manual_seed(0)
    for kind, folds in ((OwnForward, True), (Scaled, False)):
        model = Pair(kind(16, 16))
        flags, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
        adapter = on(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert adapter.sites()["layer"].folds == folds
        check_gradients(model, adapter, rows())
        adapter.detach()
        assert flags == [p.requires_grad for p in model.parameters()] and model.layer.training


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


UNFIT = {
    "returns a tuple": (Router(16, 8), "layer returns a tuple, not a tensor"),
    "ignores its weight": (Ignoring(16, 8), "layer gives the same output whatever its weight is"),
    "flattens": (Flat(16, 8), r"layer turns an input \(1, 1, 16\) into \(8,\)"),
    "stack": (Stacked(), r"layer has a weight of shape \(2, 16, 16\), which is no matrix"),
    "wrapper": (Wrapper(), "layer wraps a layer and shows that layer's weight as its own"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_layer_that_can_have_no_delta_is_left_alone_with_a_word(kind):
    module, reason = UNFIT[kind]
    model = Pair(module)
    with pytest.warns(UserWarning, match=f"1 linear layers can have no delta and are left as they are; .* {reason}"):
        adapter = on(model)
    assert set(adapter.sites()) == ({"first", "layer.inner"} if kind == "wrapper" else {"first"})
    adapter.detach()
    with pytest.raises(ValueError, match=f"{reason}; leave it out of targets"):
        on(model, targets=["first", "layer"])


def test_a_lazy_layer_has_to_run_first():
    model = Pair(nn.LazyLinear(8))
    with pytest.raises(ValueError, match="layer is a lazy layer without a weight: run the model once first"):
        on(model)
    model(rows())
    assert set(on(model).sites()) == {"first", "layer"}


def test_an_adapter_file_that_names_such_a_layer_is_refused(tmp_path):
    on(Pair(layer())).save_pretrained(tmp_path)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="layer returns a tuple"):
        SparseAdapter.from_pretrained(Pair(Router(16, 8)), tmp_path)


def test_attention_of_torch_never_runs_its_output_layer():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    with pytest.warns(UserWarning, match=r"MultiheadAttention multiplies by the weight of self_attn\.out_proj"):
        adapter = on(model)
    assert set(adapter.sites()) == {"linear1", "linear2"}
    check_gradients(model, adapter, rows()[None])
    for mode in ("fold", "side"):  # in evaluation torch would take weights past the layers, but for the hooks
        adapter.detach()
        adapter = on(model.eval(), mode=mode)
        before = model(rows()[None]).detach()
        disturb(adapter)
        with torch.no_grad():
            assert not torch.allclose(model(rows()[None]), before, atol=1e-3)


def test_a_layer_that_acts_through_zeros_is_no_target():
    model = family("llama")
    attention = model.model.layers[0].self_attn
    attention.A, attention.dt_proj = nn.Parameter(torch.zeros(2)), nn.Linear(16, 2)
    with pytest.raises(ValueError, match=r"dt_proj acts through exp\(A softplus\(y\)\)"):
        attach(model, targets=["dt_proj"])
    with torch.no_grad():
        attention.A.fill_(0.5)
    assert len(attach(model, targets=["dt_proj"]).sites()) == 1


def test_weights_in_one_memory_get_no_delta():
    model = Pair(nn.Linear(16, 16))
    model.layer.weight = nn.Parameter(model.first.weight.data.T)
    model.last = nn.Linear(16, 16)
    with pytest.warns(UserWarning, match="2 linear layers .* the weight of first shares its memory with another one"):
        adapter = on(model)
    assert set(adapter.sites()) == {"last"}
    adapter.detach()
    whole = torch.randn(32, 16)  # halves of one tensor don't overlap
    model.first.weight, model.layer.weight = nn.Parameter(whole[:16]), nn.Parameter(whole[16:])
    assert set(on(model).sites()) == {"first", "layer", "last"}


def test_a_model_with_an_adapter_of_peft_is_refused():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (wrapped, wrapped.base_model.model):
        original = snapshot(model)
        with pytest.raises(ValueError, match=r"carries an adapter of PEFT .* merge_and_unload\(\)"):
            attach(model)
        assert same_bits(snapshot(model), original)
    attach(wrapped.unload())


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        x = linear(x.to(self.d.weight.dtype), self.a.weight) + x @ self.b.weight.T
        return self.d(torch.matmul(self.d(x), self.c.weight.t()))


def test_a_weight_that_the_code_of_a_model_multiplies_by_gets_no_delta():
    model = ByHand()
    with pytest.warns(UserWarning, match="3 linear layers .* ByHand multiplies by the weight of a without running"):
        adapter = on(model)
    assert set(adapter.sites()) == {"d"}
    adapter.detach()
    with pytest.raises(ValueError, match="multiplies by the weight of b without running the layer"):
        on(model, targets=["b"])


class Bypassing(nn.Module):
    """Uses the weight of one layer past the layer, before or after another one runs."""

    def __init__(self, first):
        super().__init__()
        self.a, self.b, self.is_first = nn.Linear(16, 16), nn.Linear(16, 16), first

    def forward(self, x):
        weight = self.a.weight  # by a name of its own: what attaching looks for in the code is not there
        past = linear(x, weight, self.a.bias)
        return self.b(past) if self.is_first else past + self.b(x)


@pytest.mark.parametrize("mode", ["fold", "side"])
@pytest.mark.parametrize("first", [False, True])
def test_a_weight_that_is_used_past_its_layer_is_an_error_in_the_backward(first, mode):
    model = Bypassing(first)
    adapter = on(model, mode=mode)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="uses the weight of a without running that layer"):
        for _ in range(2):  # what is used before any layer has run is seen in the second step
            model(rows()).square().sum().backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
    adapter.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_that_never_runs_is_named_once_and_its_weight_stays_frozen():
    model = Pair(layer())
    model.idle = nn.Linear(16, 16)
    adapter = on(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"1 of 3 matrices got no gradient in the first step \(the first is idle\)"):
        model(rows()).square().sum().backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model(rows()).square().sum().backward()
            optimizer.step()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_runs_all_its_layers_computes_no_gradient_of_a_weight():
    model = llama()
    adapter = attach(model)
    model(**batch()).loss.backward()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 8)

    def forward(self, x):
        return self.a(input=x)


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_a_layer_may_be_called_by_name(mode):
    model = ByName()
    adapter = on(model, mode=mode)
    check_gradients(model, adapter, rows())
    adapter.detach()
    scores = score_columns(model, [rows()], lambda model, x: model(x).square().sum())
    assert (scores.columns["a"] > 0).all()


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_a_model_made_in_inference_mode_runs_there(mode):
    with torch.inference_mode():
        model = Pair(OwnForward(16, 16))
        before, adapter = model(rows()), on(model, mode=mode)
        assert set(adapter.sites()) == {"first", "layer"}
        disturb(adapter)
        assert not torch.equal(model(rows()), before)
        adapter.detach()
        assert torch.equal(model(rows()), before)


def test_meta_and_fake_models_are_taken_at_their_word():
    with torch.device("meta"):
        model = Pair(OwnForward(16, 16))
    adapter = on(model)
    assert set(adapter.sites()) == {"first", "layer"} and not any(site.folds for site in adapter.sites().values())
