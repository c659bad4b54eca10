"""Deltas of expert stacks: gradients against those of the whole weights, scores, saving, offloading, and refusals."""

import copy
import warnings

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import attach, batch, disturb, family, llama, same_bits, snapshot
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import rbfast
from rbfast.adapter.column_scores import score_columns
from rbfast.adapter.footprint import outline
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.models.experts import ExpertStack, stacks_of
from rbfast.models.linears import count_parameters, group_siblings, select_linears

EPS = torch.finfo(torch.float32).eps
FAMILIES = ("mixtral", "qwen3-moe", "gpt-oss", "jamba")  # gpt-oss keeps [E, in, out], and has biases


def experts_of(model):
    return {name: module for name, module in model.named_modules() if stacks_of(module)}


class Doubled(MixtralExperts):
    def forward(self, *args):
        return 2 * super().forward(*args)


def loss_of(model):
    return model(input_ids=batch()["input_ids"], use_cache=False).logits.square().mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_match_those_of_the_whole_weights(name):
    """dA = B^T dW and dB = dW A^T, on the columns, dW by autograd through the model's own forward."""
    model, adapter = family(name), None
    adapter = attach(model, density=0.2)
    disturb(adapter)
    loss_of(model).backward()
    plain = family(name)
    for (key, ours), theirs in zip(snapshot(model).items(), plain.parameters(), strict=True):
        assert theirs.shape == ours.shape, key
        theirs.data.copy_(ours)
    loss_of(plain).backward()
    stacks = {n: site for n, site in adapter.sites().items() if isinstance(site.linear, ExpertStack)}
    assert len(stacks) == 2 * len(experts_of(model))
    for key, site in stacks.items():
        grad = plain.get_parameter(key).grad
        columns = (grad.mT if site.linear.is_transposed else grad)[..., site.cols]
        for actual, expected in ((site.A.grad, site.B.mT @ columns), (site.B.grad, columns @ site.A.mT)):
            assert (actual - expected).norm() <= 64 * EPS * expected.norm()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["gradient", "factored", "activation"])
def test_column_scores_sum_over_experts(name, method):
    model = family(name)
    before = snapshot(model)
    scores = score_columns(model, [batch()], lambda model, _: loss_of(model), method=method)
    assert not any("forward" in module.__dict__ for module in experts_of(model).values())
    assert same_bits(snapshot(model), before)
    key = next(key for key in scores.columns if key.endswith("down_proj") and "experts" in key)
    assert scores.columns[key].shape == (scores.shapes[key].in_features,) and scores.shapes[key].experts == 4
    if method == "gradient":
        weight = model.get_parameter(key).requires_grad_(True)
        loss_of(model).backward()
        grad = (
            weight.grad.mT
            if stacks_of(experts_of(model)[key.rpartition(".")[0]])["down_proj"].is_transposed
            else weight.grad
        )
        expected = grad.square().sum((0, 1))
        assert (scores.columns[key] - expected).norm() <= 64 * EPS * expected.norm()
    placed = SparseAdapter.attach(model, density=0.05, placement=scores)
    assert placed.config.modules[key].score is not None
    loss_of(model).backward()
    assert placed.sites()[key].B.grad.abs().max() > 0


@pytest.mark.parametrize("method", ["factored", "activation"])
def test_scores_do_not_depend_on_which_expert_a_token_reaches(method):
    experts = family("mixtral").model.layers[0].mlp.experts
    for weight in experts.parameters():
        weight.data[1:] = weight.data[0]
    x, weights = torch.linspace(-1, 1, 32).expand(6, 32), torch.ones(6, 1)
    routes = [torch.zeros(6, 1, dtype=torch.long), torch.tensor([[0], [2], [2], [2], [2], [2]])]
    one, two = (
        score_columns(nn.Sequential(experts), [to], lambda m, to: m[0](x, to, weights).sum(), method=method)
        for to in routes
    )
    torch.testing.assert_close(one.columns, two.columns)


