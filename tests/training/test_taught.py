"""A teacher's signals in training, and the commands that create and use them."""

import json

import pytest
import torch
from host_waits import host_waits
from openai_server import serving
from plain_losses import divergence
from tiny_models import family, llama
from tiny_tokenizers import byte_fallback, byte_level

from rbfast.cli.main import main
from rbfast.data.encoding import IGNORE, collate, encode, mask_targets_from
from rbfast.data.readers import read_traces, write_traces
from rbfast.data.signal_store import SignalStore
from rbfast.data.spans import ROLES
from rbfast.data.trace import Trace
from rbfast.loss.distill_loss import DistillLoss
from rbfast.loss.teacher_signal import Dense
from rbfast.models.student import final_hidden, load_teacher
from rbfast.teacher.logprobs import add_local_logprobs
from rbfast.training.distill import DistillConfig, distill
from rbfast.training.objective import Objective, role_counts, token_losses

TRACES = [Trace(f"What is {n} + 1?", f"Add one.\n{n} + 1 = {n + 1}", str(n + 1), id=f"t{n}") for n in range(6)]
TOKENIZER = byte_level(*(trace.completion() for trace in TRACES))
OBJECTIVE = Objective(ce_share=0.25)
CONFIG = DistillConfig(density=0.05, batch_size=2, placement="random", objective=OBJECTIVE)


def model(seed=0):
    tiny = llama(vocab_size=len(TOKENIZER), max_position_embeddings=512).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tiny


def score_traces(folder, traces=TRACES, teacher=None):
    with SignalStore(folder, "tiny", 5, len(TOKENIZER)) as store:
        add_local_logprobs(teacher or model(1), TOKENIZER, traces, TOKENIZER, store)
    return folder


def pack(traces=TRACES[:2], store=None):
    examples = [encode(trace, TOKENIZER) for trace in traces]
    if store:
        SignalStore.open(store).fill(examples)
    return collate(examples)


def losses(student, batch, teacher=None):
    hidden = student.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state[0]
    return hidden, token_losses(student, hidden, batch, torch.ones(3), OBJECTIVE, teacher)


def test_running_teacher_gives_its_whole_distribution():
    student, teacher, batch = model(), model(1), pack()
    hidden, out = losses(student, batch, teacher)
    with torch.no_grad():
        logits = teacher(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    expected = DistillLoss(reduction="sum")(
        hidden, student.lm_head.weight, batch["labels"][0], Dense(logits=logits), kl_weight=0.75, ce_weight=0.25
    )
    torch.testing.assert_close(out.loss, expected.loss)
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


# The heads have a softcap, a scale and a bias.
@pytest.mark.parametrize(("name", "beta"), [("gemma2", 0.0), ("cohere", 0.5), ("phi", 1.0)])
def test_heads_and_roles_match_the_formula(name, beta):
    student, teacher = (family(name, vocab_size=len(TOKENIZER), max_position_embeddings=512) for _ in range(2))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.2)
    batch, weights, taus = pack(TRACES[:1]), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 2.0, 3.0])
    temperatures = dict(zip((f"{role}_temperature" for role in ROLES), taus.tolist(), strict=True))
    hidden = final_hidden(student, batch["input_ids"], batch["position_ids"], batch["lengths"])
    out = token_losses(student, hidden, batch, weights, Objective(ce_share=0.25, beta=beta, **temperatures), teacher)

    rows = batch["text_rows"]
    roles, z, y = batch["roles"][0][rows], *(m(batch["input_ids"]).logits[0][rows].double() for m in (student, teacher))
    tau = taus[roles]
    d = divergence((y / tau[:, None]).log_softmax(1), (z / tau[:, None]).log_softmax(1), beta)
    ce = torch.nn.functional.cross_entropy(z, batch["labels"][0][rows], reduction="none")
    expected = (weights[roles] * (0.75 * tau**2 * d + 0.25 * ce)).sum()
    assert set(roles.tolist()) == {0, 1, 2} and out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_student_does_not_diverge_from_itself():
    student = model()
    _, out = losses(student, pack(), student)
    assert out.divergence.max() < 1e-5 and out.ce.sum() > 1


