"""Textbook losses to differentiate in fp64, and students near their teacher."""

import torch
from torch import Tensor

from rbfast.loss.teacher_signal import Dense, TopK


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The textbook definition over buckets [T, n]; differentiable in log_q."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return (p * (log_p - log_q)).sum(1)
    if beta == 1:
        return (q * (log_q - log_p)).sum(1)
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * (p * (log_p - log_m)).sum(1) + (1 - beta) * (q * (log_q - log_m)).sum(1)


def top_k_divergence(z: Tensor, ids: Tensor, log_p: Tensor, tau: Tensor, beta: float) -> Tensor:
    """The divergence over k + 1 buckets. The teacher is given on ids, and shaped like the student elsewhere."""
    with torch.no_grad():
        support = torch.zeros_like(z, dtype=torch.bool).scatter(1, ids, True)
        tail = torch.log_softmax(z.masked_fill(support, -torch.inf), 1)
        teacher = (tail + torch.log1p(-log_p.exp().sum(1, keepdim=True))).scatter(1, ids, log_p)

    def buckets(full: Tensor) -> Tensor:
        full = torch.log_softmax(full / tau, 1)
        rest = full.masked_fill(support, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([full.gather(1, ids), rest], 1)

    return divergence(buckets(teacher), buckets(z), beta)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


class Near:
    """A bf16 student, and a teacher whose logits differ by about `gap`: its hidden states have eight more features."""

    T, H, V, K = 48, 96, 1500, 20

    def __init__(self, gap: float) -> None:
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.hidden = normal(self.T, self.H).bfloat16().requires_grad_()
        self.weight = (0.3 * normal(self.V, self.H)).bfloat16().requires_grad_()
        # The same numbers in fp64: a gradient of bf16 leaves would itself be rounded to bf16.
        self.exact = tuple(x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        self.labels = torch.randint(self.V, (self.T,), generator=g)
        self.teacher_hidden = torch.cat([self.hidden.detach(), normal(self.T, 8).bfloat16()], 1)
        self.teacher_weight = torch.cat([self.weight.detach(), (gap / 8**0.5 * normal(self.V, 8)).bfloat16()], 1)
        z = self.teacher_hidden.double() @ self.teacher_weight.double().T
        self.log_p = torch.log_softmax(z, 1)

    def signal(self, kind: str) -> TopK | Dense:
        if kind == "dense":
            return Dense(self.teacher_hidden, self.teacher_weight)
        logprobs, ids = self.log_p.topk(self.K, 1)
        return TopK(ids, logprobs.float())

    def plain(self, kind: str, beta: float) -> Tensor:
        """Divergence [T] in fp64 of the same bf16 numbers; differentiable."""
        z = self.exact[0] @ self.exact[1].T
        if kind == "dense":
            return divergence(self.log_p, torch.log_softmax(z, 1), beta)
        signal = self.signal(kind)
        return top_k_divergence(z, signal.ids, signal.logprobs.double(), torch.ones(self.T, 1).double(), beta)


def student_logits(hidden, weight, bias=None, softcap=None, logit_scale=1.0) -> Tensor:
    z = hidden @ weight.T
    z = logit_scale * (z if bias is None else z + bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


class Case:
    """A batch of T tokens with rows of all three kinds and ignored ones, in fp64."""

    T, H, V, K = 23, 12, 37, 4

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.hidden, self.weight, self.bias = normal(self.T, self.H), normal(self.V, self.H), normal(self.V)
        self.labels = torch.randint(self.V, (self.T,), generator=g)
        self.labels[[2, 9, 20]] = -100
        order = torch.randperm(self.T, generator=g)
        self.topk_rows, self.dense_rows = order[:9], order[9:17]
        log_p = torch.log_softmax(2 * normal(9, self.V), 1)
        self.logprobs, self.ids = log_p.topk(self.K, 1)
        self.teacher_logits = 2 * normal(8, self.V)
        self.w, self.a = torch.rand(self.T, generator=g).double(), torch.rand(self.T, generator=g).double()
        self.tau = 0.5 + 2 * torch.rand(self.T, generator=g).double()

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def signals(self) -> list:
        return [TopK(self.ids, self.logprobs, self.topk_rows), Dense(logits=self.teacher_logits, rows=self.dense_rows)]

    def plain(self, hidden: Tensor, weight: Tensor, bias: Tensor, beta: float, **head) -> tuple[Tensor, Tensor, Tensor]:
        """Per-token loss, divergence and CE [T]."""
        z = student_logits(hidden, weight, bias, **head)
        tau = self.tau.unsqueeze(1)
        d = torch.zeros(self.T, dtype=torch.float64)
        rows = self.topk_rows
        d = d.index_put((rows,), top_k_divergence(z[rows], self.ids, self.logprobs, tau[rows], beta))
        rows = self.dense_rows
        log_p, log_q = (torch.log_softmax(x / tau[rows], 1) for x in (self.teacher_logits, z[rows]))
        d = d.index_put((rows,), divergence(log_p, log_q, beta))
        valid = self.labels != -100
        d = d * valid
        ce = -torch.log_softmax(z, 1).gather(1, self.labels.clamp_min(0).unsqueeze(1)).squeeze(1) * valid
        return self.w * self.tau**2 * d + self.a * ce, d, ce

    def arguments(self) -> dict:
        return {"kl_weight": self.w, "ce_weight": self.a, "temperature": self.tau}