def test_detach_restores_the_own_forward_of_experts():
    model = family("qwen3-moe")
    adapter = attach(model)
    assert all("forward" in module.__dict__ for module in experts_of(model).values())
    adapter.detach()
    assert not any("forward" in module.__dict__ for module in experts_of(model).values())
    copy.deepcopy(model)


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_an_optimizer_that_trains_the_weight_of_a_stack_is_refused(mode):
    model = family("mixtral")
    model.adapter = attach(model, mode=mode)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):  # one token leaves experts idle, and idle weights are checked for use elsewhere
        model(input_ids=torch.tensor([[3]]), use_cache=False).logits.square().mean().backward()
        optimizer.step()
    model.get_parameter("model.layers.0.mlp.experts.down_proj").requires_grad_(True)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"trains the weight of model\.layers\.0\.mlp\.experts\.down_proj, a stack"):
        optimizer.step()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_holds_its_adapter_is_saved_with_it(name, tmp_path):
    """As a Trainer saves its checkpoints. transformers saves the experts one by one."""
    model = family(name)
    model.adapter = attach(model)
    disturb(model.adapter)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    held = {key.removeprefix("adapter."): value for key, value in saved.items() if key.startswith("adapter.")}
    assert same_bits(held, model.adapter.state_dict())
    disturb(model.adapter, seed=2)
    model.load_state_dict(saved, strict=False)
    assert same_bits(model.adapter.state_dict(), held)


def test_two_adapters_on_one_stack_are_refused():
    model, targets = family("mixtral"), r".*experts\..*_proj"
    first = attach(model, targets=targets)
    disturb(first)
    with rbfast.evaluating(model), pytest.raises(ValueError, match="has a SparseAdapter attached already"):
        attach(model, targets=targets)
    first.merge()
    second = attach(model, targets=targets)
    with pytest.raises(RuntimeError, match="another adapter is attached"):
        first.unmerge()
    second.detach()
    first.unmerge()
    assert same_bits(snapshot(model), snapshot(family("mixtral")))


def test_a_token_gives_gradients_to_its_own_experts_only():
    model = family("mixtral")
    adapter = attach(model)
    disturb(adapter)
    model(input_ids=torch.tensor([[3]]), use_cache=False).logits.square().mean().backward()
    site = adapter.sites()["model.layers.0.mlp.experts.gate_up_proj"]
    assert (site.B.grad.flatten(1).abs().amax(1) > 0).sum() == 2 == model.config.num_experts_per_tok


def test_budget_counts_the_values_of_every_expert():
    model = family("mixtral")
    adapter = attach(model, density=0.05)
    assert sum(p.numel() for p in adapter.parameters()) <= 0.05 * count_parameters(model)
    assert sum(line.values for line in adapter.summary()) == sum(p.numel() for p in adapter.parameters())


def test_large_mixture_takes_at_most_an_eighth_of_its_inputs():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3_moe", hidden_size=2048, num_hidden_layers=2, moe_intermediate_size=768)
    with torch.device("meta"):
        planned = outline(AutoModelForCausalLM.from_config(config))
    assert planned.support == (96, 256)  # of the 768 inputs of down_proj, and of the 2048 of the others


def test_targets_name_stacks_by_their_parameters():
    model = family("qwen2-moe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = attach(model, targets=["gate_up_proj"])
    assert [name.rpartition(".")[2] for name in adapter.sites()] == ["gate_up_proj"] * 2
    disturb(adapter)
    loss_of(model).backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_experts_with_another_forward_get_no_delta_and_a_warning():
    model = family("mixtral")
    model.model.layers[1].mlp.experts.__class__ = Doubled
    with pytest.warns(UserWarning) as warned:
        adapter = attach(model)
    messages = " ".join(str(w.message) for w in warned)
    assert "2 stacks of experts (the first is model.layers.1.mlp.experts.gate_up_proj)" in messages
    assert "a Doubled, which does more to its experts than multiply and gate" in messages
    assert "model.layers.0.mlp.experts.down_proj" in adapter.sites()
    assert "model.layers.1.mlp.experts.down_proj" in adapter.left_out
    adapter.detach()
    with pytest.raises(ValueError, match="Doubled, which does more"):
        attach(model, targets=r".*layers\.1.*experts.*")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda experts: setattr(experts, "_is_expert_parallel", True), "is spread over processes by expert"),
        (lambda experts: accelerate.cpu_offload(experts, torch.device("cpu")), "whose forward was replaced"),
    ],
)
def test_offloaded_or_expert_parallel_stacks_are_refused(change, reason):
    model = family("mixtral")
    change(model.model.layers[1].mlp.experts)
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.experts\.gate_up_proj .*{reason}"):
        attach(model, targets=r".*experts\..*_proj")


