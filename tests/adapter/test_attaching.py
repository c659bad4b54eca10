"""Attaching an adapter and its options; saving, loading, moving and detaching it; its garbage collection."""

import copy
import gc
import re
import warnings
import weakref
from pathlib import Path
from types import MethodType

import accelerate
import pytest
import torch
from tiny_models import attach, batch, disturb, gpt2, llama, same_bits, snapshot, train
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing._internal.distributed.fake_pg import FakeStore

from rbfast.adapter import adapter_files, sparse_adapter
from rbfast.adapter.adapter_files import read_adapter
from rbfast.adapter.column_delta import ColumnDelta
from rbfast.adapter.column_scores import score_columns
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.models.linears import fingerprint


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


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_parts(model):
    model.model.layers[1] = compiled(model.model.layers[1])
    model.model.layers[0].mlp.up_proj = compiled(model.model.layers[0].mlp.up_proj)
    return model


@pytest.mark.parametrize(
    "wrap", [compiled, nn.DataParallel, lambda model: nn.DataParallel(compiled(model)), compiled_in_parts]
)
def test_module_names_ignore_wrappers_around_the_model(tmp_path, wrap):
    wrapped = wrap(llama())
    scores = score_columns(wrapped, [batch()], lambda model, batch: model(**batch).loss, method="activation")
    adapter = attach(wrapped, placement=scores)
    losses = train(wrapped, adapter, steps=5)
    assert losses[-1] < losses[0]  # the same batch
    logits = wrapped(**batch()).logits
    adapter.save_pretrained(tmp_path)
    plain = attach(llama(), placement=scores)
    assert adapter.config.modules == plain.config.modules and adapter.left_out == plain.left_out
    for other in (llama(), wrap(llama())):
        SparseAdapter.from_pretrained(other, tmp_path)
        assert torch.allclose(other(**batch()).logits, logits, atol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_ddp_over_several_processes_warns(processes, tmp_path):
    attach(llama()).save_pretrained(tmp_path)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attach(nn.parallel.DistributedDataParallel(llama()))
            SparseAdapter.from_pretrained(nn.parallel.DistributedDataParallel(llama()), tmp_path)
    finally:
        torch.distributed.destroy_process_group()
    assert [str(w.message)[:39] for w in caught] == ["DistributedDataParallel does not reduce"] * 2 * (processes - 1)


def test_a_compiled_head_gets_no_delta():
    model = llama(tie_word_embeddings=False)
    model.lm_head = compiled(model.lm_head)
    assert attach(model).config.modules == attach(llama(tie_word_embeddings=False)).config.modules


def test_file_for_another_model_is_refused_and_changes_nothing(tmp_path):
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
    with pytest.raises(ValueError, match=r"linear layer model\.layers\.0\.self_attn\.q_proj is not in this model"):
        SparseAdapter.from_pretrained(gpt2(), tmp_path)
    assert same_bits(snapshot(other), original) and all(p.requires_grad for p in other.parameters())


def test_layer_that_is_no_longer_linear_is_refused_by_name(tmp_path):
    attach(llama()).save_pretrained(tmp_path)
    changed = llama()
    changed.model.layers[1].mlp.up_proj = nn.Identity()  # as Jamba's router, a Linear until transformers 5.21
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj is of type Identity here; .* version of"):
        SparseAdapter.from_pretrained(changed, tmp_path)


def test_adapter_of_an_fp32_base_loads_onto_bf16_and_fp16_bases(tmp_path):
    attach(llama()).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        SparseAdapter.from_pretrained(llama(dtype), tmp_path)


def test_saving_records_the_dtype_of_the_current_base(tmp_path):
    attach(llama(torch.float16)).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        SparseAdapter.from_pretrained(llama(dtype), tmp_path).save_pretrained(tmp_path)
        assert read_adapter(tmp_path)[0].base_dtype == str(dtype).removeprefix("torch.")
    assert SparseAdapter.from_pretrained(llama(), tmp_path).config == attach(llama()).config


def test_each_matrix_is_fingerprinted_once_on_load(tmp_path, monkeypatch):
    attach(llama()).save_pretrained(tmp_path)
    compared = []
    monkeypatch.setattr(adapter_files, "fingerprint", lambda matrix: compared.append(matrix) or fingerprint(matrix))
    adapter = SparseAdapter.from_pretrained(llama(torch.bfloat16), tmp_path)
    assert len(compared) == len(adapter.sites())


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_adapter_attached_in_inference_mode_trains_outside_it(mode):
    model, other = llama(), llama()
    with torch.inference_mode():
        adapter = attach(model, mode=mode)
    assert train(model, adapter) == train(other, attach(other, mode=mode))


def test_default_device_and_dtype_change_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    scores = score_columns(model, [torch.ones(2, 64)], lambda model, x: model(x).square().sum())
    for placement in ("random", scores):
        plain = attach(model, placement=placement)
        plain.detach()
        with torch.device("meta"):  # stands for a GPU: its tensors do not mix with those on the CPU
            torch.set_default_dtype(torch.float16)
            try:
                adapter = attach(model, placement=placement)
            finally:
                torch.set_default_dtype(torch.float32)
            adapter.export_lora(tmp_path / "lora")
            adapter.save_pretrained(tmp_path)
            adapter.detach()
        assert same_bits(adapter.state_dict(), plain.state_dict())


def test_second_adapter_is_refused_until_the_first_is_gone(tmp_path):
    model = llama()
    original, first = snapshot(model), attach(model)
    first.save_pretrained(tmp_path)
    disturb(first)
    for again in (attach, lambda model: SparseAdapter.from_pretrained(model, tmp_path)):
        with pytest.raises(ValueError, match=r"takes one at a time: call its detach\(\) or merge\(\)"):
            again(model)
    first.merge()
    for size in (0.0, 0.1):  # a second adapter on the same columns, without and with a change
        second = attach(model)
        disturb(second, size)
        with pytest.raises(RuntimeError, match=r"another adapter is attached at model\.layers\.0\.self_attn\.q_proj"):
            first.unmerge()
        second.detach()
    first.unmerge()
    assert same_bits(snapshot(model), original)


@pytest.mark.parametrize("mode", ["fold", "side"])
@pytest.mark.parametrize("options", [{"seed": 1}, {"support": 8, "rank": 1}])
def test_state_with_other_columns_is_refused_before_any_write(mode, options):
    other = attach(llama(), **options)
    disturb(other)
    model = llama()
    original = snapshot(model)
    adapter = attach(model, mode=mode)
    before, logits = snapshot(adapter), model(**batch()).logits
    for whole, prefix in ((adapter, ""), (nn.ModuleDict({"adapter": adapter}), "adapter.")):
        state = {f"{prefix}{name}": value for name, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=r"with other columns \(first at model\.layers\.0\.self_attn\.q_proj"):
            whole.load_state_dict(state)
    assert same_bits(snapshot(adapter), before) and torch.equal(model(**batch()).logits, logits)
    adapter.detach()
    assert same_bits(snapshot(model), original)


def test_unmerge_before_merge_and_calls_after_detach_are_refused():
    adapter = attach(llama())
    with pytest.raises(RuntimeError, match="cannot unmerge this adapter: it must be merged, and it is attached"):
        adapter.unmerge()
    adapter.detach()
    for action in (adapter.merge, adapter.detach, adapter.surviving_share, adapter.disabled().__enter__):
        with pytest.raises(RuntimeError, match="it must be attached, and it is detached"):
            action()


def test_deepcopy_is_refused_until_merged():
    model = llama()
    adapter = attach(model)
    for refused in (model, adapter):
        with pytest.raises(TypeError, match=r"adapter\.merge\(\).* average clones of adapter\.parameters\(\)"):
            copy.deepcopy(refused)
    adapter.merge()
    copy.deepcopy(model)


def test_model_given_by_name_is_refused():
    for call in (SparseAdapter.attach, lambda model: SparseAdapter.from_pretrained(model, "adapter/")):
        with pytest.raises(TypeError, match="expected a model, such as load_student returns, got str"):
            call("smollm2-135m")


@pytest.mark.parametrize("end", ["merge", "detach"])
def test_training_a_merged_or_detached_adapter_warns(end):
    model = llama()
    adapter = attach(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    model(**batch()).loss.backward()
    getattr(adapter, end)()
    with pytest.warns(UserWarning, match=f"trains an adapter that is {end.removesuffix('e')}ed, which") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error:an optimizer trains an adapter")
def test_optimizer_may_hold_a_detached_adapter_among_others():
    model, other = llama(), llama()
    old, side = attach(model), attach(other)
    optimizer = torch.optim.AdamW([*old.parameters(), *side.parameters()], lr=0.05)
    train(model, old, optimizer=optimizer)
    old.detach()
    new = attach(model)
    optimizer.add_param_group({"params": new.parameters()})
    train(model, new, optimizer=optimizer)
    train(other, side, optimizer=optimizer)
    model(**batch()).loss.backward()
    new.detach()  # with gradients that no optimizer steps
    train(other, side)


def test_unreferenced_adapter_and_model_are_garbage_collected():
    gc.collect()
    others = len(sparse_adapter._ADAPTERS)
    model = llama()
    adapter = attach(model)
    assert len(sparse_adapter._ADAPTERS) == others + 1
    alive = weakref.ref(adapter), weakref.ref(model)
    del model, adapter
    gc.collect()
    assert alive[0]() is None and alive[1]() is None
    assert len(sparse_adapter._ADAPTERS) == others


def test_layer_with_a_replaced_forward_is_garbage_collected():
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = MethodType(nn.Linear.forward, layer)
    attach(model).detach()
    alive = weakref.ref(layer)
    del model, layer
    gc.collect()
    assert alive() is None


def test_adapter_may_be_garbage_collected_during_a_step():
    def collect(*step) -> None:
        forgotten.clear()
        gc.collect()

    hook = register_optimizer_step_post_hook(collect)
    forgotten, model = [attach(llama())], llama()
    adapter, original = attach(model), snapshot(model)
    train(model, adapter, steps=2)
    hook.remove()
    assert not same_bits(snapshot(model), original)


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


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_the_delta_follows_the_base_to_its_device(monkeypatch, mode):
    """Needs no second device: the fake weight claims to be on a GPU, and moves are recorded, not made."""
    model = llama()
    adapter = attach(model, mode=mode)
    moves = []
    monkeypatch.setattr(ColumnDelta, "to", lambda site, device: moves.append(device))
    site = next(iter(adapter.sites().values()))
    model(**batch())
    site.linear.weight = nn.Parameter(torch.empty(site.linear.weight.shape, device="meta"), requires_grad=False)
    site._pre_forward(site.linear, ())
    assert moves == []  # a weight that is offloaded for a while moves nothing
    with FakeTensorMode():
        site.linear.weight = nn.Parameter(torch.empty(site.linear.weight.shape, device="cuda:1"), requires_grad=False)
    site._pre_forward(site.linear, ())
    assert moves == [torch.device("cuda:1")]
    with pytest.raises(RuntimeError, match="no longer a plain floating tensor"):  # which the fake one is not
        _ = site.weight  # as merge() reads it if no forward has run since
    assert moves == [torch.device("cuda:1")] * 2


@pytest.mark.parametrize("is_attached_before", [False, True])
def test_an_offloaded_base_runs_and_trains_its_delta(is_attached_before, tmp_path):
    plain, model = llama(), llama()
    adapters = [attach(plain, mode="side")]
    if is_attached_before:
        adapters.append(attach(model, mode="side"))
    accelerate.disk_offload(model.model.layers[0], tmp_path / "weights", torch.device("cpu"))
    accelerate.cpu_offload(model.model.layers[1], torch.device("cpu"))
    up_proj = model.model.layers[1].mlp.up_proj
    accelerate.hooks.add_hook_to_module(up_proj, accelerate.hooks.ModelHook(), append=True)  # a second hook
    if not is_attached_before:
        adapters.append(attach(model))
    assert all(site.linear.weight.is_meta for site in adapters[1].sites().values())
    losses = [train(*pair, steps=3) for pair in zip((plain, model), adapters, strict=True)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    adapters[1].save_pretrained(tmp_path)
    assert torch.equal(plain(**batch()).logits, model(**batch()).logits)
    assert same_bits(adapters[0].state_dict(), SparseAdapter.from_pretrained(llama(), tmp_path).state_dict())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_delta_moved_to_another_device_returns_to_its_base(monkeypatch):
    model = llama()
    site = next(iter(attach(model, mode="side").sites().values()))
    moves = []
    monkeypatch.setattr(ColumnDelta, "to", lambda site, device: moves.append(device))
    model(**batch())
    assert moves == []
    with FakeTensorMode():
        site.A = nn.Parameter(torch.empty(site.A.shape, device="cuda:1"))
    site._pre_forward(site.linear, ())
    assert moves == [torch.device("cpu")]


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
        ({"targets": ["proj"]}, "'proj' names no linear layer"),
        ({"targets": "layers.*"}, "the regex 'layers.*' matches no linear layer"),
        ({"targets": "(("}, r"targets: '\(\(' is not a regex: missing \)"),
        ({"targets": []}, "expected at least one name"),
        ({"targets": None}, 'expected names, a regex or "all-linear", got None'),
        ({"targets": 5}, 'expected names, a regex or "all-linear", got 5'),
        ({"targets": ["lm_head"]}, "the weight of lm_head is tied"),
    ],
)
def test_bad_options_are_refused_and_leave_the_model_alone(options, message):
    model = llama()
    original = snapshot(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **options)
    assert same_bits(snapshot(model), original) and all(parameter.requires_grad for parameter in model.parameters())


def test_failed_attach_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.randn(1, 8).expand(8, 8))  # cannot be written to
    original = snapshot(model)
    with pytest.raises(RuntimeError, match="weight is an expanded view"):
        attach(model, density=0.9)
    assert same_bits(snapshot(model), original) and all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    attach(model, density=0.9, mode="side")


