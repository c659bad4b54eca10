"""Weights used without running their layer, shared between layers, or never used: no wrong gradients, and a message."""

import warnings

import pytest
import torch
from layer_pairs import Pair, attach_full, check_gradients, layer, rows
from tiny_models import attach, batch, disturb, family, llama, same_bits, snapshot
from torch import nn
from torch.nn.functional import linear


def test_output_layer_of_torchs_attention_gets_no_delta():
    torch.manual_seed(0)  # with some weights the loss is not smooth between the two points of a finite difference
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    with pytest.warns(UserWarning, match=r"MultiheadAttention multiplies by the weight of self_attn\.out_proj"):
        adapter = attach_full(model)
    assert set(adapter.sites()) == {"linear1", "linear2"}
    check_gradients(model, adapter, rows()[None])
    for mode in ("fold", "side"):  # in evaluation torch would bypass the layers if they had no hooks
        adapter.detach()
        adapter = attach_full(model.eval(), mode=mode)
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


def test_weights_that_share_memory_get_no_delta():
    model = Pair(nn.Linear(16, 16))
    model.layer.weight = nn.Parameter(model.first.weight.data.T)
    model.last = nn.Linear(16, 16)
    with pytest.warns(UserWarning, match="2 linear layers .* the weight of first shares its memory with another one"):
        adapter = attach_full(model)
    assert set(adapter.sites()) == {"last"}
    adapter.detach()
    whole = torch.randn(32, 16)  # halves of one tensor don't overlap
    model.first.weight, model.layer.weight = nn.Parameter(whole[:16]), nn.Parameter(whole[16:])
    assert set(attach_full(model).sites()) == {"first", "layer", "last"}


def test_weights_that_are_views_of_a_larger_one_get_no_delta():
    model, whole = Pair(nn.Linear(16, 16)), torch.randn(48, 16)
    model.last, model.whole = nn.Linear(16, 16), nn.Parameter(whole)
    model.first.weight, model.layer.weight = nn.Parameter(whole[4:20]), nn.Parameter(whole[24:40])
    with pytest.warns(UserWarning, match="2 linear layers .* the weight of first shares its memory with another one"):
        assert set(attach_full(model).sites()) == {"last"}


def test_weight_that_shares_memory_with_a_buffer_gets_no_delta():
    model = Pair(nn.Linear(16, 16))
    model.register_buffer("shown", model.layer.weight.data[2:4])
    with pytest.warns(UserWarning, match="the weight of layer shares its memory with another one"):
        assert set(attach_full(model).sites()) == {"first"}


def test_model_with_a_peft_adapter_is_refused():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (wrapped, wrapped.base_model.model):
        original = snapshot(model)
        with pytest.raises(ValueError, match=r"this model has a PEFT adapter .* merge_and_unload\(\)"):
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


class Inheriting(ByHand):
    pass


@pytest.mark.parametrize("kind", [ByHand, Inheriting])
def test_weight_used_directly_in_model_code_gets_no_delta(kind):
    model = kind()
    message = f"3 linear layers .* {kind.__name__} multiplies by the weight of a without running"
    with pytest.warns(UserWarning, match=message):
        adapter = attach_full(model)
    assert set(adapter.sites()) == {"d"}
    adapter.detach()
    with pytest.raises(ValueError, match="multiplies by the weight of b without running the layer"):
        attach_full(model, targets=["b"])


def test_model_without_source_code_is_accepted():
    kind = type("Typed", (nn.Sequential,), {"forward": eval("lambda self, x: self[0](x)")})  # as in a shell
    assert set(attach_full(kind(nn.Linear(16, 16))).sites()) == {"0"}


class Bypassing(nn.Module):
    """Uses the weight of `a` without running `a`, before or after `b` runs."""

    def __init__(self, first):
        super().__init__()
        self.a, self.b, self.is_first = nn.Linear(16, 16), nn.Linear(16, 16), first

    def forward(self, x):
        if not torch.is_grad_enabled():  # an evaluation may run the layer
            return self.b(self.a(x))
        weight = self.a.weight  # under another name, so that the check of the source code does not find it
        bypassed = linear(x, weight, self.a.bias)
        return self.b(bypassed) if self.is_first else bypassed + self.b(x)


@pytest.mark.parametrize("mode", ["fold", "side"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("trained", ["A B", "B"])
def test_weight_used_without_running_its_layer_is_an_error(first, mode, trained):
    model = Bypassing(first)
    adapter = attach_full(model, mode=mode)
    for site in adapter.sites().values():
        site.A.requires_grad_("A" in trained)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="uses the weight of a without running that layer"):
        for _ in range(2):  # the first step shows that the layer is idle, the second that its weight is used
            with torch.no_grad():
                model(rows())
            model(rows()).square().sum().backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    adapter.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


class Routed(nn.Module):
    """Runs one layer and, once `is_second_on` is set, another."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.is_second_on = nn.Linear(16, 16), nn.Linear(16, 16), False

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if self.is_second_on else x


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_compiled_layer_is_not_mistaken_for_a_bypassed_weight(mode):
    model = Pair(Routed())
    adapter = attach_full(model, mode=mode)
    model.layer.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="1 of 3 matrices got no gradient")
        for _ in range(3):
            model(rows()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.layer.is_second_on = True
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("frozen_from", [0, 1])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_manually_frozen_delta_is_accepted(frozen_from, is_compiled):
    model = Pair(Routed())
    adapter = attach_full(model)
    run = torch.compile(model, backend="aot_eager") if is_compiled else model
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error" if frozen_from == 0 else "ignore", message=".* got no gradient")
        for step in range(3):
            if step == frozen_from:
                adapter.sites()["layer.second"].requires_grad_(False)
            run(rows()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.layer.is_second_on = True
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_weight_that_is_trained_beside_its_delta_is_not_frozen():
    model = Pair(Routed())
    adapter, weight = attach_full(model, mode="side"), model.layer.second.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([*adapter.parameters(), weight], lr=0.1)
    with pytest.warns(UserWarning, match="1 of 3 matrices got no gradient"):
        for _ in range(2):
            model(rows()).square().sum().backward()
            optimizer.step()
            model.layer.is_second_on = True
    assert weight.requires_grad and weight.grad is not None


class Int8(nn.Module):
    in_features = out_features = 16

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_without_positive_values_counts_as_a_gradient(sign):
    model = nn.Sequential(nn.Linear(16, 2))
    optimizer = torch.optim.SGD(attach(model, density=1.0, rank=1, support=4).parameters(), lr=0.1)
    (sign * model(rows())[:, 0].sum()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("idle", [lambda: nn.Linear(16, 16), Int8])
def test_idle_layer_is_reported_once_and_its_weight_stays_frozen(idle):
    model = Pair(layer())
    model.idle = idle()
    adapter = attach_full(model)
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


@pytest.mark.parametrize("end", ["merge", "detach"])
def test_frozen_model_stays_frozen_if_its_adapter_ends_after_one_step(end):
    model = Pair(Routed()).requires_grad_(False)
    adapter = attach_full(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(rows()).square().sum().backward()
    with pytest.warns(UserWarning, match="1 of 3 matrices got no gradient"):
        optimizer.step()
    assert model.layer.second.weight.requires_grad  # to see whether it is used
    getattr(adapter, end)()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_no_weight_gradient_is_computed_if_every_layer_runs():
    model = llama()
    adapter = attach(model)
    model(**batch()).loss.backward()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
