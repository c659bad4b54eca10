"""The guide as a state machine: ends of thinking, interventions, probes, options and boundaries."""

from itertools import pairwise

import pytest
from guide_streams import drive, tokens_of
from guides import SHORT, make_guide

from rbfast.inference.boundary import Boundary
from rbfast.inference.guide import OTHER, VERIFY, WAIT, WRAP_UP
from rbfast.inference.state import CLOSE, STABLE, GuideState, Phase
from rbfast.inference.tokens import Vocabulary


def test_number_cut_off_by_the_budget_is_struck_whole():
    guide = make_guide(budget=60, reserve=36, **SHORT)
    row, _ = drive(guide, tokens_of(["x = 123456789012345678901234567890"]))
    [event] = row.state.events
    assert event.kind == WRAP_UP and event.struck == "12345678901234567890"[: len(event.struck)]
    assert row.state.thinking == "x = \n\nStop.\n</think>"


def test_open_fence_is_closed_and_its_code_kept():
    guide = make_guide(budget=100, reserve=40, **SHORT)
    row, _ = drive(guide, tokens_of(["```py\n", "y = x + 1\n" * 9]))
    assert row.state.thinking.startswith("```py\ny = x + 1\ny = x + 1\n")
    assert "\n```\nStop.\n</think>" in row.state.thinking


def test_early_end_becomes_wait_up_to_the_cap():
    guide = make_guide(budget=300, minimum=200, cap=2, finish="</answer>", **SHORT)
    row, _ = drive(guide, tokens_of(["First = 12</think>", "Then</think>", "Last</think>", "42</answer>"]))
    assert [event.kind for event in row.state.events] == [WAIT, WAIT]
    assert row.state.events[0].struck == "</think>"
    assert row.state.thinking == "First = 12\n\nWait.\nThen\n\nWait.\nLast</think>"
    assert row.state.answer == "42</answer>" and row.state.finished


def test_early_end_inside_a_formula_strikes_the_formula():
    row, _ = drive(make_guide(budget=300, minimum=100, **SHORT), tokens_of(["so $x + 1</think>", "Then"]))
    assert row.state.events[0].struck == "$x + 1</think>" and row.state.thinking.startswith("so \n\nWait.\nThen")


def test_struck_text_does_not_count_towards_the_minimum():
    row = GuideState(make_guide(budget=300, minimum=40, **SHORT), len)
    row.write("word word", tokens=10)
    assert row.write("</think>", tokens=25).kind == WAIT
    assert row.write("</think>", tokens=1).kind == WAIT  # only 10 tokens and the first insertion count
    assert row.write("", tokens=1, ended=True).kind == WAIT


@pytest.mark.parametrize(("tokens", "minimum", "waits"), [(13, 20, True), (14, 20, False), (13, 13, False)])
def test_early_end_waits_below_the_minimum_if_a_token_is_left(tokens, minimum, waits):
    row = GuideState(make_guide(budget=60, reserve=40, minimum=minimum, **SHORT), len)
    order = row.write("word</think>", tokens=tokens)
    assert (order is not None) == waits and row.left > 0
    assert row.phase is (Phase.THINK if waits else Phase.ANSWER)


def test_minimum_may_equal_maximum():
    row = GuideState(make_guide(budget=300, minimum=100, maximum=100, **SHORT), len)
    assert row.write("word</think>", tokens=50).kind == WAIT
    assert row.write("word ", tokens=row.left).kind == WRAP_UP


@pytest.mark.parametrize(("tokens", "ends"), [(59, False), (60, True)])
def test_sentence_end_near_the_limit_ends_the_thinking(tokens, ends):
    row = GuideState(make_guide(budget=104, reserve=40, **SHORT), len)
    order = row.write("A sentence. ", tokens=tokens)
    assert (order is not None and order.kind == WRAP_UP and order.strike == 0) == ends


