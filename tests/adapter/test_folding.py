"""Deltas folded into their weights: after each step, merged, disabled or unhooked; and the base restored bitwise."""

import contextlib
import copy
import gc
import sys
import threading

import pytest
import torch
from tiny_models import MODELS, attach, batch, disturb, llama, same_bits, snapshot, train
from torch import nn

from rbfast.adapter.column_delta import unhooked
from rbfast.adapter.sparse_adapter import SparseAdapter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unmerge_are_bitwise_exact(name, dtype):
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


def test_merging_a_side_adapter_matches_fold_mode_bitwise():
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
def test_disabled_restores_the_base_nests_and_survives_exceptions(mode):
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


def test_backward_inside_disabled_of_an_earlier_forward_is_refused():
    model = llama()
    adapter = attach(model)
    disturb(adapter)
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    expected = [parameter.grad.clone() for parameter in adapter.parameters()]
    adapter.zero_grad()
    with adapter.disabled(), adapter.disabled(), pytest.raises(RuntimeError, match="after the block"):
        loss.backward(retain_graph=True)
    adapter.zero_grad()
    loss.backward()
    assert all(map(torch.equal, (parameter.grad for parameter in adapter.parameters()), expected))


def step_by_sgd(adapter):
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(adapter.parameters(), lr=0.5).step()


def test_a_frozen_adapter_can_be_disabled():
    model = llama()
    original, adapter = snapshot(model), attach(model)
    disturb(adapter)
    adapter.requires_grad_(False)
    with adapter.disabled():
        assert same_bits(snapshot(model), original)


def test_a_step_while_disabled_is_folded_after_the_block():
    model = llama()
    adapter = attach(model)
    original = snapshot(model)
    with adapter.disabled():
        step_by_sgd(adapter)
        assert same_bits(snapshot(model), original)
    assert is_folded(adapter) and not same_bits(snapshot(model), original)


def test_detaching_while_disabled_leaves_the_base():
    model = llama(torch.bfloat16)
    original = snapshot(model)
    adapter = attach(model)
    train(model, adapter)
    with adapter.disabled():
        adapter.detach()
    assert same_bits(snapshot(model), original)


@pytest.mark.parametrize("end", ["merge", "detach"])
def test_merged_or_detached_adapter_never_writes_to_the_model(end):
    model = llama()
    adapter = attach(model)
    state = copy.deepcopy(adapter.state_dict())
    disturb(adapter)
    getattr(adapter, end)()
    left = snapshot(model)
    with pytest.raises(RuntimeError, match="cannot fold this adapter: it must be attached"):
        adapter.fold()
    with pytest.raises(RuntimeError, match="cannot load a state into this adapter: it must be attached"):
        adapter.load_state_dict(state)
    step_by_sgd(adapter)
    assert same_bits(snapshot(model), left) and not same_bits(adapter.state_dict(), state)


def test_unmerge_is_refused_if_weights_changed_after_merge():
    model = llama()
    adapter = attach(model)
    adapter.merge()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"the weight of model\.layers\.1\.mlp\.up_proj was changed after merge"):
        adapter.unmerge()


@pytest.mark.filterwarnings("ignore:an optimizer trains an adapter that is merged")
def test_unmerge_is_refused_if_the_adapter_trained_after_merge():
    model = llama()
    adapter = attach(model)
    disturb(adapter)
    adapter.merge()
    step_by_sgd(adapter)
    with pytest.raises(RuntimeError, match=r"A or B of \S+q_proj was changed after merge"):
        adapter.unmerge()


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


def test_step_is_folded_without_a_reference_to_the_adapter():
    model = llama()
    optimizer = torch.optim.AdamW(attach(model).parameters(), lr=0.05)
    gc.collect()
    before = snapshot(model)
    model(**batch()).loss.backward()
    optimizer.step()
    assert not same_bits(before, snapshot(model))


def test_optimizer_step_during_backward_fails_in_autograd():
    model = llama()
    adapter = attach(model)
    disturb(adapter)
    for parameter in adapter.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.5)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(**batch()).loss.backward()


