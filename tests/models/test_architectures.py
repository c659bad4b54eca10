"""A tiny random model of every architecture family: attach, packed training step, save, load, merge, export."""

import json
import math
import warnings

import accelerate
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from tiny_models import FAMILIES, VOCABULARY, attach, batch, disturb, family, losses_of_steps, same_bits, snapshot
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from rbfast.adapter.adapter_files import LORA_RANKS
from rbfast.adapter.column_scores import score_columns
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import IGNORE, Example, collate
from rbfast.models import student
from rbfast.models.student import final_hidden, packs
from rbfast.training.distill import DistillConfig, placement_scores
from rbfast.training.objective import Objective, role_counts, token_losses

pytestmark = pytest.mark.filterwarnings("ignore:.*run one at a time")
both_modes = pytest.mark.parametrize("mode", ["fold", "side"])
every_family = pytest.mark.parametrize("name", FAMILIES)
# Fold mode for every family; side mode for a few, as its code does not depend on the family.
families_and_modes = pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "fold") for name in FAMILIES] + [(name, "side") for name in ("llama", "gpt2", "mixtral", "falcon-h1")],
)

EPS = torch.finfo(torch.float32).eps
MAMBA2 = {"conv1d.weight", "out_proj.weight"}
# The parameters of a family that get no delta, by the end of their names.
LEFT_OUT = {
    "mixtral": {"mlp.gate.weight"},
    "qwen2-moe": {"mlp.gate.weight"},
    "qwen3-moe": {"mlp.gate.weight"},
    "gpt-oss": {"router.weight", "experts.gate_up_proj_bias", "experts.down_proj_bias"},
    "falcon-h1": MAMBA2,
    "bamba": MAMBA2,
    "jamba": MAMBA2 | {"x_proj.weight", "dt_proj.weight", "mamba.A_log", "router.weight"},
    "lfm2": {"conv.weight"},
}
# Families whose examples must run one at a time: attention ignores the positions, or a state is carried on.
RUNS_ALONE = {"gpt-oss", "falcon-h1", "bamba", "jamba", "lfm2"}
if Version(transformers.__version__) < Version("5.24"):
    RUNS_ALONE |= {"falcon", "falcon-alibi"}


def adapted(name, mode="fold", dtype=torch.float32):
    model = family(name, dtype)
    adapter = attach(model, mode=mode, density=0.2)
    disturb(adapter)
    return model, adapter


