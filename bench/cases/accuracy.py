"""Gradients against fp64 on the same inputs, for every op and dtype: the loss near its teacher, and the adapter's ops.

Student and teacher have logits that are 0.02 apart. The ground truth is DistillLoss on the inputs in fp64, which runs
the plain reference, and the fp64 reference for the adapter's ops. A value is the relative error in % of the worse of
two gradients (hidden states and head; A and B).
"""

from collections.abc import Callable
from functools import partial

import torch
from registry import Bar, Case, Contest, Place
from torch import Tensor

from cases.columns import columns, in_runs
from rbfast import Dense, DistillLoss, TopK, ops
from rbfast.ops import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GAP, K = 0.02, 20
SIGNALS = {"top-k": 0.0, "forward KL": 0.0, "reverse KL": 1.0, "JS": 0.5}


def error(ours: Tensor, exact: Tensor) -> float:
    """The relative error in %."""
    return 100 * float((ours.double() - exact.double()).norm() / exact.double().norm())


def loss_gradients(signal: str, hidden: Tensor, weight: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the hidden states and the head, summed over rows."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    given: TopK | Dense = Dense(logits=teacher)
    if signal == "top-k":
        logprobs, ids = torch.log_softmax(teacher, 1).topk(K, 1)
        given = TopK(ids, logprobs)
    loss = DistillLoss(SIGNALS[signal], reduction="sum")
    return torch.autograd.grad(loss(hidden, weight, labels, given).loss, (hidden, weight))


def of_loss(place: Place, signal: str, dtype: torch.dtype) -> float:
    T, H, V = place.size(64, 16), place.size(1024, 32), place.size(32000, 256)
    fp64 = partial(place.draw, dtype=torch.float64)
    hidden, weight = fp64(T, H).to(dtype), (fp64(V, H) * (3 / H**0.5)).to(dtype)
    teacher = hidden.double() @ weight.double().T + GAP * fp64(T, V)
    teacher = teacher.float()
    ours = loss_gradients(signal, hidden, weight, teacher)
    exact = loss_gradients(signal, hidden.double(), weight.double(), teacher.double())
    return max(error(a, b) for a, b in zip(ours, exact, strict=True))


def of_columns(place: Place, name: str, dtype: torch.dtype) -> float:
    T, out, features, s, k = place.size(1024, 32), place.size(1536, 48), place.size(1024, 64), place.size(128, 32), 5
    draw = partial(place.draw, dtype=dtype)
    x, dy = draw(T, features), draw(T, out)
    cols = columns(features, s).to(place.device)
    A, B = place.draw(k, s, dtype=torch.float32), place.draw(out, k, dtype=torch.float32)
    xs = x[:, cols]
    if name == "column_grad":
        exact = reference.column_grad(dy.double(), xs.double(), A.double(), B.double(), 1.0)
        return max(error(a, b) for a, b in zip(ops.column_grad(dy, xs, A, B, 1.0), exact, strict=True))
    # These add to their target and round to its dtype: it starts at zero, so that the error of the sum shows.
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    wide = [t.double() for t in (y, dx, dy, xs, A, B)]
    if name == "column_linear_":
        ops.column_linear_(y, xs, A, B, 1.0)
        reference.column_linear_(wide[0], wide[3], wide[4], wide[5], 1.0)
        return error(y, wide[0])
    ops.column_scatter_(dx, dy, cols, A, B, 1.0, **in_runs(name))
    reference.column_scatter_(wide[1], wide[2], cols, wide[4], wide[5], 1.0)
    return error(dx, wide[1])


def make(place: Place, name: str, measure: Callable[[Place, str, torch.dtype], float]) -> Contest:
    values = {f"{dtype} error %": measure(place, name, kind) for dtype, kind in DTYPES.items()}
    bars = tuple(Bar(metric, "<=", 0.3) for metric in values)
    return Contest(f"gradient error of {name}", {}, bars, rounds=1, values=lambda: values)


CASES = [
    *(Case("accuracy", name, partial(make, name=name, measure=of_loss), ("cuda",)) for name in SIGNALS),
    *(
        Case("accuracy", name, partial(make, name=name, measure=of_columns), ("cuda",))
        for name in ("column_grad", "column_linear_", "column_scatter_")
    ),
]
