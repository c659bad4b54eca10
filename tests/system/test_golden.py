"""Bytes that must not change unless a format does: an adapter's files, a curation, an encoded trace."""

import json
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from tiny import tiny_tokenizer

import rbfast
from rbfast.adapter.adapter_files import AdapterConfig, Delta, MatrixInfo, write_adapter, write_lora
from rbfast.data.encoding import encode
from rbfast.data.trace import Trace

PROBLEMS = ("What is {} + {}?", "A train drives {} miles an hour for {} hours. How far is it?", "Is {} more than {}?")


def digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: digest(path.read_bytes()) for path in sorted(folder.iterdir())}


def adapter_parts() -> tuple[AdapterConfig, dict[str, Delta]]:
    info = MatrixInfo(6, 8, 3, 2, 0, "0123456789abcdef", 0.5)
    delta = Delta(torch.tensor([1, 4, 6]), torch.arange(6.0).view(2, 3) / 8, torch.arange(12.0).view(6, 2) / 16)
    config = AdapterConfig("a/base", "bfloat16", 0.003, 1.0, 0, "random", {"layers.0.q_proj": info})
    return config, {"layers.0.q_proj": delta}


def test_adapter_bytes_are_unchanged(tmp_path):
    write_adapter(tmp_path / "adapter", *adapter_parts())
    write_lora(tmp_path / "lora", *adapter_parts(), transposed=False)
    assert digests(tmp_path / "adapter") == {
        "adapter_config.json": "56738e6900daea4b",
        "adapter_model.safetensors": "fcff811d51ae3a94",
    }
    assert digests(tmp_path / "lora") == {
        "adapter_config.json": "44a3ddc46e87be31",
        "adapter_model.safetensors": "eec15ff07372bf5b",
    }


def test_curation_bytes_are_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a row without a source gets the path of its file
    rows = [
        {
            "problem": PROBLEMS[i % 3].format(7 * i + 1, 3 * i + 2),
            "reasoning": f"Let me think about {i}. First I add. Then I check: " + "so it is right. " * (i % 5),
            "answer": str(10 * i + 3),
            "domain": ("numbers", "trains")[i % 2],
        }
        for i in range(40)
    ]
    Path("pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rbfast.curate(["pool.jsonl"], "out", rbfast.CurateConfig(size=10, seed=3))
    assert digest(Path("out/reason1k.jsonl").read_bytes()) == "3cbe6f8c8873eab5"


def test_encoded_trace_is_unchanged():
    trace = Trace("What is 2+3?", "First add.\nSo 2+3=5. Let me check: 5-3=2, right.", "5", plan="Add, then check.")
    example = encode(trace, tiny_tokenizer())
    parts = [getattr(example, name).astype(np.int64) for name in ("input_ids", "labels", "roles")]
    encoded = b"".join(part.tobytes() for part in parts)
    assert digest(encoded) == "a5f5881799677580"
