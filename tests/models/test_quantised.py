"""Loading in 4 or 8 bits: the package that quantises, the error without one, and training on top."""

import importlib.util

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_models import llama

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.models import quantised
from rbfast.models.quantised import quantisation
from rbfast.models.student import load_student

PACKAGES = ("bitsandbytes", "torchao")


def only(monkeypatch, *names):
    """Pretends that of the packages that quantise only these are installed."""
    monkeypatch.setattr(quantised, "find_spec", lambda name: name in names or None)
    monkeypatch.setattr(quantised, "import_optional", lambda *args: None)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_bitsandbytes_is_preferred(monkeypatch, bits):
    only(monkeypatch, *PACKAGES)
    config = quantisation(bits, torch.bfloat16)
    assert config.quant_method == "bitsandbytes"
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == "4bit", bits == "8bit")
    if bits == "4bit":
        assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype == torch.bfloat16


def test_missing_packages_are_named(monkeypatch):
    only(monkeypatch)
    with pytest.raises(ImportError, match="weights in 4bit need the package bitsandbytes, or torchao: pip install"):
        quantisation("4bit", torch.bfloat16)


def test_widths_other_than_4_and_8_bits_are_refused():
    with pytest.raises(ValueError, match="loaded in 4bit or 8bit, got '3bit'"):
        quantisation("3bit", torch.bfloat16)


def test_gguf_file_is_not_quantised_again(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"read from a GGUF file, whose weights cannot be loaded in 4bit"):
        load_student(str(tmp_path / "model.gguf"), load_in="4bit")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("package", PACKAGES)
def test_adapter_trains_beside_weights_quantised_on_loading(monkeypatch, tmp_path, package, bits):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(quantised, "find_spec", lambda name: name == package or None)
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    llama(vocab_size=258, **sizes).save_pretrained(tmp_path)  # sizes that 4-bit packing allows
    tiny_tokenizer().save_pretrained(tmp_path)
    plain, _ = load_student(str(tmp_path), torch.float32)
    model, _ = load_student(str(tmp_path), torch.float32, load_in=bits)
    x = torch.randn(20, plain.config.hidden_size)
    ours, exact = (m.model.layers[0].mlp.up_proj(x).detach() for m in (model, plain))
    assert 1e-4 < (ours - exact).norm() / exact.norm() < 0.2, "the weights must have been quantised"
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    assert adapter.sites() and not any(site.is_folded for site in adapter.sites().values())
    model.train()(torch.arange(20)[None]).logits.square().mean().backward()
    assert all(site.B.grad.abs().sum() > 0 for site in adapter.sites().values())
