"""A base sharded in a group of one process: bitwise as the whole one, saved whole, and refused if unshardable."""

import pytest
import torch
import torch.distributed as dist
from tiny_models import attach, batch, disturb, family, gpt2, llama, train
from tiny_tokenizers import byte_level
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.cli.main import main
from rbfast.data.readers import write_traces
from rbfast.data.trace import Trace
from rbfast.models.linears import is_sharded, unsharded
from rbfast.models.student import final_hidden, head_of, load_student, packs
from rbfast.training import sharding
from rbfast.training.sharding import shard


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def packed_row():
    ids, positions = torch.arange(1, 18)[None], torch.cat([torch.arange(8), torch.arange(9)])[None]
    return ids, positions


def gradients(model):
    """Hidden states, the head, and the gradients of an adapter that runs beside the weights."""
    adapter = attach(model, mode="side")
    disturb(adapter)
    hidden = final_hidden(model, *packed_row())
    hidden.square().sum().backward()
    return [hidden, head_of(model).weight, *(parameter.grad for parameter in adapter.parameters())]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2", "mixtral", "falcon-h1"])
def test_sharded_model_matches_the_whole_one_bitwise(group, name):
    expected = gradients(family(name))
    model = family(name)
    shard(model)
    assert is_sharded(model) and packs(model) == packs(family(name))
    assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())  # every parameter is sharded
    sharded = gradients(model)
    assert all(torch.equal(one, other) for one, other in zip(sharded, expected, strict=True))


def test_model_that_is_already_sharded_keeps_its_shards(group):
    expected = gradients(family("llama"))
    model = family("llama")
    for module in (*model.model.layers, model):  # much as transformers does
        fully_shard(module)
    shards = list(model.parameters())
    shard(model)
    assert all(one is other for one, other in zip(model.parameters(), shards, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), expected, strict=True))


def test_gradient_checkpointing_works_on_a_sharded_model(group):
    expected = gradients(llama())
    model = llama()
    shard(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), expected, strict=True))


def test_adapter_of_a_sharded_model_is_saved_as_of_the_whole_one(group, tmp_path):
    whole_one, model = attach(llama(), mode="side"), llama()
    shard(model)
    adapter = attach(model)
    whole_one.save_pretrained(tmp_path / "whole")
    adapter.save_pretrained(tmp_path / "sharded")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(RuntimeError, match="quantised, sharded or offloaded"):
        adapter.merge()
    adapter.detach()
    other = llama(initializer_range=0.3)
    shard(other)
    with pytest.raises(ValueError, match="differ from its own"):
        SparseAdapter.from_pretrained(other, tmp_path / "sharded")


def test_adapter_sharded_with_its_model_trains_and_is_saved_whole(group, tmp_path):
    saved = []
    for is_sharded_too in (False, True):
        model = llama()
        model.adapter = attach(model, mode="side")
        if is_sharded_too:
            fully_shard(model)
        train(model, model.adapter)
        model.adapter.export_lora(tmp_path / f"lora-{is_sharded_too}")
        model.adapter.save_pretrained(tmp_path / f"{is_sharded_too}")
        saved.append((tmp_path / f"{is_sharded_too}" / "adapter_model.safetensors").read_bytes())
    assert saved[0] == saved[1]


def test_adapter_sharded_in_mixed_precision_computes_in_bf16_and_is_kept_in_fp32(group):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    gradients = []
    for is_sharded_too in (False, True):
        model = llama()
        model.adapter = attach(model, mode="side")
        disturb(model.adapter)
        if is_sharded_too:
            fully_shard(model, mp_policy=policy)
        model(**batch()).loss.backward()
        gradients.append([unsharded(parameter.grad) for parameter in model.adapter.parameters()])
    for whole, sharded in zip(*gradients, strict=True):
        assert sharded.dtype == torch.float32
        torch.testing.assert_close(sharded, whole, rtol=0, atol=0.03 * float(whole.abs().amax()))


def test_sharding_under_a_folded_adapter_is_refused_with_a_hint(group):
    model = llama()
    model.adapter = attach(model)
    fully_shard(model)
    with pytest.raises(RuntimeError, match='before you change or shard it, or attach with mode="side"'):
        train(model, model.adapter)


def test_command_line_shards_student_and_teacher(group, tmp_path, monkeypatch):
    traces = [Trace(f"What is {n} + 1?", f"{n} + 1 = {n + 1}", str(n + 1)) for n in range(8)]
    tokenizer = byte_level(*(trace.completion() for trace in traces))
    llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_traces(tmp_path / "traces.jsonl", traces)
    calls = []
    monkeypatch.setattr(sharding, "shard", lambda *args: (calls.append(args[1:]), shard(*args)))
    paths = [str(tmp_path / name) for name in ("base", "traces.jsonl", "run")]
    options = ["--shard", "1", "--density", "0.05", "--device", "cpu", "--dtype", "float32", "--json"]
    assert main(["distill", *paths[:2], "-o", paths[2], "--teacher", paths[0], *options]) == 0
    assert calls == [(1, "cpu")] * 2
    model, _ = load_student(paths[0], torch.float32)
    assert SparseAdapter.from_pretrained(model, paths[2]).surviving_share() > 0.9


def test_unshardable_models_are_refused(group):
    model = gpt2()
    for over in (3, 0, -1):
        with pytest.raises(ValueError, match=rf"over \(--shard\) must divide the number of processes, 1, got {over}"):
            shard(model, over=over)
    adapter = attach(model)
    with pytest.raises(ValueError, match="has a SparseAdapter attached"):
        shard(model)
    adapter.detach()
    model._no_split_modules = None
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be sharded: it names no class of layers"):
        shard(model)


def test_single_process_is_refused():
    with pytest.raises(ValueError, match="this is the only one: start several with torchrun"):
        shard(gpt2())


def test_unsharded_returns_an_unsharded_tensor_itself():
    tensor = torch.ones(3)
    assert unsharded(tensor) is tensor and not is_sharded(llama())
