"""The number of rows in a chunk of the loss, and the gradients computed on a CPU by the plan for a GPU."""

import pytest
import torch
from plain_losses import Near, relative_error

from rbfast.loss import chunked_loss, chunking
from rbfast.loss.chunking import chunk_on_cpu, chunk_on_gpu, chunk_trained_head
from rbfast.loss.distill_loss import DistillLoss
from rbfast.ops.head_gemm import head_grad_rounded_

LLAMA_8B = torch.Size((128256, 4096))


@pytest.mark.parametrize("rows", [0, 1, 31, 33, 95, 500, 1000, 1025, 4096, 4097, 50_000])
@pytest.mark.parametrize("V", [1, 500, 49152, 128256, 262144])
@pytest.mark.parametrize("asked", [None, 1, 7, 3000])
def test_chunks_are_whole_tiles(rows, V, asked):
    for plan in (
        chunk_on_cpu(rows, 4 * V, asked),
        chunk_on_cpu(rows, 4 * V, asked, chunking.IN_TILES),
        chunk_on_gpu(rows, 8 * V, asked),
        chunk_on_gpu(rows, 4 * V, asked, extra_bytes=4 * V),
        chunk_trained_head(rows, 4 * V, asked, torch.Size((V, 1000))),
        chunk_trained_head(rows, 4 * V, asked, torch.Size((V, 1000)), extra_bytes=4 * V),
    ):
        assert 1 <= plan.chunk <= plan.product <= max(1, rows)
        assert plan.chunk <= 2 * plan.extra <= 2 * plan.chunk
        assert plan.chunk % 32 == 0 or plan.chunk == plan.product
        if plan.rounds_sum:
            assert -(-rows // plan.product) <= 2


def test_gpu_memory_stays_below_a_gigabyte_for_llama_8b():
    V, H = LLAMA_8B
    for plan, extra_bytes in (
        (chunk_on_gpu(4096, 4 * V, None), 0),
        (chunk_on_gpu(4096, 4 * V, None, extra_bytes=4 * V), 4 * V),
        (chunk_trained_head(4096, 4 * V, None, LLAMA_8B), 0),
    ):
        dz_bytes = 2 * V * plan.product if plan.keeps_dz else 0
        d_hidden = 4 * 4096 * H - 2 * 4096 * H  # in fp32, of which half is returned
        assert plan.chunk * 4 * V + plan.extra * extra_bytes + dz_bytes + d_hidden < 1e9
        assert plan.chunk == (768 if plan.keeps_dz else 1024)


@pytest.mark.parametrize("V", [40_000, 128_256, 151_936, 190_000, 262_144])
def test_student_and_teacher_logits_fit_the_memory_for_a_gpu(V):
    plan = chunk_on_gpu(4096, 4 * V, None, extra_bytes=4 * V)
    assert plan.chunk * 4 * V + plan.extra * 4 * V <= chunking.GPU_BYTES


@pytest.mark.parametrize("rows", [1025, 2047, 2048, 2049])
def test_gradient_summed_in_bf16_takes_two_products(rows):
    plan = chunk_trained_head(rows, 4 * 262144, None, torch.Size((262144, 1000)))
    assert plan.rounds_sum and -(-rows // plan.product) == 2


def test_reference_on_a_gpu_gets_small_chunks():
    """It makes fp64 copies of the logits."""
    device = torch.device("meta")
    assert chunking.gpu_memory(device) == chunking.GPU_BYTES // 16
    assert 2**29 < chunking.logits_bytes(4096, 151936, device) < 2**30  # with the copies


def test_rows_of_logits_are_aligned_whatever_the_vocabulary():
    assert [chunking.row_width(V, is_gpu=True) for V in (0, 1, 32, 49152, 50257)] == [0, 32, 32, 49152, 50272]


def test_rows_of_logits_start_in_different_cache_sets_of_a_cpu():
    widths = [chunking.row_width(V, is_gpu=False) for V in (0, 1, 32, 49152, 50257)]
    assert widths == [0, 32, 32, 49184, 50272]
    line_starts = {row * widths[3] * 4 // 64 % 64 for row in range(64)}  # 64 sets of lines of 64 bytes: a usual L1
    assert len(line_starts) == 32


def test_long_batch_sums_the_head_gradient_in_fp32():
    assert chunk_trained_head(4 * 4096, 4 * LLAMA_8B[0], None, LLAMA_8B).rounds_sum
    plan = chunk_trained_head(4 * 4096 + 1, 4 * LLAMA_8B[0], None, LLAMA_8B)
    assert plan.keeps_dz and not plan.rounds_sum
    assert 2 * plan.product * LLAMA_8B[0] < 925e6


@pytest.mark.parametrize("products", [1, 2])
def test_two_products_in_bf16_cost_a_gradient_less_than_0_3_percent(products):
    g = torch.Generator().manual_seed(0)
    dz, x = torch.randn(1024, 300, generator=g).bfloat16(), torch.randn(1024, 200, generator=g).bfloat16()
    dW = torch.full((300, 200), torch.nan, dtype=torch.bfloat16)
    for i, part in enumerate(torch.arange(1024).tensor_split(products)):
        head_grad_rounded_(dW, dz[part], x[part], adds=i > 0)
    error = relative_error(dW, dz.double().T @ x.double())
    assert 0.001 < error < (0.002 if products == 1 else 0.003)


@pytest.mark.parametrize("memory", [925 * 10**6, 2 * 1500 * 24])
@pytest.mark.parametrize("chunk_rows", [None, 1])
@pytest.mark.parametrize("kind", ["dense", "top-k"])
def test_head_gradient_by_the_gpu_plan_matches_the_plain_formula(kind, chunk_rows, memory, monkeypatch):
    """dz in separate memory for several chunks; one product, a sum of two, or a sum in fp32 (memory for 24 rows)."""
    monkeypatch.setattr(chunked_loss, "_is_gpu", lambda x: True)
    monkeypatch.setattr(chunking, "GPU_BYTES", memory)
    monkeypatch.setattr(chunked_loss, "gpu_memory", lambda device: memory)
    monkeypatch.setattr(chunking, "TILE_ROWS", 16)
    near = Near(1.0)
    rows = torch.arange(near.T)
    truth = near.plain(kind, 0.0)
    expected = torch.autograd.grad(truth.mean(), near.exact)
    loss_fn = DistillLoss(chunk_rows=chunk_rows)
    out = loss_fn(near.hidden, near.weight, near.labels, near.signal(kind), rows=rows)
    for ours, theirs in zip(torch.autograd.grad(out.loss, (near.hidden, near.weight)), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, theirs) <= 0.003
    assert relative_error(out.divergence, truth.detach()) <= 0.003


@pytest.mark.parametrize("rows", [None, torch.arange(0)])
def test_head_gradient_by_the_gpu_plan_is_zero_without_rows(rows, monkeypatch):
    monkeypatch.setattr(chunked_loss, "_is_gpu", lambda x: True)
    monkeypatch.setattr(chunked_loss.torch, "empty", lambda shape, **kinds: torch.full(shape, torch.nan, **kinds))
    near = Near(1.0)
    labels = torch.full((near.T,), -100)
    out = DistillLoss()(near.hidden, near.weight, labels, ce_weight=1.0, rows=rows)
    out.loss.backward()
    assert not near.weight.grad.any() and not near.hidden.grad.any()


def test_second_backward_agrees_and_does_not_overwrite_the_first():
    near = Near(0.1)
    inputs = (near.hidden, near.weight)
    for reduction in ("mean", "none"):
        out = DistillLoss(reduction=reduction)(*inputs, near.labels, near.signal("top-k"))
        upstream = torch.full_like(out.loss, 4.0)
        once = torch.autograd.grad(out.loss, inputs, upstream, retain_graph=True)
        kept = [x.clone() for x in once]
        twice = torch.autograd.grad(out.loss, inputs, upstream)
        for a, b, c in zip(once, kept, twice, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)