@pytest.mark.parametrize(
    ("maximum", "tokens", "ends"),
    [(None, 63, False), (None, 64, True), (30, 29, False), (30, 30, True), (99, 63, False)],
)
def test_thinking_may_use_its_last_token(maximum, tokens, ends):
    row = GuideState(make_guide(budget=104, reserve=40, maximum=maximum, **SHORT), len)
    order = row.write("word ", tokens=tokens)
    assert (order is not None and order.kind == WRAP_UP) == ends


@pytest.mark.parametrize(("budget", "thinking"), [(400, 300), (1024, 768), (4096, 3840)])
def test_reserve_is_a_quarter_of_the_budget_up_to_256_tokens(budget, thinking):
    assert GuideState(make_guide(budget=budget), len).left == thinking


@pytest.mark.parametrize(
    ("cap", "cooldown", "noticed", "kind"), [(4, 0, 3, OTHER), (4, 64, 64, OTHER), (0, 64, 3, WRAP_UP)]
)
def test_loop_without_a_sentence_end_is_interrupted_after_32_tokens(cap, cooldown, noticed, kind):
    row = GuideState(make_guide(budget=2000, cap=cap, cooldown=cooldown, loop_length=2, loop_times=2, **SHORT), len)
    orders = [row.write("a ") for _ in range(noticed + 32)]
    assert orders[:-1] == [None] * (noticed + 31) and orders[-1].kind == kind


def test_loop_count_restarts_after_another_approach():
    row = GuideState(make_guide(budget=2000, cooldown=0, loop_length=2, loop_times=2, **SHORT), len)
    for _ in range(2):
        orders = [row.write("a ") for _ in range(3 + 32)]
        assert orders[:-1] == [None] * 34 and orders[-1].kind == OTHER


def test_intervention_cancels_a_pending_one():
    row = GuideState(make_guide(budget=2000, minimum=200, cooldown=3, loop_length=2, loop_times=2, **SHORT), len)
    assert [row.write("a ") for _ in range(3)] == [None] * 3  # another approach is due
    assert row.write("</think>").kind == WAIT
    assert row.write("A sentence. ") is None


def test_without_interventions_the_finish_text_ends_nothing():
    row = GuideState(make_guide(budget=300, finish="</answer>", interventions=()), len)
    row.write("So</think>", tokens=3)
    assert row.write("4</answer>", tokens=3) is None and row.phase is Phase.ANSWER


def test_end_without_an_answer_prompts_for_one():
    guide = make_guide(budget=200, close="<answer>", finish="</answer>", **SHORT)
    row, _ = drive(guide, tokens_of(["It is 42", "<end>", "42</answer>"]))
    assert row.state.thinking + row.state.answer == "It is 42\n\n<answer>42</answer>"
    assert row.state.events[0].kind == CLOSE and row.state.finished


def test_marker_may_share_a_token_with_the_following_text():
    guide = make_guide(budget=400)
    row = GuideState(guide, len)
    assert row.write("done </thi") is None and row.write("nk>\nIt is 4", tokens=3) is None
    assert (row.thinking, row.answer, row.phase) == ("done </think>", "\nIt is 4", Phase.ANSWER)


def test_one_piece_may_hold_the_whole_answer():
    row = GuideState(make_guide(budget=400, finish="</answer>"), len)
    order = row.write("It is 7.</think>7</answer>", tokens=26)
    assert order.end and row.phase is Phase.DONE and row.finished and row.answer == "7</answer>"


def test_loop_gets_other_approaches_then_the_end():
    guide, loop = make_guide(budget=2000, cap=2, cooldown=0, loop_length=6, **SHORT), "round and round. "
    row, _ = drive(guide, tokens_of([loop * 60]))
    assert [event.kind for event in row.state.events] == [OTHER, OTHER, WRAP_UP]
    assert row.state.thinking.startswith(loop) and len(row.state.thinking) < 220
    places = [event.at for event in row.state.events]
    assert all(b - a > 2 * len(loop) for a, b in pairwise(places))  # the count restarts each time


