"""The benchmarks' peers: each computes the loss that bench/peers states, and a record becomes a page and a picture."""

import json
from pathlib import Path

import cpu_page
import pytest
import registry
import torch
from experiments.accuracy import gradient, in_fp64, negatives
from harness import absent, reason
from peers.adapters import ADAPTERS, trained
from peers.losses import DENSE, TOP_K, Batch, plain_dense, rbfast_dense, rbfast_top_k
from publish import kind_of, put_section
from tiny import tiny_model

T, H, V, K = 24, 32, 211, 5


@pytest.fixture
def batch() -> Batch:
    return Batch.draw(T, H, V, K, torch.float32)


def load(peer, beta: float):
    try:
        return peer.load(beta)
    except ImportError as error:
        pytest.skip(f"{error}: docs/bench.md says how to install it")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("who", [who for who in DENSE if who not in ("torchtune KL", "torch.compile")])
def test_dense_peers_compute_our_loss(batch: Batch, who: str, beta: float) -> None:
    loss, exact = load(DENSE[who], beta), rbfast_dense(beta)
    assert loss(batch).item() == pytest.approx(exact(in_fp64(batch)).item(), rel=1e-4)
    torch.testing.assert_close(gradient(loss, batch), gradient(exact, in_fp64(batch)), rtol=1e-3, atol=1e-6)