def test_submodules_may_share_names_with_adapter_attributes(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.merge, self.config = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 8))

        def forward(self, x):
            return self.config(self.merge(x))

    model = Named()
    original, adapter = snapshot(model), attach(model, density=0.5)
    assert {name for name, _ in adapter.named_parameters()} == {"merge.A", "merge.B", "config.0.A", "config.0.B"}
    disturb(adapter)
    adapter.save_pretrained(tmp_path)
    state, logits = adapter.state_dict(), model(torch.ones(1, 16))
    adapter.detach()
    again = SparseAdapter.from_pretrained(model, tmp_path)
    again.load_state_dict(state)
    assert torch.equal(model(torch.ones(1, 16)), logits)
    again.merge()
    again.unmerge()
    assert same_bits(snapshot(model), original)


@pytest.mark.parametrize("place", [str, Path])
def test_unknown_placement_is_refused_with_the_valid_values(tmp_path, place):
    for name in ("foo", tmp_path):
        message = re.escape(f'unknown placement {str(name)!r}: use "random", ColumnScores (from ')
        with pytest.raises(FileNotFoundError, match=message + ".* or the path of a score file"):
            attach(llama(), placement=place(name))


def test_a_model_without_linears_is_refused():
    with pytest.raises(ValueError, match=r"expected a model with linear layers .* found none in Embedding"):
        attach(nn.Embedding(3, 3))


