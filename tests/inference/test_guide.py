"""The guide as a state machine: budgets, ends, interruptions, on random and adversarial streams of tokens."""

import random
import re
from collections import deque
from itertools import pairwise

import pytest
from guides import make_guide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from rbfast.inference.boundary import Boundary
from rbfast.inference.guide import INTERVENTIONS, OTHER, VERIFY, WAIT, WRAP_UP
from rbfast.inference.state import CLOSE, STABLE, GuideState, Phase
from rbfast.inference.tokens import TokenState, Vocabulary
from rbfast.inference.vote import decided, majority

TOKENIZER = tiny_tokenizer()
END = 0
SHORT = {"wait": "Wait.", "verify": "Check.", "other": "Else.", "wrap_up": "Stop."}
# What may go wrong at a boundary, in pieces that hypothesis puts together.
PIECES = [
    "12", "3.5", ".", ",", "-", "1e", " ", "\n", "\n\n", "$", "$$", "`", "```", "```py\n", "\\(", "\\)", "\\[", "\\]",
    "\\$", "\\begin{a}", "\\end{a}", "</", "<", "</think", "</think>", ">", "x", "So. ", "the sum is 12. ", "e.g. ",
    "é", "日", "It costs $5 per day. ", "loop loop. ", "</answer>", "7/8", "(", ")", "!",
]  # fmt: skip
streams = st.lists(st.sampled_from([*PIECES, "<end>"]), max_size=60)
bytes_of_any_kind = st.lists(st.integers(0, 257), max_size=150)
options = {
    "budget": st.integers(50, 140),
    "reserve": st.integers(32, 40),
    "minimum": st.sampled_from([0, 0, 8]),
    "finish": st.sampled_from(["", "</answer>"]),
    "cap": st.integers(0, 4),
    "cooldown": st.integers(0, 20),
    "verify_above": st.sampled_from([None, 0.5]),
    "loop_length": st.integers(1, 8),
    "loop_times": st.integers(2, 3),
} | {name: st.just(text) for name, text in SHORT.items()}
guides = st.builds(make_guide, **options)
more_options = {
    "interventions": st.sets(st.sampled_from(INTERVENTIONS)).map(sorted),
    "maximum": st.sampled_from([None, 10, 40]),
    "probe_every": st.sampled_from([0, 1, 7]),
    "probe_agree": st.integers(2, 3),
    "probe_tokens": st.integers(1, 5),
    "probe": st.sampled_from(["", "A:"]),
}
all_guides = st.builds(make_guide, **options | more_options)
relaxed = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def tokens_of(pieces):
    """One token a byte, the end token where it says so."""
    ids = []
    for piece in pieces:
        ids += [END] if piece == "<end>" else TOKENIZER(piece, add_special_tokens=False).input_ids
    return ids


def new_row(guide):
    return TokenState(guide, Vocabulary(TOKENIZER, guide, [END]))


def drive(guide, stream, entropies=None):
    """Runs a row to its end as a loop would: the queue's tokens where there are some, else the stream's, then "a"."""
    row, source, fed = new_row(guide), iter(stream), []
    noise = random.Random(0)
    while not row.done:
        if row.wants_probe:
            written = noise.randint(1, guide.limits.probe_tokens)
            row.probed(noise.choice("77 "), row.state.count(row.state.probe_text) + written)
            continue
        token = row.queue[0] if row.queue else next(source, TOKENIZER("a").input_ids[0])
        entropy = noise.random() if entropies else None
        fed.append((token, entropy))
        row.feed(token, entropy)
    return row, fed


@relaxed
@given(guides, streams.map(tokens_of), st.booleans())
def test_the_budget_is_never_exceeded_and_every_answer_ends(guide, stream, entropies):
    row, fed = drive(guide, stream, entropies)
    assert len(fed) == row.state.spent <= guide.limits.budget
    assert fed[-1][0] == END and row.ids[-1] == END
    assert row.state.phase is Phase.DONE and guide.phrases.close in row.state.thinking
    assert row.state.thinking.endswith(guide.phrases.close)


@relaxed
@given(all_guides, st.one_of(streams.map(tokens_of), bytes_of_any_kind), st.booleans())
def test_so_it_is_with_any_interventions_and_probes(guide, stream, entropies):
    row, fed = drive(guide, stream, entropies)
    assert row.state.phase is Phase.DONE
    assert len(fed) + row.state.probed_tokens == row.state.spent <= guide.limits.budget
    if WRAP_UP in guide.interventions:
        assert row.ids[-1] == END and row.state.thinking.endswith(guide.phrases.close)
    if guide.passive:
        assert row.ids == [token for token, _ in fed] and not row.state.events


