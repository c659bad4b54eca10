"""DistillLoss against the plain formula in fp64, differentiated by autograd."""

import math
from itertools import permutations

import pytest
import torch
from plain_losses import Case, Near, divergence, relative_error, student_logits
from torch import Tensor

from rbfast.loss.distill_loss import DistillLoss
from rbfast.loss.teacher_signal import Dense, TopK, check_top_k, merge_duplicates, repeated_id
from rbfast.ops import reference


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}, {"logit_scale": 0.25}, {"softcap": 2.0, "logit_scale": 1.7}])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mixed_rows_match_the_plain_formula(beta, reduction, head):
    case = Case()
    inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    truth, divergence_truth, ce_truth = case.plain(*inputs, beta, **head)
    upstream = (
        torch.linspace(0.5, 2, case.T, dtype=torch.float64) if reduction == "none" else torch.tensor(3.0).double()
    )
    count = int((case.labels != -100).sum())
    truth = {"mean": truth.sum() / count, "sum": truth.sum(), "none": truth}[reduction]
    expected = torch.autograd.grad(truth, inputs, upstream)

    loss_fn = DistillLoss(beta, reduction=reduction, chunk_rows=16, **head)
    hidden, weight, bias = inputs
    out = loss_fn(hidden, weight, case.labels, case.signals(), head_bias=bias, **case.arguments())
    assert not (out.divergence.requires_grad or out.ce.requires_grad)
    torch.testing.assert_close(out.loss, truth)
    torch.testing.assert_close(out.divergence, divergence_truth)
    torch.testing.assert_close(out.ce, ce_truth)
    for ours, theirs in zip(torch.autograd.grad(out.loss, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def at_temperature(z, ids, log_p, s, tau, beta):
    """The divergence from log-probs taken at temperature s, in k + 1 buckets by the formula in TopK's docstring."""
    support = torch.zeros_like(z, dtype=torch.bool).scatter(1, ids, True)
    shape = torch.softmax((z.detach() / s).masked_fill(support, -torch.inf), 1)
    unseen = 1 - log_p.exp().sum(1, keepdim=True)
    tail = unseen ** (s / tau) * torch.where(support, 0, shape ** (s / tau)).sum(1, keepdim=True)
    teacher = torch.cat([log_p.exp() ** (s / tau), tail], 1)
    student = torch.log_softmax(z / tau, 1)
    rest = student.masked_fill(support, -torch.inf).logsumexp(1, keepdim=True)
    return divergence(
        (teacher / teacher.sum(1, keepdim=True)).log(), torch.cat([student.gather(1, ids), rest], 1), beta
    )


@pytest.mark.parametrize("head", [{}, {"softcap": 2.0, "logit_scale": 1.7}])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trains_head", [False, True])
def test_log_probs_at_a_temperature_match_the_plain_formula_in_mixed_rows(beta, reduction, head, trains_head):
    """Log-probs at temperatures 2, 0.6 and 1, full distributions over more ids, and rows of text."""
    case = Case()
    hidden, weight, bias = (x.clone().requires_grad_(i == 0 or trains_head) for i, x in enumerate(case.inputs()))
    inputs = [hidden, weight, bias] if trains_head else [hidden]
    parts = [(2.0, slice(0, 4)), (0.6, slice(4, 7)), (1.0, slice(7, 9))]
    wider = torch.cat([case.teacher_logits, case.teacher_logits[:, :5]], 1)
    signals = [TopK(case.ids[i], case.logprobs[i], case.topk_rows[i], temperature=s) for s, i in parts]
    signals.append(Dense(logits=wider, rows=case.dense_rows))

    z = student_logits(hidden, weight, bias, **head)
    tau, d = case.tau.unsqueeze(1), torch.zeros(case.T, dtype=torch.float64)
    for s, i in parts:
        rows = case.topk_rows[i]
        d = d.index_put((rows,), at_temperature(z[rows], case.ids[i], case.logprobs[i], s, tau[rows], beta))
    rows = case.dense_rows
    log_p, log_q = (torch.log_softmax(x / tau[rows], 1) for x in (case.teacher_logits, z[rows]))
    d = d.index_put((rows,), divergence(log_p, log_q, beta)) * (case.labels != -100)
    ce = -torch.log_softmax(z, 1).gather(1, case.labels.clamp_min(0).unsqueeze(1)).squeeze(1) * (case.labels != -100)
    truth = case.w * case.tau**2 * d + case.a * ce
    truth = truth.sum() / int((case.labels != -100).sum()) if reduction == "mean" else truth
    upstream = torch.ones_like(truth)

    loss_fn = DistillLoss(beta, reduction=reduction, chunk_rows=32, **head)
    out = loss_fn(hidden, weight, case.labels, signals, head_bias=bias, **case.arguments())
    for ours, theirs in ((out.loss, truth), (out.divergence, d), (out.ce, ce)):
        torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(truth, inputs, upstream)
    for ours, theirs in zip(torch.autograd.grad(out.loss, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gap", [1.0, 0.02])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_log_probs_already_at_the_temperature_are_used_unchanged(isa, beta, gap, ce_weight):
    """What TRL's served teachers send: log softmax(y / 2), for a loss at temperature 2; in bf16, against fp64."""
    case, tau = Near(gap), 2.0
    log_p, ids = torch.log_softmax(case.log_p / tau, 1).topk(case.K, 1)
    z = case.exact[0] @ case.exact[1].T
    student = torch.log_softmax(z / tau, 1)
    rest = student.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    sent = torch.cat([log_p, torch.log1p(-log_p.exp().sum(1, keepdim=True))], 1)
    d = divergence(sent, torch.cat([student.gather(1, ids), rest], 1), beta)
    ce = torch.nn.functional.cross_entropy(z, case.labels, reduction="none")
    truth = (tau**2 * d + ce_weight * ce).sum()
    expected = torch.autograd.grad(truth, case.exact)

    signal = TopK(ids, log_p.float(), temperature=tau)
    out = DistillLoss(beta, reduction="sum")(
        case.hidden, case.weight, case.labels, signal, ce_weight=ce_weight, temperature=tau
    )
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-3) and (out.divergence >= 0).all()
    for ours, theirs in zip(torch.autograd.grad(out.loss, (case.hidden, case.weight)), expected, strict=True):
        assert relative_error(ours, theirs) < 4e-3  # dz and the gradients are rounded to bf16
    wrong = DistillLoss(beta)(case.hidden, case.weight, case.labels, TopK(ids, log_p.float()), temperature=tau)
    assert abs(wrong.divergence.sum().item() - d.sum().item()) > 0.1 * d.sum().item()


def test_bits_at_a_temperature_do_not_depend_on_chunks():
    case = Near(0.5)
    log_p, ids = torch.log_softmax(case.log_p / 2, 1).topk(case.K, 1)
    results = []
    for rows in (32, 64):
        out = DistillLoss(chunk_rows=rows)(
            case.hidden,
            case.weight,
            case.labels,
            TopK(ids, log_p.float(), temperature=2.0),
            ce_weight=0.3,
            temperature=2.0,
        )
        results.append((out.divergence, out.ce, torch.autograd.grad(out.loss, case.hidden)[0]))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_no_gradient_is_computed_under_no_grad(monkeypatch):
    case = Case()
    inputs = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    monkeypatch.setattr("rbfast.ops.reference.head_backward_", lambda *_: pytest.fail("a gradient of hidden"))
    monkeypatch.setattr("rbfast.ops.reference.head_grad_", lambda *_: pytest.fail("a gradient of the head"))
    written, rows = [], reference.divergence_rows_
    monkeypatch.setattr(reference, "divergence_rows_", lambda z, dz, *rest: written.append(dz) or rows(z, dz, *rest))
    with torch.no_grad():
        out = DistillLoss()(*inputs[:2], case.labels, case.signals(), head_bias=inputs[2], **case.arguments())
    assert not out.loss.requires_grad and float(out.loss) > 0 and set(written) == {None}


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradcheck(beta):
    case = Case()
    inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # At temperature 1, as at others the teacher's tail follows the student, yet counts as a constant.
        return DistillLoss(beta, softcap=3.0)(
            hidden, weight, case.labels, case.signals(), kl_weight=case.w, ce_weight=case.a, head_bias=bias
        ).loss

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("gap", [1.0, 0.1, 0.02, 0.001])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["dense", "top-k"])
def test_gradient_error_is_at_most_0_3_percent_near_the_teacher(isa, kind, beta, gap):
    near = Near(gap)
    inputs = (near.hidden, near.weight)
    truth = near.plain(kind, beta)
    expected = torch.autograd.grad(truth.mean(), near.exact)
    out = DistillLoss(beta)(*inputs, near.labels, near.signal(kind))
    for ours, theirs in zip(torch.autograd.grad(out.loss, inputs), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, theirs) <= 0.003
    assert bool((out.divergence >= 0).all())
    assert relative_error(out.divergence, truth.detach()) <= 0.003


@pytest.mark.parametrize("gap", [1.0, 0.02, 0.001])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradient_error_under_a_shared_head(isa, beta, gap):
    """Logits of size 4 in fp32: two separate products would be off by 0.3% of a gap of 0.001."""
    T, H, V = 37, 64, 1003
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(T, H, generator=g), 4 / H**0.5 * torch.randn(V, H, generator=g)
    theirs, labels = hidden + gap / 4 * torch.randn(T, H, generator=g), torch.randint(V, (T,), generator=g)
    results = []
    for dtype in (torch.float32, torch.float64):
        x, head = hidden.to(dtype).requires_grad_(), weight.to(dtype)
        teacher = Dense(theirs, head) if dtype == torch.float32 else Dense(logits=theirs.double() @ head.T)
        out = DistillLoss(beta, chunk_rows=32)(x, head, labels, teacher)
        results.append((torch.autograd.grad(out.loss, x)[0], out.divergence))
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) <= 0.001


@pytest.mark.parametrize("view", [lambda head: head[:5], lambda head: head.T])
def test_teacher_head_that_views_the_students_memory_is_not_shared(view):
    torch.manual_seed(0)
    hidden, theirs, weight = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8, 8)
    labels = torch.zeros(6, dtype=torch.int64)
    teachers = Dense(theirs, view(weight)), Dense(theirs, view(weight).clone())
    assert torch.equal(*(DistillLoss()(hidden, weight, labels, teacher).divergence for teacher in teachers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_16_bit_head_does_not_round_the_hidden_difference(dtype):
    torch.manual_seed(0)
    hidden, theirs, weight = (torch.randn(n, 8).to(dtype) for n in (6, 6, 37))
    labels = torch.zeros(6, dtype=torch.int64)
    teachers = Dense(theirs, weight), Dense(theirs, weight.clone())
    assert torch.equal(*(DistillLoss()(hidden, weight, labels, teacher).divergence for teacher in teachers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_chunks_threads_or_packing(isa, dtype, threads):
    T, H, V = 100, 40, 301
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype)
    bias, labels = torch.randn(V, generator=g), torch.randint(V, (T,), generator=g)
    labels[::10] = -100
    logprobs, ids = torch.log_softmax(torch.randn(40, V, generator=g), 1).topk(5, 1)
    logits, tau = torch.randn(35, V, generator=g), 0.5 + torch.rand(T, generator=g)

    def run(chunk_rows: int | None, order: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in (hidden[order], weight, bias)]
        place = order.argsort()
        teacher = [TopK(ids, logprobs, place[:40]), Dense(logits=logits, rows=place[40:75])]
        out = DistillLoss(0.3, chunk_rows=chunk_rows)(
            *inputs[:2], labels[order], teacher, ce_weight=0.5, temperature=tau[order], head_bias=inputs[2]
        )
        d_hidden, d_weight, d_bias = torch.autograd.grad(out.loss, inputs)
        return [out.loss.detach(), out.divergence[place], out.ce[place], d_hidden[place], d_weight, d_bias]

    truth = run(None, torch.arange(T))
    for count, chunk_rows in ((1, 1), (2, 7), (3, 1000)):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(chunk_rows, torch.arange(T)), truth, strict=True))
    # In another packing order the head's gradient sums the same terms in another order; all else is bitwise equal.
    shuffled = run(7, torch.randperm(T, generator=g))
    assert all(torch.equal(a, b) for a, b in zip(shuffled[:4], truth[:4], strict=True))
    torch.testing.assert_close(shuffled[4:], truth[4:])


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_hidden_and_head_of_two_dtypes_keep_the_precision_of_each(isa, dtypes):
    near = Near(1.0)
    leaves = (near.hidden, near.weight, torch.linspace(-1, 1, near.V))
    kinds = [getattr(torch, name) for name in (*dtypes, "bfloat16")]
    inputs = [x.detach().to(kind).requires_grad_() for x, kind in zip(leaves, kinds, strict=True)]
    gradients = []
    for given in (inputs, [x.detach().double().requires_grad_() for x in inputs]):
        out = DistillLoss()(*given[:2], near.labels, near.signal("top-k"), ce_weight=0.3, head_bias=given[2])
        gradients.append(torch.autograd.grad(out.loss, given))
    for ours, exact in zip(*gradients, strict=True):
        assert relative_error(ours, exact) <= 8 * torch.finfo(ours.dtype).eps


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_head_trained_in_bf16_has_the_gradient_of_the_plain_formula(isa, reduction):
    near = Near(1.0)
    upstream = torch.linspace(0.5, 2, near.T) if reduction == "none" else torch.tensor(3.0)
    truth = near.plain("top-k", 0.0)
    truth = {"mean": truth.mean(), "sum": truth.sum(), "none": truth}[reduction]
    inputs = (near.hidden, near.weight)
    expected = torch.autograd.grad(truth, near.exact, upstream.double())
    out = DistillLoss(reduction=reduction)(*inputs, near.labels, near.signal("top-k"))
    for ours, theirs in zip(torch.autograd.grad(out.loss, inputs, upstream), expected, strict=True):
        assert relative_error(ours, theirs) <= 0.003


def test_loss_is_bitwise_independent_of_the_order_of_rows():
    hidden, weight, labels = torch.ones(3, 8), torch.eye(8), torch.zeros(3, dtype=torch.int64)
    orders = permutations(torch.tensor([1.0, 1e20, -1e20]))
    losses = {DistillLoss()(hidden, weight, labels, ce_weight=torch.stack(order)).loss.item() for order in orders}
    assert len(losses) == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_agrees_and_does_not_overwrite_the_first(reduction):
    case = Case()
    inputs = [x.requires_grad_() for x in case.inputs()]
    out = DistillLoss(reduction=reduction)(
        *inputs[:2], case.labels, case.signals(), head_bias=inputs[2], **case.arguments()
    )
    first = torch.autograd.grad(3 * out.loss.sum(), inputs, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3 * out.loss.sum(), inputs)
    assert all(map(torch.equal, first, kept))
    torch.testing.assert_close(second, first)


def test_num_items_divides_the_mean():
    case = Case()
    arguments = (case.hidden, case.weight, case.labels, case.signals())
    total = DistillLoss(reduction="sum")(*arguments).loss
    torch.testing.assert_close(DistillLoss()(*arguments, num_items=50).loss, total / 50)
    torch.testing.assert_close(DistillLoss()(*arguments, num_items=torch.tensor(50)).loss, total / 50)
    weighted_total, items = DistillLoss(reduction="sum")(*arguments, **case.arguments()).loss, torch.tensor(50)
    torch.testing.assert_close(DistillLoss()(*arguments, **case.arguments(), num_items=items).loss, weighted_total / 50)
    with pytest.raises(ValueError, match="num_items"):
        DistillLoss(reduction="sum")(*arguments, num_items=50)


@pytest.mark.parametrize("as_tensor", [torch.tensor, lambda x: torch.full((48,), x)])
def test_weights_given_as_numbers_or_tensors_agree_bitwise(as_tensor):
    near, numbers = Near(0.1), {"kl_weight": 0.5, "ce_weight": 0.25, "temperature": 2.0}
    results = []
    for parameters in (numbers, {name: as_tensor(number) for name, number in numbers.items()}):
        out = DistillLoss(reduction="sum")(near.hidden, near.weight, near.labels, near.signal("top-k"), **parameters)
        results.append((out.loss, out.divergence, out.ce, *torch.autograd.grad(out.loss, (near.hidden, near.weight))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("labels", [torch.full((5,), -100), torch.zeros(0, dtype=torch.int64)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_is_zero_with_zero_gradients(labels, reduction):
    hidden = torch.randn(len(labels), 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    teacher = Dense(logits=torch.randn(len(labels), 11))
    out = DistillLoss(reduction=reduction)(hidden, weight, labels, teacher, ce_weight=1.0)
    out.loss.sum().backward()
    assert out.loss.sum() == 0
    for items in (0, torch.tensor(0)) if reduction == "mean" else ():
        assert DistillLoss()(hidden, weight, labels, teacher, num_items=items).loss == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("student, teacher", [(37, 29), (29, 37)])
def test_vocabularies_of_different_size_are_cut_to_the_shared_ids(student, teacher):
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8).double().requires_grad_(), torch.randn(student, 8).double()
    logits = torch.randn(6, teacher).double()
    out = DistillLoss()(hidden, weight, torch.zeros(6, dtype=torch.int64), Dense(logits=logits))
    shared = min(student, teacher)
    log_p, log_q = (torch.log_softmax(x[:, :shared], 1) for x in (logits, hidden @ weight.T))
    truth = divergence(log_p, log_q, 0.0).mean()
    torch.testing.assert_close(out.loss, truth)
    expected = torch.autograd.grad(truth, hidden)
    torch.testing.assert_close(torch.autograd.grad(out.loss, hidden), expected)


def test_dense_teacher_uses_its_own_head():
    torch.manual_seed(0)
    student, labels = (torch.randn(6, 8), torch.randn(11, 8)), torch.zeros(6, dtype=torch.int64)
    theirs, head = (torch.randn(6, 8), torch.randn(11, 8), torch.randn(11)), {"logit_scale": 0.7, "softcap": 1.5}
    teachers = Dense(*theirs[:2], bias=theirs[2], **head), Dense(logits=student_logits(*theirs, **head))
    torch.testing.assert_close(*(DistillLoss()(*student, labels, teacher).divergence for teacher in teachers))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_teacher_and_weights_get_no_gradient(reduction):
    torch.manual_seed(0)
    hidden, weight, *theirs = (torch.randn(*n, requires_grad=True) for n in ((8, 4), (11, 4), (4, 4), (11, 4), (11,)))
    logits, logprobs = torch.randn(2, 11, requires_grad=True), torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    signals = [
        Dense(*theirs[:2], bias=theirs[2], rows=torch.arange(4)),
        Dense(logits=logits, rows=torch.arange(4, 6)),
        TopK(torch.tensor([[3], [4]]), logprobs, torch.arange(6, 8)),
    ]
    weights = {name: torch.rand(8, requires_grad=True) for name in ("kl_weight", "ce_weight", "temperature")}
    out = DistillLoss(reduction=reduction)(hidden, weight, torch.arange(8), signals, **weights)
    out.loss.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert all(x.grad is None for x in (*theirs, logits, logprobs, *weights.values()))


def test_padding_and_duplicates_do_not_change_a_top_k_signal():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 8), torch.randn(37, 8)
    logprobs, ids = torch.log_softmax(torch.randn(3, 37), 1).topk(4, 1)
    half = logprobs[:, :1] + math.log(0.5)
    padding = torch.tensor([[-1], [36], [-1]])
    messy_ids = torch.cat([ids[:, :1], padding, ids], 1)
    messy_logprobs = torch.cat([half, torch.tensor([[0.0], [-torch.inf], [0.0]]), half, logprobs[:, 1:]], 1)
    labels = torch.zeros(3, dtype=torch.int64)
    clean = DistillLoss()(hidden, weight, labels, TopK(ids, logprobs))
    messy = DistillLoss()(hidden, weight, labels, TopK(messy_ids, messy_logprobs))
    torch.testing.assert_close(messy.divergence, clean.divergence)


def test_repeated_ids_in_a_wide_row_are_merged():
    torch.manual_seed(0)
    rows, k = 64, 300
    ids = torch.randint(-1, 20, (rows, k))
    logprobs = torch.randn(rows, k, dtype=torch.float64).log_softmax(1).masked_fill(ids < 0, -torch.inf)
    given = ids.clone(), logprobs.clone()
    merged = merge_duplicates(TopK(ids, logprobs))
    assert torch.equal(ids, given[0]) and torch.equal(logprobs, given[1])
    expected = torch.zeros(rows, 20, dtype=torch.float64).scatter_add_(1, ids.clamp(min=0), logprobs.exp())
    masses = torch.zeros_like(expected).scatter_add_(1, merged.ids.clamp(min=0), merged.logprobs.exp())
    torch.testing.assert_close(masses, expected)
    assert repeated_id(merged.ids) == -1 and torch.equal(merged.ids[:, 0], ids[:, 0])
    assert torch.equal(merged.ids == -1, merged.logprobs == -torch.inf)


@pytest.mark.parametrize("number", [0, 1])
def test_check_top_k_merges_repeated_ids(number):
    checked = check_top_k(TopK(torch.tensor([[number, number]]), torch.tensor([[0.25, 0.5]]).log()))
    assert checked.ids.tolist() == [[number, -1]]
    torch.testing.assert_close(checked.logprobs.exp(), torch.tensor([[0.75, 0.0]]))
    with pytest.raises(ValueError, match="add up to more than 1"):
        check_top_k(TopK(torch.tensor([[number, 2]]), torch.tensor([[0.75, 0.5]]).log()))


def test_signal_without_ids_works_beside_one_with_duplicates():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(4, 8), torch.randn(11, 8), torch.arange(4)
    empty = TopK(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0), torch.tensor([0, 1]))
    outs = []
    for ids, p in (([[0, 0]], [[0.2, 0.3]]), ([[0]], [[0.5]])):
        messy = TopK(torch.tensor(ids), torch.tensor(p).log(), torch.tensor([2]))
        outs.append(DistillLoss()(hidden, weight, labels, [empty, messy]).divergence)
    torch.testing.assert_close(*outs)


def test_probabilities_slightly_over_one_are_scaled_back():
    logprobs = torch.tensor([[0.7, 0.302]]).log()
    hidden, weight = torch.zeros(1, 8), torch.zeros(37, 8)
    out = DistillLoss()(hidden, weight, torch.tensor([0]), TopK(torch.tensor([[3, 5]]), logprobs))
    p = torch.tensor([0.7, 0.302]) / 1.002
    torch.testing.assert_close(out.divergence[0], (p * (p * 37).log()).sum())


def test_values_are_the_same_without_gradients_and_under_autocast():
    case = Case()
    hidden, weight = case.hidden.float().requires_grad_(), case.weight.float()
    arguments = (case.labels, case.signals())
    out = DistillLoss()(hidden, weight, *arguments)
    with torch.no_grad():
        silent = DistillLoss()(hidden, weight, *arguments)
    assert not silent.loss.requires_grad
    assert torch.equal(silent.divergence, out.divergence) and torch.equal(silent.ce, out.ce)
    double = DistillLoss()(*case.inputs()[:2], *arguments)
    with torch.autocast("cpu", torch.bfloat16):  # which casts no fp64, as in F.linear
        assert torch.equal(DistillLoss()(*case.inputs()[:2], *arguments).loss, double.loss)

    narrow = DistillLoss()(hidden.bfloat16(), weight.bfloat16(), *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        cast = DistillLoss()(hidden, weight, *arguments)
    assert torch.equal(cast.loss, narrow.loss)
    cast.loss.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_labels_ids_and_rows_may_be_any_integers():
    case, losses = Case(), []
    for dtype in (torch.int64, torch.int32):
        signal = TopK(case.ids.to(dtype), case.logprobs, case.topk_rows.to(dtype))
        losses.append(DistillLoss()(case.hidden.float(), case.weight.float(), case.labels.to(dtype), signal).loss)
    assert torch.equal(*losses)


def test_default_device_changes_nothing():
    case = Case()
    arguments = (case.hidden.float(), case.weight.float(), case.labels, case.signals())
    plain = DistillLoss()(*arguments)
    with torch.device("meta"):  # stands for a GPU
        assert torch.equal(DistillLoss()(*arguments).loss, plain.loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction):
    case = Case()
    hidden = case.hidden.float().requires_grad_()
    loss = DistillLoss(reduction=reduction)(hidden, case.weight.float(), case.labels, case.signals()).loss.sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (loss + gradient.norm()).backward()