def test_stored_logprobs_take_precedence_over_the_running_teacher(tmp_path):
    student, teacher = model(), model(1)
    batch = pack(store=score_traces(tmp_path, TRACES[:1]))
    _, mixed = losses(student, batch, teacher)
    _, running = losses(student, pack(), teacher)
    first = torch.zeros(len(mixed.ce), dtype=torch.bool).index_fill_(0, batch["teacher_rows"], True)
    trained = batch["labels"][0] != IGNORE
    assert first.any() and (trained & ~first).any()
    assert torch.equal(mixed.divergence[~first], running.divergence[~first])
    # The tail of a top-k is one bucket, which can only bring the two closer.
    assert (mixed.divergence[first] < running.divergence[first]).all()
    shared = 0.25 * mixed.ce + 0.75 * mixed.divergence
    torch.testing.assert_close(mixed.loss, shared.sum())
    _, text = losses(student, batch)  # without a running teacher
    torch.testing.assert_close(text.loss, torch.where(first, shared, mixed.ce).sum())


def test_masked_trace_loses_its_signals_too(tmp_path):
    store = score_traces(tmp_path, TRACES[1:2])
    whole, first = pack(TRACES[:2], store), pack(TRACES[:1])
    mask_targets_from(whole, first["labels"].shape[1])
    assert torch.equal(whole["text_rows"], first["text_rows"]) and not len(whole["teacher_rows"])
    assert len(whole["teacher_ids"]) == len(whole["teacher_logprobs"]) == 0
    _, out = losses(model(), whole)
    _, alone = losses(model(), first)
    torch.testing.assert_close(out.loss, alone.loss)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_objective_never_waits_for_the_device(tmp_path, with_teacher, monkeypatch):
    batch = pack(store=score_traces(tmp_path, TRACES[:1]))
    student, teacher = model(), model(1) if with_teacher else None
    hidden = student.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state[0]
    monkeypatch.setattr(
        "rbfast.training.objective.final_hidden", lambda *_: hidden.detach()
    )  # a model's own waits do not count
    with host_waits(monkeypatch) as waits:
        weights = OBJECTIVE.weights(0.3, hidden.device) / role_counts(batch)
        token_losses(student, hidden, batch, weights, OBJECTIVE, teacher).loss.backward()
    assert waits.found == []