def test_interventions_respect_the_cooldown():
    guide = make_guide(budget=2000, cap=99, cooldown=50, verify_above=0.0, **SHORT)
    row, _ = drive(guide, tokens_of([f"Sentence {word} here. " for word in "abcdefghijklmnopqrstuvwxyz" * 3]), True)
    places = [event.at for event in row.state.events if event.kind == VERIFY]
    assert len(places) > 10 and all(b - a >= 50 for a, b in pairwise(places))


@pytest.mark.parametrize(("tokens", "entropy", "verifies"), [(49, 1.5, False), (50, 1.5, True), (50, 1.0, False)])
def test_verify_needs_high_entropy_after_the_cooldown(tokens, entropy, verifies):
    row = GuideState(make_guide(budget=2000, cooldown=50, verify_above=1.0, **SHORT), len)
    assert (row.write("A sentence. ", tokens=tokens, entropy=entropy) is not None) == verifies


def test_verify_needs_a_high_average_entropy():
    guide = make_guide(budget=500, verify_above=2.0, cooldown=0, **SHORT)
    row = GuideState(guide, len)
    for _ in range(8):
        assert row.write("Sure. ", entropy=0.1) is None
    orders = [row.write("Unsure. ", entropy=9.0) for _ in range(9)]
    first = next(i for i, order in enumerate(orders) if order)
    assert first >= 1 and orders[first].kind == VERIFY  # an average: one surprise is not enough


def test_stable_probe_ends_the_thinking():
    guide = make_guide(budget=900, probe_every=10, probe_agree=3, finish="</answer>", **SHORT)
    row = GuideState(guide, len)
    for answer in ("", "", "", "7", "8</answer> or", " 8\nSo"):  # an answer ends at its marker or its line end
        assert row.write("word word. ", tokens=10) is None
        assert row.wants_probe and row.probed(answer, 20) is None
        assert not row.wants_probe
    row.write("word word. ", tokens=10)
    order = row.probed("8", 20)
    assert order.kind == STABLE and row.phase is Phase.ANSWER
    assert row.probed_tokens == 140 and row.spent == 210 + len(order.text)


def test_stable_probe_respects_the_minimum():
    row = GuideState(make_guide(budget=900, minimum=50, probe_every=10, probe_agree=2, **SHORT), len)
    orders = []
    for _ in range(5):
        row.write("word word. ", tokens=10)
        orders.append(row.probed("8", 20))
    assert orders[:4] == [None] * 4 and orders[4].kind == STABLE


def test_probes_keep_their_interval_after_a_long_insertion():
    guide = make_guide(budget=900, minimum=50, probe_every=10, probe_agree=3, wait="Wait. " * 6)
    row = GuideState(guide, len)
    assert row.write("word.</think>", tokens=2).kind == WAIT
    assert row.wants_probe and row.probed("8", 20) is None
    assert not row.wants_probe


def test_stable_probe_without_room_for_an_answer_is_ignored():
    guide = make_guide(budget=40, interventions=(), probe_every=5, probe_agree=2, probe_tokens=1)
    row = GuideState(guide, len)
    for _ in range(2):
        row.write("word.", tokens=5)
        assert row.wants_probe and row.probed("8", 11) is None
    assert row.phase is Phase.THINK and row.left == 8


@pytest.mark.parametrize(("budget", "pays"), [(16, False), (17, True)])
def test_probe_must_leave_a_token(budget, pays):
    row = GuideState(make_guide(budget=budget, interventions=(), probe_every=5, probe_tokens=1), len)
    row.write("word.", tokens=5)
    assert row.wants_probe is pays and len(row.probe_text) + 1 == 11


def test_budget_that_is_all_reserve_skips_the_thinking():
    row = GuideState(make_guide(budget=60, reserve=60, open="<think>", **SHORT), len)
    order = row.start()
    assert order.kind == WRAP_UP and row.phase is Phase.ANSWER and row.thinking == "<think>Stop.\n</think>"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"budget": -5}, "budget must be at least 1, got -5"),
        ({"budget": 9, "reserve": 10}, r"reserve must lie in 1 .. budget \(9\), got 10"),
        ({"budget": 9, "maximum": 0}, "maximum must be at least 1, got 0"),
        ({"budget": 99, "minimum": 9, "maximum": 8}, "maximum must be at least 9, got 8"),
        ({"budget": 9, "close": ""}, "close must be the text that ends the thinking"),
        ({"budget": 9, "interventions": ["wiat"]}, "interventions wiat: use wait, verify, other approach, wrap up"),
        ({"budget": 9, "loop_times": 1}, "loop_times must be at least 2, got 1"),
    ],
)
def test_invalid_guides_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_guide(**options)


