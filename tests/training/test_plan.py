"""The plan of a run: the memory autograd keeps, what checkpointing saves, and whether the run fits."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import family, llama
from tiny_runs import TOKENIZER, TRACES
from torch.autograd.graph import saved_tensors_hooks

from rbfast.adapter.column_scores import score_columns
from rbfast.adapter.footprint import megabytes
from rbfast.data.encoding import collate, encode_all
from rbfast.models.checkpointing import checkpointing
from rbfast.models.student import final_hidden, packs
from rbfast.training.batches import batches_by_tokens
from rbfast.training.distill import DistillConfig, _scored_batches, distill, plan_run
from rbfast.training.plan import tokens_in

CONFIG = DistillConfig(density=0.2, rank=3, tokens_per_batch=400)


@pytest.fixture
def model():
    return llama(vocab_size=len(TOKENIZER), max_position_embeddings=512, num_hidden_layers=4)


def kept(model, examples):
    """The hidden states of a batch, and the bytes that autograd keeps for it, each storage once."""
    batch, storages = collate(examples), {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        hidden = final_hidden(model, batch["input_ids"], batch["position_ids"], batch["lengths"])
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return hidden, sum(storages.values())


def test_plan_matches_what_a_forward_keeps(model):
    plan = plan_run(model, TOKENIZER, TRACES, CONFIG)
    examples, _ = encode_all(TRACES, TOKENIZER)
    assert plan.tokens == sum(len(example.input_ids) for example in examples)
    assert plan.largest <= 400 and plan.batches * 400 >= plan.tokens
    model.requires_grad_(False)
    from rbfast.adapter.sparse_adapter import SparseAdapter

    adapter = SparseAdapter.attach(model, 0.2, rank=3)
    packs(model)
    batch = examples[: 400 // len(examples[0].input_ids)]
    _, kept_bytes = kept(model, batch)
    kept_bytes *= plan.largest / sum(len(example.input_ids) for example in batch)
    layers = len(model.model.layers)
    assert plan.kept == pytest.approx(kept_bytes * (1 + 1 / layers), rel=0.1)  # plus a layer's gradients
    assert plan.trained == sum(parameter.numel() for parameter in adapter.parameters())
    assert plan.weights == sum(4 * parameter.numel() for parameter in model.parameters())


class EightBits(torch.Tensor):
    """An int8 weight like torchao's: a tensor without storage of its own, which F.linear accepts."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32)

    def __init__(self, held):
        self.held = held

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(parts, *_):
        return EightBits(parts["held"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            args = (args[0], args[1].held.float() / 100, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function is torch.ops.aten.detach.default:
            return EightBits(args[0].held)
        raise NotImplementedError(function)


def test_plan_counts_the_bytes_of_quantised_weights(model):
    before = plan_run(model, TOKENIZER, TRACES, CONFIG)
    weights = [layer.mlp.up_proj for layer in model.model.layers]
    for linear in weights:
        held = (linear.weight.detach() * 100).to(torch.int8)
        linear.weight = torch.nn.Parameter(EightBits(held), requires_grad=False)
    plan = plan_run(model, TOKENIZER, TRACES, CONFIG)
    assert before.weights - plan.weights == sum(3 * linear.weight.numel() for linear in weights)
    assert plan.kept == pytest.approx(before.kept, rel=0.1)


def test_plan_counts_the_savings_of_checkpointing(model):
    without, with_it = (
        plan_run(model, TOKENIZER, TRACES, replace(CONFIG, gradient_checkpointing=on)) for on in (False, True)
    )
    assert without.kept_checkpointed == with_it.kept_checkpointed < 0.75 * without.kept
    assert with_it.needed < without.needed
    assert "(on)" in str(with_it) and "(on)" not in str(without)


def test_plan_counts_what_scoring_by_gradients_keeps(model):
    config = replace(CONFIG, density=0.05, rank=1)
    by_gradient, examples, peaks = replace(config, placement="gradient"), encode_all(TRACES, TOKENIZER)[0], []
    random, scored, checkpointed = (
        plan_run(model, TOKENIZER, TRACES, other)
        for other in (config, by_gradient, replace(by_gradient, gradient_checkpointing=True))
    )
    assert random.scoring == checkpointed.scoring == 0 and "to place the columns" not in str(random)
    assert scored.needed == scored.fixed + scored.scoring > random.needed
    assert f"scoring      about {megabytes(scored.scoring)} to place the columns" in str(scored)

    def loss(model, batch):
        hidden, kept_bytes = kept(model, batch)
        peaks.append(kept_bytes)
        return hidden.square().mean()

    packs(model)
    batches = _scored_batches(examples, by_gradient)
    score_columns(model, batches, loss)
    share = max(map(tokens_in, batches)) / scored.largest
    layer = scored.kept / (1 + len(model.model.layers))
    assert scored.scoring == pytest.approx(max(peaks) + share * (layer + scored.loss), rel=0.1)


def test_plan_reports_whether_it_fits_and_what_would(model):
    plan = plan_run(model, TOKENIZER, TRACES, CONFIG)
    assert plan.fits and "fits" in str(plan)
    assert plan.needed == plan.weights + plan.adapter + plan.optimizer + plan.kept + plan.loss
    assert replace(plan, teacher_weights=7).needed == plan.needed + 7
    small = replace(plan, memory=plan.needed)  # some must stay free
    assert not small.fits and "does not fit; use --gradient-checkpointing" in str(small)
    checkpointed = replace(plan, is_checkpointed=True)
    checkpointed = replace(checkpointed, memory=checkpointed.needed)
    assert "does not fit; use --tokens-per-batch" in str(checkpointed)
    half = replace(checkpointed, memory=round((plan.fixed + checkpointed.needed) / 2 / 0.92))
    assert f"--tokens-per-batch {plan.largest // 2}," in str(half)
    assert "--load-in 4bit" in str(replace(plan, memory=plan.fixed))
    assert replace(plan, memory=None).fits is None


def test_plan_reports_a_model_that_runs_one_example_at_a_time(model):
    assert "one example at a time" not in plan_run(model, TOKENIZER, TRACES, CONFIG).attention
    carries_over = family("lfm2")
    carries_over.resize_token_embeddings(len(TOKENIZER))
    with pytest.warns(UserWarning, match="run one at a time"):
        plan = plan_run(carries_over, TOKENIZER, TRACES, CONFIG)
    assert plan.attention.endswith("the model runs one example at a time, which is slower")


def test_planning_leaves_the_model_unchanged(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    plan_run(model, TOKENIZER, TRACES, CONFIG)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_run_saves_and_prints_its_plan(model, tmp_path, capsys):
    finished = distill(model, TOKENIZER, TRACES[:8], tmp_path, CONFIG)
    saved = json.loads((tmp_path / "run.json").read_text())["plan"]
    assert saved == json.loads(json.dumps(finished.plan.to_dict()))
    shown = capsys.readouterr().err
    assert "activations" in shown and "encoding" in shown


def test_planned_token_batches_are_the_trained_ones(model, tmp_path):
    traces = [replace(trace, reasoning="One. " * (1 + 17 * n % 23)) for n, trace in enumerate(TRACES)]
    finished = distill(model, TOKENIZER, traces, tmp_path, replace(CONFIG, tokens_per_batch=280), quiet=True)
    batches = batches_by_tokens(encode_all(traces, TOKENIZER)[0], 280, seed=0)
    sizes = [sum(len(example.input_ids) for example in batch) for batch in batches]
    assert finished.plan.batches == len(sizes) == len(finished.log_history)
    assert finished.plan.largest == max(sizes) > sizes[0] and finished.plan.tokens == sum(sizes)


def test_plan_counts_the_traces_left_out(model):
    traces = [*TRACES[:4], replace(TRACES[4], reasoning="One. " * 200)]
    assert "left out" not in str(plan_run(model, TOKENIZER, traces, CONFIG))
    plan = plan_run(model, TOKENIZER, traces, replace(CONFIG, max_tokens=400))
    assert plan.left_out == 1 and "left out     1 of the traces" in str(plan)


def test_overlong_held_out_traces_warn(model):
    model.config.max_position_embeddings = 600
    long = replace(TRACES[0], reasoning="One. " * 200)
    with pytest.warns(UserWarning, match="1 of 5 traces are longer than the 600 positions"):
        plan_run(model, TOKENIZER, TRACES[:4], CONFIG, held_out=[long])


def test_checkpointing_restores_the_model(model):
    def state():
        flags = [
            (layer.training, layer.gradient_checkpointing, layer._gradient_checkpointing_func)
            for layer in model.model.layers
        ]
        return flags, sum(len(module._forward_hooks) for module in model.modules())

    first = model.model.layers[0]
    model.gradient_checkpointing_enable({"use_reentrant": True})
    first.gradient_checkpointing = False
    first.training = not model.training
    before = state()
    with checkpointing(model):
        assert first.gradient_checkpointing and state() != before
    assert state() == before


def test_checkpointing_works_in_evaluation_mode():
    model, runs = llama().eval(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with checkpointing(model):
        model(torch.arange(5)[None]).logits.sum().backward()
    assert len(runs) == 2


def test_model_without_checkpointing_support_is_refused():
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        model = llama()
        model.supports_gradient_checkpointing = False
        with checkpointing(model):
            pass
