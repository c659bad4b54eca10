"""What needs a GPU: streams, graphs, torch.compile, the head's products, and the public API against the CPU.

The ops themselves are tested in test_cuda_columns.py and test_cuda_rows.py, with or without a GPU.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from column_cases import OPS, Delta, arguments, make, run
from head_products import DTYPES, SHAPES, assert_product, draw, head_backward
from row_cases import Rows
from row_cases import make as make_rows
from tiny_models import attach, batch, llama
from torch import Tensor

from rbfast import Dense, DistillLoss, TopK, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(values: tuple) -> tuple:
    return tuple(value.cuda() if isinstance(value, Tensor) else value for value in values)


def row_arguments(rows: Rows) -> tuple:
    """The op's arguments with a dz, on the GPU."""
    values = [getattr(rows, field.name) for field in fields(rows)]
    return on_gpu((values[0].clone(), torch.zeros_like(values[0]), *values[1:]))


def test_every_op_has_its_kernel() -> None:
    implementations = ops.implementations("cuda")
    assert {implementations[name] for name in (*OPS, "divergence_rows_")} == {"CUDA C++"}


@pytest.mark.parametrize("name", OPS)
def test_column_ops_pass_opcheck(name: str) -> None:
    given = on_gpu(arguments(name, make((65, 90, 77, 33, 2), torch.bfloat16)))
    torch.library.opcheck(getattr(torch.ops.rbfast, name).default, given)


@pytest.mark.parametrize("kind", ["text", "dense", "top-k"])
def test_row_op_passes_opcheck(kind: str) -> None:
    torch.library.opcheck(ops.divergence_rows_, row_arguments(make_rows(kind, head=True)))


def delta() -> Delta:
    d = make((300, 90, 192, 64, 2), torch.bfloat16).map(Tensor.cuda)
    return replace(d, cols=d.cols.cuda())


def calls() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Every op with its inputs. A call returns the results and leaves its inputs unchanged."""
    d = delta()

    def rows_of(kind: str) -> Callable[[], tuple[Tensor, ...]]:
        logits, dz, *rest = row_arguments(make_rows(kind, 3001, 3001))
        return lambda: (*ops.divergence_rows_(logits.clone(), dz, *rest), dz.clone())

    column_calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {name: lambda name=name: run(name, d) for name in OPS}
    return column_calls | {f"divergence_rows_ {kind}": rows_of(kind) for kind in ("text", "dense", "top-k")}


@pytest.mark.parametrize("name", (*OPS, *(f"divergence_rows_ {kind}" for kind in ("text", "dense", "top-k"))))
def test_graph_replay_matches_a_call(name: str) -> None:
    call = calls()[name]
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for result in captured:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPS)
def test_work_is_put_on_the_current_stream_without_waiting(name: str) -> None:
    """The input arrives late on that stream, so a kernel on another stream would read the zeros from before."""
    d = delta()
    expected, late = run(name, d), d.map(torch.zeros_like)
    stream, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(30):
            busy = busy @ busy / 64
        for field in fields(d):
            if field.name not in ("cols", "scale", "run"):
                getattr(late, field.name).copy_(getattr(d, field.name))
        is_busy = stream.record_event()
        results = run(name, late)
        assert not is_busy.query(), "the op waited for the stream"
    stream.synchronize()
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPS)
def test_compiles_without_graph_breaks(name: str) -> None:
    d = delta()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(name, d), run(name, d), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dz_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_heads_products_match_fp64(shape: tuple[int, int, int], dtype: torch.dtype, dz_dtype: torch.dtype) -> None:
    T, H, V = shape
    hidden, weight, dz = draw(T, H, dtype=dtype), draw(V, H, dtype=dtype, seed=1), draw(T, V, dtype=dz_dtype, seed=2)
    logits = torch.full((T, V), torch.nan, device="cuda")
    ops.head_forward_(logits, hidden.cuda(), weight.cuda())
    assert_product(logits.cpu(), hidden, weight.T)
    assert_product(head_backward(dz.cuda(), weight.cuda()).cpu(), dz, weight)
    start = draw(V, H, dtype=torch.float32, seed=3)
    dW = start.cuda()
    ops.head_grad_(dW, dz.cuda(), hidden.cuda())
    assert_product(dW.cpu(), dz.T, hidden, start)


def losses(device: str, dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    """Loss and gradients of a small batch, for every kind of signal."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(70, 64, generator=g), torch.randn(1003, 64, generator=g) / 4
    labels = torch.randint(1003, (70,), generator=g)
    logprobs, ids = torch.log_softmax(hidden @ weight.T + torch.randn(70, 1003, generator=g), 1).topk(20, 1)
    teacher = hidden + 0.1 * torch.randn(70, 64, generator=g)
    hidden, weight, teacher = (x.to(device, dtype) for x in (hidden, weight, teacher))
    signals = {"text": None, "top-k": TopK(ids.to(device), logprobs.to(device)), "dense": Dense(teacher, weight)}
    results = {}
    for name, signal in signals.items():
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = DistillLoss(beta=0.0)(x, w, labels.to(device), signal, ce_weight=0.3, temperature=1.5)
        out.loss.backward()
        assert x.grad is not None and w.grad is not None
        results[name] = tuple(t.detach().double().cpu() for t in (out.loss, x.grad, w.grad))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_match_the_cpu(dtype: torch.dtype) -> None:
    ours, theirs = losses("cuda", dtype), losses("cpu", dtype)
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-5
    for name in ours:
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert float((mine - other).norm()) <= rounding * float(other.norm()), name


def trained(device: str, mode: str, attached_on: str | None = None) -> list[Tensor]:
    """The adapter's values after three steps on a tiny model, which may move to the device after it was attached."""
    model = llama().to(attached_on or device)
    adapter = attach(model, mode=mode)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model.to(device)
    inputs = {name: value.to(device) for name, value in batch().items()}
    for _ in range(3):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().cpu() for parameter in adapter.parameters()]


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_an_adapter_trains_as_on_the_cpu(mode: str) -> None:
    expected = trained("cpu", mode)
    for attached_on in ("cuda", "cpu"):
        for ours, theirs in zip(trained("cuda", mode, attached_on), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
