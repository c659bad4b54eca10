"""DistillLoss refuses bad tensors, signals and settings by name."""

import math

import pytest
import torch
from plain_losses import Case

from rbfast.loss.distill_loss import DistillLoss
from rbfast.loss.teacher_signal import Dense, TopK


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), True, torch.ones(9), "2"])
def test_invalid_temperature_of_a_signal_is_refused(temperature):
    case = Case()
    signal = TopK(case.ids, case.logprobs, case.topk_rows, temperature=temperature)
    with pytest.raises(ValueError, match="TopK's temperature must be a positive number"):
        DistillLoss()(case.hidden, case.weight, case.labels, signal)


@pytest.mark.parametrize(("value", "what"), [(-torch.inf, "only -inf"), (torch.nan, "NaN or infinity")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("known", [False, True])
def test_teacher_row_that_is_no_distribution_is_refused(value, what, dtype, beta, known):
    case = Case()
    logits = case.teacher_logits.to(dtype)
    logits[3] = value
    rows = (case.labels != -100).nonzero()[:, 0] if known else None
    owned = ~torch.isin(case.dense_rows, (case.labels == -100).nonzero()[:, 0])
    signal = Dense(logits=logits[owned], rows=case.dense_rows[owned])
    with pytest.raises(ValueError, match=f"Dense teacher's logits holds {what}, which is no distribution"):
        DistillLoss(beta)(case.hidden.to(dtype), case.weight.to(dtype), case.labels, signal, rows=rows)


def test_teacher_row_with_only_ids_unknown_to_the_student_is_refused():
    case = Case()
    known = case.weight.shape[0]
    logits = torch.zeros(len(case.dense_rows), known + 3)
    logits[:, :known] = -torch.inf
    with pytest.raises(ValueError, match="Dense teacher's logits holds only -inf, which is no distribution"):
        DistillLoss()(case.hidden, case.weight, case.labels, Dense(logits=logits, rows=case.dense_rows))


def test_masked_teacher_is_accepted_and_a_nan_student_gives_nan():
    case = Case()
    logits = case.teacher_logits.clone()
    logits[:, 1:] = -torch.inf
    signal = Dense(logits=logits, rows=case.dense_rows)
    assert DistillLoss()(case.hidden, case.weight, case.labels, signal).divergence.isfinite().all()
    assert DistillLoss()(case.hidden * torch.nan, case.weight, case.labels, signal).loss.isnan()


def valid_arguments() -> dict:
    torch.manual_seed(0)
    logprobs, ids = torch.log_softmax(torch.randn(5, 11), 1).topk(3, 1)
    labels = torch.tensor([1, 2, -100, 3, 4])
    return dict(hidden=torch.randn(5, 8), head_weight=torch.randn(11, 8), labels=labels, teacher=TopK(ids, logprobs))


NAN, ROWS, ROW_3 = torch.full((5, 3), torch.nan), torch.tensor([0, 1]), torch.arange(5) != 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g: {"hidden": g["hidden"].unsqueeze(0)}, "flatten"),
        (lambda g: {"hidden": g["hidden"].int()}, "hidden must be float32"),
        (lambda g: {"hidden": g["hidden"].double()}, "both be float64"),
        (lambda g: {"head_weight": g["head_weight"].double()}, "both be float64"),
        (lambda g: {"head_weight": torch.randn(11, 9)}, r"head_weight must be \[V, 8\]"),
        (lambda g: {"head_bias": torch.randn(10)}, "head_bias"),
        (lambda g: {"labels": g["labels"][:4]}, "one per row"),
        (lambda g: {"labels": g["labels"].float()}, "integers"),
        (lambda g: {"labels": g["labels"] > 0}, "integers, got torch.bool"),
        (lambda g: {"labels": g["labels"].where(ROW_3, torch.tensor(-1))}, "got -1 at row 3"),
        (
            lambda g: {"labels": g["labels"].where(ROW_3, torch.tensor(11))},
            r"labels must be in \[0, 11\).*got 11 at row 3",
        ),
        (lambda g: {"head_weight": torch.nn.Linear(8, 11)}, "head_weight must be a tensor, got Linear"),
        (lambda g: {"labels": g["labels"].tolist()}, "labels must be a tensor, got list"),
        (lambda g: {"head_bias": [0.0] * 11}, "head_bias must be a tensor, got list"),
        (lambda g: {"rows": [0, 1]}, r"rows must be int64 \[n\], .* got list"),
        (lambda g: {"kl_weight": torch.ones(4)}, "kl_weight must be a float"),
        (lambda g: {"kl_weight": [1.0] * 5}, r"kl_weight must be a float or a tensor \[T\] = \[5\], got list"),
        (lambda g: {"kl_weight": math.nan}, "kl_weight must be finite, got nan"),
        (lambda g: {"kl_weight": torch.tensor([1, 1, 1, math.nan, 1])}, "kl_weight .* got nan at row 3"),
        (lambda g: {"kl_weight": torch.tensor([1, 1, 1, math.inf, 1])}, "kl_weight must be finite"),
        (lambda g: {"ce_weight": torch.tensor([1, 1, 1, -math.inf, 1])}, "ce_weight .* got -inf at row 3"),
        (lambda g: {"temperature": ROW_3.float()}, "temperature must be positive in every row, got 0.0 at row 3"),
        (lambda g: {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        (lambda g: {"num_items": torch.tensor([4, 4])}, r"num_items must be one number, got a tensor \[2\]; add up"),
        (lambda g: {"num_items": torch.full((4,), 4)}, r"num_items must be one number, got a tensor \[4\]"),
        (lambda g: {"num_items": [4]}, "num_items must be one number, got list"),
        (lambda g: {"teacher": None}, "nothing to learn"),
        (lambda g: {"teacher": 3.0}, "teacher must be"),
        (lambda g: {"teacher": [g["teacher"], g["teacher"]]}, "row 0 has more than one"),
        (lambda g: {"teacher": TopK(g["teacher"].ids, NAN)}, "got NaN.*row 0"),
        (lambda g: {"teacher": TopK(torch.full((5, 1), 11), -torch.ones(5, 1))}, "vocabulary of 11"),
        (lambda g: {"teacher": TopK(g["teacher"].ids - 12, g["teacher"].logprobs)}, "negative"),
        (lambda g: {"teacher": TopK(g["teacher"].ids, g["teacher"].logprobs + 1)}, "more than 1"),
        (lambda g: {"teacher": TopK(g["teacher"].ids[:, :2], g["teacher"].logprobs)}, r"ids \[N, k\]"),
        (lambda g: {"teacher": TopK(g["teacher"].ids.float(), g["teacher"].logprobs)}, "integer ids"),
        (lambda g: {"teacher": TopK(g["teacher"].ids, g["teacher"].ids)}, "and torch.int64"),
        (lambda g: {"teacher": TopK(g["teacher"].ids[:2], g["teacher"].logprobs[:2])}, "2 rows for 5 tokens"),
        (lambda g: {"teacher": TopK(g["teacher"].ids, g["teacher"].logprobs, ROW_3)}, r"rows must be .*torch.bool"),
        (lambda g: {"teacher": TopK(g["teacher"].ids, g["teacher"].logprobs, ROWS)}, r"rows must be \[5\]"),
        (lambda g: {"teacher": TopK(g["teacher"].ids[:2], g["teacher"].logprobs[:2], ROWS + 4)}, "4..5"),
        (lambda g: {"teacher": TopK(g["teacher"].ids[:2], g["teacher"].logprobs[:2], ROWS - 1)}, "got -1..0"),
        (lambda g: {"teacher": TopK(g["teacher"].ids.tolist(), g["teacher"].logprobs)}, "ids of TopK must be a tensor"),
        (lambda g: {"teacher": Dense()}, "Dense needs"),
        (lambda g: {"teacher": Dense(torch.randn(5, 4), torch.nn.Linear(4, 11))}, "weight of Dense must be a tensor"),
        (lambda g: {"teacher": Dense(logits=[[0.0] * 11] * 5)}, "the logits of Dense must be a tensor, got list"),
        (lambda g: {"teacher": Dense(logits=torch.zeros(5, 11), bias=[0.0] * 11)}, "bias of Dense must be a tensor"),
        (lambda g: {"teacher": TopK(g["teacher"].ids, g["teacher"].logprobs, [0])}, "rows of a signal must be a"),
        (lambda g: {"teacher": Dense(logits=torch.randn(1, 5, 11))}, r"Dense needs logits \[N, V'\], got \[1, 5, 11\]"),
        (lambda g: {"teacher": Dense(torch.randn(5, 4), torch.randn(11, 5))}, "Dense needs hidden"),
        (lambda g: {"teacher": Dense(torch.randn(5, 4), logits=torch.randn(5, 11))}, "not both"),
        (
            lambda g: {"teacher": Dense(logits=torch.randn(5, 11), bias=torch.ones(1))},
            r"bias of Dense must be \[V'\] = \[11\]",
        ),
        (lambda g: {"teacher": Dense(logits=torch.randn(5, 11), softcap=0.0)}, "softcap of Dense must be positive"),
        (lambda g: {"teacher": Dense(logits=torch.randn(5, 11), logit_scale=math.inf)}, "logit_scale of Dense must be"),
        (lambda g: {"teacher": Dense(torch.randn(5, 4).double(), torch.randn(11, 4))}, "float64"),
        (
            lambda g: {"head_weight": g["head_weight"].to("meta")},
            "head_weight must be on cpu .* got one on meta, where",
        ),
        (lambda g: {"head_bias": torch.randn(11, device="meta")}, "head_bias must be on cpu"),
        (lambda g: {"labels": g["labels"].to("meta")}, "labels must be on cpu"),
        (
            lambda g: {"teacher": Dense(torch.randn(5, 4, device="meta"), torch.randn(11, 4))},
            "the hidden of Dense must be",
        ),
        (
            lambda g: {"teacher": Dense(torch.randn(5, 4), torch.randn(11, 4, device="meta"))},
            "the weight of Dense must be",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = valid_arguments()
    DistillLoss()(**arguments)
    with pytest.raises(ValueError, match=message):
        DistillLoss()(**{**arguments, **change(arguments)})


@pytest.mark.parametrize(
    "rows, message",
    [
        (torch.arange(4, dtype=torch.int32), r"rows must be int64 \[n\], .* got torch.int32 \[4\]"),
        (torch.ones(5, dtype=torch.bool), r"rows must be int64 \[n\], .* got torch.bool \[5\]"),
        (torch.arange(4)[None], r"rows must be int64 \[n\], .* got torch.int64 \[1, 4\]"),
        (torch.arange(1), "the signals cover 2 rows, but only 1 take part"),
        (torch.arange(0), "the signals cover 2 rows, but only 0 take part"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, message):
    teacher = TopK(torch.ones(2, 1).long(), torch.zeros(2, 1), torch.arange(2))
    with pytest.raises(ValueError, match=message):
        DistillLoss()(**valid_arguments() | {"teacher": teacher}, rows=rows)


@pytest.mark.parametrize(
    "setting",
    [
        {"beta": -0.1},
        {"beta": 1.5},
        {"reduction": "max"},
        {"softcap": 0},
        {"softcap": math.inf},
        {"logit_scale": math.nan},
        {"chunk_rows": 0},
        {"gradient_filter": 1},
    ],
)
def test_bad_settings_are_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        DistillLoss(**setting)