def examples(lengths=(5, 9, 12), seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = rng.integers(0, VOCABULARY, length)
        labels = np.append(ids[1:], IGNORE)
        labels[:2] = IGNORE
        made.append(Example(ids, labels, np.where(labels == IGNORE, -1, np.arange(length) % 3)))
    return made


def packed_loss(model, made, counts=None):
    """The loss of a packed row, as the trainer computes it."""
    packed = collate(made)
    weights = Objective().weights(0.0) / (role_counts(packed) if counts is None else counts)
    hidden = final_hidden(model, packed["input_ids"], packed["position_ids"])
    return token_losses(model, hidden, packed, weights, Objective()).loss


def plain_loss(model, made):
    """The same loss written out, from the model's own logits of each example alone."""
    sums, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    for example in made:
        logits = model(input_ids=torch.from_numpy(example.input_ids)[None], use_cache=False).logits[0].double()
        ce = cross_entropy(logits, torch.from_numpy(example.labels), reduction="none")
        for role in range(3):
            sums[role] = sums[role] + ce[torch.from_numpy(example.roles == role)].sum()
            counts[role] += (example.roles == role).sum()
    return (Objective().weights(0.0) * sums / counts).sum()


def gradient(loss, adapter):
    """All gradients in one vector, with zeros for an expert that no token reached."""
    gradients = torch.autograd.grad(loss, list(adapter.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in gradients])


def relative_error(left, right):
    return ((left - right).norm() / right.norm()).item()


def train(model, adapter):
    return losses_of_steps(adapter, lambda: packed_loss(model, examples()))


def logits(model):
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"], use_cache=False).logits


def weights_of(adapter):
    """The names of the weights that have a delta. A stack of experts is itself a weight."""
    return {site if len(delta.A.shape) == 3 else f"{site}.weight" for site, delta in adapter.sites().items()}


def ending(name, known):
    return next((end for end in known if name.endswith(f".{end}")), name)


@every_family
def test_every_linear_gets_a_delta_and_the_rest_is_listed(name):
    if name == "jamba":
        pytest.importorskip("transformers", minversion="5.23")  # before that its router was an nn.Linear
    model = family(name)
    adapter = attach(model)
    expected = LEFT_OUT.get(name, set())
    linears = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    linears = {n for n in linears if ending(n, expected) == n} - {"lm_head.weight"}
    linears |= {n for n, weight in model.named_parameters() if weight.dim() == 3 and ending(n, expected) == n}
    assert weights_of(adapter) == linears and len(linears) >= 4
    assert {ending(n, expected) for n in adapter.left_out} == expected


@every_family
def test_every_matrix_gets_positive_gradient_scores(name):
    scores = score_columns(family(name), [examples()], packed_loss)
    assert all(column.sum() > 0 for column in scores.columns.values())


@every_family
@both_modes
def test_packed_step_matches_each_example_alone(name, mode):
    model, adapter = adapted(name, mode)
    reference, reference_adapter = adapted(name)
    loss, expected = packed_loss(model, examples()), plain_loss(reference, examples())
    assert loss.item() == pytest.approx(expected.item(), rel=32 * EPS)
    assert relative_error(gradient(loss, adapter), gradient(expected, reference_adapter)) <= 256 * EPS
    assert packs(model) == (name not in RUNS_ALONE)


@every_family
@both_modes
def test_adapter_trains_saves_loads_merges_and_unmerges(name, mode, tmp_path):
    model = family(name)
    original = snapshot(model)
    adapter = attach(model, mode=mode)
    losses = train(model, adapter)
    assert losses[3] < losses[2] < losses[1] < losses[0]
    trained, changed = snapshot(model), weights_of(adapter)
    assert {n for n in trained if not torch.equal(trained[n], original[n])} == (changed if mode == "fold" else set())
    adapter.save_pretrained(tmp_path)
    again = family(name)
    SparseAdapter.from_pretrained(again, tmp_path, mode=mode)
    trained_logits = logits(model)
    assert torch.equal(logits(again), trained_logits) and not torch.equal(trained_logits, logits(family(name)))
    adapter.merge()
    model.requires_grad_(False)  # as for the logits above: torch chooses a kernel (Jamba's dt_proj) by this flag too
    if mode == "fold":
        assert same_bits(snapshot(model), trained) and torch.equal(logits(model), trained_logits)
    else:
        assert relative_error(logits(model), trained_logits) <= 64 * EPS
    adapter.unmerge()
    assert same_bits(snapshot(model), original)


@every_family
def test_exported_lora_matches_in_peft_and_fits_vllm_and_llama_cpp(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapter = adapted(name)
    adapter.export_lora(tmp_path)
    assert relative_error(logits(peft.PeftModel.from_pretrained(family(name), tmp_path)), logits(model)) <= 64 * EPS
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # vLLM's PEFTHelper: these fields, no bias, no DoRA, no modules_to_save; a rank it has kernels for.
    assert config["r"] in LORA_RANKS and config["bias"] == "none" and config["lora_alpha"] == config["r"]
    assert not {"modules_to_save", "use_dora", "use_rslora"} & config.keys()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    expected = {}
    for site, delta in adapter.sites().items():
        *stack, out_features, in_features = delta.weight.shape
        if stack:  # PEFT wraps the layer of a module's last parameter around that of the first
            assert site in config["target_parameters"]
            inner = "" if site.endswith("down_proj") else ".base_layer"
            site = site.rpartition(".")[0] + inner
        rows = config["r"] * math.prod(stack)
        # llama.cpp's LoraTorchTensor: two matrices of one dtype, A [r, in] and B [out, r]; vLLM parses the same names.
        expected[f"base_model.model.{site}.lora_A.weight"] = (rows, in_features)
        expected[f"base_model.model.{site}.lora_B.weight"] = (out_features, rows)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@families_and_modes
def test_gradient_checkpointing_gives_the_same_gradients(name, mode):
    model, adapter = adapted(name, mode)
    expected = gradient(packed_loss(model, examples()), adapter)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    assert torch.equal(gradient(packed_loss(model, examples()), adapter), expected)


@families_and_modes
def test_autocast_and_bf16_are_close(name, mode):
    model, adapter = adapted(name, mode)
    expected = packed_loss(model, examples()).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = packed_loss(model, examples())
    assert gradient(loss, adapter).isfinite().all()
    assert 0 < abs(loss.item() - expected) <= 0.03 * expected
    half, _ = adapted(name, mode, torch.bfloat16)
    assert packed_loss(half, examples()).item() == pytest.approx(expected, rel=0.03)
    assert packs(half) == packs(model)


@families_and_modes
def test_two_accumulated_batches_match_one(name, mode):
    model, adapter = adapted(name, mode)
    counts = role_counts(collate(examples()))
    whole = gradient(packed_loss(model, examples(), counts), adapter)
    for part in (examples()[:1], examples()[1:]):
        packed_loss(model, part, counts).backward()
    summed = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in adapter.parameters()])
    assert relative_error(summed, whole) <= 256 * EPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"), [("llama", "fold"), ("llama", "side"), ("gpt2", "side"), ("mixtral", "fold")]
)
def test_fully_compiled_model_has_the_same_logits_and_gradients(name, mode):
    torch._dynamo.reset()
    model, adapter = adapted(name, mode)
    inputs = {"input_ids": batch()["input_ids"], "use_cache": False}
    eager, compiled = model(**inputs).logits, torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    assert relative_error(compiled, eager) <= 8 * EPS
    gradients = [gradient(found.square().mean(), adapter) for found in (compiled, eager)]
    assert relative_error(*gradients) <= 64 * EPS


