"""Guided inference in real batches: plain generation without interventions, independent rows with them."""

import logging
import math
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from guides import make_guide
from host_waits import host_waits
from tiny import tiny_model, tiny_tokenizer
from tiny_models import family

from rbfast.data.chat_template import format_prompt
from rbfast.data.instruction import BOXED
from rbfast.inference.decoding import complete, greedy_settings
from rbfast.inference.guide import WAIT, WRAP_UP, Guide, Limits
from rbfast.inference.local import LocalSolver, guided
from rbfast.inference.remote import ServerSolver
from rbfast.inference.solver import Sampling, calibrate, seed_named
from rbfast.inference.steering import GuidedSteering, draw, entropy
from rbfast.inference.tokens import TokenState, Vocabulary, phrases_for
from rbfast.teacher.client import Server

PROMPTS = ["a", "a much longer prompt than the others", "two words", "2 + 2 =", "xyz", "The end is near", "b", "?"]
STOPS = [0, *range(2, 258, 30)]
SHORT = {"wait": "Wait.", "verify": "Check.", "other": "Else.", "wrap_up": "Stop."}
TOKENIZER = tiny_tokenizer()


@pytest.fixture
def model():
    model = tiny_model()
    model.generation_config.eos_token_id = STOPS
    return model


def guide(**options):
    return make_guide(
        **{"budget": 150, "reserve": 50, "minimum": 50, "finish": "</answer>", "cooldown": 8} | SHORT | options
    )


def greedy_tokens(model, prompt, solution):
    """The model's greedy token at each position of a solution: one row, no cache, nothing struck."""
    ids = TOKENIZER(prompt, add_special_tokens=False).input_ids
    whole = torch.tensor([ids + list(solution.ids)])
    with torch.no_grad():
        return model(whole).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()


def inserted_positions(solution):
    """The positions of a solution's inserted tokens (one token per byte here)."""
    return {p for e, text in insertions(solution) for p in range(e.at, e.at + len(text))}


def insertions(solution):
    texts = {
        WAIT: "Wait.\n",
        WRAP_UP: "Stop.\n</think>",
        "close": "</think>",
        "verify": "Check.\n",
        "other approach": "Else.\n",
    }
    for event in solution.events:
        text = texts[event.kind]
        rest = solution.thinking[event.at :]
        yield event, rest[: rest.index(text) + len(text)]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_passive_guide_matches_plain_decoding(model, batch_size):
    expected = complete(model, TOKENIZER, PROMPTS, max_new_tokens=24, batch_size=batch_size)
    solutions = guided(
        model, TOKENIZER, PROMPTS, guide(budget=24, reserve=1, minimum=0, interventions=()), batch_size=batch_size
    )
    assert [(s.text, s.tokens, s.truncated) for [s] in solutions] == [(c.text, c.tokens, c.truncated) for c in expected]


@pytest.mark.parametrize("seed", range(4))
def test_passive_guide_matches_generate_of_transformers(seed):
    model = tiny_model(seed)
    model.generation_config.eos_token_id = STOPS
    settings = greedy_settings(model, TOKENIZER)
    plain = guide(budget=24, reserve=1, minimum=0, interventions=())
    for prompt in PROMPTS:
        ids = torch.tensor([TOKENIZER(prompt, add_special_tokens=False).input_ids])
        expected = model.generate(ids, max_new_tokens=24, **settings)[0, ids.shape[1] :].tolist()
        [[solution]] = guided(model, TOKENIZER, [prompt], plain)
        assert list(solution.ids) == expected


def test_rows_never_affect_each_other(model):
    together = guided(model, TOKENIZER, PROMPTS, guide(), batch_size=8)
    assert guided(model, TOKENIZER, PROMPTS, guide(), batch_size=1) == together
    assert guided(model, TOKENIZER, PROMPTS[::-1], guide(), batch_size=3) == together[::-1]
    kinds = {event.kind for [solution] in together for event in solution.events}
    assert {WAIT, "close"} <= kinds and any(event.struck for [s] in together for event in s.events)


