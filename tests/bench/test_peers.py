"""The benchmarks' peers: each computes what bench/peers.py says it does, and a record becomes a page and a picture."""

import json
from pathlib import Path

import peers_report
import pytest
import torch
from experiments.accuracy import gradient, in_fp64, negatives
from harness import absent, reason
from peers.adapters import ADAPTERS, trained
from peers.losses import DENSE, TOP_K, Batch, plain_dense, rbfast_dense, rbfast_top_k
from publish import put_section
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


def test_torchtunes_is_the_teachers_cross_entropy(batch: Batch) -> None:
    loss = load(DENSE["torchtune KL"], 0.0)
    log_p = torch.log_softmax(batch.teacher_hidden.double() @ batch.teacher_weight.double().T, 1)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    assert (loss(batch) - entropy).item() == pytest.approx(plain_dense(0.0)(batch).item(), rel=1e-3)
    torch.testing.assert_close(gradient(loss, batch), gradient(rbfast_dense(0.0), in_fp64(batch)), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="beta 0"):
        DENSE["torchtune KL"].load(0.5)


@pytest.mark.parametrize("who", TOP_K)
def test_top_k_peers_compute_our_loss(batch: Batch, who: str) -> None:
    loss, exact = TOP_K[who].load(0.0), rbfast_top_k(0.0)
    assert loss(batch).item() == pytest.approx(exact(in_fp64(batch)).item(), rel=1e-4)
    torch.testing.assert_close(gradient(loss, batch), gradient(exact, in_fp64(batch)), rtol=1e-3, atol=1e-6)


def test_rows_are_counted_one_by_one(batch: Batch) -> None:
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


def test_why_somebody_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError) as missing:
        import no_such_package_at_all  # noqa: F401
    assert reason(missing.value) == "no_such_package_at_all is not installed"
    assert reason(ValueError("a\nb")) == "ValueError: a"
    with pytest.raises(ValueError, match="why"):
        absent(ValueError("why"))()


def test_a_record_becomes_a_page_and_a_picture(tmp_path: Path) -> None:
    who = {
        "floor": {"seconds": [1.0, 1.0, 1.0]},
        "rbfast": {"seconds": [2.0, 2.0, 4.0], "extra_mib": 7.4, "note": ""},
        "theirs": {"seconds": [4.0, 4.0, 4.0], "extra_mib": None, "note": "whole logits"},
        "absent": {"missing": "trl is not installed", "note": "never shown"},
    }
    facts = {"who": who, "versions": {"torch": "2.0"}, "threads": 2, "isa": "avx2"}
    record = tmp_path / "bench.json"
    record.write_text(json.dumps({"benchmarks": [{"group": "loss, tiny", "extra_info": facts}]}))
    put_section(tmp_path / "bench.md", "other", "stays")
    assert peers_report.main([str(record), "--docs", str(tmp_path)]) == 0
    page = (tmp_path / "bench.md").read_text()
    assert "| rbfast | 2.000 | 2.00 [2.00, 3.00] | 1.00 [1.00, 1.00] | 7 |  |" in page
    assert "| theirs | 4.000 | 4.00 [4.00, 4.00] | 2.00 [1.50, 2.00] |  | whole logits |" in page
    assert "| absent | - | - | - | - | trl is not installed |" in page
    assert "stays" in page
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
