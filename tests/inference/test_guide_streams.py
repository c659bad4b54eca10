"""The guide on random and adversarial token streams: the budget holds, and constructs stay whole."""

import random
import re
from collections import deque

from guide_streams import END, TOKENIZER, drive, new_row, tokens_of
from guides import SHORT, make_guide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_fallback

from rbfast.inference.guide import INTERVENTIONS, WAIT, WRAP_UP
from rbfast.inference.state import CLOSE, GuideState, Phase
from rbfast.inference.tokens import TokenState, Vocabulary

BYTE_FALLBACK = byte_fallback("a")

# Pieces that are difficult at a boundary, for hypothesis to combine.
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
relaxed = settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])


@relaxed
@given(guides, streams.map(tokens_of), st.booleans())
def test_budget_holds_and_every_answer_ends(guide, stream, entropies):
    row, fed = drive(guide, stream, entropies)
    assert len(fed) == row.state.spent <= guide.limits.budget
    assert fed[-1][0] == END and row.ids[-1] == END
    assert row.state.phase is Phase.DONE and guide.phrases.close in row.state.thinking
    assert row.state.thinking.endswith(guide.phrases.close)


@relaxed
@given(all_guides, st.one_of(streams.map(tokens_of), bytes_of_any_kind), st.booleans())
def test_budget_holds_with_any_interventions_and_probes(guide, stream, entropies):
    row, fed = drive(guide, stream, entropies)
    assert row.state.phase is Phase.DONE
    assert len(fed) + row.state.probed_tokens == row.state.spent <= guide.limits.budget
    if WRAP_UP in guide.interventions:
        assert row.ids[-1] == END and row.state.thinking.endswith(guide.phrases.close)
    if guide.passive:
        assert row.ids == [token for token, _ in fed] and not row.state.events


@relaxed
@given(all_guides, st.lists(st.tuples(st.sampled_from([*PIECES, "<end>"]), st.integers(1, 9)), max_size=60))
def test_budget_holds_for_pieces_of_several_tokens(guide, stream):
    """A server sends such pieces."""
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
def test_budget_holds_for_invalid_utf8(guide, stream):
    row, fed = drive(guide, stream)
    assert len(fed) == row.state.spent <= guide.limits.budget and row.ids[-1] == END


@relaxed
@given(bytes_of_any_kind)
def test_invalid_utf8_ends_no_row_with_byte_fallback(stream):
    tokenizer, plain = BYTE_FALLBACK, make_guide(budget=200, interventions=())
    row = TokenState(plain, Vocabulary(tokenizer, plain, [tokenizer.eos_token_id]))
    line_break, part, word = (tokenizer.convert_tokens_to_ids(token) for token in ("<0x0A>", "<0xE6>", "a"))
    for token in [*(number for number in stream if number > 1), line_break, part, word]:
        row.feed(token)
    assert row.state.thinking.endswith("a")


@relaxed
@given(guides, streams.map(tokens_of))
def test_state_is_a_fold_over_the_tokens(guide, stream):
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
    """The construct open at the end of a text. Unlike the guide, it removes complete constructs first."""
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    if "```" in rest:
        return "code"
    rest = re.sub(r"\\\$", "", rest)
    for opening, closing in ((r"\\\(", r"\\\)"), (r"\\\[", r"\\\]"), (r"\\begin\{a\}", r"\\end\{a\}")):
        rest = re.sub(f"{opening}.*?{closing}", "", rest, flags=re.DOTALL)
        if re.search(opening, rest):
            return opening
    return None


# Complete constructs, not nested, so that the one open at an intervention is unambiguous.
PLAIN_PIECES = [
    "12", "3", ".", " ", "\n", "so. ", "x", "is 4. ", "0.5", "\\(x^2 + 12\\)", "\\[12. \\]",
    "```\ny = 1.\nz = 2\n```\n",
    "\\begin{a}1. 2\\end{a}", "</think>", "<end>",
]  # fmt: skip


@relaxed
@given(guides, st.lists(st.sampled_from(PLAIN_PIECES), max_size=60).map(tokens_of))
def test_nothing_is_inserted_inside_numbers_latex_or_code(guide, stream):
    row, _ = drive(guide, stream, entropies=True)
    thinking = row.state.thinking
    for event in row.state.events:
        before, put = thinking[: event.at], thinking[event.at :]
        if put.startswith("```\n"):
            before += "```\n"
        assert open_formula_or_code(before) is None, (event, before)
        ended_by_the_model = event.kind == CLOSE or (event.kind == WAIT)
        assert ended_by_the_model or not re.search(r"\d[.,]?\Z", before), (event, before)


# Constructs that must stay whole, whatever they contain, with any text between them. They do not nest.
WHOLE = [
    "$x = 12.5$", "$$x. \n\ny = 1.$$", "\\(x^2. 1\\)", "\\[12. \\]", "\\begin{a}1. 2\n\n\\end{a}", "`a. b!`",
    "\\boxed{12. {a. } b}", "\\alpha", "```\ny = 1.\n\nz = 2. \n```\n",
]  # fmt: skip
texts_with_wholes = st.lists(
    st.one_of(st.sampled_from(WHOLE), st.text("ab .,!?019\n", min_size=1, max_size=9), st.just("</think>")),
    max_size=40,
)


def marked(pieces):
    """Yields (character, number of its piece, whether the next character is in the same construct or number)."""
    text = "".join(pieces)
    numbers = {i for found in re.finditer(r"\d+(?:[.,]\d+)*", text) for i in range(found.start(), found.end() - 1)}
    place = 0
    for number, piece in enumerate(pieces):
        for i, character in enumerate(piece):
            inside = i + 1 < len(piece.rstrip("\n")) and (piece in WHOLE or piece == "</think>")
            yield character, number, inside or place in numbers
            place += 1


@relaxed
@given(guides, texts_with_wholes)
def test_constructs_are_never_split(guide, pieces):
    # Checks against the layout of the stream instead of parsing the text again.
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
            source.popleft()  # skip the rest of the struck construct, which no model would continue