class Scripted:
    """Draws adversarial text that was written for a row, whatever the model predicts."""

    def __init__(self):
        source = random.Random(0)
        texts = ["".join(source.choices(HARMFUL, k=60)) for _ in PROMPTS]
        texts[1] = "round and "
        self.streams = [[0 if c == "\0" else TOKENIZER(c).input_ids[0] for c in text] for text in texts]
        self.streams[0] = [source.randrange(2, 258) for _ in range(200)]

    def token(self, row, step):
        stream = self.streams[row]
        return stream[step % len(stream)]

    def draw(self, scores, sampling, names, steps):
        rows = (int(name.split(":")[1]) for name in names)
        return torch.tensor([self.token(row, step) for row, step in zip(rows, steps, strict=True)])


HARMFUL = [
    "12",
    ".",
    "3",
    " ",
    "\n",
    "$",
    "`",
    "```",
    "\\(",
    "\\[",
    "</think>",
    "</",
    "so. ",
    "x",
    "\0",
    "</answer>",
    "é",
]


@pytest.mark.parametrize("probe_every", [0, 20])
def test_adversarial_rows_never_affect_each_other(model, monkeypatch, probe_every):
    script = Scripted()
    monkeypatch.setattr("rbfast.inference.steering.draw", script.draw)
    probing = guide(minimum=20, probe_every=probe_every, probe_tokens=3, loop_length=4)
    together = guided(model, TOKENIZER, PROMPTS, probing, Sampling(temperature=1.0))
    assert {e.kind for [s] in together for e in s.events} >= {WAIT, WRAP_UP, "other approach"}
    for batch_size in (1, 3):
        assert guided(model, TOKENIZER, PROMPTS, probing, Sampling(temperature=1.0), batch_size=batch_size) == together
    if probe_every:
        assert any(solution.probe_tokens for [solution] in together)
        return
    # The batch is the state machine of each row alone.
    vocabulary = Vocabulary(TOKENIZER, probing, STOPS)
    for number, [solution] in enumerate(together):
        row = TokenState(probing, vocabulary)
        while not row.done:
            row.feed(row.queue[0] if row.queue else script.token(number, row.written))
        assert row.solution() == solution


@pytest.mark.parametrize("kind", ["llama", "falcon-h1", "jamba"])
def test_struck_text_leaves_no_trace(kind):
    model = tiny_model() if kind == "llama" else family(kind, vocab_size=258, max_position_embeddings=256)
    model.generation_config.eos_token_id = STOPS
    # Every token that was not inserted is the one that the model would write after the text that is left.
    visible = torch.full((258,), -1e4)
    visible[0] = visible[2:96] = 0.0  # the end and printable characters: a token is one character
    model.lm_head.bias = torch.nn.Parameter(visible)
    checked = 0
    for prompt, [solution] in zip(PROMPTS, guided(model, TOKENIZER, PROMPTS, guide()), strict=True):
        greedy, forced = greedy_tokens(model, prompt, solution), inserted_positions(solution)
        free = [i for i in range(len(solution.thinking)) if i not in forced]
        assert [greedy[i] for i in free] == [solution.ids[i] for i in free]
        checked += any(event.struck for event in solution.events) and bool(free)
    assert checked


def test_recurrent_model_can_be_probed():
    model = family("falcon-h1", vocab_size=258, max_position_embeddings=256)
    model.generation_config.eos_token_id = STOPS
    probing = guide(minimum=20, probe_every=8, probe_tokens=3)
    together = guided(model, TOKENIZER, PROMPTS, probing)
    assert guided(model, TOKENIZER, PROMPTS, probing, batch_size=1) == together
    assert any(solution.probe_tokens for [solution] in together)


def test_struck_text_and_prompts_of_one_token_cause_no_padding_warning(model, caplog):
    log = logging.getLogger("transformers.generation.utils")
    log.addHandler(caplog.handler)
    try:
        solutions = guided(model, TOKENIZER, PROMPTS, guide(), batch_size=8)
        assert any(event.struck for [solution] in solutions for event in solution.events)
        guided(model, TOKENIZER, ["a", "longer"], Guide.plain(2), Sampling(samples=2, temperature=1.0))
        assert "right-padding" not in caplog.text
        ids = torch.full((2, 3), 5)
        model.generate(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]), pad_token_id=1, max_new_tokens=1)
        assert "right-padding" in caplog.text  # other batches still get the warning
    finally:
        log.removeHandler(caplog.handler)


def test_every_row_ends_within_its_budget(model):
    for budget in (60, 90, 150):
        for [solution] in guided(model, TOKENIZER, PROMPTS, guide(budget=budget, reserve=45, minimum=10)):
            assert solution.tokens <= budget and solution.ids[-1] in STOPS
            assert "</think>" in solution.thinking


