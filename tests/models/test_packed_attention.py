"""Attention of a packed row in one call: the same hidden states and gradients as with one call per example."""

from itertools import pairwise

import pytest
import torch
from every_causal_lm import tiny, tiny_config
from host_waits import host_waits
from tiny_models import llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, PreTrainedConfig

from rbfast.models import packed_attention, student
from rbfast.models.packed_attention import Packing, describe_attention, lengths_of, packing
from rbfast.models.student import final_hidden, packs

LENGTHS = [7, 1, 12, 5]
SCALE = 8**-0.5  # of heads of 8 values


def scores_of(q, k):
    """The attention weights [heads, T, T] of one example, q [T, heads, d]; and k repeated to the heads of q."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = SCALE * torch.einsum("ihd,jhd->hij", q, k)
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1), k


def attend(query, key, value, cuts):
    """The attention output [T, heads, d], each example by itself."""
    parts = []
    for a, b in pairwise(cuts.tolist()):
        q, k, v = (x[a:b].float() for x in (query, key, value))
        weights, _ = scores_of(q, k)
        parts.append(torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(q.shape[1] // v.shape[1], 1)))
    return torch.cat(parts).to(query.dtype)


def attend_back(dy, query, key, value, cuts):
    """The gradients of `attend`, derived by hand, as autograd does not see into a kernel."""
    gradients = []
    for a, b in pairwise(cuts.tolist()):
        d, q, k, v = (x[a:b].float() for x in (dy, query, key, value))
        group = (k.shape[1], q.shape[1] // k.shape[1])
        weights, each_k = scores_of(q, k)
        dv = torch.einsum("hij,ihd->jhd", weights, d)
        dw = torch.einsum("ihd,jhd->hij", d, v.repeat_interleave(group[1], 1))
        ds = SCALE * weights * (dw - (dw * weights).sum(-1, keepdim=True))
        dq, dk = torch.einsum("hij,jhd->ihd", ds, each_k), torch.einsum("hij,ihd->jhd", ds, q)
        gradients.append((dq, *(x.unflatten(1, group).sum(2) for x in (dk, dv))))
    return tuple(torch.cat(parts).to(query.dtype) for parts in zip(*gradients, strict=True))


@pytest.fixture
def flash_calls():
    """Registers CPU kernels for PyTorch's flash op, which keeps PyTorch's own derivative. Yields the calls."""
    calls = []

    def check(q, cuts, sizes, options):
        assert cuts[0] is not None and cuts[0].dtype == torch.int32 and torch.equal(*cuts)
        assert sizes == (max(LENGTHS), max(LENGTHS)) and options["scale"] == pytest.approx(SCALE)
        assert (options["window_size_left"], options["window_size_right"]) == (-1, 0)  # any earlier token, none later

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, debug, **options):
        check(q, (cu_q, cu_k), (max_q, max_k), options)
        assert is_causal and dropout == 0 and v.shape == k.shape
        calls.append("forward")
        empty = torch.empty(0, dtype=torch.uint64)
        return attend(q, k, v, cu_q), q.new_empty(q.shape[1], q.shape[0]).float(), empty, empty, q.new_empty(0)

    def backward(dy, q, k, v, y, logsumexp, cu_q, cu_k, max_q, max_k, dropout, is_causal, state, unused, **options):
        check(q, (cu_q, cu_k), (max_q, max_k), options)
        assert is_causal and dropout == 0
        calls.append("backward")
        return attend_back(dy, q, k, v, cu_q)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield calls
    library._destroy()


def packed_row():
    ids = torch.arange(sum(LENGTHS))[None] % 50
    return ids, torch.cat([torch.arange(n) for n in LENGTHS])[None]


def hidden_and_gradient(model):
    hidden = final_hidden(model, *packed_row(), LENGTHS)
    (hidden * torch.arange(hidden.shape[-1])).sum().backward()
    gradient = model.model.layers[0].self_attn.v_proj.weight.grad.clone()
    model.zero_grad()
    return hidden.detach(), gradient


def test_one_call_for_all_examples_matches_one_call_each(monkeypatch, flash_calls):
    model = llama(torch.bfloat16, hidden_size=32).eval()
    assert packs(model)
    expected = hidden_and_gradient(model)
    assert not flash_calls
    monkeypatch.setattr(packed_attention, "has_varlen_kernel", lambda device: True)
    actual = hidden_and_gradient(model)
    layers = len(model.model.layers)
    assert flash_calls == ["forward"] * layers + ["backward"] * layers
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= torch.finfo(torch.bfloat16).eps * theirs.norm()


class RowsOfProducts(TorchDispatchMode):
    """Records the number of rows of every matrix product and every attention."""

    def __init__(self):
        super().__init__()
        self.rows = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default):
            self.rows.add(args[0].shape[-2])
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_16_bit_rows_are_padded_to_few_sizes_on_a_cpu(dtype):
    torch.manual_seed(0)
    model = llama(dtype).eval()
    assert packs(model)
    with torch.no_grad():
        with RowsOfProducts() as products:
            together = final_hidden(model, *packed_row(), LENGTHS)
        assert products.rows == ({32} if dtype == torch.bfloat16 else {sum(LENGTHS), *LENGTHS})
        examples = packed_row()[0].split(LENGTHS, dim=1)
        alone = torch.cat([model.float().model(ids).last_hidden_state[0] for ids in examples])
    assert together.shape == alone.shape
    assert (together - alone).norm() <= 4 * torch.finfo(dtype).eps * alone.norm()


def assert_same_together_and_alone(heads, device):
    """Compares outputs and gradients of one call for all examples with those of one call each."""
    torch.manual_seed(0)
    query, key, value, dy = (
        torch.randn(1, n, 25, 8, dtype=torch.bfloat16, device=device) for n in (4, heads, heads, 4)
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    cuts = packing(LENGTHS, torch.device("cpu")).cuts
    results = []
    for packed in (Packing(cuts, torch.tensor(cuts, dtype=torch.int32, device=device)), Packing(cuts)):
        attended, _ = packed_attention._attend(nn.Module(), *leaves, None, packing=packed, scaling=SCALE)
        results.append([attended, *torch.autograd.grad(attended, leaves, dy.transpose(1, 2))])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= torch.finfo(torch.bfloat16).eps * theirs.norm()


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_gradients_of_one_call_match_one_call_each(flash_calls, heads):
    assert_same_together_and_alone(heads, "cpu")
    assert flash_calls == ["forward", "backward"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_gradients_of_one_call_match_one_call_each_on_a_gpu(heads):
    assert packed_attention.has_varlen_kernel(torch.device("cuda"))
    assert_same_together_and_alone(heads, "cuda")


def test_fp32_attends_one_example_at_a_time(monkeypatch, flash_calls):
    """Flash kernels take half precision only."""
    model = llama().eval()
    expected = hidden_and_gradient(model)
    monkeypatch.setattr(packed_attention, "has_varlen_kernel", lambda device: True)
    for ours, theirs in zip(hidden_and_gradient(model), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not flash_calls


def test_dropout_uses_the_attention_that_supports_it(flash_calls):
    query, cuts = torch.randn(1, 4, 25, 8, dtype=torch.bfloat16), packing(LENGTHS, torch.device("cpu")).cuts
    packed = Packing(cuts, torch.tensor(cuts, dtype=torch.int32))
    given, options = (nn.Module(), query, query, query, None), {"packing": packed, "scaling": SCALE}
    whole, dropped = (packed_attention._attend(*given, **options, dropout=share)[0] for share in (0.0, 0.5))
    assert flash_calls == ["forward"] and (dropped - whole).norm() > 0.1 * whole.norm()


def test_flash_takes_heads_of_suitable_sizes_only():
    heads = {size: torch.empty(1, 1, 1, size, dtype=torch.bfloat16) for size in (8, 12, 256, 264)}
    assert [size for size, query in heads.items() if packed_attention._suits_flash(query, query)] == [8, 256]


def test_model_whose_values_have_another_size_attends_one_example_at_a_time(monkeypatch, flash_calls):
    model = tiny("deepseek_v3").to(torch.bfloat16)
    assert model.config.v_head_dim < model.config.qk_nope_head_dim + model.config.qk_rope_head_dim
    monkeypatch.setattr(packed_attention, "has_varlen_kernel", lambda device: True)
    assert packs(model) and not flash_calls


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_flash_op_of_torch_accepts_packed_rows(heads):
    """Shapes and the derivative, on the meta device. Values need a GPU."""
    query, cuts = torch.empty(1, 4, 25, 8, dtype=torch.bfloat16, device="meta", requires_grad=True), [0, 7, 8, 20, 25]
    key = torch.empty(1, heads, 25, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    packed = Packing(cuts, torch.empty(5, dtype=torch.int32, device="meta"))
    attended = packed_attention._attend_varlen(query, key, key, packed, SCALE)
    attended.sum().backward()
    assert attended.shape == (1, 25, 4, 8) and key.grad.shape == key.shape and query.grad.shape == query.shape


def test_examples_are_cut_on_the_device_of_the_layer(monkeypatch):
    """A model that is spread over several GPUs has layers on other devices than its input."""
    devices = []

    def flash(*given, **_):
        devices.extend(x.device.type for x in given[:5])
        return given

    monkeypatch.setattr(packed_attention, "_flash_op", lambda: flash)
    query, cuts = torch.empty(1, 4, 25, 8, device="meta"), [0, 7, 8, 20, 25]
    packed_attention._attend_varlen(query, query, query, Packing(cuts, torch.tensor(cuts)), SCALE)
    assert devices == ["meta"] * 5


def test_flash_op_with_another_signature_is_not_called(monkeypatch):
    monkeypatch.setattr(packed_attention, "_FLASH_TAKES", "query key value")
    packed_attention._flash_op.cache_clear()
    assert packed_attention._flash_op() is None
    packed_attention._flash_op.cache_clear()


def test_forward_with_given_lengths_never_waits_for_the_device(monkeypatch):
    model, inputs = llama().eval(), packed_row()
    packs(model)
    with host_waits(monkeypatch) as waits:
        final_hidden(model, *inputs, LENGTHS)
    assert waits.found == []
    with host_waits(monkeypatch) as waits:
        final_hidden(model, *inputs)
    assert waits.found


def test_lengths_are_read_from_positions():
    assert lengths_of(packed_row()[1]) == LENGTHS
    assert packing(LENGTHS, torch.device("cpu")).cuts == [0, 7, 8, 20, 25]


def test_description_names_the_attention_in_use():
    model = llama().eval()
    assert describe_attention(model, torch.device("cpu")) == "sdpa, the model's own"
    packs(model)
    shown = describe_attention(model, torch.device("cpu"))
    # The second wording is for a model whose examples cannot be packed.
    assert "one call per example" in shown and "one example at a time" not in shown


def test_attention_output_is_contiguous():
    """Some models (AFMoE, JetMoE) view it as a matrix."""
    query, key = torch.randn(1, 4, 25, 8), torch.randn(1, 2, 25, 8)
    attended, _ = packed_attention._attend(nn.Module(), query, key, key, None, packing=packing(LENGTHS, query.device))
    assert attended.shape == (1, 25, 4, 8) and attended.is_contiguous()


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"attention_mask": torch.zeros(1, 4, 25, 25)}, "builds its own attention mask"),
        ({"position_bias": torch.ones(1)}, "adds its own bias to the scores"),
    ],
)
def test_mask_or_bias_that_a_model_adds_is_not_packable(extra, problem):
    query = torch.randn(1, 4, 25, 8)
    options = {"attention_mask": None, "packing": packing(LENGTHS, query.device)} | extra
    with pytest.raises(packed_attention.NotPackable, match=problem):
        packed_attention._attend(nn.Module(), query, query, query, **options)


def test_window_missing_from_the_config_is_not_packable():
    query, no_mask = torch.randn(1, 4, 25, 8), torch.ones(packed_attention.NO_MASK, dtype=torch.bool)
    options = {"packing": packing(LENGTHS, query.device), "sliding_window": 6}  # shorter than the longest example
    with pytest.raises(packed_attention.NotPackable, match="has a window of 6 tokens that its config does not name"):
        packed_attention._attend(nn.Module(), query, query, query, no_mask, **options)


def test_model_with_its_own_mask_runs_one_example_at_a_time():
    model = llama().eval()

    def mask_itself(attention, args, kwargs):
        tokens = kwargs["hidden_states"].shape[1]
        return args, kwargs | {"attention_mask": torch.zeros(1, 1, tokens, tokens)}

    model.model.layers[0].self_attn.register_forward_pre_hook(mask_itself, with_kwargs=True)
    with pytest.warns(UserWarning, match="does not keep the examples of a packed row apart"):
        assert not packs(model)
    assert not packed_attention.has_packed_attention(model)


def change_by_packing(model, lengths):
    """The largest relative change of a hidden state from packing examples of these lengths into one row."""
    ids = torch.randint(3, 61, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = final_hidden(model, ids, positions)
        alone = torch.cat([final_hidden(model, one, torch.arange(one.shape[1])[None]) for one in ids.split(lengths, 1)])
    return float(((packed - alone).norm(dim=1) / alone.norm(dim=1)).max())


def afmoe() -> nn.Module:
    """Its masks ignore the positions. The two examples that `packs` runs are shorter than its window."""
    config: PreTrainedConfig = tiny_config("afmoe")
    config.update({"sliding_window": 12, "max_position_embeddings": 256})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def llama4(**options: int) -> nn.Module:
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=4)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, pad_token_id=0)
    torch.manual_seed(0)
    return Llama4ForCausalLM(Llama4TextConfig(initializer_range=0.15, **sizes | options)).eval()


@pytest.mark.parametrize("lengths", [[5, 12, 7], [20, 13, 9]])
def test_examples_longer_than_the_window_stay_apart(lengths):
    model = afmoe()
    assert packs(model)
    assert change_by_packing(model, lengths) <= 1e-5


@pytest.mark.parametrize("lengths", [[5, 7], [20, 20, 20], [9, 8, 7]])
@pytest.mark.parametrize("option", ["floor_scale", "attention_chunk_size"])
def test_position_in_a_long_row_changes_nothing(option, lengths):
    model = llama4(**{option: 24})
    assert packs(model)
    assert change_by_packing(model, lengths) <= 1e-5


@pytest.mark.parametrize("make", [afmoe, lambda: llama4(floor_scale=24)])
def test_sharded_model_runs_equally_often_for_any_row(make, monkeypatch):
    model, runs = make(), []
    assert packs(model)
    monkeypatch.setattr(student, "is_sharded", lambda model: True)
    model.model.register_forward_hook(lambda *_: runs.append(1))
    for lengths in ([5, 6], [5, 30]):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        final_hidden(model, positions, positions)
    assert len(runs) == 4


def test_packing_check_is_repeated_after_a_change_of_attention():
    model = tiny("opt")  # its masks ignore the positions
    assert packs(model) and change_by_packing(model, LENGTHS) <= 1e-5
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="does not keep the examples of a packed row apart"):
        assert change_by_packing(model, LENGTHS) <= 1e-5
    model.set_attn_implementation("sdpa")
    assert packs(model)