@relaxed
@given(all_guides, st.lists(st.tuples(st.sampled_from([*PIECES, "<end>"]), st.integers(1, 9)), max_size=60))
def test_so_it_is_in_pieces_of_many_tokens_as_a_server_sends_them(guide, stream):
    row, source = GuideState(guide, len, end_cost=0), iter(stream)
    row.start()
    while row.phase is not Phase.DONE:
        if row.wants_probe:
            row.probed("7", row.count(row.probe_text) + guide.limits.probe_tokens)
            continue
        text, tokens = next(source, ("a", 1))
        assert row.left >= 1
        row.write("" if text == "<end>" else text, min(tokens, row.left), ended=text == "<end>")
    assert row.spent <= guide.limits.budget
    assert row.thinking.endswith(guide.phrases.close) or WRAP_UP not in guide.interventions


@relaxed
@given(guides, bytes_of_any_kind)
def test_bytes_that_are_no_text_keep_the_budget_too(guide, stream):
    row, fed = drive(guide, stream)
    assert len(fed) == row.state.spent <= guide.limits.budget and row.ids[-1] == END


@relaxed
@given(guides, streams.map(tokens_of))
def test_the_state_is_a_fold_over_the_tokens(guide, stream):
    row, fed = drive(guide, stream, entropies=True)
    for cut in {0, len(fed) // 2, len(fed)}:
        first, again = new_row(guide), new_row(guide)
        for token, entropy in fed[:cut]:
            first.feed(token, entropy)
        for token, entropy in fed:
            again.feed(token, entropy)
        assert first.state.events == row.state.events[: len(first.state.events)]
        assert (again.ids, again.state.events, again.state.spent) == (row.ids, row.state.events, row.state.spent)


def open_formula_or_code(text):
    """What is open at the end of a text, by another way than the guide's: whole constructs are taken out first."""
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    if "```" in rest:
        return "code"
    rest = re.sub(r"\\\$", "", rest)
    for opening, closing in ((r"\\\(", r"\\\)"), (r"\\\[", r"\\\]"), (r"\\begin\{a\}", r"\\end\{a\}")):
        rest = re.sub(f"{opening}.*?{closing}", "", rest, flags=re.DOTALL)
        if re.search(opening, rest):
            return opening
    return None


# Whole constructs, none inside of another: what is open where an intervention comes is then beyond dispute.
PLAIN_PIECES = [
    "12", "3", ".", " ", "\n", "so. ", "x", "is 4. ", "0.5", "\\(x^2 + 12\\)", "\\[12. \\]",
    "```\ny = 1.\nz = 2\n```\n",
    "\\begin{a}1. 2\\end{a}", "</think>", "<end>",
]  # fmt: skip


@relaxed
@given(guides, st.lists(st.sampled_from(PLAIN_PIECES), max_size=60).map(tokens_of))
def test_nothing_is_put_inside_a_number_latex_or_code(guide, stream):
    row, _ = drive(guide, stream, entropies=True)
    thinking = row.state.thinking
    for event in row.state.events:
        before, put = thinking[: event.at], thinking[event.at :]
        if put.startswith("```\n"):
            before += "```\n"
        assert open_formula_or_code(before) is None, (event, before)
        ended_by_the_model = event.kind == CLOSE or (event.kind == WAIT)
        assert ended_by_the_model or not re.search(r"\d[.,]?\Z", before), (event, before)


# Constructs that must stay whole, whatever is in them, and any text between them. None opens another.
WHOLE = [
    "$x = 12.5$", "$$x. \n\ny = 1.$$", "\\(x^2. 1\\)", "\\[12. \\]", "\\begin{a}1. 2\n\n\\end{a}", "`a. b!`",
    "\\boxed{12. {a. } b}", "\\alpha", "```\ny = 1.\n\nz = 2. \n```\n",
]  # fmt: skip
texts_with_wholes = st.lists(
    st.one_of(st.sampled_from(WHOLE), st.text("ab .,!?019\n", min_size=1, max_size=9), st.just("</think>")),
    max_size=40,
)


def marked(pieces):
    """(character, number of its piece, whether what follows it belongs to the same construct or number)."""
    text = "".join(pieces)
    numbers = {i for found in re.finditer(r"\d+(?:[.,]\d+)*", text) for i in range(found.start(), found.end() - 1)}
    place = 0
    for number, piece in enumerate(pieces):
        for i, character in enumerate(piece):
            inside = i + 1 < len(piece) and (piece in WHOLE or piece == "</think>")
            yield character, number, inside or place in numbers
            place += 1


@relaxed
@given(guides, texts_with_wholes)
def test_what_must_stay_whole_is_never_cut(guide, pieces):
    # By the places where the stream was made up, not by reading the text again.
    row, noise = new_row(guide), random.Random(0)
    source, kept = deque(marked(pieces)), []
    while not row.done:
        if row.queue:
            row.feed(row.queue[0])
            continue
        character, number, inside = source.popleft() if source else ("a", -1, False)
        events = len(row.state.events)
        struck = row.feed(TOKENIZER(character).input_ids[0], noise.random())
        kept.append((character, number, inside))
        if len(row.state.events) == events:
            continue
        put = row.state.thinking[row.state.events[-1].at :]
        del kept[len(kept) - struck :]
        fence_closed = put.startswith("```\n") and kept and kept[-1][0] == "\n" and pieces[kept[-1][1]] == WHOLE[-1]
        assert not kept or not kept[-1][2] or fence_closed, (row.state.events[-1], row.state.thinking)
        kept.clear()
        while source and source[0][1] == number and pieces[number] in WHOLE:
            source.popleft()  # the rest of what was struck, which no model would go on with


def test_a_number_cut_by_the_budget_is_struck_whole():
    guide = make_guide(budget=60, reserve=36, **SHORT)
    row, _ = drive(guide, tokens_of(["x = 123456789012345678901234567890"]))
    [event] = row.state.events
    assert event.kind == WRAP_UP and event.struck == "12345678901234567890"[: len(event.struck)]
    assert row.state.thinking == "x = \n\nStop.\n</think>"


def test_an_open_fence_is_closed_and_its_code_kept():
    guide = make_guide(budget=100, reserve=40, **SHORT)
    row, _ = drive(guide, tokens_of(["```py\n", "y = x + 1\n" * 9]))
    assert row.state.thinking.startswith("```py\ny = x + 1\ny = x + 1\n")
    assert "\n```\nStop.\n</think>" in row.state.thinking


def test_an_early_end_becomes_wait_up_to_the_cap():
    guide = make_guide(budget=300, minimum=200, cap=2, finish="</answer>", **SHORT)
    row, _ = drive(guide, tokens_of(["First = 12</think>", "Then</think>", "Last</think>", "42</answer>"]))
    assert [event.kind for event in row.state.events] == [WAIT, WAIT]
    assert row.state.events[0].struck == "</think>"
    assert row.state.thinking == "First = 12\n\nWait.\nThen\n\nWait.\nLast</think>"
    assert row.state.answer == "42</answer>" and row.state.finished


def test_a_model_that_ends_without_an_answer_is_asked_for_it():
    guide = make_guide(budget=200, close="<answer>", finish="</answer>", **SHORT)
    row, _ = drive(guide, tokens_of(["It is 42", "<end>", "42</answer>"]))
    assert row.state.thinking + row.state.answer == "It is 42\n\n<answer>42</answer>"
    assert row.state.events[0].kind == CLOSE and row.state.finished


def test_the_marker_may_share_a_token_with_what_follows_it():
    guide = make_guide(budget=400)
    row = GuideState(guide, len)
    assert row.write("done </thi") is None and row.write("nk>\nIt is 4", tokens=3) is None
    assert (row.thinking, row.answer, row.phase) == ("done </think>", "\nIt is 4", Phase.ANSWER)


def test_a_loop_gets_another_approach_then_the_end():
    guide = make_guide(budget=2000, cap=1, cooldown=0, loop_length=6, **SHORT)
    row, _ = drive(guide, tokens_of(["round and round. " * 60]))
    assert [event.kind for event in row.state.events] == [OTHER, WRAP_UP]
    assert row.state.thinking.startswith("round and round. ") and len(row.state.thinking) < 150


def test_interventions_keep_their_distance():
    guide = make_guide(budget=2000, cap=99, cooldown=50, verify_above=0.0, **SHORT)
    row, _ = drive(guide, tokens_of([f"Sentence {word} here. " for word in "abcdefghijklmnopqrstuvwxyz" * 3]), True)
    places = [event.at for event in row.state.events if event.kind == VERIFY]
    assert len(places) > 10 and all(b - a >= 50 for a, b in pairwise(places))


def test_sure_models_are_not_told_to_verify():
    guide = make_guide(budget=500, verify_above=2.0, cooldown=0, **SHORT)
    row = GuideState(guide, len)
    for _ in range(8):
        assert row.write("Sure. ", entropy=0.1) is None
    orders = [row.write("Unsure. ", entropy=9.0) for _ in range(9)]
    first = next(i for i, order in enumerate(orders) if order)
    assert first >= 1 and orders[first].kind == VERIFY  # an average: one surprise is not enough


def test_a_stable_probe_ends_the_thinking():
    guide = make_guide(budget=900, probe_every=10, probe_agree=3, **SHORT)
    row = GuideState(guide, len)
    for answer in ("", "7", "8", "8"):
        assert row.write("word word. ", tokens=10) is None
        assert row.wants_probe and row.probed(answer, 20) is None
        assert not row.wants_probe
    row.write("word word. ", tokens=10)
    order = row.probed("8", 20)
    assert order.kind == STABLE and row.phase is Phase.ANSWER
    assert row.probed_tokens == 100 and row.spent == 150 + len(order.text)


def test_a_stable_probe_that_could_not_be_followed_by_an_answer_does_not_end_the_thinking():
    guide = make_guide(budget=40, interventions=(), probe_every=5, probe_agree=2, probe_tokens=1)
    row = GuideState(guide, len)
    for _ in range(2):
        row.write("word.", tokens=5)
        assert row.wants_probe and row.probed("8", 11) is None
    assert row.phase is Phase.THINK and row.left == 8


@pytest.mark.parametrize(("budget", "pays"), [(16, False), (17, True)])
def test_a_probe_leaves_a_token(budget, pays):
    row = GuideState(make_guide(budget=budget, interventions=(), probe_every=5, probe_tokens=1), len)
    row.write("word.", tokens=5)
    assert row.wants_probe is pays and len(row.probe_text) + 1 == 11


def test_a_budget_that_is_all_reserve_goes_straight_to_the_answer():
    row = GuideState(make_guide(budget=60, reserve=60, **SHORT), len)
    order = row.start()
    assert order.kind == WRAP_UP and row.phase is Phase.ANSWER and row.thinking == "Stop.\n</think>"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"budget": -5}, "budget must be at least 1, got -5"),
        ({"budget": 9, "reserve": 10}, r"reserve must lie in 1 .. budget \(9\), got 10"),
        ({"budget": 9, "maximum": 0}, "maximum must be at least 1, got 0"),
        ({"budget": 99, "minimum": 9, "maximum": 8}, "maximum must be at least 9, got 8"),
        ({"budget": 9, "close": ""}, "close must be the text that ends the thinking"),
        ({"budget": 9, "interventions": ["wiat"]}, "must be of wait, verify, other approach, wrap up; got wiat"),
        ({"budget": 9, "loop_times": 1}, "loop_times must be at least 2, got 1"),
    ],
)
def test_bad_guides_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_guide(**options)