def test_cache_is_kept_across_interventions(model, monkeypatch):
    read = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: read.append(k["input_ids"].shape[1]) or forward(*a, **k))
    [[solution]] = guided(model, TOKENIZER, ["two words"], guide())
    assert solution.events and read[0] == len("two words") and set(read[1:]) == {1}
    assert len(read) == solution.tokens


def test_samples_share_the_prefill(model, monkeypatch):
    read = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: read.append(tuple(k["input_ids"].shape)) or forward(*a, **k))
    prompt = PROMPTS[1]
    [samples] = guided(model, TOKENIZER, [prompt], guide(), Sampling(samples=5, temperature=1.0))
    assert read[0] == (1, len(prompt) - 1) and read[1] == (5, 1)
    assert len({solution.ids for solution in samples}) > 1


def test_samples_depend_on_the_seed_and_not_on_the_batch(model):
    def sampled(seed=0, batch_size=32):
        sampling = Sampling(samples=2, temperature=0.9, seed=seed, early_stop=False)
        return guided(model, TOKENIZER, PROMPTS[:4], guide(), sampling, batch_size=batch_size)

    first = sampled()
    assert sampled(batch_size=2) == first
    assert sampled(seed=1) != first


def test_samples_beyond_the_batch_size_take_turns(model, monkeypatch):
    rows = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **k: rows.append(len(ids)) or generate(ids, **k))
    sampling = Sampling(samples=7, temperature=0.9, early_stop=False)
    together = guided(model, TOKENIZER, PROMPTS[:2], guide(), sampling)
    assert max(rows) == 14
    rows.clear()
    assert guided(model, TOKENIZER, PROMPTS[:2], guide(), sampling, batch_size=3) == together
    assert max(rows) == 3


def test_samples_after_a_decided_vote_are_not_written(model, monkeypatch):
    monkeypatch.setattr("rbfast.inference.solver.answer_key", lambda text, truncated: "same")
    [samples] = guided(model, TOKENIZER, ["two words"], guide(), Sampling(samples=9, temperature=1.5), batch_size=2)
    assert [solution.abandoned for solution in samples[:4]] == [False] * 4
    assert samples[6].abandoned and all((s.tokens, s.text) == (0, "") for s in samples[6:])


def test_drawing_takes_as_many_launches_for_many_rows_as_for_few(monkeypatch):
    """On a GPU two launches for each row would take longer than the draw."""

    def launches(rows):
        states = [SimpleNamespace(done=False, queue=[5] if row == 1 else [], written=3) for row in range(rows)]
        steering = GuidedSteering(
            SimpleNamespace(device=torch.device("cpu")),
            {"eos_token_id": [0]},
            states,
            names=list(map(str, range(rows))),
            groups=[None] * rows,
            sampling=Sampling(temperature=1.0),
            measures_entropy=False,
        )
        with host_waits(monkeypatch) as waits:
            chosen = steering.choose(torch.randn(rows, 50))
        assert ((chosen == 0).sum(1) == 1).all() and ((chosen == -torch.inf).sum(1) == 49).all()
        assert chosen[1, 5] == 0 and not waits.found
        return waits.launches

    assert launches(20) == launches(2)


def test_draws_follow_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0, -math.inf]])
    draws = lambda n, **settings: [draw(scores, Sampling(**settings), ["row"], [i]).item() for i in range(n)]  # noqa: E731
    n = 4000
    counts = torch.bincount(torch.tensor(draws(n, temperature=2.0)), minlength=4) / n
    expected = torch.softmax(scores[0] / 2, -1)
    # Five binomial standard errors.
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
    assert {*draws(200, temperature=1.0, top_p=0.7)} == {0, 1}  # the first holds 0.665 of the mass, so 0.7 takes two
    assert {*draws(200, temperature=1.0, top_p=0.6)} == {0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [0.5, 0.95, 0.999])
