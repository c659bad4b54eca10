"""divergence_rows_ against the reference in fp64 on every instruction set, and at the extremes."""

from dataclasses import replace

import pytest
import torch
from row_cases import (
    BETAS,
    KINDS,
    PARTS_OF_A_HEAD,
    SIZES,
    TAUGHT,
    assert_close_to_fp64,
    assert_masked,
    assert_no_rows,
    assert_no_tail,
    assert_reverse_kl_floors_a_teacher_of_zero,
    assert_tail,
    below_one_without_a_tail,
    certain,
    cold,
    extreme,
    make,
    make_with_part_of_a_head,
    masked,
    masked_label,
    no_rows,
    over_one,
    taught_rows,
    tiny_tail,
    with_factors,
    without_values,
)

from rbfast import ops
from rbfast.ops import reference

pytestmark = pytest.mark.usefixtures("isa")


@taught_rows
def test_rows_with_a_teacher_match_fp64(kind, beta, size, gap, head):
    rows = make(kind, *size, gap=gap, head=head, beta=beta)
    assert_close_to_fp64(rows)
    assert_close_to_fp64(replace(rows, ce_weight=torch.zeros(9)))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_text_rows_match_fp64(size, head):
    rows = make("text", *size, head=head)
    assert_close_to_fp64(rows)
    assert not rows.run()[0].any()


@pytest.mark.parametrize("part", PARTS_OF_A_HEAD)
@pytest.mark.parametrize("kind", KINDS)
def test_head_with_a_single_option_matches_fp64(kind, part):
    assert_close_to_fp64(make_with_part_of_a_head(kind, part))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_place_of_the_logits(kind):
    rows = make(kind, 1000, 1000, head=True)
    *losses, dz = rows.run()
    for dtype in (torch.float32, torch.bfloat16):
        logits = rows.logits.clone()
        place = logits.view(dtype)[:, :1000]
        again = ops.divergence_rows_(logits, place, *rows.signals())
        assert all(map(torch.equal, again, losses))
        assert torch.equal(place, dz.to(dtype))
    silent = ops.divergence_rows_(rows.logits.clone(), None, *rows.signals())
    assert all(map(torch.equal, silent, losses))


@pytest.mark.parametrize("pair", [with_factors, without_values])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_match_values_multiplied_by_them_bitwise(kind, pair):
    ours, spelt = pair(kind)
    assert all(map(torch.equal, ours.run(), spelt.run()))
    for actual, expected in zip(ours.double().run(reference), spelt.double().run(reference), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_do_not_depend_on_its_position(kind, threads):
    rows = make(kind, 1000, 1000)
    truth = rows.run()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for count, part in ((1, order), (3, order), (2, order[:1])):
        threads(count)
        assert all(torch.equal(ours, whole[part]) for ours, whole in zip(rows.at(part).run(), truth, strict=True))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", TAUGHT)
def test_extreme_logits(kind, beta):
    rows = extreme(kind, beta)
    assert_close_to_fp64(rows)
    assert all(bool(result.isfinite().all()) for result in rows.run())


@pytest.mark.parametrize("beta", BETAS)
def test_low_temperature_matches_fp64(beta):
    assert_close_to_fp64(cold(beta))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_peaked_teacher_and_masked_logits_stay_finite(beta):
    for kind in TAUGHT:
        assert_close_to_fp64(certain(kind, beta))
    assert_masked(masked(beta).run())


@pytest.mark.parametrize("beta", BETAS)
def test_probabilities_that_do_not_add_up_to_1_are_scaled(beta):
    assert_close_to_fp64(over_one(beta))
    assert_close_to_fp64(below_one_without_a_tail(beta))


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_of_equal_distributions_is_not_negative(beta):
    for V in (2, 3, 5, 8, 50):
        assert bool((make("top-k", V, gap=0.0, k=2, beta=beta).run()[0] >= 0).all())


def test_a_masked_label_without_a_weight_leaves_the_loss_finite():
    for kind in KINDS:
        divergence, _, loss, dz = masked_label(kind).run()
        assert all(bool(x.isfinite().all()) for x in (divergence, loss, dz))
        assert_close_to_fp64(masked_label(kind))


def test_masked_ids_of_the_teacher_without_a_weight_leave_the_loss_finite():
    for kind in TAUGHT:
        rows = replace(make(kind, 50, 50), kl_weight=torch.zeros(9))
        likely = rows.logits.argmax(1, keepdim=True) if rows.ids is None else rows.ids[:, :1]
        rows = replace(rows, logits=rows.logits.scatter(1, likely, -torch.inf), labels=(likely[:, 0] + 1) % 50)
        assert all(bool(x.isfinite().all()) for x in rows.run())
        assert_close_to_fp64(rows)


@pytest.mark.parametrize("beta", BETAS)
def test_a_tail_of_only_minus_inf_has_no_gradient(beta):
    assert_no_tail(ops, beta)
    assert_no_tail(reference, beta)


def test_reverse_kl_floors_a_teacher_of_zero():
    assert_reverse_kl_floors_a_teacher_of_zero()


@pytest.mark.parametrize("student_tail", [1e-9, 1e-30])
def test_a_tiny_tail_of_the_student_keeps_its_gradient(student_tail):
    rows = tiny_tail(student_tail)
    assert_close_to_fp64(rows)
    assert_tail(rows.run()[-1])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind, beta):
    rows = replace(make(kind, 50, 50), beta=beta)
    rows.logits[0, 20] = torch.nan
    divergence, ce, loss, dz = rows.run()
    for values in (ce, loss, dz, *([] if kind == "text" else [divergence])):
        assert bool(values[0].isnan().all()) and not values[1:].isnan().any()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_teacher_row_of_only_minus_inf_is_nan(beta):
    rows = make("dense", 50, 50, beta=beta)
    rows.teacher[4] = -torch.inf
    for ours, exact in zip(rows.run(), rows.double().run(reference), strict=True):
        torch.testing.assert_close(ours.double(), exact, equal_nan=True, rtol=1e-4, atol=1e-5)
    divergence, ce, _, dz = rows.run()
    assert torch.equal(divergence.isnan(), torch.arange(9) == 4) and bool(ce.isfinite().all())
    assert bool(dz[4].isnan().all()) and bool(dz[:4].isfinite().all()) and bool(dz[5:].isfinite().all())


