"""llama.cpp and vLLM with an exported LoRA match the merged model token for token.

Both are large, and vLLM needs its own torch, so the test requirements leave them out: pip install '.[consumers]' into
a separate environment, and run this file there.
"""

import json

import pytest
import torch
from gguf_files import SPECIAL, VOCABULARY, write_llama, write_lora
from tiny_models import attach, disturb, llama

pytestmark = pytest.mark.slow

# Of sixteen candidates, those without near ties.
PROMPTS = [[1, *(3 + (7 * n + 11 * i) % 128 for i in range(5 + n))] for n in (1, 2, 3, 5, 7, 8, 9, 11)]
TOKENS = 8
MARGIN = 0.02  # between the two likeliest tokens: rounding decides between closer ones


def student():
    sizes = dict(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_attention_heads=4)
    sizes |= dict(tie_word_embeddings=False, initializer_range=0.3, max_position_embeddings=128)
    model = llama(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2).eval()
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL)] = 0  # never the likeliest, so no text ends early
    return model


def greedy_tokens(model):
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):
            with torch.no_grad():
                best = model(ids).logits[:, -1].topk(2)
            assert best.values[0, 0] - best.values[0, 1] > MARGIN, "a near tie: choose other prompts"
            ids = torch.cat([ids, best.indices[:, :1]], 1)
        rows.append(ids[0, len(prompt) :].tolist())
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The base and the LoRA, each as a folder and as GGUF, and the tokens of the base and of the merged model."""
    folder, model = tmp_path_factory.mktemp("consumers"), student()
    base = greedy_tokens(model)
    model.save_pretrained(folder / "base")
    write_llama(model, folder / "base.gguf")
    adapter = attach(model)
    disturb(adapter, size=0.5)
    adapter.export_lora(folder / "lora", str(folder / "base"))
    write_lora(folder / "lora", model.config, folder / "lora.gguf")
    adapter.merge()
    merged = greedy_tokens(model)
    assert all(ours != theirs for ours, theirs in zip(merged, base, strict=True)), "the adapter must matter"
    return folder, base, merged


def test_llama_cpp_matches_the_merged_model(files):
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs the extra `consumers`")
    folder, base, merged = files

    def run(adapters):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(folder / "base.gguf"), 256, 1
        params.cpuparams.n_threads, params.warmup = 1, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # fp16 would flip near ties
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
        server = xllamacpp.Server(params)
        options = dict(max_tokens=TOKENS, temperature=0.0, logprobs=1, ignore_eos=True, cache_prompt=False)
        replies = [server.handle_completions({"prompt": prompt, **options})["choices"][0] for prompt in PROMPTS]
        return [[token["id"] for token in reply["logprobs"]["content"]] for reply in replies]

    assert run([]) == base
    assert run([folder / "lora.gguf"]) == merged


def test_vllm_matches_the_merged_model(files):
    vllm = pytest.importorskip("vllm", reason="needs the extra `consumers`")
    from vllm.lora.request import LoRARequest

    folder, base, merged = files
    rank = json.loads((folder / "lora" / "adapter_config.json").read_text())["r"]
    options = dict(dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True, max_num_seqs=8)
    engine = vllm.LLM(str(folder / "base"), enable_lora=True, max_lora_rank=rank, **options)
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]

    def run(adapter):
        replies = engine.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
        return [list(reply.outputs[0].token_ids) for reply in replies]

    assert run(None) == base
    assert run(LoRARequest("trained", 1, str(folder / "lora"))) == merged
