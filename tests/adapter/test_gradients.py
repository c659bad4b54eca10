"""The adapter's gradients: as exact as autograd on the written-out weight, in both modes and however the model runs."""

import copy
import sys
import threading

import pytest
import torch
from tiny_models import MODELS, attach, batch, disturb, llama, same_bits, train
from torch import nn
from torch.func import functional_call
from transformers import GPT2LMHeadModel

from rbfast.adapter.column_delta import unhooked
from rbfast.adapter.shared_gather import SharedGather
from rbfast.models.linears import matrix_shape


def reparameterised(model, adapter, base, dtype):
    """The loss with W = W0 + scale * B A written out, and the gradients by autograd."""
    double = copy.deepcopy(base).to(dtype)
    weights, leaves = {}, {}
    for name, site in adapter.sites().items():
        a, b = (p.detach().to(dtype).requires_grad_() for p in (site.A, site.B))
        leaves |= {f"{name}.A": a, f"{name}.B": b}
        weight = double.get_parameter(f"{name}.weight").detach()
        dense = torch.zeros(b.shape[0], matrix_shape(site.linear)[1], dtype=dtype).index_copy(
            1, site.cols, site.scale * b @ a
        )
        weights[f"{name}.weight"] = weight + (dense.T if isinstance(base, GPT2LMHeadModel) else dense)
    loss = functional_call(double, weights, kwargs=batch(), tie_weights=True).loss
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def error(gradients, exact):
    """|gradients - exact| / |exact| over all parameters together."""
    difference = sum((gradients[name].double() - exact[name].double()).square().sum() for name in exact)
    return (difference / sum(gradient.double().square().sum() for gradient in exact.values())).sqrt().item()


