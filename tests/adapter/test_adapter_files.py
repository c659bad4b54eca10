"""Adapter files: what they contain, malformed ones, fingerprints of the base, and the LoRA export."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hub_cache import add_repository, use_hub_cache
from safetensors.torch import load_file, save_file
from tiny_models import attach, batch, disturb, gpt2, llama, same_bits, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

from rbfast.adapter import adapter_files
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.instruction import FILE
from rbfast.models import linears


def saved(directory, **options):
    model = llama()
    adapter = attach(model, **options)
    disturb(adapter)
    adapter.save_pretrained(directory)
    return model, adapter


def test_config_and_tensors_describe_every_matrix(tmp_path):
    saved(tmp_path, seed=5, scale=0.25)
    header = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (header["format"], header["version"], header["seed"], header["scale"]) == ("rbfast-columns", 1, 5, 0.25)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, entry in header["modules"].items():
        assert tensors[f"{name}.A"].shape == (entry["rank"], entry["support"])
        assert tensors[f"{name}.B"].shape == (entry["out_features"], entry["rank"])
        assert tensors[f"{name}.cols"].dtype == torch.int64
    assert len(tensors) == 3 * len(header["modules"])
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_adapter_of_which_a_process_holds_a_part_is_not_saved(tmp_path):
    model = llama()
    adapter = attach(model, mode="side")
    name, site = list(adapter.sites().items())[3]
    site.B.data = site.B.data.flatten()[:5]  # as FullyShardedDataParallel does between the steps
    for save in (adapter.save_pretrained, adapter.export_lora):
        with pytest.raises(ValueError, match=rf"{name}: this process holds .* summon_full_params"):
            save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_memory_layout_does_not_change_the_saved_file(tmp_path):
    _, adapter = saved(tmp_path / "rows")
    for parameter in adapter.parameters():
        parameter.data = parameter.data.T.contiguous().T
    adapter.save_pretrained(tmp_path / "columns")
    files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("rows", "columns")]
    assert files[0].read_bytes() == files[1].read_bytes()


def set_field(*path, value):
    def change(header):
        *parents, last = path
        for key in parents:
            header = header[key]
        header[last] = value

    return change


def drop_field(*path):
    def change(header):
        *parents, last = path
        for key in parents:
            header = header[key]
        del header[last]

    return change


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("format", value="lora"), "format: expected \"rbfast-columns\", got 'lora'"),
        (drop_field("format"), "this is not an rbfast adapter"),
        (set_field("version", value=2), "version: expected 1, got 2; update rbfast"),
        (drop_field("scale"), "scale is missing"),
        (set_field("scale", value="1"), "scale: expected .*float.*, got '1'"),
        (set_field("scale", value=float("nan")), "scale: expected a finite number other than 0, got nan"),
        (set_field("scale", value=10**400), "scale: expected .*float.*, got 1000"),
        (set_field("seed", value=True), "seed: expected .*int.*, got True"),
        (set_field("modules", value={}), "modules: expected an object with at least one matrix"),
        (set_field("modules", Q, value=3), "q_proj: expected an object, got 3"),
        (set_field("modules", Q, "rank", value=0), "q_proj: expected 1 <= support <= in_features and rank >= 1"),
        (set_field("modules", Q, "support", value=25), "q_proj: expected 1 <= support <= in_features"),
        (drop_field("modules", Q, "group"), "q_proj: group is missing"),
        (drop_field("modules", Q), r"tensor model\.layers\.0\.self_attn\.q_proj\.A is not in the config \(3 such\)"),
    ],
)
def test_malformed_config_is_refused(tmp_path, change, message):
    saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    header = json.loads(file.read_text())
    change(header)
    file.write_text(json.dumps(header))
    with pytest.raises(ValueError, match=message):
        adapter_files.read_adapter(tmp_path)


def test_integer_scale_is_read_as_a_float(tmp_path):
    saved(tmp_path, scale=2.0)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"scale": 2.0', '"scale": 2'))
    assert '"scale": 2,' in file.read_text()
    scale = adapter_files.read_adapter(tmp_path)[0].scale
    assert scale == 2 and isinstance(scale, float)


def test_adapter_of_numpy_numbers_can_be_saved_and_read(tmp_path):
    share, two = np.float32(0.25), np.int64(2)
    attach(llama(), density=share, support=8 * two, rank=two, scale=share, seed=two).save_pretrained(tmp_path)
    assert SparseAdapter.from_pretrained(llama(), tmp_path).config.seed == 2


def test_seed_that_is_no_whole_number_is_refused():
    with pytest.raises(TypeError, match=r"seed must be a whole number, got 1\.5"):
        attach(llama(), seed=1.5)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_config_that_is_not_a_json_object_is_refused(tmp_path, text):
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json: (not JSON|format: expected)"):
        adapter_files.read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("cols", lambda t: t.flip(0), "expected sorted unique columns in 0..23"),
        ("cols", lambda t: t.clamp(max=int(t[1])), "expected sorted unique columns"),
        ("cols", lambda t: t - 24, "expected sorted unique columns"),
        ("cols", lambda t: t + 24, "expected sorted unique columns"),
        ("cols", lambda t: torch.cat([t[:-1], t.new_tensor([24])]), "expected sorted unique columns"),
        ("cols", lambda t: torch.arange(len(t)), r"k_proj\.cols: expected the columns of .*, which is in the same"),
        ("cols", lambda t: t.int(), r"cols: expected \(\d+,\) int64, got \(\d+,\) int32"),
        ("A", lambda t: t[:, :-1].contiguous(), r"A: expected \(2, \d+\) float32, got"),
        ("A", lambda t: t.bfloat16(), "float32, got .* bfloat16"),
        ("B", lambda t: t.index_fill(0, torch.tensor(3), float("nan")), "B: expected finite values"),
        ("B", lambda t: t.index_fill(0, torch.tensor(3), float("inf")), "B: expected finite values"),
    ],
)
def test_malformed_tensor_is_refused_by_name(tmp_path, key, change, message):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"{Q}.{key}": change(tensors[f"{Q}.{key}"])}, file)
    with pytest.raises(ValueError, match=message) as error:
        adapter_files.read_adapter(tmp_path)
    assert Q in str(error.value)


def test_swapped_tensor_names_and_flipped_bits_are_detected(tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    first, second = b"layers.0.mlp.up_proj.A", b"layers.1.mlp.up_proj.A"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].replace(first, b"?").replace(second, first).replace(b"?", second)
    for changed in (data[:8] + header + data[end:], data[:-1] + bytes([data[-1] ^ 1])):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="its content has changed since it was written"):
            adapter_files.read_adapter(tmp_path)


@pytest.mark.parametrize("rank", [1, 2, 10])
def test_tensor_data_in_a_file_is_aligned(tmp_path, rank):
    saved(tmp_path, rank=rank, density=0.9)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_dtype_unknown_to_torch_is_refused(tmp_path):
    saved(tmp_path)
    header = json.dumps({"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a complete safetensors file \(.*F4"):
        adapter_files.read_adapter(tmp_path)


def test_width_beyond_int64_is_refused(tmp_path):
    saved(tmp_path)
    header = json.loads((tmp_path / "adapter_config.json").read_text())
    header["modules"][Q]["in_features"] = 2**70
    (tmp_path / "adapter_config.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=rf"q_proj is \(24, {2**70}\), not \(24, 24\)"):
        SparseAdapter.from_pretrained(llama(), tmp_path)


def test_missing_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: expected a file written by SparseAdapter"):
        adapter_files.read_adapter(tmp_path)
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a complete safetensors file"):
            adapter_files.read_adapter(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        adapter_files.read_adapter(tmp_path)


def test_hub_id_names_an_adapter(tmp_path, monkeypatch):
    _, adapter = saved(tmp_path / "adapter")
    add_repository(tmp_path / "cache", "owner/name", tmp_path / "adapter")
    use_hub_cache(monkeypatch, tmp_path / "cache")
    assert same_bits(SparseAdapter.from_pretrained(llama(), "owner/name").state_dict(), adapter.state_dict())
    message = (
        r"^owner/other: expected the folder of an adapter or a hub id .* returned nothing: .*\. Check the spelling$"
    )
    with pytest.raises(OSError, match=message):
        SparseAdapter.from_pretrained(llama(), "owner/other")
    with pytest.raises(FileNotFoundError, match=r"^owner/name/again/adapter_config\.json: expected a file"):
        SparseAdapter.from_pretrained(llama(), "owner/name/again")


def test_adapter_on_the_hub_comes_with_its_prompt(tmp_path, monkeypatch):
    """A later run without a connection would otherwise use another prompt."""
    fetched = []

    def download(name, *, allow_patterns, **_):
        fetched.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    adapter_files.adapter_folder("owner/name")
    assert set(fetched) == {"adapter_config.json", "adapter_model.safetensors", FILE}


@pytest.mark.parametrize("failing", ["seal", "write_text"])
def test_failed_save_never_pairs_tensors_with_an_older_config(tmp_path, monkeypatch, failing):
    saved(tmp_path, scale=0.25)
    older = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(adapter_files, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, scale=0.5)
    if failing == "seal":  # no file was written
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == older
    else:
        with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: expected a file written by SparseAdapter"):
            adapter_files.read_adapter(tmp_path)


def test_matrix_shapes_of_every_kind_of_layer():
    assert linears.matrix_shape(nn.Linear(3, 5)) == (5, 3)
    assert linears.matrix_shape(Conv1D(5, 3)) == (5, 3)
    for other in (nn.Embedding(3, 5), nn.LayerNorm(3), nn.Conv1d(3, 5, 1), nn.Bilinear(3, 4, 5), nn.Sequential()):
        assert linears.matrix_shape(other) is None
    view = linears.matrix_view(Conv1D(5, 3))
    assert view is not None and view.shape == (5, 3)
    assert linears.matrix_view(nn.Linear(3, 5, device="meta")) is None
    assert linears.matrix_view(nn.Linear(3, 5, dtype=torch.float64)) is None


def test_fingerprint_ignores_dtype_and_detects_one_changed_weight():
    layer = nn.Linear(24, 40)
    before = linears.fingerprint(layer)
    assert linears.fingerprint(layer.bfloat16()) == before
    with torch.no_grad():
        layer.weight[7, 0] += 1
    assert linears.fingerprint(layer) != before


def test_fingerprint_of_a_large_weight_is_stable_across_versions():
    layer = nn.Linear(96, 100)
    layer.weight = nn.Parameter(torch.arange(9600.0).view(100, 96))
    assert linears.fingerprint(layer) == "8e0fbf2b6087e097"


@pytest.mark.parametrize(("make", "rank", "padded"), [(llama, 1, 1), (llama, 2, 8), (gpt2, 2, 8)])
def test_peft_loads_the_exported_lora_and_computes_the_same(tmp_path, make, rank, padded):
    peft = pytest.importorskip("peft")
    model = make()
    adapter = attach(model, rank=rank, scale=0.5)
    disturb(adapter)
    adapter.export_lora(tmp_path)
    ours = model(**batch()).logits
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == padded
    lora = peft.PeftModel.from_pretrained(make(), tmp_path)
    theirs = lora(**batch()).logits
    assert torch.dist(ours, theirs) <= 16 * torch.finfo(torch.float32).eps * ours.norm()
    assert torch.dist(ours, make()(**batch()).logits) > 0.01 * ours.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_exported_lora_ignores_the_default_dtype(tmp_path, dtype):
    _, adapter = saved(tmp_path / "adapter")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        adapter.export_lora(tmp_path / "lora")
    finally:
        torch.set_default_dtype(before)
    adapter.export_lora(tmp_path / "plain")
    files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("lora", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


def with_single_columns(adapter):
    """The config and deltas of an adapter from before supports came in runs: five scattered columns of each matrix."""
    infos, deltas = {}, {}
    for name, info in adapter.config.modules.items():
        cols = torch.tensor([0, 3, 7, 11, info.in_features - 1])
        generator = torch.Generator().manual_seed(len(name))
        a, b = (torch.randn(shape, generator=generator) for shape in ((2, 5), (info.out_features, 2)))
        infos[name], deltas[name] = replace(info, support=5, rank=2), adapter_files.Delta(cols, a, b)
    return replace(adapter.config, modules=infos), deltas


def test_files_with_single_columns_still_load_fold_export_and_detach(tmp_path):
    model = llama()
    adapter = attach(model)
    config, deltas = with_single_columns(adapter)
    adapter.detach()
    original = snapshot(model)
    adapter_files.write_adapter(tmp_path / "old", config, deltas)
    loaded = SparseAdapter.from_pretrained(model, tmp_path / "old")
    for name, delta in deltas.items():
        exact = original[f"{name}.weight"].double()
        exact[:, delta.cols] += delta.B.double() @ delta.A.double()
        folded = loaded.sites()[name].weight
        assert (folded.double() - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    loaded.save_pretrained(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "old" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    loaded.export_lora(tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, delta in deltas.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(a[:2, delta.cols], delta.A) and torch.equal(b[:, :2], delta.B)
        assert a.count_nonzero() == delta.A.numel()
    loaded.detach()
    assert same_bits(snapshot(model), original)


def test_lora_rank_above_512_is_refused(tmp_path):
    adapter = attach(llama())
    info = {name: replace(info, rank=513) for name, info in adapter.config.modules.items()}
    with pytest.raises(ValueError, match="a rank of at most 512, this adapter has 513"):
        adapter_files.write_lora(tmp_path, replace(adapter.config, modules=info), {}, False)