def test_draws_come_from_the_smallest_set_whose_mass_reaches_top_p(top_p, dtype):
    """Rows from peaked to flat: the set of some is larger than the tokens that are looked at first. In bf16 many
    chances are equal."""
    g = torch.Generator().manual_seed(0)
    scores = (torch.randn(12, 3000, generator=g) * torch.linspace(0.1, 8, 12)[:, None]).to(dtype)
    chances, tokens = scores.double().softmax(-1).sort(descending=True, stable=True)
    sizes = ((chances.cumsum(-1) - chances) < top_p).sum(1)
    assert sizes.min() < 256 < sizes.max()
    names, sampling = [f"row {i}" for i in range(12)], Sampling(temperature=1.0, top_p=top_p)
    for step in range(20):
        drawn = draw(scores, sampling, names, [step] * 12)
        for row, size in enumerate(sizes):
            kept = chances[row, :size]
            share = (seed_named(f"{names[row]}:{step}") >> 11) / 2**53 * kept.sum()
            assert drawn[row] == tokens[row, torch.searchsorted(kept.cumsum(0), share, right=True)]
            assert drawn[row] == draw(scores[row : row + 1], sampling, names[row : row + 1], [step])


def test_decided_vote_abandons_the_rest(model, monkeypatch):
    monkeypatch.setattr("rbfast.inference.solver.answer_key", lambda text, truncated: "same")
    [samples] = guided(model, TOKENIZER, ["two words"], guide(), Sampling(samples=7, temperature=1.5))
    gone = [solution for solution in samples if solution.abandoned]
    assert 0 < len(gone) <= 3
    to_the_end = Sampling(samples=7, temperature=1.5, early_stop=False)
    [all_of_them] = guided(model, TOKENIZER, ["two words"], guide(), to_the_end)
    assert not any(solution.abandoned for solution in all_of_them)
    assert sum(s.tokens for s in samples) < sum(s.tokens for s in all_of_them)
    kept = [i for i, solution in enumerate(samples) if not solution.abandoned]
    assert [samples[i] for i in kept] == [all_of_them[i] for i in kept]


def test_probes_leave_the_rows_unchanged(model):
    probing = guide(probe_every=16, probe_tokens=4, probe_agree=99, budget=210)
    plain = guided(model, TOKENIZER, PROMPTS, guide(budget=210))
    for [with_probes], [without] in zip(guided(model, TOKENIZER, PROMPTS, probing), plain, strict=True):
        assert with_probes.tokens <= 210
        if with_probes.events == without.events and not with_probes.truncated:
            assert with_probes.ids == without.ids
            assert with_probes.tokens == without.tokens + with_probes.probe_tokens
    probed = [with_probes for [with_probes] in guided(model, TOKENIZER, PROMPTS, probing)]
    assert sum(solution.probe_tokens > 0 for solution in probed) > 3


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_sliding_window_model_can_be_probed(name, monkeypatch):
    model = family(name, vocab_size=258, max_position_embeddings=256)
    model.generation_config.eos_token_id = STOPS
    probing = guide(minimum=0, probe_every=4, probe_tokens=8, probe_agree=99, interventions=())
    recorded = []
    probed = TokenState.probed
    monkeypatch.setattr(TokenState, "probed", lambda *a: recorded.append(a[1:]) or probed(*a))
    together, [*probes] = guided(model, TOKENIZER, PROMPTS, probing), recorded
    assert len(probes) > 4
    recorded.clear()
    assert guided(model, TOKENIZER, PROMPTS, probing, batch_size=1) == together and sorted(recorded) == sorted(probes)
    recorded.clear()
    monkeypatch.setattr("rbfast.inference.decoding.new_cache", lambda model: None)  # rereads each row
    assert guided(model, TOKENIZER, PROMPTS, probing) == together and recorded == probes


def test_entropy_matches_its_definition():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 4
    expected = torch.distributions.Categorical(logits=scores.double()).entropy()
    torch.testing.assert_close(entropy(scores).double(), expected, rtol=1e-5, atol=1e-6)
    scores[0, 3:] = -math.inf
    assert entropy(scores)[0] == pytest.approx(
        torch.distributions.Categorical(logits=scores[0, :3].double()).entropy().item(), rel=1e-5
    )


def test_calibration_is_a_quantile_of_the_models_entropies(model, monkeypatch):
    monkeypatch.setattr("rbfast.inference.local.format_prompt", lambda problem, *_: problem)
    solver = LocalSolver(model, TOKENIZER)
    low, high = (calibrate(solver, PROMPTS, guide(), quantile=q) for q in (0.1, 0.9))
    assert 0 < low < high < math.log(258)
    with pytest.raises(ValueError, match="quantile must lie in"):
        calibrate(solver, PROMPTS, guide(), quantile=1.5)