@pytest.mark.parametrize("mode", ["fold", "side"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_as_exact_as_autograd_on_the_written_out_weight(name, mode):
    model, base = MODELS[name](), MODELS[name]()
    adapter = attach(model, mode=mode, scale=0.7)
    disturb(adapter)
    loss = model(**batch()).loss
    loss.backward()
    exact_loss, exact = reparameterised(model, adapter, base, torch.float64)
    _, single = reparameterised(model, adapter, base, torch.float32)
    ours = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert ours.keys() == exact.keys()
    eps = torch.finfo(torch.float32).eps
    assert error(ours, exact) <= error(single, exact) + eps
    assert abs(loss.item() - exact_loss.item()) <= 4 * eps * exact_loss.item()


def test_side_and_fold_modes_agree():
    outputs = {}
    for mode in ("fold", "side"):
        model = llama()
        adapter = attach(model, mode=mode)
        disturb(adapter)
        inputs = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=inputs).logits
        logits.square().mean().backward()
        outputs[mode] = {"logits": logits.detach(), "dx": inputs.grad} | {
            n: p.grad for n, p in adapter.named_parameters()
        }
    # Both round every product to fp32; the sums differ by a few units in the last place per layer.
    assert error(outputs["side"], outputs["fold"]) <= 16 * torch.finfo(torch.float32).eps


def test_foreign_forward_hook_sees_the_delta():
    """It doubles the output, so the delta's gradient must pass through it, even if it was there before the adapter."""
    gradients = {}
    for when in ("before", "after", "before, and unhooked since"):
        linear = nn.Linear(8, 4)
        with torch.no_grad():
            linear.weight.copy_(torch.linspace(-1, 1, 32).view(4, 8))
            linear.bias.zero_()
        model = nn.ModuleDict({"linear": linear})
        if when != "after":
            linear.register_forward_hook(lambda module, args, y: 2 * y)
        adapter = attach(model, density=1.0, rank=1, support=4)
        if when == "after":
            linear.register_forward_hook(lambda module, args, y: 2 * y)
        disturb(adapter)
        if "unhooked" in when:
            with unhooked(model):
                pass
        linear(torch.linspace(0, 1, 40).view(5, 8)).square().sum().backward()
        gradients[when] = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert all(same_bits(result, gradients["after"]) for result in gradients.values())


def test_matrices_that_share_an_input_gather_it_once(monkeypatch):
    from rbfast import ops

    calls = []
    gather = ops.column_gather
    monkeypatch.setattr(ops, "column_gather", lambda x, *rest: calls.append(x.shape) or gather(x, *rest))
    model = llama()
    attach(model)
    model(**batch()).loss.backward()
    # Per layer: q, k, v once; o (guessed to be their sibling, and is not); gate and up once; down.
    assert len(calls) == 2 * 4
    with torch.no_grad():
        model(**batch())
    assert len(calls) == 2 * 4  # nothing is gathered without gradients


def test_a_gather_is_shared_in_one_dtype():
    x, cols, gather = torch.randn(3, 8), torch.tensor([1, 4]), SharedGather()
    gather.members = [None, None]
    assert [gather(x, cols, 1, dtype).dtype for dtype in (torch.float32, torch.bfloat16)] == [x.dtype, torch.bfloat16]


def test_threads_that_share_a_gather_get_their_own_columns():
    x, other, cols = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([1, 4])
    code, lines = SharedGather._gathered.__code__, set()

    def interrupted_at(number):
        """Gathers x. At the line of this number, if any, another thread gathers from another input first."""
        gather = SharedGather()
        gather.members = [None, None]

        def on_line(frame, event, arg):
            lines.add(frame.f_lineno)
            if event == "line" and frame.f_lineno == number:
                thread = threading.Thread(target=gather, args=(other, cols, 1, x.dtype))
                thread.start()
                thread.join()
            return on_line

        before = sys.gettrace()
        sys.settrace(lambda frame, event, arg: on_line if frame.f_code is code else None)
        try:
            return gather(x, cols, 1, x.dtype)
        finally:
            sys.settrace(before)

    interrupted_at(None)
    assert len(lines) > 5
    for number in sorted(lines):
        assert torch.equal(interrupted_at(number), x[:, cols]), number


def test_an_input_changed_in_place_is_gathered_again():
    shared = nn.ModuleDict({"left": nn.Linear(8, 8), "right": nn.Linear(8, 8)})
    adapter = attach(shared, density=1.0, rank=1, support=4)
    disturb(adapter)
    x = torch.randn(5, 8)
    left = shared["left"](x)
    x.mul_(3)
    (left.sum() + shared["right"](x).sum()).backward()
    site = adapter.sites()["right"]
    dH = torch.ones(5, 8) @ site.B.detach()
    assert torch.allclose(site.A.grad, dH.T @ x[:, site.cols])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fold", "side"])
def test_fully_compiled_model_trains_like_eager(mode):
    steps = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        model = llama(num_hidden_layers=1)
        adapter = attach(model, mode=mode)
        steps[compiled] = train(torch.compile(model, fullgraph=True) if compiled else model, adapter, steps=5)
    assert steps[True] == pytest.approx(steps[False], rel=1e-5)
    assert steps[True][4] < steps[True][0]


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_model_compiled_before_attaching_trains_its_delta(mode):
    model = llama().requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch())
    adapter = attach(model, mode=mode)
    disturb(adapter)
    out = compiled(**batch())
    assert torch.allclose(out.logits, model(**batch()).logits, atol=1e-5)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gradients = {}
    for checkpointing in (False, True):
        model = llama()
        adapter = attach(model)
        disturb(adapter)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        model(**batch()).loss.backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert same_bits(gradients[True], gradients[False])


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_autocast_gradients_are_close_to_fp32(mode):
    model = llama()
    adapter = attach(model, mode=mode)
    disturb(adapter)
    model(**batch()).loss.backward()
    full = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    adapter.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch()).loss.backward()
    half = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert 0 < error(half, full) < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_double_backward_is_refused(mode):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    adapter = attach(model, density=0.3, mode=mode)
    disturb(adapter)
    gradients = torch.autograd.grad(model(torch.randn(5, 8)).sum(), list(adapter.parameters()), create_graph=True)
    for gradient in gradients:  # the last layer's dy is constant, but its gradients are not
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.sum().backward(retain_graph=True)


def test_accumulated_gradients_are_the_sum():
    model = llama()
    adapter = attach(model)
    disturb(adapter)
    parts = []
    for seed in (0, 1):
        model(**batch(seed=seed)).loss.backward()
        parts.append({name: parameter.grad.clone() for name, parameter in adapter.named_parameters()})
        adapter.zero_grad()
    for seed in (0, 1):
        model(**batch(seed=seed)).loss.backward()
    for name, parameter in adapter.named_parameters():
        assert torch.equal(parameter.grad, parts[0][name] + parts[1][name])


def test_an_output_may_be_changed_in_place_afterwards():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    adapter = attach(model, density=0.3)
    disturb(adapter)
    model(torch.randn(5, 8)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


def test_functorch_transform_is_refused_by_torch_itself():
    model = llama()
    adapter = attach(model)
    linear = next(iter(adapter.sites().values())).linear
    model(**batch())  # by now no layer is watched
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: linear(x).sum())(torch.ones(3, linear.in_features))