def test_weights_made_in_inference_mode_are_folded_after_a_step():
    with torch.inference_mode():
        model = llama()
    adapter = attach(model)
    parameters = list(adapter.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.5).step()
    assert is_folded(adapter)


def test_optimizer_of_other_parameters_does_not_fold():
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


def test_manual_change_is_folded_before_the_next_forward():
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


def test_replaced_parameter_data_is_folded_before_the_next_forward():
    model = llama()
    adapter = attach(model)
    model(**batch())
    values = 2 * torch.ones(sum(parameter.numel() for parameter in adapter.parameters()))
    nn.utils.vector_to_parameters(values, adapter.parameters())
    assert not is_folded(adapter)
    model(**batch())
    assert is_folded(adapter)
    for parameter in adapter.parameters():
        parameter.data.mul_(2)
    adapter.fold()  # a write through .data is not detected
    assert is_folded(adapter)


def hooks(model):
    return [
        (name, type(hook.__self__).__name__)
        for name, module in model.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]


def test_unhooked_block_changes_neither_logits_nor_later_training():
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


def test_unhooked_removes_all_hooks_and_restores_each_once():
    model = llama()
    adapter = attach(model)
    before = hooks(model)
    with pytest.raises(KeyError), unhooked(model):
        assert hooks(model) == []
        for part in (model, model.model):
            with unhooked(part):
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


def test_concurrent_unhooked_blocks_restore_each_hook_once():
    model = llama()
    adapter = attach(model)
    before, interval = sorted(hooks(model)), sys.getswitchinterval()

    def enter_and_leave():
        for _ in range(200):
            with unhooked(model):
                pass

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(hooks(model)) == before
    adapter.detach()
    assert not hooks(model)


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
    assert len(hooks(model)) == 2 * len(third.sites())  # the third adapter alone has hooks
    disturb(third)
    losses = train(model, third, steps=3)
    assert losses[2] < losses[0]


def test_side_deltas_keep_their_hooks():
    model = llama()
    adapter = attach(model, mode="side")
    disturb(adapter)
    logits, before = model(**batch()).logits, hooks(model)
    with unhooked(model):
        assert hooks(model) == before
        assert torch.equal(model(**batch()).logits, logits)


class Quantised(nn.Module):
    """A weight in int8 with one scale per row."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("steps", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.steps).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.steps)


def with_quantised_down_proj(model):
    for layer in model.model.layers:
        layer.mlp.down_proj = Quantised(layer.mlp.down_proj)
    return model


def side_matrices(adapter):
    return {name.rpartition(".")[2] for name, site in adapter.sites().items() if not site.is_folded}


def test_quantised_matrix_gets_a_side_delta_and_the_others_fold():
    model, full = llama(), llama()
    total = sum(parameter.numel() for parameter in full.parameters())
    adapter = attach(with_quantised_down_proj(model))
    assert adapter.parameters_of_base == total
    assert side_matrices(adapter) == {"down_proj"}
    losses = train(model, adapter, steps=7)
    assert losses[6] < losses[4] < losses[0]
    with pytest.raises(RuntimeError, match="down_proj: its weight is quantised, sharded or offloaded; use export_lora"):
        adapter.merge()
    with pytest.raises(ValueError, match=r"mode \"fold\" needs .* which model\.layers\.0\.mlp\.down_proj is not"):
        adapter.detach()
        attach(model, mode="fold")


def test_adapter_of_plain_weights_loads_onto_quantised_ones(tmp_path):
    attach(llama()).save_pretrained(tmp_path)
    adapter = SparseAdapter.from_pretrained(with_quantised_down_proj(llama()), tmp_path)
    assert side_matrices(adapter) == {"down_proj"}


def test_surviving_share_falls_with_the_size_of_the_change():
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
    beside = attach(llama(torch.bfloat16), mode="side")
    disturb(beside)
    assert beside.surviving_share() == 1.0  # nothing is rounded
