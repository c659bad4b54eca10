"""Base weights that change while an adapter is attached, and deltas that are not finite: handled exactly or refused."""

import pytest
import torch
from tiny_models import attach, batch, disturb, gpt2, llama, same_bits, snapshot, train
from torch import nn
from torch.nn.utils import parametrizations

from rbfast.adapter.adapter_files import write_lora
from rbfast.adapter.column_delta import ColumnDelta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast", [lambda a: a.bfloat16().float(), lambda a: a.half(), lambda a: a.double()])
def test_an_adapter_is_never_cast(cast, dtype):
    model = llama(dtype)
    original = snapshot(model)
    adapter = attach(model)
    disturb(adapter)
    trained, values = snapshot(model), snapshot(adapter)
    cast(adapter)
    assert same_bits(snapshot(adapter), values)
    model(**batch()).loss.backward()
    assert same_bits(snapshot(model), trained)
    adapter.detach()
    assert same_bits(snapshot(model), original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_model_cast_after_attaching_merges_to_the_weights_that_ran(make, dtype):
    model = make()
    adapter = attach(model)
    disturb(adapter)
    model.to(dtype)
    logits, ran = model(**batch()).logits, snapshot(model)
    adapter.merge()
    assert same_bits(snapshot(model), ran) and torch.equal(model(**batch()).logits, logits)
    adapter.unmerge()
    assert same_bits(snapshot(model), snapshot(make(dtype)))


def test_detach_after_a_cast_and_back_matches_the_plain_model():
    model = llama()
    adapter = attach(model)
    disturb(adapter)
    model.bfloat16()(**batch())
    model.float()(**batch())
    adapter.detach()
    assert same_bits(snapshot(model), snapshot(llama().bfloat16().float()))


def test_cast_to_a_dtype_that_cannot_be_folded_is_refused():
    model = llama()
    attach(model)
    model.double()
    with pytest.raises(RuntimeError, match="no longer a plain floating tensor"):
        model(**batch())


def test_flattened_weight_is_refused():
    model = llama()
    adapter = attach(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.flatten()  # as FSDP1 does
    with pytest.raises(RuntimeError, match="no longer a plain floating tensor"):
        adapter.fold()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_loading_base_weights_keeps_the_delta(make, assign):
    model, base = make(), snapshot(make())
    adapter = attach(model)
    disturb(adapter)
    trained = snapshot(model)
    for state in (base, trained):  # the base's own weights, and those with the delta folded in
        model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=assign)
        assert same_bits(snapshot(model), trained)
    with adapter.disabled():
        for state in (trained, base):
            model.load_state_dict(state)
            assert same_bits(snapshot(model), base)
    assert same_bits(snapshot(model), trained)
    adapter.detach()
    assert same_bits(snapshot(model), base)


@pytest.mark.parametrize("source", ["base", "trained"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_assigning_bf16_weights_casts_and_wider_ones_are_refused(make, source):
    model, cast = make(), make(torch.bfloat16)
    base, adapter = snapshot(cast), attach(model)
    disturb(adapter)
    attach(cast).load_state_dict(adapter.state_dict())
    state = base if source == "base" else {name: tensor.bfloat16() for name, tensor in snapshot(model).items()}
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    assert same_bits(snapshot(model), snapshot(cast))
    with pytest.raises(RuntimeError, match="was changed while a delta is folded"):  # the kept columns are rounded
        model.load_state_dict(snapshot(make()), assign=True)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_state_dict_with_the_adapter_restores_base_and_adapter(make, assign):
    model = make()
    model.adapter = attach(model)
    disturb(model.adapter, seed=1)
    expected, state = model(**batch()).logits, snapshot(model)
    disturb(model.adapter, seed=2)
    model.load_state_dict(state, assign=assign)
    assert same_bits(snapshot(model), state) and torch.equal(model(**batch()).logits, expected)
    name = next(iter(model.adapter.sites()))
    with pytest.raises(RuntimeError, match=rf"{name}\.weight: the weight of a \w+ was changed"):
        model.load_state_dict(state | {f"{name}.weight": state[f"{name}.weight"] + 0.5})


def test_state_with_adapter_keys_renamed_by_transformers_is_refused():
    model = llama()
    model.adapter = attach(model)
    state = {name.replace("model.", "backbone."): tensor for name, tensor in snapshot(model).items()}  # as NemotronH's
    with pytest.raises(ValueError, match=r"has adapter\.backbone\.\S+ and no adapter\.model\.\S+ \(42 names of"):
        model.load_state_dict(state, strict=False)
    part = {name: tensor for name, tensor in snapshot(model).items() if not name.startswith("adapter.model.layers.0")}
    model.load_state_dict(part, strict=False)


def test_weights_of_another_base_are_refused_and_trained_ones_kept():
    model = llama()
    base = snapshot(model)
    adapter = attach(model)
    disturb(adapter)
    trained = snapshot(model)
    other = {name: tensor + 0.5 for name, tensor in base.items()}
    with pytest.raises(RuntimeError, match=r"q_proj\.weight: the weight of a Linear was changed while a delta"):
        model.load_state_dict(other)
    sites = [f"{name}.weight" for name in adapter.sites()]
    assert all(torch.equal(model.state_dict()[name], trained[name]) for name in sites)


@pytest.mark.parametrize("end", ["detach", "merge"])
def test_merged_or_detached_adapter_writes_nothing_when_the_model_loads(end):
    model = llama()
    model.adapter = attach(model)
    disturb(model.adapter)
    getattr(model.adapter, end)()
    state = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in snapshot(model).items()}
    model.load_state_dict(state)
    assert same_bits(snapshot(model), state)


def test_weight_of_another_shape_raises_torchs_own_error():
    model = llama()
    attach(model)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict(snapshot(model) | {name: torch.zeros(40, 4)})


def test_weights_loaded_after_a_stay_on_meta_regain_their_delta():
    model, base = llama(), snapshot(llama())
    disturb(attach(model))
    trained = snapshot(model)
    model.load_state_dict({name: tensor.to("meta") for name, tensor in base.items()}, assign=True)
    model.load_state_dict(base, assign=True)
    assert same_bits(snapshot(model), trained)


def test_in_place_weight_change_is_detected_by_forward_and_merge():
    model = llama()
    adapter = attach(model)
    disturb(adapter)
    weight = model.model.layers[1].mlp.up_proj.weight
    trained, site = weight.clone(), adapter.sites()["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        weight[:, site.cols] = site.base_columns
    model(**batch())
    assert torch.equal(weight, trained)
    with torch.no_grad():
        weight.mul_(2)
    site.A.data = site.A.data.clone()  # as a move does: the weight must be checked all the same
    for act in (lambda: model(**batch()), adapter.merge):
        with pytest.raises(RuntimeError, match="was changed while a delta is folded into it"):
            act()


def test_replaced_weight_is_detected_by_the_next_forward():
    model, base = llama(), llama()
    disturb(attach(model))
    layer, theirs = (m.model.layers[1].mlp.up_proj for m in (model, base))
    model(**batch())
    trained, version = layer.weight.clone(), layer.weight._version
    layer.weight = theirs.weight.requires_grad_(False)
    assert layer.weight._version == version  # so only the identity of the tensor shows the change
    model(**batch())
    assert torch.equal(layer.weight, trained)


def test_weight_parametrized_after_attaching_is_refused():
    model = llama()
    attach(model)
    model(**batch())
    parametrizations.orthogonal(model.model.layers[0].mlp.up_proj)
    with pytest.raises(RuntimeError, match="no longer a plain floating tensor"):
        model(**batch())


def test_forward_without_changes_compares_no_weights(monkeypatch):
    model = llama()
    adapter = attach(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(**batch()).loss.backward()
    compared = []
    monkeypatch.setattr(ColumnDelta, "fold_if_stale", lambda site: compared.append(site))
    model(**batch())
    optimizer.step()  # folds, and records what it wrote
    model(**batch())
    assert compared == []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    model(**batch())
    assert compared == [adapter.sites()["model.layers.1.mlp.up_proj"]]


def test_an_optimizer_may_hold_frozen_weights():
    model = llama()
    model.adapter = attach(model)
    other = llama()
    adapter = attach(other)
    held = torch.optim.AdamW(model.parameters(), lr=0.05)
    assert train(model, model.adapter, optimizer=held) == train(other, adapter)


def test_optimizer_may_hold_the_frozen_weight_of_an_idle_layer():
    model = nn.ModuleDict({"runs": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    model.adapter = attach(model, density=0.5)
    held = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="1 of 2 matrices got no gradient"):
        for _ in range(3):  # after the first step that weight gets gradients for a while, to see if it is used
            model["runs"](torch.ones(2, 8)).square().sum().backward()
            held.step()
            held.zero_grad()


def test_an_optimizer_that_trains_a_folded_weight_is_refused():
    model = llama()
    adapter = attach(model)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    optimizer = torch.optim.SGD([*adapter.parameters(), weight], lr=0.1)
    model(**batch()).loss.backward()
    with pytest.raises(RuntimeError, match=r"changed the weight of model\.layers\.0\.mlp\.up_proj, into which a delta"):
        optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("mode", ["fold", "side"])
def test_non_finite_delta_is_not_saved_exported_or_merged(mode, part, value, tmp_path):
    model = llama()
    original = snapshot(model)
    adapter = attach(model, mode=mode)
    name, site = list(adapter.sites().items())[3]
    with torch.no_grad():
        getattr(site, part)[0, 0] = value
    for act in (adapter.save_pretrained, adapter.export_lora, lambda _: adapter.merge()):
        with pytest.raises(ValueError, match=rf"{name}\.{part} holds NaN or infinity, so the training has diverged"):
            act(tmp_path)
    with pytest.raises(ValueError, match="holds NaN"):
        write_lora(tmp_path, adapter.config, adapter._deltas(), False)
    assert list(tmp_path.iterdir()) == []
    adapter.detach()
    assert same_bits(snapshot(model), original)