def test_budgets_without_room_for_an_answer_are_refused():
    with pytest.raises(
        ValueError, match=r"need \d+ tokens, the reserve is 2 of a budget of 10: raise the budget"
    ) as caught:
        GuideState(make_guide(budget=10), len)
    enough = int(str(caught.value).split()[-1])
    row = GuideState(make_guide(budget=enough), len)
    assert row.write("```\ncode\n", tokens=row.left).kind == WRAP_UP and row.left == 1
    with pytest.raises(ValueError, match=r"need (\d+) tokens, the reserve is 5 .* raise the reserve \(of Limits\) to"):
        GuideState(make_guide(budget=900, reserve=5), len)
    with pytest.raises(
        ValueError, match=r"minimum must be at most 60, the tokens of thinking .* got 90: lower minimum"
    ):
        GuideState(make_guide(budget=100, reserve=40, minimum=90, **SHORT), len)


def test_markers_the_vocabulary_cannot_write_are_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "Wait": 1, "<e>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", unk_token="<unk>")
    with pytest.raises(ValueError, match="close must be a text that the tokenizer can write, got '</think>'"):
        Vocabulary(tokenizer, make_guide(budget=100), [2])
    assert Vocabulary(tokenizer, make_guide(budget=100, interventions=()), [2])  # it inserts nothing


@pytest.mark.parametrize(
    ("text", "safe", "sentence_end"),
    [
        ("So it is.", True, True),
        ("so it is 12", False, False),
        ("so it is 12.", False, False),
        ("so it is 7/", False, False),
        ("so it is 3e", False, False),
        ("so it is 3e-", False, False),
        ("so it is 12. ", True, True),
        ("so it is 12.\n", True, True),
        ("for example, e.g. ", True, False),
        ("a line\n", True, True),
        ("so $x", False, False),
        ("so $x = 1$ holds.", True, True),
        ("so $$x = 1", False, False),
        ("so $$x = 1$$\n", True, True),
        (r"so \(x", False, False),
        (r"so \[x\].", True, True),
        (r"so x \\(y).", True, True),
        ("so $x + y $", False, False),
        (r"a price of \$x here.", True, True),
        ("it costs $5 per day.", True, True),
        ("it costs $5", False, False),
        ("```\ncode.\n", False, False),
        ("```\ncode.\n```\n", True, True),
        ("````\ncode.\n", False, False),
        ("an `inline. ", False, False),
        ("an `inline.` piece.", True, True),
        (r"\begin{align} x.", False, False),
        (r"\begin{al", False, False),
        (r"so it is \boxed{a \} {b.} c.", False, False),
        (r"so it is \boxed{a \} {b.} c}.", True, True),
        ("so \\", False, False),
        (r"so \alph", False, False),
        (r"so \alpha is.", True, True),
        (r"\begin{align} x. \end{align}" + "\n", True, True),
        ("so $x + y\n", True, True),
        ("3 - ", True, False),
        ("3 -", False, False),
        ("well </thi", False, False),
    ],
)
def test_boundaries(text, safe, sentence_end):
    for size in (1, 2, 3, len(text)):
        boundary = Boundary("</think>")
        for start in range(0, len(text), size):
            boundary.write(text[start : start + size])
        assert (boundary.safe, boundary.sentence_end) == (safe, sentence_end)


def test_stray_opener_protects_only_briefly():
    boundary = Boundary()
    boundary.write("\\( never closed " + "word. " * 300)
    assert boundary.safe


def test_fence_protects_code_of_any_length():
    boundary = Boundary()
    boundary.write("```\n" + "code. " * 300)
    assert not boundary.safe
