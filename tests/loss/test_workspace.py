"""The memory for a chunk's logits, which calls of the loss on a CPU reuse."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from plain_losses import Case

from rbfast.loss import chunked_loss, workspace
from rbfast.loss.chunking import logits_bytes
from rbfast.loss.distill_loss import DistillLoss
from rbfast.loss.teacher_signal import Dense


@pytest.fixture(autouse=True)
def keeps_small_pieces(monkeypatch):
    monkeypatch.setattr(workspace, "MIN_KEPT", 1)
    workspace.release()
    yield
    workspace.release()


def solve(case: Case) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in case.inputs()]
    hidden, weight, bias = inputs
    out = DistillLoss(0.3)(hidden, weight, case.labels, case.signals(), head_bias=bias, **case.arguments())
    return [out.loss.detach(), out.divergence, out.ce, *torch.autograd.grad(out.loss, inputs)]


def solve_text(tokens: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=g).requires_grad_() for n in (tokens, 500))
    out = DistillLoss()(hidden, weight, torch.arange(tokens), ce_weight=1.0)
    return [out.loss.detach(), out.ce, *torch.autograd.grad(out.loss, (hidden, weight))]


def kept() -> torch.Tensor:
    (memory,) = workspace._kept
    return memory


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_memory_is_reused_whatever_it_contains():
    case = Case()
    first = solve(case)
    memory = kept()
    memory.fill_(255)  # NaN in every dtype
    assert same(first, solve(case))
    assert kept() is memory
    workspace.release()
    assert same(first, solve(case))
    assert kept() is not memory


def test_smaller_call_uses_part_of_the_memory_and_larger_gets_more():
    few, many = solve_text(10), solve_text(100)
    large = kept()
    large.fill_(255)
    assert same(few, solve_text(10)) and same(many, solve_text(100))
    assert kept() is large
    workspace.release()
    solve_text(10)
    assert kept().numel() < large.numel()


def test_memory_from_inference_mode_serves_a_training_step():
    case = Case()
    expected = solve(case)
    workspace.release()
    with torch.inference_mode():
        hidden, weight, bias = case.inputs()
        DistillLoss(0.3)(hidden, weight, case.labels, case.signals(), head_bias=bias, **case.arguments())
    memory = kept()
    assert same(expected, solve(case))
    assert kept() is memory


def test_memory_is_on_the_cpu_whatever_the_default_device():
    case = Case()
    expected = solve(case)
    workspace.release()
    with torch.device("meta"):  # stands for a GPU
        assert same(expected, solve(case))


def test_threads_do_not_share_memory():
    cases = [Case(seed) for seed in range(8)]
    expected = [solve(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: [solve(case) for case in cases], range(8)):
            assert all(same(a, b) for a, b in zip(results, expected, strict=True))
    assert len(workspace._kept) == 1


def test_huge_memory_is_not_kept(monkeypatch):
    monkeypatch.setattr(workspace, "MAX_KEPT", 1000)
    solve_text(10)
    assert not workspace._kept


@pytest.mark.parametrize("theirs", [0, 8192])
def test_memory_matches_the_plan(theirs):
    tokens, own = 2000, 16384  # in several chunks
    hidden, weight = torch.ones(tokens, 8).bfloat16(), torch.ones(own, 8).bfloat16()
    teacher = Dense(hidden, weight[:theirs]) if theirs else None
    with torch.no_grad():
        DistillLoss()(hidden, weight, torch.zeros(tokens, dtype=torch.int64), teacher, ce_weight=1.0)
    assert kept().numel() == logits_bytes(tokens, own, hidden.device, theirs) < 4 * tokens * (own + theirs)


def test_call_on_a_gpu_keeps_no_memory(monkeypatch):
    expected = solve_text(10)
    workspace.release()
    monkeypatch.setattr(chunked_loss, "_is_gpu", lambda x: True)
    assert same(expected, solve_text(10)) and not workspace._kept
