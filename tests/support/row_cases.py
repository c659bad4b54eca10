"""Rows of logits with teacher signals, the op's results, and hard cases for every implementation."""

from dataclasses import dataclass, fields, replace

import torch
from covering import covering
from torch import Tensor

from rbfast import ops
from rbfast.ops import reference

EPS32 = torch.finfo(torch.float32).eps
ROUNDINGS = 4  # of a logit: bias, scale, cap, difference; and of a result: exp, factor, product, sum
BETAS = (0.0, 0.01, 0.3, 0.99, 1.0)
KINDS = ("text", "dense", "top-k")
TAUGHT = KINDS[1:]
SIZES = ((1, 1), (5, 5), (37, 50), (3001, 2700))  # V, V'
taught_rows = covering(3, kind=TAUGHT, beta=BETAS, size=SIZES, gap=(3.0, 0.1, 0.001), head=(False, True))


PARTS_OF_A_HEAD = ("bias", "logit_scale", "softcap")
WEIGHTS = ("kl_weight", "ce_weight", "temperature")
FACTORS = ("kl_factor", "ce_factor", "temperature_factor")
PER_ROW = ("logits", "labels", *WEIGHTS, "ids", "logprobs", "teacher")


@dataclass(frozen=True)
class Rows:
    """The op's arguments except dz. logits [T, V]; T = 9."""

    logits: Tensor
    labels: Tensor
    kl_weight: Tensor | None
    ce_weight: Tensor | None
    temperature: Tensor | None
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    teacher: Tensor | None = None
    bias: Tensor | None = None
    beta: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    kl_factor: float = 1.0
    ce_factor: float = 1.0
    temperature_factor: float = 1.0

    def run(self, implementation=ops, dz: Tensor | None = None) -> tuple[Tensor, ...]:
        """Divergence, CE, loss and dz; logits are not overwritten."""
        dz = torch.empty_like(self.logits) if dz is None else dz
        return *implementation.divergence_rows_(self.logits.clone(), dz, *self.signals()), dz

    def signals(self, device: str = "cpu") -> list:
        """The op's arguments after logits and dz."""
        values = [getattr(self, field.name) for field in fields(self)][1:]
        return [x.to(device) if isinstance(x, Tensor) else x for x in values]

    def at(self, part: Tensor | slice) -> "Rows":
        """Some of the rows."""
        values = {name: getattr(self, name) for name in PER_ROW}
        return replace(self, **{name: x[part].contiguous() for name, x in values.items() if x is not None})

    def double(self) -> "Rows":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        floating = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return replace(self, **{name: value.double() for name, value in floating.items()})

    def nudged(self) -> "Rows":
        """In fp64, with the student's and the teacher's values moved up or down by the head's roundings."""
        g = torch.Generator().manual_seed(7)
        rows, names = self.double(), ("logits", "teacher", "logprobs")
        given = {name: getattr(rows, name) for name in names if getattr(rows, name) is not None}
        moved = {
            name: x * (1 + ROUNDINGS * EPS32 * torch.randn(x.shape, generator=g).sign()) for name, x in given.items()
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


def make_with_part_of_a_head(kind: str, part: str) -> Rows:
    """Rows of a head with only one part."""
    return replace(make(kind), **{part: getattr(make(kind, head=True), part)})


def assert_close_to_fp64(rows: Rows, implementation=ops) -> None:
    """The error against fp64 is within the roundings of a logit and of a result."""
    results = rows.run(implementation)
    truths, nudged = rows.double().run(reference), rows.nudged().run(reference)
    for name, ours, exact, other in zip(("divergence", "CE", "loss", "dz"), results, truths, nudged, strict=True):
        error = float((ours - exact).norm())
        budget = float((other - exact).norm() + ROUNDINGS * EPS32 * exact.norm())
        where = int((ours - exact).abs().flatten().nan_to_num(torch.inf).argmax())
        size = f"of a norm of {float(exact.norm()):.3g}, most at {where} of {list(exact.shape)}"
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g} {size}"
    least = float(results[0].min())
    assert least >= 0, f"a divergence of {least:.3g}"


def extreme(kind: str, beta: float) -> Rows:
    """Logits that alternate between 1e4 and -1e4."""
    rows = make(kind, 50, 50, beta=beta)
    sign = torch.where(torch.arange(50) % 2 == 0, 1.0, -1.0)
    rows = replace(rows, logits=1e4 * torch.where(torch.arange(9).unsqueeze(1) % 2 == 0, sign, -sign).contiguous())
    return replace(rows, teacher=(1e4 * sign).expand(9, 50).contiguous()) if kind == "dense" else rows


def certain(kind: str, beta: float) -> Rows:
    """A teacher that gives all its mass to one id."""
    if kind == "dense":
        teacher = torch.full((9, 50), -torch.inf)
        teacher[:, 7] = 3.0
        return replace(make("dense", 50, 50, beta=beta), teacher=teacher)
    logprobs = torch.tensor([0.0, -torch.inf]).expand(9, 2).contiguous()
    return replace(
        make("top-k", 50, beta=beta, k=2), ids=torch.tensor([[7, -1]]).expand(9, 2).contiguous(), logprobs=logprobs
    )