def test_concurrent_decoding_has_the_same_end_tokens(model):
    ends, meanwhile = greedy_settings(model, TOKENIZER), []
    guided(model, TOKENIZER, ["xyz"], guide(), listen=lambda *_: meanwhile.append(greedy_settings(model, TOKENIZER)))
    assert meanwhile and all(settings == ends for settings in meanwhile)


def test_listener_receives_everything_in_order(model):
    received = []
    [[solution]] = guided(
        model, TOKENIZER, ["xyz"], guide(), listen=lambda row, kind, text: received.append((row, kind, text))
    )
    assert {row for row, _, _ in received} == {0}
    inserted = [kind for _, kind, _ in received if kind not in ("think", "answer")]
    assert inserted[: len(solution.events)] == [event.kind for event in solution.events]
    assert "".join(text for _, kind, text in received if kind == "answer") in solution.answer


def test_markers_suit_the_tokenizer():
    plain = phrases_for(TOKENIZER)
    assert (plain.close, plain.finish, plain.probe) == ("<answer>", "</answer>", "")
    thinking = tiny_tokenizer()
    thinking.add_tokens(["</think>"])
    assert phrases_for(thinking).close == "<answer>"  # the template decides, not the vocabulary
    thinking.chat_template = "{% for m in messages %}{{ (m.reasoning or '') + '</think>\n' + m.content }}{% endfor %}"
    thinking.chat_template = thinking.chat_template.replace("{{ (", "{{ m.content if m.role == 'user' else (")
    assert (phrases_for(thinking).close, phrases_for(thinking).probe) == ("</think>", "\n\\boxed{")
    assert (
        len(Vocabulary(TOKENIZER, Guide(Limits(500)), [0]).encode("</think>")) == 8
    )  # a marker may take several tokens


def test_solver_uses_its_instruction_and_batch_size(model, monkeypatch):
    calls = []
    monkeypatch.setattr("rbfast.inference.local.guided", lambda *args, **others: calls.append((args, others)))
    solver = LocalSolver(model, TOKENIZER, batch_size=3, instruction=BOXED)
    solver.solve(["2 + 2?"], guide())
    [((_, _, prompts, *_), others)] = calls
    assert prompts == [format_prompt("2 + 2?", TOKENIZER, BOXED)] and others["batch_size"] == 3
    assert solver.phrases().close == "\\boxed{"


def test_invalid_requests_are_refused(model):
    with pytest.raises(ValueError, match="longest prompt has 200 tokens and 150 more"):
        guided(model, TOKENIZER, ["x" * 200], guide())
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        guided(model, TOKENIZER, ["x"], guide(), batch_size=0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"samples": 2}, "need a temperature above 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
    ],
)
def test_invalid_sampling_is_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Sampling(**options)


@pytest.mark.slow
def test_real_student_answers_within_its_budget(pristine):
    model, tokenizer = pristine
    solver = LocalSolver(model, tokenizer)
    steps = Guide(Limits(budget=120, reserve=50, minimum=30), solver.phrases())
    [[solution]] = solver.solve(["A farm has 3 cows and 2 hens. How many legs are there?"], steps)
    assert solution.tokens <= 120 and "<answer>" in solution.text
    assert solution.text.rstrip().endswith("</answer>") or not solution.truncated


def test_a_single_text_is_refused(model):
    server = ServerSolver(Server("http://127.0.0.1:9/v1", "tiny", retries=0))
    for solve in (LocalSolver(model, TOKENIZER).solve, server.solve, partial(guided, model, TOKENIZER)):
        with pytest.raises(TypeError, match=r"expected a list of texts, got one: '2 \+ 2 ='; put it in a list"):
            solve("2 + 2 =", guide())


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
def test_a_seed_for_each_text_is_required(model, seeds):
    server = ServerSolver(Server("http://127.0.0.1:9/v1", "tiny", retries=0))
    sampling = Sampling(temperature=1.0, seed=seeds)
    for solve in (LocalSolver(model, TOKENIZER).solve, server.solve, partial(guided, model, TOKENIZER)):
        with pytest.raises(ValueError, match=rf"a seed for each of 2 texts, or one for all, got {len(seeds)}"):
            solve(["a", "b"], Guide.plain(4), sampling)


def test_a_numpy_seed_is_a_seed(model):
    drawn = [
        guided(model, TOKENIZER, PROMPTS[:2], Guide.plain(6), Sampling(temperature=1.0, seed=seed))
        for seed in (3, np.int64(3))
    ]
    assert drawn[0] == drawn[1]
