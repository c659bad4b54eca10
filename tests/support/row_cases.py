"""Rows of logits with their signals, and what the op makes of them."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rbfast import ops

EPS32 = torch.finfo(torch.float32).eps
ROUNDINGS = 4  # of a logit: bias, scale, cap, difference; and of a result: exp, factor, product, sum
BETAS = (0.0, 0.01, 0.3, 0.99, 1.0)


@dataclass(frozen=True)
class Rows:
    """The op's arguments but for dz. logits [T, V]; T = 9."""

    logits: Tensor
    labels: Tensor
    kl_weight: Tensor
    ce_weight: Tensor
    temperature: Tensor
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    teacher: Tensor | None = None
    bias: Tensor | None = None
    beta: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def run(self, implementation=ops, dz: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Divergence, CE and dz; logits are left alone."""
        logits, *rest = (getattr(self, field.name) for field in fields(self))
        dz = torch.empty_like(logits) if dz is None else dz
        divergence, ce = implementation.divergence_rows_(logits.clone(), dz, *rest)
        return divergence, ce, dz

    def double(self) -> "Rows":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        floating = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return replace(self, **{name: value.double() for name, value in floating.items()})

    def nudged(self) -> "Rows":
        """In fp64, with what student and teacher say moved up or down by the roundings of the head."""
        g = torch.Generator().manual_seed(7)
        rows, names = self.double(), ("logits", "teacher", "logprobs")
        said = {name: getattr(rows, name) for name in names if getattr(rows, name) is not None}
        moved = {
            name: x * (1 + ROUNDINGS * EPS32 * torch.randn(x.shape, generator=g).sign()) for name, x in said.items()
        }
        return replace(rows, **moved)


def make(
    kind: str, V: int = 37, V_teacher: int = 37, gap: float = 1.0, k: int = 5, head: bool = False, **options
) -> Rows:
    """Nine rows whose teacher is `gap` away from the student."""
    g = torch.Generator().manual_seed(0)
    rows = Rows(
        logits=3 * torch.randn(9, V, generator=g),
        labels=torch.randint(V, (9,), generator=g),
        kl_weight=0.5 + torch.rand(9, generator=g),
        ce_weight=torch.rand(9, generator=g),
        temperature=torch.where(torch.arange(9) < 3, 1.0, 0.5 + 2 * torch.rand(9, generator=g)),
        **options,
    )
    z = rows.logits.double()
    if head:
        rows = replace(rows, bias=torch.randn(V, generator=g), logit_scale=0.7, softcap=5.0)
        z = 5 * torch.tanh(0.7 * (z + rows.bias.double()) / 5)
    close = z + gap * torch.randn(9, V, generator=g)
    if kind == "dense":
        teacher = torch.randn(9, max(V, V_teacher), generator=g)
        teacher[:, :V] = close
        rows = replace(rows, teacher=teacher[:, :V_teacher])
    if kind == "top-k":
        logprobs, ids = torch.log_softmax(close, 1).topk(min(k, V), 1)
        ids[0, 1:] = -1
        rows = replace(rows, ids=ids, logprobs=logprobs.float())
    return rows
