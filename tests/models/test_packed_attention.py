"""A packed row attended to in one call: the same hidden states and gradients as one example at a time."""

import inspect
from itertools import pairwise

import pytest
import torch
from host_waits import host_waits
from tiny_models import llama
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rbfast.models import packed_attention
from rbfast.models.packed_attention import attention_of, lengths_of, packing
from rbfast.models.student import final_hidden, packs

LENGTHS = [7, 1, 12, 5]


def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn does, by its documentation: rows [T, heads, d]."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == torch.int32 and max_q == max_k == max(LENGTHS)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    cuts = cu_seq_q.tolist()
    assert cuts == cu_seq_k.tolist()
    parts = []
    for a, b in pairwise(cuts):
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in (query, key, value))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


def without_groups(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def row():
    ids = torch.arange(sum(LENGTHS))[None] % 50
    return ids, torch.cat([torch.arange(n) for n in LENGTHS])[None]


def hidden_and_gradient(model):
    hidden = final_hidden(model, *row(), LENGTHS)
    hidden.float().square().sum().backward()
    found = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    return hidden.detach(), found


@pytest.mark.parametrize("attend", [kernel, without_groups])
def test_one_call_for_all_examples_gives_what_one_at_a_time_does(monkeypatch, attend):
    model, calls = llama(torch.bfloat16, hidden_size=32).eval(), []
    assert packs(model)
    expected = hidden_and_gradient(model)

    def counting(*args, **options):
        calls.append(1)
        return attend(*args, **options)

    counting.__signature__ = inspect.signature(attend)
    monkeypatch.setattr(packed_attention, "takes_all_at_once", lambda device: True)
    monkeypatch.setattr(packed_attention, "_varlen_attn", lambda: counting)
    found = hidden_and_gradient(model)
    assert len(calls) == len(model.model.layers)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= torch.finfo(torch.bfloat16).eps * theirs.norm()


def test_fp32_is_attended_to_one_example_at_a_time(monkeypatch):
    """Flash kernels multiply half precision alone."""
    model = llama().eval()
    expected = hidden_and_gradient(model)
    monkeypatch.setattr(packed_attention, "takes_all_at_once", lambda device: True)
    monkeypatch.setattr(packed_attention, "_varlen_attn", lambda: pytest.fail("it was asked"))
    for ours, theirs in zip(hidden_and_gradient(model), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_forward_that_is_told_the_lengths_waits_for_nothing(monkeypatch):
    model, inputs = llama().eval(), row()
    packs(model)
    with host_waits(monkeypatch) as waits:
        final_hidden(model, *inputs, LENGTHS)
    assert waits.found == []
    with host_waits(monkeypatch) as waits:
        final_hidden(model, *inputs)
    assert waits.found


def test_lengths_are_read_from_positions():
    assert lengths_of(row()[1]) == LENGTHS
    assert packing(LENGTHS, torch.device("cpu")).cuts == [0, 7, 8, 20, 25]


def test_it_says_what_attends():
    model = llama().eval()
    assert attention_of(model, torch.device("cpu")) == "sdpa, the model's own"
    packs(model)
    said = attention_of(model, torch.device("cpu"))
    assert "a call for each example" in said and "one example at a time" not in said  # the words for a model that fails


def test_what_it_returns_is_contiguous():
    """Some models (AFMoE, JetMoE) look at it as a matrix."""
    query, key = torch.randn(1, 4, 25, 8), torch.randn(1, 2, 25, 8)
    attended, _ = packed_attention._attend(nn.Module(), query, key, key, None, packing=packing(LENGTHS, query.device))
    assert attended.shape == (1, 25, 4, 8) and attended.is_contiguous()


@pytest.mark.parametrize("extra", [{"attention_mask": torch.zeros(1, 4, 25, 25)}, {"position_bias": torch.ones(1)}])
def test_what_a_model_adds_to_the_scores_is_not_dropped(extra):
    query = torch.randn(1, 4, 25, 8)
    options = {"attention_mask": None, "packing": packing(LENGTHS, query.device)} | extra
    with pytest.raises(packed_attention.NotPackable, match="of its own"):
        packed_attention._attend(nn.Module(), query, query, query, **options)


def test_a_model_with_a_mask_of_its_own_runs_one_example_at_a_time():
    model = llama().eval()

    def mask_itself(attention, args, kwargs):
        tokens = kwargs["hidden_states"].shape[1]
        return args, kwargs | {"attention_mask": torch.zeros(1, 1, tokens, tokens)}

    model.model.layers[0].self_attn.register_forward_pre_hook(mask_itself, with_kwargs=True)
    with pytest.warns(UserWarning, match="does not keep the examples of a packed row apart"):
        assert not packs(model)
    assert not packed_attention.has_packed_attention(model)