def test_torchtune_kl_is_the_teachers_cross_entropy(batch: Batch) -> None:
    loss = load(DENSE["torchtune KL"], 0.0)
    log_p = torch.log_softmax(batch.teacher_hidden.double() @ batch.teacher_weight.double().T, 1)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    assert (loss(batch) - entropy).item() == pytest.approx(plain_dense(0.0)(batch).item(), rel=1e-3)
    torch.testing.assert_close(gradient(loss, batch), gradient(rbfast_dense(0.0), in_fp64(batch)), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="beta 0"):
        DENSE["torchtune KL"].load(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("who", TOP_K)
def test_top_k_peers_compute_our_loss(batch: Batch, who: str) -> None:
    loss, exact = TOP_K[who].load(0.0), rbfast_top_k(0.0)
    assert loss(batch).item() == pytest.approx(exact(in_fp64(batch)).item(), rel=1e-4)
    torch.testing.assert_close(gradient(loss, batch), gradient(exact, in_fp64(batch)), rtol=1e-3, atol=1e-6)


def test_negative_rows_are_counted_one_by_one(batch: Batch) -> None:
    assert negatives(rbfast_dense(0.0), batch) == 0
    assert negatives(lambda one: one.hidden.sum() * 0 - 1, batch) == T


@pytest.mark.parametrize("who", ADAPTERS)
def test_adapters_train_every_linear(who: str) -> None:
    if who != "rbfast":
        pytest.importorskip("peft")
    model = tiny_model()
    adapter = ADAPTERS[who](model) if who != "rbfast" else ADAPTERS[who](model, density=0.1)
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    assert trained(adapter)
    assert all(parameter.grad is not None for parameter in trained(adapter))


@pytest.mark.parametrize(("is_there", "found"), [(False, "none"), (True, "only toys")])
def test_toy_and_absent_records_make_no_page(tmp_path: Path, capsys, is_there: bool, found: str) -> None:
    record = tmp_path / "cases.jsonl"
    if is_there:
        entry = {"case": "loss-a", "who": {"rbfast": {"seconds": [1.0, 1.0]}}, "is_toy": True}
        record.write_text(json.dumps(entry) + "\n")
    assert cpu_page.main([str(record), "--docs", str(tmp_path)]) == 2
    assert f"expected cases in which rbfast was timed, found {found}" in capsys.readouterr().err
    assert not (tmp_path / "bench.md").exists()


def test_reason_for_a_missing_peer() -> None:
    with pytest.raises(ModuleNotFoundError) as missing:
        import no_such_package_at_all  # noqa: F401
    assert reason(missing.value) == "no_such_package_at_all is not installed"
    assert reason(ValueError("a\nb")) == "ValueError: a"
    with pytest.raises(ValueError, match="why"):
        absent(ValueError("why"))()


def record_of(path: Path, seconds: list[float]) -> Path:
    who = {
        "floor": {"seconds": [1.0, 1.0, 1.0]},
        "rbfast": {"seconds": seconds, "extra_mib": 7.4, "note": ""},
        "torch.compile": {"seconds": [4.0, 4.0, 4.0], "extra_mib": None, "note": "whole logits"},
        "absent": {"missing": "trl is not installed", "note": "never shown"},
    }
    facts = {"title": "loss, tiny", "versions": {"torch": "2.0"}, "threads": 2, "isa": "avx2"}
    entries = [{"case": "loss-top-k-SmolLM2-135M", "who": who} | facts, {"case": "loss-dense", "failed": "no"}]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_record_becomes_a_page_and_a_picture(tmp_path: Path, monkeypatch, capsys) -> None:
    record = record_of(tmp_path / "cases.jsonl", [2.0, 2.0, 4.0])
    put_section(tmp_path / "bench.md", "other", "stays")
    monkeypatch.setattr(cpu_page, "cpu_kind", lambda: "Xeon, AMX")
    assert cpu_page.main([str(record), "--docs", str(tmp_path)]) == 0
    page = (tmp_path / "bench.md").read_text()
    assert "| rbfast | 2.000 | 2.00 [2.00, 3.00] | 1.00 [1.00, 1.00] | 7 |  |" in page
    assert "| torch.compile | 4.000 | 4.00 [4.00, 4.00] | 2.00 [1.50, 2.00] |  | whole logits |" in page
    assert "| absent | - | - | - | - | trl is not installed |" in page
    assert "stays" in page
    assert (tmp_path / "bench-xeon-amx.png").read_bytes().startswith(b"\x89PNG")
    assert "| loss, top-k, SmolLM2-135M: over its bare products | 2.00 |" in capsys.readouterr().out


def test_cpu_kind_replaces_only_its_own_figures(tmp_path: Path, monkeypatch) -> None:
    for kind, seconds in (("Xeon, AMX", [2.0, 2.0, 2.0]), ("Zen 5, AVX-512", [1.5] * 3), ("Xeon, AMX", [1.0] * 3)):
        record = record_of(tmp_path / "cases.jsonl", seconds)
        monkeypatch.setattr(cpu_page, "cpu_kind", lambda kind=kind: kind)
        assert cpu_page.main([str(record), "--docs", str(tmp_path)]) == 0
    page = (tmp_path / "bench.md").read_text()
    assert "| ratio of times | Xeon, AMX | Zen 5, AVX-512 |" in page
    assert "| loss, top-k, SmolLM2-135M: over its bare products | 1.00 | 1.50 |" in page
    assert page.count("### Xeon, AMX") == page.count("### Zen 5, AVX-512") == 1
    assert "| rbfast | 1.500 |" in page and "| rbfast | 2.000 |" not in page


def test_quoted_ratios_name_measured_cases() -> None:
    assert {case for case, _ in cpu_page.RATIOS.values()} <= {str(case) for case in registry.cases("cpu")}


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"vendor_id": "AuthenticAMD", "cpu family": "26", "flags": "avx2 avx512f avx512_bf16"}, "Zen 5, AVX-512"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "flags": "avx2"}, "Zen 3, AVX2"),
        ({"vendor_id": "GenuineIntel", "model name": "Intel(R) Xeon(R)", "flags": "avx512f amx_bf16"}, "Xeon, AMX"),
        ({"Features": "asimd"}, "aarch64"),
    ],
)
def test_cpu_kinds(facts: dict[str, str], kind: str) -> None:
    assert kind_of(facts, "aarch64") == kind