def test_a_model_in_fp64_is_refused():
    with pytest.raises(ValueError, match=r"q_proj has a weight in float64.*cast the model to float32"):
        attach(llama(torch.float64))


def test_default_placement_is_random():
    adapter, same = SparseAdapter.attach(llama(), density=0.05), attach(llama(), density=0.05, placement="random")
    assert adapter.config.placement == "random"
    assert all(torch.equal(site.cols, same.sites()[name].cols) for name, site in adapter.sites().items())


def test_density_one_trains_at_most_as_many_values_as_the_base_has():
    model = llama()
    adapter = attach(model, density=1.0)
    assert 50 < adapter.trainable_percent <= 100
    losses = train(model, adapter, steps=5, optimizer=torch.optim.AdamW(adapter.parameters(), lr=0.01))
    assert losses[4] < losses[0]  # the same batch


def test_tensor_parallel_model_is_refused():
    model = llama()
    model._tp_size = 2  # as transformers sets it for tp_plan="auto"
    with pytest.raises(ValueError, match=r"split over 2 processes by tensor parallelism, .* without tp_plan"):
        attach(model)
    model._tp_size = 1
    attach(model)


def test_a_scripted_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got one made by torch\.jit: attach before scripting it"):
        SparseAdapter.attach(torch.jit.script(nn.Sequential(nn.Linear(16, 16))))