def test_packed_expert_matrices_are_not_stacks():
    experts = family("mixtral").model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(96, 1, dtype=torch.uint8), requires_grad=False)
    assert stacks_of(experts) == {}


def test_stacks_of_equal_width_get_separate_groups():
    shapes = group_siblings(select_linears(family("mixtral", intermediate_size=32), r".*experts\..*_proj"))
    assert {shape.in_features for shape in shapes.values()} == {32}
    assert len({shape.group for shape in shapes.values()}) == len(shapes) == 4


def test_loading_other_expert_weights_is_refused_and_a_cast_accepted():
    model = family("gpt-oss")
    base = snapshot(model)
    adapter = attach(model)
    disturb(adapter)
    trained = loss_of(model)
    model.load_state_dict(base)  # equal to the base, so the delta stays
    assert torch.equal(loss_of(model), trained)
    other = {key: value + 1 if key.endswith("experts.down_proj") else value for key, value in base.items()}
    with pytest.raises(RuntimeError, match=r"experts\.down_proj: the weight of a GptOssExperts was changed"):
        model.load_state_dict(other)
    with adapter.disabled():
        assert same_bits(snapshot(model), base)
    model.to(torch.bfloat16)
    assert loss_of(model).item() == pytest.approx(trained.item(), rel=0.05)


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_accelerate_may_offload_after_attaching(mode):
    model = family("mixtral")
    adapter = attach(model, mode=mode)
    disturb(adapter)
    expected = loss_of(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with rbfast.evaluating(model):
        assert torch.equal(loss_of(model), expected)
    assert torch.equal(loss_of(model), expected)
    loss_of(model).backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_accept_zero_tokens(name):
    model = family(name)
    attach(model)
    for experts in experts_of(model).values():
        y = experts(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
        assert y.shape == (0, 32)


def test_attach_checks_experts_in_their_current_state():
    model, targets = family("mixtral"), r".*experts\..*_proj"
    with torch.autocast("cpu", torch.bfloat16):
        attach(model, targets=targets).detach()
    model.double()
    with pytest.raises(ValueError, match="is kept in float64"):
        attach(model, targets=targets)
    with torch.device("meta"):
        other = type(model)(model.config)
    other.model.layers[0].mlp.experts.__class__ = Doubled
    assert len(select_linears(other)) == 12
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="Doubled, which does more"):
        attach(other, targets=targets)


def test_adapter_for_another_number_of_experts_is_refused(tmp_path):
    attach(family("mixtral")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 4 experts, not 8"):
        SparseAdapter.from_pretrained(family("mixtral", num_experts=8, num_local_experts=8), tmp_path)


def test_layer_with_a_count_attribute_is_not_a_stack(tmp_path):
    model = llama()
    model.model.layers[0].self_attn.q_proj.count = 7
    adapter = attach(model)
    assert all(site.A.dim() == 2 for site in adapter.sites().values())
    adapter.save_pretrained(tmp_path)
    adapter.detach()
    SparseAdapter.from_pretrained(model, tmp_path)


def test_stacks_add_no_modules_or_keys_to_the_model():
    model = family("mixtral")
    keys, modules = list(model.state_dict()), len(list(model.modules()))
    attach(model)
    assert list(model.state_dict()) == keys and len(list(model.modules())) == modules
    assert not any(isinstance(module, ExpertStack) for module in model.modules())
