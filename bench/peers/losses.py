"""The losses a user would pick instead, each called as its own documentation or its own trainer calls it.

    loss = DENSE["TRL GKD"].load(beta=0.0)      # raises ImportError if the package is absent
    loss(batch).backward()

All are means over rows; the gradient flows to batch.hidden, and to batch.weight if it requires grad.
"""

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rbfast.loss.distill_loss import DistillLoss
from rbfast.loss.teacher_signal import Dense, TopK


@dataclass(frozen=True)
class Batch:
    """A student's hidden [T, H] and head [V, H], its teacher's [T, H'] and [V, H'] and top-k [T, k]."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    ids: Tensor
    logprobs: Tensor

    @classmethod
    def draw(
        cls, T: int, H: int, V: int, k: int, dtype: torch.dtype, device: str = "cpu", is_trained: bool = False
    ) -> "Batch":
        """A student at some distance from its teacher, which has a head of the same size in its own memory."""
        g = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(T, H, generator=g, device=device)
        weight = (torch.randn(V, H, generator=g, device=device) * (3 / H**0.5)).to(dtype)
        teacher_hidden = (hidden + 0.3 * torch.randn(T, H, generator=g, device=device)).to(dtype)
        labels = torch.randint(V, (T,), generator=g, device=device)
        teacher_weight = weight.clone()
        weight.requires_grad_(is_trained)
        return cls.near(hidden.to(dtype), weight, labels, teacher_hidden, teacher_weight, k)

    @classmethod
    def near(
        cls, hidden: Tensor, weight: Tensor, labels: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, k: int
    ) -> "Batch":
        head = teacher_weight.float()  # in bf16, rounding would move the teacher by more than a small gap
        rows = [torch.log_softmax(x.float() @ head.T, 1).topk(k, 1) for x in teacher_hidden.split(64)]
        logprobs, ids = torch.cat([row.values for row in rows]), torch.cat([row.indices for row in rows])
        return cls(hidden.requires_grad_(), weight, labels, teacher_hidden, teacher_weight, ids, logprobs)

    @cached_property
    def rows(self) -> Tensor:
        """The rows that take part: all of them. A trainer knows them before it calls the loss."""
        return torch.arange(len(self.labels), device=self.labels.device)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's [T, V] as a model's head gives them, in its dtype."""
        with torch.no_grad():
            teacher = self.teacher_hidden @ self.teacher_weight.T
        return self.hidden @ self.weight.T, teacher


Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Peer:
    """`note`: how its computation differs. `load(beta)` raises ImportError, or ValueError for an unsupported beta."""

    load: Callable[[float], Loss]
    note: str = ""
    is_divergence: bool = True


def rbfast_dense(beta: float) -> Loss:
    loss = DistillLoss(beta)
    return lambda b: loss(b.hidden, b.weight, b.labels, Dense(b.teacher_hidden, b.teacher_weight), rows=b.rows).loss


def rbfast_top_k(beta: float, knows_rows: bool = True) -> Loss:
    loss = DistillLoss(beta)
    return lambda b: (
        loss(b.hidden, b.weight, b.labels, TopK(b.ids, b.logprobs), rows=b.rows if knows_rows else None).loss
    )


def plain_dense(beta: float) -> Loss:
    """Straightforward torch: whole logits, converted to fp32."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(1)

    def loss(batch: Batch) -> Tensor:
        log_q, log_p = (torch.log_softmax(z.float(), 1) for z in batch.logits())
        if beta in (0, 1):
            return (kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)).mean()
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        return (beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)).mean()

    return loss


def plain_top_k(beta: float) -> Loss:
    if beta != 0:
        raise ValueError(f"only the forward KL (beta 0) is written out here, got {beta}")

    def loss(batch: Batch) -> Tensor:
        z = (batch.hidden @ batch.weight.T).float()
        total = z.logsumexp(1, keepdim=True)
        log_q = z.gather(1, batch.ids) - total
        log_q_tail = z.scatter(1, batch.ids, -torch.inf).logsumexp(1, keepdim=True) - total
        p = batch.logprobs.exp()
        p_tail = 1 - p.sum(1, keepdim=True)
        value = (p * (batch.logprobs - log_q)).sum(1, keepdim=True) + p_tail * (p_tail.log() - log_q_tail)
        return value.mean()

    return loss


def compiled(plain: Callable[[float], Loss]) -> Callable[[float], Loss]:
    return lambda beta: torch.compile(plain(beta), fullgraph=True)


def trl_gkd(beta: float, upcast: bool = True) -> Loss:
    """The loss of GKDTrainer, on logits [1, T, V]; `upcast` to fp32, as mixed precision does with a model's outputs."""
    from trl.experimental.gkd import GKDTrainer

    def loss(batch: Batch) -> Tensor:
        student, teacher = (z.float().unsqueeze(0) if upcast else z.unsqueeze(0) for z in batch.logits())
        return GKDTrainer.generalized_jsd_loss(student, teacher, labels=batch.labels.unsqueeze(0), beta=beta)

    return loss