def over_one(beta: float) -> Rows:
    """A teacher whose probabilities sum to more than 1, as rounded ones may."""
    rows = make("top-k", 50, beta=beta)
    total = rows.logprobs.exp().where(rows.ids >= 0, 0.0).sum(1, keepdim=True)
    return replace(rows, logprobs=rows.logprobs - total.log() + 0.001)


def below_one_without_a_tail(beta: float) -> Rows:
    """A teacher with candidates for every id, whose probabilities sum to less than 1."""
    rows = make("top-k", 5, beta=beta)
    return replace(rows, logprobs=rows.logprobs - 0.1)


def cold(beta: float) -> Rows:
    """A temperature at which all of the teacher's probabilities underflow fp32.

    From row to row the support outweighs the tail by less, and finally not at all. The next row has no support. In the
    last rows, one id has almost all of the student's tail, and so of the teacher's.
    """
    rows = make("top-k", 1000, k=20, beta=beta)
    each = torch.tensor((0.045, 0.01, 2e-3, 1.1e-3, 1e-3, 0.0, 1e-3, 0.01, 1e-4))
    ids, logits = torch.arange(20).repeat(9, 1), rows.logits / 30
    ids[6] = -1
    logits[7:, 500] = 30.0
    logprobs = each.log()[:, None] + torch.linspace(0, -0.1, 20)
    rows = replace(rows, logits=logits, ids=ids, logprobs=logprobs, temperature=torch.full((9,), 0.04))
    return replace(rows, ce_weight=torch.zeros(9))


def masked(beta: float) -> Rows:
    """A bias of minus infinity at id 3, for the student and the teacher."""
    rows, bias = make("dense", 50, 50, beta=beta), torch.zeros(50)
    bias[3] = -torch.inf
    return replace(rows, bias=bias, labels=torch.zeros(9, dtype=torch.int64), teacher=rows.teacher + bias)


def masked_label(kind: str) -> Rows:
    """Rows whose label has a logit of minus infinity and no weight; it is not a candidate of a top-k teacher."""
    rows = make(kind, 50, 50)
    labels = rows.logits.argmin(1)
    logits = rows.logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return replace(rows, logits=logits, labels=labels, ce_weight=torch.zeros(9))


def assert_masked(results: tuple[Tensor, ...]) -> None:
    *losses, dz = results
    assert all(bool(x.isfinite().all()) for x in losses) and not dz[:, 3].any()


def assert_reverse_kl_floors_a_teacher_of_zero(implementation=ops) -> None:
    rows = certain("dense", 1.0)
    # The rounded value is a log-prob of -100, times q <= 1 and the row's factor.
    atol = ROUNDINGS * EPS32 * 100 * float((rows.kl_weight * rows.temperature).max())
    for ours, exact in zip(rows.run(implementation), rows.double().run(reference), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=ROUNDINGS * EPS32, atol=atol)


def tiny_tail(student_tail: float, V: int = 1000) -> Rows:
    """One column has nearly all the student's mass; the teacher gives it 0.9. Elsewhere dz = q_v (1 - 0.1 / q_tail)."""
    logits = torch.zeros(1, V)
    logits[0, 0] = torch.log(torch.tensor((V - 1) / student_tail))
    one, label = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    return Rows(logits, label, one, 0 * one, one, torch.tensor([[0]]), torch.tensor([[0.9]]).log())


def assert_tail(dz: Tensor) -> None:
    V = dz.shape[1]
    torch.testing.assert_close(dz[0, 1:], torch.full((V - 1,), -0.1 / (V - 1)), rtol=1e-5, atol=0)


def assert_no_tail(implementation, beta: float) -> None:
    """The student's logits outside the support are minus infinity, except for one NaN in the first row."""
    rows = make("top-k", 50, beta=beta).at(slice(1, 9))  # without the row that has padding
    others = torch.ones(8, 50).scatter(1, rows.ids, 0.0) > 0
    rows = replace(rows, logits=rows.logits.masked_fill(others, -torch.inf), labels=rows.ids[:, 0])
    rows.logits[0, int(others[0].nonzero()[0])] = torch.nan
    results = rows.run(implementation)
    for result in results:
        assert bool(result[0].isnan().any()) and bool(result[1:].isfinite().all())
    assert not results[-1][1:][others[1:]].any()


def no_rows() -> Rows:
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return Rows(torch.zeros(0, 37), none, empty, empty, empty)


def assert_no_rows(results: tuple[Tensor, ...]) -> None:
    *losses, dz = results
    assert all(x.shape == (0,) for x in losses) and dz.shape == (0, 37)


def with_factors(kind: str) -> tuple[Rows, Rows]:
    """The same rows twice: with values per row and factors, and with the products as values per row."""
    rows, numbers = make(kind, 50, 50, head=True), (0.25, 3.0, 0.5)
    per_row = {name: getattr(rows, name) * number for name, number in zip(WEIGHTS, numbers, strict=True)}
    return replace(rows, **dict(zip(FACTORS, numbers, strict=True))), replace(rows, **per_row)


def without_values(kind: str) -> tuple[Rows, Rows]:
    """The same rows twice: with factors only, and with the same numbers as values per row."""
    rows, numbers = make(kind, 50, 50), (0.75, 0.125, 1.5)
    per_row = {name: torch.full((9,), number) for name, number in zip(WEIGHTS, numbers, strict=True)}
    given = dict(zip(FACTORS, numbers, strict=True)) | dict.fromkeys(WEIGHTS)
    return replace(rows, **given), replace(rows, **per_row)