def test_family_that_cannot_pack_warns_once():
    model = family("bamba")
    with pytest.warns(UserWarning, match="BambaForCausalLM does not keep the examples of a packed row apart"):
        packed_loss(model, examples())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed_loss(model, examples())


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    ],
)
def test_long_example_does_not_change_the_rotation_of_its_neighbours(name, options):
    model = family(name, **options)
    with torch.no_grad():
        for lengths in ([5, 9], [5, 30, 9]):
            ids = torch.arange(sum(lengths))[None] % VOCABULARY
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            hidden = final_hidden(model, ids, positions).split(lengths)
            for one, part in zip(ids[0].split(lengths), hidden, strict=True):
                assert relative_error(part, model.model(one[None]).last_hidden_state[0]) <= 64 * EPS


def test_sharded_model_with_dynamic_rope_runs_equally_often_for_any_row(monkeypatch):
    model, runs = family("llama", rope_parameters=DYNAMIC, max_position_embeddings=16), []
    assert packs(model)
    monkeypatch.setattr(student, "is_sharded", lambda model: True)
    model.model.register_forward_hook(lambda *_: runs.append(1))
    for lengths in ([5, 9], [5, 30]):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        final_hidden(model, positions, positions)
    assert len(runs) == 4


@pytest.mark.parametrize("part", ["lm_head", ""])
def test_offloaded_head_is_refused(part):
    model = family("llama")
    accelerate.cpu_offload(model.get_submodule(part), torch.device("cpu"))
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM is offloaded"):
        packs(model)


@pytest.mark.parametrize(("name", "at"), [("layers.0.mlp.up_proj", (0, 0)), ("norm", 0)])  # all NaN; some infinite
def test_model_with_damaged_weights_is_refused(name, at):
    model = family("llama")
    with torch.no_grad():
        model.model.get_submodule(name).weight[at] = torch.inf
    with pytest.raises(ValueError, match="gives hidden states that are NaN or infinite in float32"):
        packs(model)


def test_packing_check_leaves_the_model_unchanged():
    model = family("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    assert packs(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


def test_packing_check_does_not_affect_scores():
    asked, fresh = family("llama"), family("llama")
    assert packs(asked)
    scores = [placement_scores(model, examples(), DistillConfig(), "activation") for model in (asked, fresh)]
    assert same_bits(scores[0].columns, scores[1].columns)


def test_head_that_does_more_than_its_config_names_is_refused():
    model = family("llama")
    model.lm_head.register_forward_hook(lambda module, args, y: y * 1.5)
    with pytest.raises(ValueError, match="LlamaForCausalLM does more to its logits than"):
        packed_loss(model, examples())


def test_layer_that_a_mamba_mixer_may_bypass_is_no_target():
    with pytest.raises(ValueError, match=r"may use the weight of model\.layers\.0\.mamba\.out_proj without running"):
        attach(family("bamba"), targets=["out_proj"])


def quantisable():
    return family("llama", hidden_size=64, intermediate_size=64, num_attention_heads=2)


def torchao_llama(bits):
    """int8 weights with a scale for each row, int4 ones with a scale for every 32 columns."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    groups = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    config = torchao.Int8WeightOnlyConfig() if bits == 8 else groups
    model = quantisable()
    torchao.quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    return model


def bitsandbytes_llama(bits):
    """LLM.int8() weights, which round the activations too, or NF4 ones."""
    layers = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")
    kind, options = (layers.Linear8bitLt, {"has_fp16_weights": False}) if bits == 8 else (layers.Linear4bit, {})
    model = quantisable()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            quantised = kind(module.in_features, module.out_features, bias=False, **options)
            quantised.load_state_dict(module.state_dict())
            model.set_submodule(name, quantised.to("cpu"))
    return model


QUANTISED = {"torchao": torchao_llama, "bitsandbytes": bitsandbytes_llama}


def dequantised(model):
    """A plain model with the weights that the quantised layers multiply by."""
    plain = quantisable()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(model.get_submodule(name)(torch.eye(module.in_features)).T)
    return plain


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("package", QUANTISED)
def test_quantised_base_trains_side_deltas(package, bits, tmp_path):
    model = QUANTISED[package](bits)
    before, plain = logits(model), dequantised(model)
    assert 0.01 < relative_error(before, logits(quantisable())) < 0.6, "the weights must have been quantised"
    adapter, reference = attach(model), attach(plain, mode="side")
    assert len(adapter.sites()) == 14 and not any(site.is_folded for site in adapter.sites().values())
    assert not adapter.left_out and torch.equal(logits(model), before)
    losses = train(model, adapter)
    assert losses[3] < losses[2] < losses[1] < losses[0]
    reference.load_state_dict(adapter.state_dict())
    ours, theirs = (gradient(packed_loss(m, examples()), a) for m, a in ((model, adapter), (plain, reference)))
    assert relative_error(ours, theirs) <= (0.02 if (package, bits) == ("bitsandbytes", 8) else 64 * EPS)
    trained = logits(model)
    adapter.save_pretrained(tmp_path)
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError, match="its weight is quantised, sharded or offloaded; use export_lora"):
        adapter.merge()
    adapter.export_lora(tmp_path / "lora")
    adapter.detach()
    assert torch.equal(logits(model), before)
    SparseAdapter.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model), trained)