def test_bad_arguments_are_refused_by_name():
    rows = make("top-k")
    for change, message in (
        ({"labels": rows.labels + 37}, r"labels must be in \[0, 37\)"),
        ({"labels": rows.labels.int()}, "labels must be Long"),
        ({"labels": rows.labels.new_empty(9, 0)}, "labels must have 1 dimension, got 2"),
        ({"temperature": torch.ones(9, 2)}, "temperature must have 1 dimension, got 2"),
        ({"kl_weight": rows.kl_weight[:4]}, "kl_weight must be Float with one entry per row"),
        ({"ids": rows.ids + 37}, r"ids must be in \[-1, 37\)"),
        ({"bias": torch.zeros(36)}, r"bias must be float32 \[37\]"),
        ({"ids": rows.ids[:, 1:]}, r"ids and logprobs must both be \[T, k\]"),
        ({"ids": None, "teacher": torch.zeros(8, 37)}, "teacher must be Float with one entry per row"),
        ({"ids": None, "teacher": torch.zeros(9, 0)}, "teacher must have at least one column"),
        ({"ids": None, "teacher": torch.zeros(37, 9).T}, r"teacher must be \[9, columns\] with dense rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            replace(rows, **change).run()
    for dz in (torch.zeros(9, 36), torch.zeros(9, 38), torch.zeros(9, 37).half()):
        with pytest.raises(RuntimeError, match="dz must be float32 or bfloat16, of the shape of logits"):
            rows.run(dz=dz)
    with pytest.raises(RuntimeError, match=r"dz must be \[9, columns\] with dense rows"):
        rows.run(dz=torch.zeros(37, 9).T)
    with pytest.raises(RuntimeError, match="logits is an expanded view, which cannot be written to: clone it"):
        ops.divergence_rows_(torch.zeros(1, 37).expand(9, 37), None, *rows.signals())
    with pytest.raises(RuntimeError, match="dz is an expanded view, which cannot be written to: clone it"):
        rows.run(dz=torch.zeros(1, 37).expand(9, 37))
    memory = torch.zeros(10, 37)
    for dz in (memory[1:], memory.view(torch.bfloat16).view(20, 37)[:9]):
        with pytest.raises(RuntimeError, match="dz may overlap logits only if each row starts where its logits start"):
            ops.divergence_rows_(memory[:9], dz, *rows.signals())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_may_directly_adjoin_the_logits_in_memory(kind):
    rows = make(kind)
    *_, expected = rows.run()
    for logits, dz in (torch.zeros(18, 37).split(9), torch.zeros(18, 37).split(9)[::-1]):
        logits.copy_(rows.logits)
        ops.divergence_rows_(logits, dz, *rows.signals())
        assert torch.equal(dz, expected)


def test_no_rows():
    assert_no_rows(no_rows().run())


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    rows = make(kind, head=True)
    torch.library.opcheck(ops.divergence_rows_, (rows.logits, torch.zeros(9, 37), *rows.signals()))
