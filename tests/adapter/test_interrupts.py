"""Ctrl-C, or running out of memory, while an adapter changes its model: the model stays usable or can be restored."""

from itertools import count

import pytest
import torch
from tiny_models import attach, batch, disturb, llama, same_bits, snapshot, train

from rbfast.adapter import sparse_adapter
from rbfast.adapter.column_delta import ColumnDelta, deltas_of, unhooked
from rbfast.adapter.sparse_adapter import SparseAdapter


def trained(mode="auto"):
    model = llama()
    adapter = attach(model, mode=mode)
    disturb(adapter)
    return model, adapter


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def interrupt(monkeypatch, owner, name, after=3):
    """Raises KeyboardInterrupt at the end of call number `after`."""
    original, calls = getattr(owner, name), count(1)

    def run(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(calls) == after:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, run)


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(ColumnDelta, "fold", 3), (ColumnDelta, "hook", 3), (sparse_adapter, "_reset_compiled_code", 1)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_interrupted_attaching_leaves_the_base(owner, name, after, tmp_path, monkeypatch):
    model, adapter = trained()
    adapter.save_pretrained(tmp_path)
    original, other = snapshot(llama()), llama()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, owner, name, after)
        SparseAdapter.from_pretrained(other, tmp_path)
    assert same_bits(snapshot(other), original) and not list(deltas_of(other))
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
    SparseAdapter.from_pretrained(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("name", ["restore", "fold_all"])
def test_interrupt_at_either_end_of_disabled_leaves_the_adapter_enabled(name, monkeypatch):
    model, adapter = trained()
    expected = logits(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if name == "restore":
            interrupt(patch, ColumnDelta, name)
        else:  # before any delta is folded
            patch.setattr(sparse_adapter, name, lambda sites: (_ for _ in ()).throw(KeyboardInterrupt))
        with adapter.disabled():
            pass
    assert torch.equal(logits(model), expected)
    train(model, adapter, steps=1)
    with adapter.disabled():
        assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("mode", ["auto", "side"])
@pytest.mark.parametrize("act", ["detach", "merge"])
def test_interrupted_detach_merge_or_unmerge_can_be_called_again(act, mode, monkeypatch):
    model, adapter = trained(mode)
    expected = snapshot(llama())
    if act == "merge":
        other, twin = trained(mode)
        twin.merge()
        expected = snapshot(other)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, ColumnDelta, "release")
        getattr(adapter, act)()
    getattr(adapter, act)()
    assert same_bits(snapshot(model), expected) and not list(deltas_of(model))
    if act == "merge":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, ColumnDelta, "restore")
            adapter.unmerge()
        adapter.unmerge()
        assert same_bits(snapshot(model), snapshot(llama()))


def test_adapter_can_be_detached_after_an_interrupted_merge(monkeypatch):
    model, adapter = trained("side")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, ColumnDelta, "release", after=1)
        adapter.merge()
    adapter.detach()
    assert same_bits(snapshot(model), snapshot(llama()))


def test_interrupted_unhooked_keeps_the_hooks_of_every_delta(monkeypatch):
    model, adapter = trained()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, ColumnDelta, "unhook")
        with unhooked(model):
            pass
    model(**batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_optimizer_steps_ignore_an_adapter_that_is_still_attaching(monkeypatch):
    stepped, (_, own) = [], trained()
    attach_delta, on_step = ColumnDelta.attach, SparseAdapter._on_optimizer_step

    def attach_while_another_trains(site):
        attach_delta(site)
        with monkeypatch.context() as patch:
            patch.setattr(SparseAdapter, "_on_optimizer_step", lambda adapter, _: stepped.append(adapter))
            torch.optim.SGD(own.parameters()).step()

    with monkeypatch.context() as patch:
        patch.setattr(ColumnDelta, "attach", attach_while_another_trains)
        adapter = attach(llama())
    assert own in stepped and adapter not in stepped and SparseAdapter._on_optimizer_step is on_step