def test_training_uses_stored_signals(tmp_path):
    folder = score_traces(tmp_path / "signals", TRACES[:4])
    missing = f"{len(TRACES) - 4} of {len(TRACES)} traces have no log-probs in .*: they learn from their text alone"
    with pytest.warns(UserWarning, match=missing):
        taught = distill(model(), TOKENIZER, TRACES, tmp_path / "run", CONFIG, quiet=True, signals=folder)
    plain = distill(model(), TOKENIZER, TRACES, tmp_path / "plain", CONFIG, quiet=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["signals"] == {
        "teacher": "tiny",
        "k": 5,
        "traces": 4,
    }
    [a, b] = ([p.detach() for p in run.adapter.parameters()] for run in (taught, plain))
    assert not all(map(torch.equal, a, b))
    for signals in (score_traces(tmp_path / "s", TRACES[:2]), None):
        with pytest.raises(ValueError, match="its signals"):
            distill(model(), TOKENIZER, TRACES, tmp_path / "run", CONFIG, quiet=True, signals=signals)


def test_signals_of_other_traces_are_refused(tmp_path):
    folder = score_traces(tmp_path / "signals", TRACES[:2])
    with pytest.raises(ValueError, match="log-probs of none of the 4 traces"):
        distill(model(), TOKENIZER, TRACES[2:], tmp_path / "run", CONFIG, quiet=True, signals=folder)


def test_training_with_a_running_teacher_is_reproducible_bitwise(tmp_path):
    runs = [
        distill(model(), TOKENIZER, TRACES, tmp_path / str(i), CONFIG, quiet=True, teacher=model(1)) for i in range(2)
    ]
    [a, b] = ([p.detach() for p in run.adapter.parameters()] for run in runs)
    assert all(map(torch.equal, a, b))
    with pytest.raises(ValueError, match="its teacher is '', now None"):
        distill(model(), TOKENIZER, TRACES, tmp_path / "0", CONFIG, quiet=True)


def test_student_as_its_own_teacher_is_refused(tmp_path):
    student = model()
    with pytest.raises(ValueError, match="the teacher is the student itself"):
        distill(student, TOKENIZER, TRACES, tmp_path, CONFIG, quiet=True, teacher=student)
    distill(student, TOKENIZER, TRACES, tmp_path, CONFIG, quiet=True, teacher=model())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher and a student on disk, and one with another tokenizer."""
    root = tmp_path_factory.mktemp("models")
    other = byte_fallback(*(trace.completion() for trace in TRACES), size=30)
    for name, tokenizer in (("teacher", TOKENIZER), ("student", TOKENIZER), ("other", other)):
        tokenizer.save_pretrained(root / name)
        llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(root / name)
    return root


def test_command_line_scores_traces_and_trains(folders, tmp_path, capsys):
    traces, out = tmp_path / "traces.jsonl", tmp_path / "scored"
    write_traces(traces, TRACES)
    teacher, student = str(folders / "teacher"), str(folders / "student")
    score = ["teach", teacher, str(traces), "-o", str(out), "--score", "--student", student, "-k", "4", "--json"]
    assert main(score) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out / "signals"), "scored": 6, "refused": 0}
    train = ["distill", student, str(traces), "-o", str(tmp_path / "run"), "--density", "0.05", "--json"]
    for folder in (out / "signals", out):
        assert main([*train, "--signals", str(folder), "--teacher", teacher]) == 0
        assert json.loads(capsys.readouterr().out)["trained"] == 6
    wrong = [str(folders / "other") if word == teacher else word for word in score]
    wrong[wrong.index(str(out))] = str(tmp_path / "aligned")
    assert main(wrong) == 2 and "--align" in capsys.readouterr().err
    assert main([*wrong, "--align"]) == 0
    train[train.index(str(tmp_path / "run"))] = str(tmp_path / "second")
    continued = [*train[: train.index("--density")], "--adapter", str(tmp_path / "run")]
    assert main([*continued, "--plan"]) == 0 and main(continued) == 0
    assert main([*train, "--adapter", str(tmp_path / "run")]) == 2
    assert "density is for a new adapter" in capsys.readouterr().err
    assert main([*continued[:4], str(tmp_path / "x"), "--teacher", str(folders / "other")]) == 2
    assert "a different vocabulary from the student" in capsys.readouterr().err


def test_command_line_queries_a_server(folders, tmp_path, capsys):
    problems, out = tmp_path / "problems.jsonl", tmp_path / "taught"
    problems.write_text('{"problem": "What is 3 + 1?", "answer": "4"}\n{"problem": "What is 5 + 1?"}\n')
    reply = "<plan>Add one.</plan>\nAdd one.\n3 + 1 = 4\n\n<answer>4</answer>"
    with serving(model(), TOKENIZER, script=lambda problem: reply) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        ask = ["teach", "tiny", str(problems), "-o", str(out), "--server", url, "--json"]
        assert main([*ask, "--student", str(folders / "student"), "-k", "5", "--prices", "1", "2"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["traces"], result["signals"], result["open"]) == (2, 2, 0) and result["cost"] > 0
        assert [trace.verified for trace in read_traces(out / "traces.jsonl")] == [True, None]
        assert len(SignalStore.open(out / "signals")) == 2
        server.faults = [401]
        ask[ask.index(str(out))] = str(tmp_path / "again")
        assert main(ask) == 1 and "returned 401" in capsys.readouterr().err
        ask[ask.index(str(tmp_path / "again"))] = str(tmp_path / "most")
        assert main([*ask, "--student", str(folders / "student")]) == 0
        assert server.requests[-1]["top_logprobs"] == 20  # the most that servers allow
        capsys.readouterr()
    assert main(["teach", "tiny", str(problems), "-o", str(out)]) == 2
    assert "--server" in capsys.readouterr().err


def test_command_line_checks_the_student_before_any_request(folders, tmp_path, capsys):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "What is 3 + 1?"}\n')
    wrong = {
        "mistyped: expected the folder of a model": ["--student", str(tmp_path / "mistyped")],
        "k must be at least 1, got 0": ["--student", str(folders / "student"), "-k", "0"],
    }
    with serving(model(), TOKENIZER) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        for message, options in wrong.items():
            ask = ["teach", "tiny", str(problems), "-o", str(tmp_path / "taught"), "--server", url, *options]
            assert main(ask) == 2
            assert message in capsys.readouterr().err
        assert not server.requests


def test_running_teacher_needs_the_students_vocabulary(folders):
    assert load_teacher(str(folders / "teacher"), TOKENIZER).config.vocab_size == len(TOKENIZER)
    with pytest.raises(ValueError, match="a different vocabulary from the student"):
        load_teacher(str(folders / "other"), TOKENIZER)
