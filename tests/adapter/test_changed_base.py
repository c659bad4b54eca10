"""What happens to a base behind a delta's back, and to a delta that is not finite: right, or a clear error."""

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
def test_a_model_cast_after_attaching_merges_to_what_ran(make, dtype):
    model = make()
    adapter = attach(model)
    disturb(adapter)
    model.to(dtype)
    logits, ran = model(**batch()).logits, snapshot(model)
    adapter.merge()
    assert same_bits(snapshot(model), ran) and torch.equal(model(**batch()).logits, logits)
    adapter.unmerge()
    assert same_bits(snapshot(model), snapshot(make(dtype)))


def test_a_model_cast_and_cast_back_comes_apart_as_the_plain_one_would():
    model = llama()
    adapter = attach(model)
    disturb(adapter)
    model.bfloat16()(**batch())
    model.float()(**batch())
    adapter.detach()
    assert same_bits(snapshot(model), snapshot(llama().bfloat16().float()))


def test_a_model_cast_to_what_cannot_be_folded_says_so():
    model = llama()
    attach(model)
    model.double()
    with pytest.raises(RuntimeError, match="no longer a plain floating tensor"):
        model(**batch())


def test_a_weight_that_is_flattened_says_so():
    model = llama()
    adapter = attach(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.flatten()  # as FSDP1 does
    with pytest.raises(RuntimeError, match="no longer a plain floating tensor"):
        adapter.fold()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_base_weights_loaded_into_an_attached_model_keep_its_delta(make, assign):
    model, base = make(), snapshot(make())
    adapter = attach(model)
    disturb(adapter)
    trained = snapshot(model)
    for state in (base, trained):  # the base's own file, and one saved with the delta in it
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
def test_weights_assigned_in_bf16_are_a_cast_and_those_of_a_wider_type_are_refused(make, source):
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
def test_a_model_goes_back_to_a_state_that_holds_its_adapter_too(make, assign):
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


def test_a_state_whose_names_of_the_adapter_transformers_has_changed_is_refused():
    model = llama()
    model.adapter = attach(model)
    state = {name.replace("model.", "backbone."): tensor for name, tensor in snapshot(model).items()}  # as NemotronH's
    with pytest.raises(ValueError, match=r"has adapter\.backbone\.\S+ and no adapter\.model\.\S+ \(42 names of"):
        model.load_state_dict(state, strict=False)
    part = {name: tensor for name, tensor in snapshot(model).items() if not name.startswith("adapter.model.layers.0")}
    model.load_state_dict(part, strict=False)


def test_weights_of_another_base_are_refused_and_nothing_is_lost():
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
def test_an_adapter_that_is_off_its_model_writes_nothing_as_the_model_loads_it(end):
    model = llama()
    model.adapter = attach(model)
    disturb(model.adapter)
    getattr(model.adapter, end)()
    state = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in snapshot(model).items()}
    model.load_state_dict(state)
    assert same_bits(snapshot(model), state)


def test_weights_of_another_shape_are_named_by_torch():
    model = llama()
    attach(model)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict(snapshot(model) | {name: torch.zeros(40, 4)})


def test_weights_that_were_on_meta_for_a_while_get_their_delta_back():
    model, base = llama(), snapshot(llama())
    disturb(attach(model))
    trained = snapshot(model)
    model.load_state_dict({name: tensor.to("meta") for name, tensor in base.items()}, assign=True)
    model.load_state_dict(base, assign=True)
    assert same_bits(snapshot(model), trained)


def test_a_weight_written_by_hand_is_seen_by_the_next_forward_and_by_merge():
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
    site.A.data = site.A.data.clone()  # as a move does: no reason not to look at the weight
    for act in (lambda: model(**batch()), adapter.merge):
        with pytest.raises(RuntimeError, match="was changed while a delta is folded into it"):
            act()


def test_a_weight_that_another_takes_the_place_of_is_seen_by_the_next_forward():
    model, base = llama(), llama()
    disturb(attach(model))
    layer, theirs = (m.model.layers[1].mlp.up_proj for m in (model, base))
    model(**batch())
    trained, version = layer.weight.clone(), layer.weight._version
    layer.weight = theirs.weight.requires_grad_(False)
    assert layer.weight._version == version  # so only the tensor itself tells
    model(**batch())
    assert torch.equal(layer.weight, trained)


def test_a_weight_that_its_layer_computes_from_now_on_is_refused():
    model = llama()
    attach(model)
    model(**batch())
    parametrizations.orthogonal(model.model.layers[0].mlp.up_proj)
    with pytest.raises(RuntimeError, match="no longer a plain floating tensor"):
        model(**batch())


def test_a_forward_after_which_nothing_changed_compares_no_weights(monkeypatch):
    model = llama()
    adapter = attach(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(**batch()).loss.backward()
    looks = []
    monkeypatch.setattr(ColumnDelta, "fold_if_stale", lambda site: looks.append(site))
    model(**batch())
    optimizer.step()  # folds, and knows what it wrote
    model(**batch())
    assert looks == []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    model(**batch())
    assert looks == [adapter.sites()["model.layers.1.mlp.up_proj"]]


def test_an_optimizer_may_hold_frozen_weights():
    model = llama()
    model.adapter = attach(model)
    other = llama()
    adapter = attach(other)
    held = torch.optim.AdamW(model.parameters(), lr=0.05)
    assert train(model, model.adapter, optimizer=held) == train(other, adapter)


def test_an_optimizer_may_hold_the_frozen_weight_of_a_layer_that_does_not_run():
    model = nn.ModuleDict({"runs": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    model.adapter = attach(model, density=0.5)
    held = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="1 of 2 matrices got no gradient"):
        for _ in range(3):  # after the first step that weight has a gradient for a while, to see if it is used
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
def test_a_delta_that_is_not_finite_is_neither_saved_nor_exported_nor_merged(mode, part, value, tmp_path):
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
