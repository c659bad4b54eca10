"""The hierarchical objective: L = l_S mean_S + l_T mean_T + l_A mean_A over strategic, tactical and answer tokens."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rbfast.data.encoding import IGNORE, to_device
from rbfast.data.spans import ROLES
from rbfast.loss.distill_loss import DistillLoss, LossOutput, Reduction
from rbfast.loss.teacher_signal import Dense, TopK
from rbfast.models.linears import is_sharded
from rbfast.models.student import final_hidden, head_of
from rbfast.utils.records import check_numbers


@dataclass(frozen=True)
class Objective:
    """The weights of the roles of a trace, and the weight of a teacher's log-probs.

    The strategic weight is annealed linearly, from abstraction to implementation: by the end of training the share
    `anneal` of it has moved to the tactical weight. The loss of a row with log-probs is
    `ce_share * CE + (1 - ce_share) * tau^2 * D`, with D as DistillLoss defines it for `beta`, at the temperature tau of
    the row's role. `gradient_filter` is DistillLoss's: the share of each token's gradient that a CPU may skip.

    Raises:
        TypeError: a field is not a number.
        ValueError: a number is out of range, or all role weights are 0.
    """

    strategic: float = 0.4
    tactical: float = 0.5
    answer: float = 0.1
    anneal: float = 0.5
    strategic_temperature: float = 1.0
    tactical_temperature: float = 1.0
    answer_temperature: float = 1.0
    ce_share: float = 0.5
    beta: float = 0.0
    gradient_filter: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self)
        weights = (self.strategic, self.tactical, self.answer)
        if not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            raise ValueError(f"role weights must be finite, >= 0 and not all 0, got {weights}")
        for name in ("anneal", "ce_share", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("strategic_temperature", "tactical_temperature", "answer_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        DistillLoss(gradient_filter=self.gradient_filter)  # it checks the value

    def weights(self, progress: float, device: torch.device | None = None) -> Tensor:
        """The weights [3] of ROLES when the share `progress` of training is done."""
        moved = self.anneal * progress * self.strategic
        return _tensor_of([self.strategic - moved, self.tactical + moved, self.answer], device)

    def temperatures(self, device: torch.device | None = None) -> Tensor:
        """The temperatures [3] of ROLES."""
        return _tensor_of([self.strategic_temperature, self.tactical_temperature, self.answer_temperature], device)


def _tensor_of(values: list[float], device: torch.device | None) -> Tensor:
    """The values as a tensor on a device. A copy from the host would synchronise with the device."""
    return torch.cat([torch.full((1,), value, device=device) for value in values])


def role_counts(batch: dict[str, Any]) -> Tensor:
    """Supervised tokens per role, [3] int64."""
    return role_mask(batch).sum(1)


def role_mask(batch: dict[str, Any]) -> Tensor:
    """Which tokens are supervised in each role, bool [3, T]."""
    roles, labels = batch["roles"].view(-1), batch["labels"].view(-1)
    return (roles == torch.arange(len(ROLES), device=roles.device).unsqueeze(1)) & (labels != IGNORE)


def sums_by_role(batch: dict[str, Any], values: Tensor) -> Tensor:
    """The sums of values [T] over the supervised tokens of each role, and the numbers of those tokens: fp64 [2, 3]."""
    mask = role_mask(batch)
    return torch.stack([torch.where(mask, values.to(mask.device).double(), 0.0).sum(1), mask.sum(1)])


def token_losses(
    model: PreTrainedModel,
    hidden: Tensor,
    batch: dict[str, Any],
    role_weights: Tensor,
    objective: Objective,
    teacher: PreTrainedModel | None = None,
    reduction: Reduction = "sum",
) -> LossOutput:
    """The loss of a packed batch whose tokens have weight `role_weights[role]`, and each token's CE and divergence.

    A token learns from its top-k log-probs if the batch has them, else from the full distribution of `teacher` if there
    is one, else from the text alone.
    """
    batch = to_device(batch, hidden.device)
    labels, roles = batch["labels"].view(-1), batch["roles"].view(-1).clamp(min=0)
    weight = role_weights.to(hidden.device, torch.float32)[roles]
    temperature = objective.temperatures(hidden.device)[roles]
    head = head_of(model)
    signals: list[TopK | Dense] = []
    share = torch.ones_like(weight)
    rows = text_rows = batch["text_rows"]
    if "teacher_rows" in batch:
        taught_rows = batch["teacher_rows"]
        signals.append(TopK(batch["teacher_ids"], batch["teacher_logprobs"], taught_rows))
        share.index_fill_(0, taught_rows, objective.ce_share)
        rows = torch.cat([taught_rows, text_rows])
    if teacher is not None and (len(text_rows) or is_sharded(teacher)):  # if sharded, it must run on every process
        signals.append(_online_signal(teacher, batch, text_rows, hidden.device))
        share.index_fill_(0, text_rows, objective.ce_share)
    kl_weight, ce_weight = weight * (1 - share), weight * share
    loss_fn = DistillLoss(
        beta=objective.beta,
        reduction=reduction,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=IGNORE,
        gradient_filter=objective.gradient_filter,
    )
    return loss_fn(
        hidden,
        head.weight,
        labels,
        teacher=signals or None,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        head_bias=head.bias,
        rows=rows,
    )


@torch.no_grad()
def _online_signal(teacher: PreTrainedModel, batch: dict[str, Any], rows: Tensor, device: torch.device) -> Dense:
    """The full distribution of a teacher at some rows of a batch, without materialising its logits."""
    # A student with more embeddings than its teacher may write an id that the teacher lacks.
    embeddings: Any = teacher.get_input_embeddings()
    ids = batch["input_ids"].clamp(max=len(embeddings.weight) - 1)
    hidden = final_hidden(teacher, ids, batch["position_ids"], batch["lengths"])
    head = head_of(teacher)
    weight, bias = head.weight.to(device), None if head.bias is None else head.bias.to(device)
    return Dense(hidden.to(device)[rows], weight, rows, bias=bias, logit_scale=head.logit_scale, softcap=head.softcap)