def test_budgets_that_hold_no_answer_are_refused():
    with pytest.raises(ValueError, match=r"need \d+ tokens, the reserve holds 2 of a budget of 10: raise"):
        GuideState(make_guide(budget=10), len)
    with pytest.raises(ValueError, match="minimum must fit into the budget, got 90 of 60 tokens of thinking"):
        GuideState(make_guide(budget=100, reserve=40, minimum=90, **SHORT), len)


def test_markers_the_vocabulary_cannot_write_are_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "Wait": 1, "<e>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", unk_token="<unk>")
    with pytest.raises(ValueError, match="close must be a text that the tokenizer can write, got '</think>'"):
        Vocabulary(tokenizer, make_guide(budget=100), [2])


@pytest.mark.parametrize(
    ("text", "safe", "sentence_end"),
    [
        ("So it is.", True, True),
        ("so it is 12", False, False),
        ("so it is 12.", False, False),
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
        (r"a price of \$x here.", True, True),
        ("it costs $5 per day.", True, True),
        ("it costs $5", False, False),
        ("```\ncode.\n", False, False),
        ("```\ncode.\n```\n", True, True),
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


def test_a_stray_opener_protects_nothing_for_long():
    boundary = Boundary()
    boundary.write("\\( never closed " + "word. " * 300)
    assert boundary.safe


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=8), st.integers(0, 6), st.data())
def test_a_decided_vote_can_not_be_turned(answers, running, data):
    if decided(answers, running):
        more = data.draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=running, max_size=running))
        assert majority([*answers, *more]).answer == majority(answers).answer


def test_majority():
    assert majority(["a", None, "b", "b"]) == ("b", 2, 3)
    assert majority(["a", "b"]).answer == "a"  # the first of equals
    assert majority([None]) == (None, 0, 0)
    assert decided(["a", "a", "a"], 2) and not decided(["a", "a"], 2) and not decided([None, None], 0)
