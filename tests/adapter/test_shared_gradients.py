"""Matrices that share an input compute their gradients in one call, bitwise equal to one call each."""

import gc
import weakref
from contextlib import ExitStack

import pytest
import torch
from gradient_calls import GradientCalls
from tiny_models import attach, batch, disturb, llama
from torch import nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True)
def sharing():
    """Has the adapters of `projections` share gradients until the test ends."""
    with ExitStack() as blocks:
        projections.blocks = blocks
        yield


def projections(shares=True, **options):
    """q, k and v of one input, and their adapter."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(16, out) for name, out in (("q", 12), ("k", 6), ("v", 6))})
    adapter = attach(model, **{"density": 1.0, "rank": 2, "support": 8} | options)
    disturb(adapter)
    if shares:
        projections.blocks.enter_context(adapter.sharing_gradients())
    return model, adapter


def gradients(adapter):
    return {name: None if p.grad is None else p.grad.clone() for name, p in adapter.named_parameters()}


def one_by_one(names, x):
    """The gradients if each matrix gets its own copy of the input, so that nothing is shared."""
    model, adapter = projections()
    for name in names:
        model[name](x.clone()).square().sum().backward()
    return gradients(adapter)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        assert (gradient is None) == (right[name] is None), name
        assert gradient is None or torch.equal(gradient, right[name]), name


def test_layer_computes_gradients_once_per_input():
    model = llama(num_hidden_layers=1)
    with attach(model).sharing_gradients():
        loss = model(**batch()).loss
    with GradientCalls() as calls:
        loss.backward()
    assert sorted(calls.together) == [1, 2, 3] and calls.alone == 1  # o; gate and up; q, k and v. down has no sibling


@pytest.mark.parametrize("names", ["qkv", "vkq", "qk", "q"])
def test_shared_gradients_equal_single_calls_bitwise(names):
    model, adapter = projections()
    x = torch.randn(2, 5, 16)
    sum(model[name](x).square().sum() for name in names).backward()
    assert_same(gradients(adapter), one_by_one(names, x))


def test_outputs_that_the_loss_does_not_use_get_no_gradient():
    model, adapter = projections()
    x = torch.randn(5, 16)
    q, _k, v = (model[name](x) for name in "qkv")
    (q.square().sum() + v.square().sum()).backward()
    assert_same(gradients(adapter), one_by_one("qv", x))


def test_one_input_in_several_graphs():
    """Each matrix has its own backward on the same tensor, some of them twice."""
    model, adapter = projections()
    x = torch.randn(5, 16)
    for name in "qkqvk":
        model[name](x).square().sum().backward()
    assert_same(gradients(adapter), one_by_one("qkqvk", x))


def test_matrix_that_runs_twice_on_one_input():
    model, adapter = projections()
    x = torch.randn(5, 16)
    sum(model[name](x).square().sum() for name in "qqk").backward()
    expected = one_by_one("qqk", x)
    for name, gradient in gradients(adapter).items():
        assert gradient is expected[name] is None or torch.allclose(gradient, expected[name], rtol=1e-5)


def test_retained_graph_can_run_backward_twice():
    model, adapter = projections()
    x = torch.randn(5, 16)
    loss = sum(model[name](x).square().sum() for name in "qkv")
    loss.backward(retain_graph=True)
    once = gradients(adapter)
    loss.backward()
    assert_same(gradients(adapter), {name: 2 * gradient for name, gradient in once.items()})
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradient_of_a_single_parameter():
    model, adapter = projections()
    x = torch.randn(5, 16)
    loss = sum(model[name](x).square().sum() for name in "qkv")
    parameters = dict(adapter.named_parameters())
    (gradient,) = torch.autograd.grad(loss, [parameters["k.A"]])
    assert torch.equal(gradient, one_by_one("k", x)["k.A"])
    assert all(p.grad is None for p in parameters.values())


def test_frozen_matrix_gets_no_gradient_beside_trained_ones():
    for frozen in "qkv":
        model, adapter = projections()
        site = adapter.sites()[frozen]
        site.A.requires_grad_(False)
        site.B.requires_grad_(False)
        x = torch.randn(5, 16)
        sum(model[name](x).square().sum() for name in "qkv").backward()
        expected = one_by_one([name for name in "qkv" if name != frozen], x)
        assert_same(gradients(adapter), expected)
    model, adapter = projections()
    adapter.requires_grad_(False)
    x = torch.randn(5, 16, requires_grad=True)
    sum(model[name](x).square().sum() for name in "qkv").backward()
    assert x.grad is not None and all(gradient is None for gradient in gradients(adapter).values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_that_share_an_input(use_reentrant):
    """The input outlives the forward, so the second run of the layers finds what the first one gathered."""
    model, adapter = projections()
    x = torch.randn(5, 16, requires_grad=True)

    def layers(x):
        return sum(model[name](x).square().sum() for name in "qkv")

    for _ in range(2):
        checkpoint(layers, x, use_reentrant=use_reentrant).backward()
    expected = one_by_one("qkvqkv", x.detach())
    assert_same(gradients(adapter), expected)


def test_checkpointing_a_model_keeps_its_gradients_bitwise():
    results = []
    for checkpoints in (False, True):
        model = llama().train()
        adapter = attach(model)
        disturb(adapter)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        with adapter.sharing_gradients():
            model(**batch()).loss.backward()
        results.append(gradients(adapter))
    assert_same(*results)


def test_gathered_columns_are_freed_with_their_input_and_outputs():
    model, adapter = projections()
    x = torch.randn(5, 16)
    y = model["q"](x)
    gather = adapter.sites()["q"].gather
    columns = weakref.ref(gather._cached.xs)
    del x
    gc.collect()
    assert gather._cached is None and columns() is not None  # the graph still needs them
    del y
    gc.collect()
    assert columns() is None


def test_gathered_columns_are_dropped_once_every_matrix_has_read_them():
    model, adapter = projections()
    x, gather = torch.randn(5, 16), adapter.sites()["q"].gather
    for name in "qk":
        model[name](x)
        assert gather._cached is not None
    model["v"](x)
    assert gather._cached is None


def test_a_checkpoint_of_one_matrix_shares_nothing():
    """The tensors it saves must not depend on what ran before, or recomputation saves others."""
    model, adapter = projections()
    x = torch.randn(5, 16)
    k = checkpoint(lambda x: model["k"](x), x, use_reentrant=False)
    q = model["q"](x)
    v = checkpoint(lambda x: model["v"](x), x, use_reentrant=False)
    sum(y.square().sum() for y in (q, k, v)).backward()
    assert_same(gradients(adapter), one_by_one("qkv", x))


def test_gradients_are_not_shared_by_default():
    """So outputs of one input may have separate backwards, and parameters may change between them."""
    model, adapter = projections(shares=False)
    x = torch.randn(5, 16)
    site = adapter.sites()["k"]
    site.A.register_hook(lambda gradient: 1.0 * gradient)
    q, k = model["q"](x).square().sum(), model["k"](x).square().sum()
    with GradientCalls() as calls:
        q.backward()
        k.backward()
    assert calls.alone == 2 and not calls.together
    assert_same(gradients(adapter), one_by_one("qk", x))
    q = model["q"](x).square().sum()
    with torch.no_grad():
        site.A.add_(1)
    q.backward()


def test_sharing_ends_with_the_outermost_block():
    _, adapter = projections(shares=False)
    gather = adapter.sites()["q"].gather
    with adapter.sharing_gradients(), adapter.sharing_gradients():
        assert gather.shares_gradients
    assert not gather.shares_gradients


def test_deterministic_mode_fills_no_sink_of_a_gradient():
    """It fills new memory. A sink has one element in memory but the shape of an output."""
    model, adapter = projections()
    x = torch.randn(5, 16)
    torch.use_deterministic_algorithms(True)
    try:
        with profile(record_shapes=True) as calls:
            outputs = [model[name](x) for name in "qkv"]
        sum(y.square().sum() for y in outputs).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    filled = [event.input_shapes[0] for event in calls.events() if event.name == "aten::fill_"]
    assert [5, 6] not in filled, filled
    assert_same(gradients(adapter), one_by_one("qkv", x))