def liger(beta: float, compile: bool = True) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compile)
    return lambda b: jsd(b.hidden, b.weight, b.teacher_hidden, b.teacher_weight, b.labels, None, None)


def liger_fused(beta: float) -> Loss:
    """Liger's Triton kernels, for a GPU."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=beta)
    return lambda b: jsd(b.hidden, b.weight, b.teacher_hidden, b.teacher_weight, b.labels)


def cut_cross_entropy(beta: float) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda b: linear_cross_entropy(b.hidden, b.weight, b.labels)


def trl_chunked(beta: float) -> Loss:
    """The loss of DistillationTrainer, which is TRL's own function: it has no public name."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(batch: Batch) -> Tensor:
        student, teacher = batch.hidden.unsqueeze(0), batch.teacher_hidden.unsqueeze(0)
        mask = torch.ones_like(batch.labels).unsqueeze(0)
        return _chunked_divergence_loss(student, teacher, batch.weight, batch.teacher_weight, mask, beta)[0]

    return loss


def torchtune(beta: float) -> Loss:
    """As in torchtune's recipes: the hidden states [1, T, H] in 8 chunks, each through the head, then their loss."""
    if beta != 0:
        raise ValueError(f"torchtune's chunked loss is for the forward direction (beta 0), got {beta}")
    forward_kl = _torchtune_losses().ForwardKLWithChunkedOutputLoss()

    def chunks(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        return [part @ weight.T for part in hidden.unsqueeze(0).chunk(forward_kl.num_output_chunks, 1)]

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            teacher = chunks(batch.teacher_hidden, batch.teacher_weight)
        return forward_kl(chunks(batch.hidden, batch.weight), teacher, batch.labels.unsqueeze(0))

    return loss


def _torchtune_losses() -> Any:
    """torchtune's file of losses alone: importing the package needs a version of torchao that PEFT rejects."""
    path = importlib.metadata.distribution("torchtune").locate_file("torchtune/modules/loss/kd_losses.py")
    spec = importlib.util.spec_from_file_location("torchtune_losses", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PACKAGES = ("trl", "liger-kernel", "torchtune", "cut-cross-entropy")
DENSE = {
    "rbfast": Peer(rbfast_dense),
    "torch": Peer(plain_dense, "whole logits of both"),
    "torch.compile": Peer(compiled(plain_dense), "whole logits of both"),
    "TRL GKD": Peer(trl_gkd, "takes whole logits of both: the products before it are counted"),
    "TRL chunked": Peer(trl_chunked, "makes the logits twice, forward and backward; an entropy besides"),
    "Liger JSD": Peer(liger, "computes the gradient of the frozen head too"),
    "torchtune KL": Peer(torchtune, "the teacher's cross-entropy, not a KL; whole logits, in chunks", False),
}
TOP_K = {
    "rbfast": Peer(rbfast_top_k),
    "torch": Peer(plain_top_k, "whole logits"),
    "torch.compile": Peer(compiled(plain_top_k), "whole logits"),
}
SIGNALS = {"dense": DENSE, "top-k": TOP_K}
# On a GPU the peers' own kernels take part, and CPU-only peers do not.
SIGNALS_ON_GPU = {
    "dense": {who: DENSE[who] for who in ("rbfast", "torch", "torch.compile")}
    | {"Liger fused JSD": Peer(liger_fused, "computes the gradient of the frozen head too")},
    "top-k": TOP_K | {"CCE": Peer(cut_cross_entropy, "the text's cross-entropy alone", False)},
}
