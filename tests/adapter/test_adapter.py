"""SparseAdapter on small random models: gradients, folding, merging, files, and life inside PyTorch."""

import contextlib
import copy
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import MODELS, attach, batch, disturb, gpt2, llama, same_bits, snapshot
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import GPT2LMHeadModel

from rbfast.adapter.column_delta import ColumnDelta, unhooked
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.models.linears import matrix_shape


def train(model, adapter, steps=3, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(adapter.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        loss = model(**batch(seed=step % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def reparameterised(model, adapter, base, dtype):
    """The loss as autograd sees it with W = W0 + scale * B A written out, and the gradients."""
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_merged_is_bitwise_what_was_trained_with_and_unmerged_bitwise_the_original(name, dtype):
    model = MODELS[name](dtype)
    original = snapshot(model)
    adapter = attach(model)
    losses = train(model, adapter, steps=6)
    assert losses[-2] < losses[0]  # the same batch
    trained_with, logits = snapshot(model), model(**batch()).logits
    assert not same_bits(trained_with, original)
    adapter.merge()
    assert same_bits(snapshot(model), trained_with)
    assert torch.equal(model(**batch()).logits, logits)
    adapter.unmerge()
    assert same_bits(snapshot(model), original)


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_detach_restores_the_base_and_leaves_nothing_behind(mode):
    model = llama(torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    original = snapshot(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapter = attach(model, mode=mode)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == original.keys()
    train(model, adapter)
    adapter.detach()
    assert same_bits(snapshot(model), original)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    copy.deepcopy(model)
    attach(model)


def test_side_equals_fold():
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


def test_merging_an_adapter_beside_plain_weights_folds_it_exactly_as_fold_does():
    states = {}
    for mode in ("fold", "side"):
        model = llama(torch.bfloat16)
        original = snapshot(model)
        adapter = attach(model, mode=mode)
        disturb(adapter)
        adapter.merge()
        states[mode] = snapshot(model)
        adapter.unmerge()
        assert same_bits(snapshot(model), original)
    assert same_bits(states["side"], states["fold"])


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_a_saved_adapter_loads_bitwise(tmp_path, mode):
    model = llama(torch.bfloat16)
    adapter = attach(model, mode=mode, scale=0.5, seed=3)
    train(model, adapter)
    logits = model(**batch()).logits
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.detach()
    again = SparseAdapter.from_pretrained(model, tmp_path / "adapter", mode=mode)
    assert torch.equal(model(**batch()).logits, logits)
    assert again.config == adapter.config
    assert same_bits(again.state_dict(), adapter.state_dict())
    again.save_pretrained(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_file_for_another_model_is_refused_and_leaves_that_model_alone(tmp_path):
    attach(llama()).save_pretrained(tmp_path)
    other = llama(intermediate_size=48)
    original = snapshot(other)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate_proj is \(40, 24\), not \(48, 24\)"):
        SparseAdapter.from_pretrained(other, tmp_path)
    retrained = llama()
    with torch.no_grad():
        retrained.model.layers[1].mlp.up_proj.weight[3].add_(0.01)
    with pytest.raises(ValueError, match=r"weights of model\.layers\.1\.mlp\.up_proj differ"):
        SparseAdapter.from_pretrained(retrained, tmp_path)
    with pytest.raises(ValueError, match=r"linear model\.layers\.0\.self_attn\.q_proj is not in this model"):
        SparseAdapter.from_pretrained(gpt2(), tmp_path)
    assert same_bits(snapshot(other), original) and all(p.requires_grad for p in other.parameters())


def test_an_adapter_trained_in_fp32_loads_onto_the_bf16_and_fp16_base(tmp_path):
    attach(llama()).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        SparseAdapter.from_pretrained(llama(dtype), tmp_path)


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_disabled_is_bitwise_the_base_nests_and_survives_exceptions(mode):
    model = llama(torch.bfloat16)
    original, base_logits = snapshot(model), model(**batch()).logits
    adapter = attach(model, mode=mode)
    train(model, adapter)
    trained, logits = snapshot(model), model(**batch()).logits
    with pytest.raises(KeyError), adapter.disabled():
        with adapter.disabled():
            assert torch.equal(model(**batch()).logits, base_logits)
        assert same_bits(snapshot(model), original)
        disturb(adapter, size=0.0)
        assert same_bits(snapshot(model), original)
        assert not model(**batch()).loss.requires_grad
        raise KeyError
    assert same_bits(snapshot(model), trained)
    assert torch.equal(model(**batch()).logits, logits)


def test_detaching_while_disabled_leaves_the_base():
    model = llama(torch.bfloat16)
    original = snapshot(model)
    adapter = attach(model)
    train(model, adapter)
    with adapter.disabled():
        adapter.detach()
    assert same_bits(snapshot(model), original)


OPTIMIZERS = {
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adamw-single": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.5, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.5, fused=True),
}


def is_folded(adapter):
    return all(torch.equal(site.weight[:, site.cols], site.folded_columns()) for site in adapter.sites().values())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_step_is_folded_at_once(kind):
    model = llama()
    adapter = attach(model)
    optimizer = OPTIMIZERS[kind](list(adapter.parameters()))
    before = snapshot(model)
    train(model, adapter, steps=2, optimizer=optimizer)
    assert is_folded(adapter) and not same_bits(snapshot(model), before)


def test_an_optimizer_of_something_else_does_not_fold():
    model = llama()
    adapter = attach(model)
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    with torch.no_grad():
        next(iter(adapter.parameters())).add_(1.0)
    other(torch.ones(1, 3)).sum().backward()
    before = snapshot(model)
    optimizer.step()
    assert same_bits(snapshot(model), before)


def test_a_change_by_hand_is_folded_before_the_next_forward():
    model = llama()
    adapter = attach(model)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    assert not is_folded(adapter)
    model.model(input_ids=batch()["input_ids"])
    assert is_folded(adapter)
    with torch.no_grad():
        state = {
            name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in adapter.state_dict().items()
        }
    adapter.load_state_dict(state)
    assert is_folded(adapter)


def test_a_second_adapter_is_refused_until_the_first_is_gone():
    model = llama()
    first = attach(model)
    with pytest.raises(ValueError, match=r"one at a time: call its detach\(\) or merge\(\)"):
        attach(model)
    first.merge()
    second = attach(model)
    disturb(second)
    with pytest.raises(RuntimeError, match="was changed after merge"):
        first.unmerge()
    second.detach()
    first.unmerge()


def test_states_that_do_not_fit_are_refused():
    adapter = attach(llama())
    with pytest.raises(RuntimeError, match="cannot unmerge this adapter: it must be merged, and it is attached"):
        adapter.unmerge()
    adapter.detach()
    for action in (adapter.merge, adapter.detach, adapter.surviving_share, adapter.disabled().__enter__):
        with pytest.raises(RuntimeError, match="it must be attached, and it is detached"):
            action()


def hooks(model):
    return [
        (name, type(hook.__self__).__name__)
        for name, module in model.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]


def test_an_unhooked_adapter_is_in_the_weights_alone_and_trains_on_afterwards():
    trained = {}
    for block in (unhooked, contextlib.nullcontext):
        model = llama()
        adapter = attach(model)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
        train(model, adapter, optimizer=optimizer)
        with torch.no_grad():
            logits, before = model(**batch()).logits, hooks(model)
            with block(model):
                assert torch.equal(model(**batch()).logits, logits)
        assert hooks(model) == before and len(before) == 2 * len(adapter.sites())
        trained[block] = train(model, adapter, optimizer=optimizer), snapshot(adapter)
    losses, parameters = trained[unhooked]
    assert losses == trained[contextlib.nullcontext][0]
    assert same_bits(parameters, trained[contextlib.nullcontext][1])


def test_no_hook_is_left_in_an_unhooked_block_and_each_comes_back_once():
    model = llama()
    adapter = attach(model)
    before = hooks(model)
    with pytest.raises(KeyError), unhooked(model):
        assert hooks(model) == []
        with unhooked(model):
            assert hooks(model) == []
        assert hooks(model) == []
        with pytest.raises(ValueError, match="attached already"):
            attach(model)
        with pytest.raises(TypeError, match=r"adapter\.merge\(\)"):
            copy.deepcopy(model)
        raise KeyError
    assert hooks(model) == before
    adapter.detach()
    with unhooked(model):
        assert hooks(model) == []
    assert hooks(model) == []


def test_changes_before_and_within_an_unhooked_block_are_folded():
    model = llama()
    adapter = attach(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    assert not is_folded(adapter)
    with unhooked(model):
        assert is_folded(adapter)
        before = snapshot(model)
        for parameter in adapter.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert is_folded(adapter) and not same_bits(snapshot(model), before)
        adapter.load_state_dict(
            {name: 2 * value if value.is_floating_point() else value for name, value in adapter.state_dict().items()}
        )
        assert is_folded(adapter)


def test_an_adapter_may_be_disabled_merged_or_detached_while_unhooked():
    model = llama()
    original = snapshot(model)
    adapter = attach(model)
    train(model, adapter)
    trained = snapshot(model)
    with unhooked(model):
        with adapter.disabled():
            assert same_bits(snapshot(model), original)
        assert same_bits(snapshot(model), trained)
    with adapter.disabled(), unhooked(model):
        assert same_bits(snapshot(model), original)
    assert same_bits(snapshot(model), trained)
    with unhooked(model):
        adapter.merge()
    assert hooks(model) == [] and same_bits(snapshot(model), trained)
    adapter.unmerge()
    second = attach(model)
    with unhooked(model):
        second.detach()
        third = attach(model)
    assert len(hooks(model)) == 2 * len(third.sites())  # those of the third alone
    disturb(third)
    assert train(model, third, steps=3)[2] > 0


def test_deltas_beside_the_weight_keep_their_hooks():
    model = llama()
    adapter = attach(model, mode="side")
    disturb(adapter)
    logits, before = model(**batch()).logits, hooks(model)
    with unhooked(model):
        assert hooks(model) == before
        assert torch.equal(model(**batch()).logits, logits)


def test_somebody_elses_hook_sees_the_matrix_with_its_delta():
    """One that was there before the adapter changes the output: the delta's gradient goes through it."""
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
    assert all(same_bits(found, gradients["after"]) for found in gradients.values())


def test_copying_and_pickling_are_refused_with_the_way_out():
    model = llama()
    adapter = attach(model)
    for refused in (model, adapter):
        with pytest.raises(TypeError, match=r"adapter\.merge\(\)"):
            copy.deepcopy(refused)
    adapter.merge()
    copy.deepcopy(model)


def test_a_forgotten_adapter_and_its_model_are_collected():
    from torch.optim.optimizer import _global_optimizer_post_hooks

    hooks = len(_global_optimizer_post_hooks)
    model = llama()
    adapter = attach(model)
    assert len(_global_optimizer_post_hooks) == hooks + 1
    alive = weakref.ref(adapter), weakref.ref(model)
    del model, adapter
    gc.collect()
    assert alive[0]() is None and alive[1]() is None
    assert len(_global_optimizer_post_hooks) == hooks


def test_parameters_are_fp32_named_after_their_matrix_and_counted(capsys):
    model = llama(torch.bfloat16)
    adapter = attach(model, density=0.05)
    names = [name for name, _ in adapter.named_parameters()]
    assert names[:2] == ["model.layers.0.self_attn.q_proj.A", "model.layers.0.self_attn.q_proj.B"]
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    trained = sum(parameter.numel() for parameter in adapter.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 0.045 * total < trained <= 0.05 * total
    assert adapter.trainable_percent == 100 * trained / total
    assert sum(row.values for row in adapter.summary()) == trained
    adapter.print_trainable_parameters()
    printed = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}\n"
    assert capsys.readouterr().out == printed


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
    assert len(calls) == 2 * 4  # nothing is done without gradients


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


class Quantised(nn.Module):
    """A weight in int8 with one scale per row."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("steps", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.steps).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.steps)


def test_a_quantised_matrix_runs_beside_its_weight_and_the_others_fold():
    model, full = llama(), llama()
    total = sum(parameter.numel() for parameter in full.parameters())
    for layer in model.model.layers:
        layer.mlp.down_proj = Quantised(layer.mlp.down_proj)
    adapter = attach(model)
    assert adapter._base_count == total
    assert {name.rpartition(".")[2] for name, site in adapter.sites().items() if not site.folds} == {"down_proj"}
    losses = train(model, adapter, steps=7)
    assert losses[6] < losses[4] < losses[0]
    with pytest.raises(RuntimeError, match="down_proj: its weight is quantised or sharded; use export_lora"):
        adapter.merge()
    with pytest.raises(ValueError, match=r"mode \"fold\" needs .* which model\.layers\.0\.mlp\.down_proj is not"):
        adapter.detach()
        attach(model, mode="fold")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fold", "side"])
def test_compiled_whole_it_trains_like_eager(mode):
    steps = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        model = llama(num_hidden_layers=1)
        adapter = attach(model, mode=mode)
        steps[compiled] = train(torch.compile(model, fullgraph=True) if compiled else model, adapter, steps=5)
    assert steps[True] == pytest.approx(steps[False], rel=1e-5)
    assert steps[True][4] < steps[True][0]


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
def test_autocast_trains(mode):
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


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_the_delta_follows_the_base_to_its_device(monkeypatch, mode):
    """Without another device at hand: a fake weight that says it is on a GPU, and the move it asks for."""
    model = llama()
    adapter = attach(model, mode=mode)
    moves = []
    monkeypatch.setattr(ColumnDelta, "to", lambda site, device: moves.append(device))
    site = next(iter(adapter.sites().values()))
    model(**batch())
    site.linear.weight = nn.Parameter(torch.empty(site.linear.weight.shape, device="meta"), requires_grad=False)
    site._before(site.linear, ())
    assert moves == []  # a weight that is offloaded for now takes nothing with it
    with FakeTensorMode():
        site.linear.weight = nn.Parameter(torch.empty(site.linear.weight.shape, device="cuda:1"), requires_grad=False)
    site._before(site.linear, ())
    assert moves == [torch.device("cuda:1")]


def test_an_output_may_be_changed_in_place_afterwards():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    adapter = attach(model, density=0.3)
    disturb(adapter)
    model(torch.randn(5, 8)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


def test_the_surviving_share_falls_with_the_size_of_the_change():
    shares = []
    for size in (1.0, 1e-3, 1e-5):
        adapter = attach(llama(torch.bfloat16))
        assert adapter.surviving_share() == 1.0  # nothing to lose yet
        disturb(adapter, size=0.0)
        with torch.no_grad():
            for site in adapter.sites().values():
                site.B.fill_(size)
        shares.append(adapter.surviving_share())
    assert shares[0] > 0.99 and shares[0] > shares[1] > shares[2] and shares[2] < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density must be above 0 and at most 1"),
        ({"density": -0.1}, "density must be above 0"),
        ({"density": 1.5}, "density must be above 0 and at most 1"),
        ({"density": 1e-9}, r"the budget is 0 trained values; rank 1 with 8 column\(s\) in each of 14 matrices needs"),
        ({"density": 0.01, "support": 20, "rank": 4}, "rank 4 with 20 column"),
        ({"support": 0}, "support must be at least 1, got 0"),
        ({"support": 3, "rank": 4}, r"rank must be at most the support \(3\), got 4"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"scale": 0.0}, "scale must be finite and not 0"),
        ({"scale": float("nan")}, "scale must be finite and not 0"),
        ({"mode": "folded"}, 'mode must be "auto", "fold" or "side"'),
        ({"targets": ["q_proj", "query"]}, "'query' names no linear layer; they are named like model.layers.0"),
        ({"targets": "layers.*"}, "the regex 'layers.*' matches no linear layer"),
        ({"targets": []}, "expected at least one name"),
        ({"targets": ["lm_head"]}, "the weight of lm_head is tied"),
    ],
)
def test_bad_options_are_refused_and_leave_the_model_alone(options, message):
    model = llama()
    original = snapshot(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **options)
    assert same_bits(snapshot(model), original) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("place", [str, Path])
def test_a_placement_that_is_no_file_is_told_what_it_may_be(tmp_path, place):
    for name in ("foo", tmp_path):
        message = re.escape(f"of a file of them, got {str(name)!r}: there is no such file")
        with pytest.raises(FileNotFoundError, match='placement must be "random", ColumnScores .* ' + message):
            attach(llama(), placement=place(name))


def test_a_model_without_linears_is_refused():
    with pytest.raises(ValueError, match=r"expected a model with linear layers .* found none in Embedding"):
        attach(nn.Embedding(3, 3))


def test_columns_are_random_unless_said_otherwise():
    adapter, same = SparseAdapter.attach(llama(), density=0.05), attach(llama(), density=0.05, placement="random")
    assert adapter.config.placement == "random"
    assert all(torch.equal(site.cols, same.sites()[name].cols) for name, site in adapter.sites().items())


def test_density_one_trains_at_most_as_many_values_as_the_base_has():
    model = llama()
    adapter = attach(model, density=1.0)
    assert 50 < adapter.trainable_percent <= 100
    losses = train(model, adapter, steps=5, optimizer=torch.optim.AdamW(adapter.parameters(), lr=0.01))
    assert losses[4] < losses[0]  # the same batch
