"""Column scores: each method against its definition, groups found in the forward, score files, and placement."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import batch, family, gpt2, llama
from torch import nn

from rbfast.adapter.column_scores import METHODS, ColumnScores, score_columns
from rbfast.adapter.placement import START_NORM
from rbfast.adapter.sparse_adapter import SparseAdapter

MATRIX = "model.layers.1.mlp.up_proj"
BATCHES = [batch(seed=seed) for seed in range(3)]


def loss_fn(model, inputs):
    return model(**inputs).loss


def dense_gradients(model, matrix):
    """The gradients of the weight by autograd, one per batch."""
    weight = model.get_parameter(f"{matrix}.weight")
    return [torch.autograd.grad(loss_fn(model, inputs), weight)[0] for inputs in BATCHES]


def captured(model, matrix):
    """x and dy of one matrix, one pair per batch."""
    seen = []

    def watch(module, args, y):
        y.register_hook(lambda dy: seen.append((args[0].detach().flatten(0, -2), dy.flatten(0, -2))))

    hook = model.get_submodule(matrix).register_forward_hook(watch)
    for inputs in BATCHES:
        loss_fn(model, inputs).backward()
    hook.remove()
    model.zero_grad()
    return seen


@pytest.mark.parametrize(("make", "matrix"), [(llama, MATRIX), (gpt2, "transformer.h.1.mlp.c_fc")])
def test_the_gradient_method_sums_squared_gradients(make, matrix):
    model = make()
    gradients = dense_gradients(model, matrix)
    gradients = [gradient.T for gradient in gradients] if make is gpt2 else gradients
    expected = sum(gradient.square().sum(0) for gradient in gradients)
    scores = score_columns(model, BATCHES, loss_fn)
    torch.testing.assert_close(scores.columns[matrix], expected)
    assert scores.batches == 3 and scores.base_model_name_or_path is None


def test_scores_name_their_model():
    model = llama()
    model.config._name_or_path = "owner/model"
    assert score_columns(model, BATCHES, loss_fn).base_model_name_or_path == "owner/model"


def test_first_layer_is_scored_with_everything_before_it_frozen():
    model = llama()
    matrix = "model.layers.0.self_attn.q_proj"
    expected = sum(gradient.square().sum(0) for gradient in dense_gradients(model, matrix))
    torch.testing.assert_close(score_columns(model, BATCHES, loss_fn).columns[matrix], expected)


def test_the_factored_and_activation_methods_follow_their_definitions():
    model = llama()
    pairs = captured(model, MATRIX)
    power = [x.square().mean(0) for x, _ in pairs]
    expected = sum(p * dy.square().mean(0).sum() for p, (_, dy) in zip(power, pairs, strict=True))
    torch.testing.assert_close(score_columns(model, BATCHES, loss_fn, method="factored").columns[MATRIX], expected)
    activation = score_columns(model, BATCHES, loss_fn, method="activation")
    torch.testing.assert_close(activation.columns[MATRIX], sum(power))


@pytest.mark.parametrize("method", METHODS)
def test_a_bf16_model_is_scored_in_fp32(method):
    torch.manual_seed(0)
    model, rows = nn.ModuleDict({"linear": nn.Linear(16, 8)}).bfloat16(), torch.randn(512, 16).bfloat16()
    x, dy = rows.float(), 2 * model["linear"](rows).detach().float()
    power = x.square().mean(0)
    expected = {
        "gradient": (dy.T @ x).square().sum(0),
        "factored": power * dy.square().mean(0).sum(),
        "activation": power,
    }
    scores = score_columns(model, [rows], lambda m, x: m["linear"](x).float().square().sum(), method=method)
    torch.testing.assert_close(scores.columns["linear"], expected[method])


def test_output_changed_in_place_scores_the_same():
    model, plain = (nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace), nn.Linear(8, 4)) for inplace in (True, False))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 8)
    columns = [score_columns(m, [x], lambda m, x: m(x).square().sum()).columns["0"] for m in (model, plain)]
    assert torch.equal(*columns)


def test_input_changed_in_place_starts_a_new_group():
    def loss(model, x):
        y, x = model["a"](x), x.clone()
        return y.sum() + model["b"](x).sum() + model["c"](x.mul_(2)).sum()

    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
    shapes = score_columns(model, [torch.randn(5, 8)], loss, method="activation").shapes
    assert [shapes[name].group for name in "abc"] == [0, 1, 2]


def test_matrices_with_the_same_input_share_a_group_and_its_columns():
    scores = score_columns(llama(), BATCHES, loss_fn)
    groups = {}
    for name, shape in scores.shapes.items():
        groups.setdefault(shape.group, []).append(name.removeprefix("model.layers."))
    assert list(groups.values())[:4] == [
        ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"],
        ["0.self_attn.o_proj"],
        ["0.mlp.gate_proj", "0.mlp.up_proj"],
        ["0.mlp.down_proj"],
    ]
    assert list(groups) == list(range(8))
    sites = SparseAdapter.attach(llama(), density=0.1, placement=scores).sites()
    q, k, o = (sites[f"model.layers.0.self_attn.{kind}_proj"] for kind in "qko")
    assert torch.equal(q.cols, k.cols) and not torch.equal(q.cols, o.cols)


def test_runs_with_the_highest_group_score_win_and_A_starts_small():
    scores = score_columns(llama(), BATCHES, loss_fn)
    adapter = SparseAdapter.attach(llama(), density=0.1, placement=scores)
    total = sum(scores.columns[f"model.layers.0.self_attn.{kind}_proj"] for kind in "qkv")
    site = adapter.sites()["model.layers.0.self_attn.v_proj"]
    by_run = total.view(-1, 8).sum(1)
    taken = torch.zeros(3, dtype=torch.bool).index_fill(0, site.cols // 8, True)
    assert site.cols.numel() == 8 * taken.sum() < 24
    assert by_run[taken].min() >= by_run[~taken].max()
    for site in adapter.sites().values():
        torch.testing.assert_close(site.A.detach().norm(dim=1), torch.full((len(site.A),), START_NORM))
        assert not site.B.any()
    assert adapter.config.placement == "gradient"
    rows = {row.name: row for row in adapter.summary()}
    cols = adapter.sites()[MATRIX].cols
    assert rows[MATRIX].score == pytest.approx(scores.columns[MATRIX][cols].sum().item())


@pytest.mark.parametrize("method", METHODS)
def test_scoring_and_placement_are_deterministic_and_survive_a_file(tmp_path, method):
    first, again = (score_columns(llama(), BATCHES, loss_fn, method=method) for _ in range(2))
    first.save(tmp_path / "scores.safetensors")
    states = [
        SparseAdapter.attach(llama(), density=0.1, placement=placement).state_dict()
        for placement in (first, again, tmp_path / "scores.safetensors", str(tmp_path / "scores.safetensors"))
    ]
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())
    loaded = ColumnScores.load(tmp_path / "scores.safetensors")
    assert (loaded.method, loaded.batches, loaded.shapes) == (first.method, 3, first.shapes)
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.safetensors"]


def test_scoring_leaves_the_model_unchanged():
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError):
        score_columns(model, BATCHES, lambda model, inputs: loss_fn(model, inputs["absent"]))
    score_columns(model, BATCHES, loss_fn)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_gradient_checkpointing_scores_the_same():
    model = llama()
    plain = score_columns(model, BATCHES, loss_fn)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again = score_columns(model, BATCHES, loss_fn)
    assert again.shapes == plain.shapes
    assert all(torch.equal(again.columns[name], column) for name, column in plain.columns.items())


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_checkpointed_layers_keep_no_inputs_for_the_backward(is_checkpointed):
    model, memory, kept = llama(), [], []
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def replace_input(linear, args):
        array = args[0].detach().numpy().copy()  # lives as long as any tensor in its memory
        memory.append(weakref.ref(array))
        return (torch.from_numpy(array),)

    def loss(model, inputs):
        memory.clear()
        value = loss_fn(model, inputs)
        kept.append([reference() is not None for reference in memory])
        return value

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(replace_input)
    score_columns(model, BATCHES[:1], loss)
    assert kept == [[not is_checkpointed] * len(model.model.layers)]


def test_compiled_model_scores_the_same():
    model = llama().requires_grad_(False)
    plain = score_columns(model, BATCHES, loss_fn)
    compiled = torch.compile(model, backend="aot_eager")
    loss_fn(compiled, BATCHES[0])
    again = score_columns(compiled, BATCHES, loss_fn)
    assert again.shapes == plain.shapes
    assert all(torch.equal(again.columns[name], column) for name, column in plain.columns.items())


def test_a_matrix_that_never_ran_scores_zero():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 4)})
    scores = score_columns(model, [torch.randn(3, 8)], lambda model, x: model["used"](x).square().sum())
    assert scores.columns["used"].all() and not scores.columns["unused"].any()
    assert scores.shapes["used"].group != scores.shapes["unused"].group
    SparseAdapter.attach(model, density=0.4, placement=scores)


@pytest.mark.parametrize("method", METHODS)
def test_batch_without_tokens_for_an_expert_adds_nothing_to_its_score(method):
    model = nn.ModuleDict({"router": nn.Linear(8, 8), "expert": nn.Linear(8, 4)})

    def loss(model, rows):
        x = model["router"](rows)
        return x.square().sum() + model["expert"](x[rows[:, 0] > 0]).square().sum()

    reached, passed_by = torch.ones(3, 8), -torch.ones(3, 8)
    both, one = (score_columns(model, batches, loss, method=method) for batches in ([reached, passed_by], [reached]))
    assert torch.equal(both.columns["expert"], one.columns["expert"]) and one.columns["expert"].all()
    SparseAdapter.attach(model, density=0.4, placement=both)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_vector_scores_as_one_row(method):
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(8)
    alone, row = (score_columns(model, [x], lambda model, x: model(x).sum(), method=method) for x in (x, x[None]))
    assert torch.equal(alone.columns["0"], row.columns["0"]) and row.columns["0"].all()


def test_activations_are_scored_in_inference_mode():
    model, options = llama(), {"method": "activation"}
    plain = score_columns(model, BATCHES, loss_fn, **options)
    with torch.inference_mode():
        again = score_columns(model, BATCHES, loss_fn, **options)
    assert again.shapes == plain.shapes
    assert all(torch.equal(again.columns[name], column) for name, column in plain.columns.items())


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], loss_fn, "at least one batch"),
        (BATCHES, lambda m, b: loss_fn(m, b) * float("nan"), "batch 0: expected a finite loss, got nan"),
        (BATCHES, lambda m, b: loss_fn(m, b).detach(), "the loss has no gradient"),
    ],
)
def test_missing_batches_and_unusable_losses_are_refused(batches, loss, message):
    with pytest.raises(ValueError, match=message):
        score_columns(llama(), batches, loss)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be one of gradient, factored, activation, got 'magic'"):
        score_columns(llama(), BATCHES, loss_fn, method="magic")


def test_scores_of_another_model_are_refused():
    scores = score_columns(llama(), BATCHES, loss_fn)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate_proj was scored as .*40.* here it is .*48"):
        SparseAdapter.attach(llama(intermediate_size=48), density=0.1, placement=scores)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.q_proj was not scored"):
        SparseAdapter.attach(llama(num_hidden_layers=3), density=0.1, placement=scores)
    scores = score_columns(family("qwen3-moe"), BATCHES, loss_fn)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj was scored as .*experts=4.* here it is .*experts=6"):
        SparseAdapter.attach(family("qwen3-moe", num_experts=6, num_local_experts=6), density=0.1, placement=scores)


def test_malformed_score_files_are_refused(tmp_path):
    file = tmp_path / "scores.safetensors"
    with pytest.raises(FileNotFoundError, match="expected a file of scores"):
        ColumnScores.load(file)
    score_columns(llama(), BATCHES[:1], loss_fn).save(file)
    whole = file.read_bytes()
    dtype = json.dumps({"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()  # unknown to torch
    for broken in (whole[:-9], len(dtype).to_bytes(8, "little") + dtype + bytes(4)):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            ColumnScores.load(file)
    file.write_bytes(whole)
    tensors = load_file(file)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="expected scores of version 2 written by rbfast"):
        ColumnScores.load(file)
    header = {"format": "rbfast-scores", "version": 2, "method": "gradient", "batches": 1}
    save_file(tensors, file, metadata={"rbfast": json.dumps(header | {"version": 1})})
    with pytest.raises(ValueError, match="expected scores of version 2 written by rbfast"):
        ColumnScores.load(file)
    header |= {
        "base_model_name_or_path": None,
        "matrices": {MATRIX: {"out_features": 40, "in_features": 24, "group": 0}},
    }
    for broken, message in (
        ({}, rf"tensor {MATRIX}\.columns is missing"),
        ({f"{MATRIX}.columns": torch.zeros(23)}, r"expected \(24,\) float32, got \(23,\) float32"),
        ({f"{MATRIX}.columns": torch.full((24,), float("nan"))}, "expected finite values"),
    ):
        save_file(broken, file, metadata={"rbfast": json.dumps(header)})
        with pytest.raises(ValueError, match=message):
            ColumnScores.load(file)


def test_scores_made_by_hand_need_a_finite_value_per_input():
    model = llama()
    scores = score_columns(model, [batch()], loss_fn)
    name, column = next(iter(scores.columns.items()))
    others = {other: value for other, value in scores.columns.items() if other != name}
    for columns in (others, others | {name: column[1:]}, others | {name: column * float("nan")}):
        with pytest.raises(ValueError, match=f"{name}: expected 24 finite scores, one per input, got "):
            SparseAdapter.attach(model, density=0.1, placement=replace(scores, columns=columns))
