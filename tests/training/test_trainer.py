"""The trainer on a tiny random Llama: its objective, packing, accumulation, checkpoints and exact resumption."""

import json
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_calls import GradientCalls
from host_waits import HostWaits, host_waits
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import Example, collate
from rbfast.data.spans import ROLES
from rbfast.models.student import final_hidden, packs
from rbfast.training.arguments import sole_training
from rbfast.training.checkpoints import last_checkpoint
from rbfast.training.objective import Objective, role_counts, token_losses
from rbfast.training.trainer import DistillTrainer

VOCAB = 61


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def some_examples(n: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(n):
        length = int(rng.integers(8, 20))
        ids = rng.integers(0, VOCAB, length)
        labels = np.append(ids[1:], -100)
        labels[:3] = -100
        roles = np.where(labels == -100, -1, np.arange(length) % 3)
        examples.append(Example(ids, labels, roles, None, None, None, str(i)))
    return examples


def arguments(folder: Path, **more: object) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    return TrainingArguments(**(settings | more))


def plain_loss(model: LlamaForCausalLM, examples: list[Example], weights: torch.Tensor) -> torch.Tensor:
    """The objective in its plain form: one example at a time, full logits, fp64."""
    sums, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    for example in examples:
        logits = model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0].double()
        ce = torch.nn.functional.cross_entropy(logits, torch.from_numpy(example.labels), reduction="none")
        for role in range(3):
            sums[role] = sums[role] + ce[torch.from_numpy(example.roles == role)].sum()
            counts[role] += (example.roles == role).sum()
    return (weights * sums / counts).sum()


def test_packed_batch_matches_its_examples_one_by_one() -> None:
    model, examples, objective = tiny_model(), some_examples(4), Objective()
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    batch, weights = collate(examples), objective.weights(0.0)
    for parameter in adapter.parameters():  # B starts at zero: move it, so that A has a gradient too
        torch.nn.init.normal_(parameter, std=0.1)
    hidden = final_hidden(model, batch["input_ids"], batch["position_ids"])
    out = token_losses(model, hidden, batch, weights / role_counts(batch), objective)
    expected = plain_loss(model, examples, weights)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = torch.autograd.grad(out.loss, list(adapter.parameters()))
    theirs = torch.autograd.grad(expected, list(adapter.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.linalg.norm(a - b) <= 1e-5 * torch.linalg.norm(b)
    filtered = token_losses(model, hidden, batch, weights, Objective(gradient_filter=0.02))
    assert out.hidden_grad_error_bound is None and filtered.hidden_grad_error_bound is not None


def test_strategic_weight_moves_to_the_tactical_one() -> None:
    objective = Objective(strategic=0.4, tactical=0.5, answer=0.1, anneal=0.5)
    assert objective.weights(0.0).tolist() == pytest.approx([0.4, 0.5, 0.1])
    assert objective.weights(1.0).tolist() == pytest.approx([0.2, 0.7, 0.1])
    for weights in ((-1.0, 0.5, 0.1), (0.0, 0.0, 0.0)):
        with pytest.raises(ValueError, match="role weights"):
            Objective(*weights)


def test_role_weights_follow_the_progress_before_each_step(tmp_path: Path) -> None:
    model, examples, objective = tiny_model(), some_examples(4), Objective(anneal=1.0)
    torch.nn.init.normal_(model.lm_head.weight)  # so that the losses of the roles differ
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    settings = arguments(tmp_path, per_device_train_batch_size=4, num_train_epochs=4, learning_rate=0.0)
    trainer = DistillTrainer(model, adapter, settings, examples, objective=objective)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [plain_loss(model, examples, objective.weights(step / 4)).item() for step in range(4)]
    assert losses == pytest.approx(expected, rel=1e-5) and max(losses) - min(losses) > 1e-3


def test_full_logits_are_never_built_and_roles_are_logged(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    packs(model)  # computes the logits of a few tokens, once
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran as a module: it builds full logits"))
    trainer = DistillTrainer(model, adapter, arguments(tmp_path), some_examples(4), some_examples(2, seed=1))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    for entry in trainer.state.log_history[:2]:
        assert {"loss", "loss_strategic", "loss_tactical", "loss_answer"} <= entry.keys()


@pytest.mark.parametrize("batch", (1, 2, 5))
def test_evaluation_does_not_depend_on_batches_or_step(tmp_path: Path, batch: int) -> None:
    model, held_out = tiny_model(), some_examples(5, seed=1)
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    settings = arguments(tmp_path, per_device_eval_batch_size=batch)
    trainer = DistillTrainer(model, adapter, settings, some_examples(4), held_out)
    expected = plain_loss(model, held_out, trainer.objective.weights(1.0)).item()
    for step in (0, 1):
        trainer.state.global_step, trainer.state.max_steps = step, 2
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    by_role = torch.tensor([metrics[f"eval_loss_{role}"] for role in ROLES])
    assert (trainer.objective.weights(1.0) * by_role).sum().item() == pytest.approx(expected, rel=1e-6)


def test_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    every = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=2)
    first = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    settings = arguments(
        tmp_path, logging_strategy="no", learning_rate=0.1, **every, **first
    )  # losses fall: the first is the greatest
    trainer = DistillTrainer(model, adapter, settings, some_examples(8), some_examples(8))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    last = max(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert losses[0] == max(losses) > losses[-1] and last == len(losses)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", f"checkpoint-{last}"}
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)
    stored = json.loads((tmp_path / f"checkpoint-{last}" / "trainer_state.json").read_text())
    assert stored["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    ("limit", "best", "kept"), [(1, None, [9]), (1, 2, [2, 9]), (2, 2, [2, 9]), (4, None, [6, 7, 8, 9]), (12, 3, None)]
)
def test_checkpoint_limit_is_kept(tmp_path: Path, limit: int, best: int | None, kept: list[int] | None) -> None:
    adapter = SparseAdapter.attach(model := tiny_model(), density=0.05, placement="random")
    trainer = DistillTrainer(model, adapter, arguments(tmp_path, save_total_limit=limit), some_examples(2))
    for step in range(1, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step == best:
            trainer.state.best_model_checkpoint = str(tmp_path / f"checkpoint-{step}")
        trainer._drop_old_checkpoints(tmp_path / f"checkpoint-{step}")
    steps = sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert steps == (kept or list(range(1, 10)))


def test_new_checkpoint_is_kept_beside_a_later_damaged_one(tmp_path: Path) -> None:
    adapter = SparseAdapter.attach(model := tiny_model(), density=0.05, placement="random")
    trainer = DistillTrainer(model, adapter, arguments(tmp_path, save_total_limit=2), some_examples(2))
    for step in (30, 60, 40):  # it resumed from 30, because 60 is damaged, and now saves at other steps
        (tmp_path / f"checkpoint-{step}").mkdir()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-30")
    trainer._drop_old_checkpoints(tmp_path / "checkpoint-40")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-30", "checkpoint-40"}


class Gradients(TrainerCallback):
    """The adapter's gradients, as the optimizer receives them."""

    def __init__(self, adapter: SparseAdapter) -> None:
        self.adapter, self.found = adapter, torch.empty(0)

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self.found = torch.cat([parameter.grad.flatten() for parameter in self.adapter.parameters()])


@pytest.mark.slow
def test_fp16_gradients_do_not_underflow_in_a_large_batch(tmp_path: Path) -> None:
    examples, by_dtype = some_examples(2000), []
    for dtype in (torch.float32, torch.float16):
        model = tiny_model().half().to(dtype)  # the same values
        adapter = SparseAdapter.attach(model, density=0.05, placement="random")
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        settings = arguments(tmp_path, per_device_train_batch_size=2000, max_steps=1, max_grad_norm=0.0)
        trainer = DistillTrainer(model, adapter, settings, examples)
        trainer.add_callback(gradients := Gradients(adapter))
        trainer.train()
        by_dtype.append(gradients.found)
        loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert 3 < loss < 6  # in nats, without the loss scale
    assert (by_dtype[1] - by_dtype[0]).norm() <= 0.01 * by_dtype[0].norm()
    assert not any(parameter._backward_hooks for parameter in adapter.parameters())


def test_fp16_loss_scale_depends_on_the_largest_weight(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    trainer = DistillTrainer(model, adapter, arguments(tmp_path), some_examples(2))
    hidden, weights = torch.empty(200_000, 1), torch.tensor([0.4, 0.5 / 150_000, 0.1 / 50_000])
    assert trainer._scale_for(hidden, weights.max()) == 8192  # times 0.4
    assert trainer._scale_for(hidden, weights[1]) == 2**17


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_matrices_with_one_input_share_a_gradient_call(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    trainer = DistillTrainer(model, adapter, arguments(tmp_path, max_steps=1), some_examples(2))
    with GradientCalls() as calls:
        trainer.train()
    if dtype == torch.float16:  # hooks see fp16 gradients, and would run without one for an unused matrix
        assert not calls.together and calls.alone == 2 * 7
    else:
        assert sorted(calls.together) == 2 * [1] + 2 * [2] + 2 * [3] and calls.alone == 2


class WaitsInSteps(TrainerCallback):
    """The waits for the device within steps."""

    def __init__(self, waits: HostWaits) -> None:
        self.waits, self.found = waits, []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.before = len(self.waits.found)

    def on_step_end(self, *_: object, **__: object) -> None:
        self.found += self.waits.found[self.before :]


def test_step_never_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    trainer = DistillTrainer(model, adapter, arguments(tmp_path, logging_strategy="no"), some_examples(8))
    trainer.train()  # the first steps check that every matrix has a gradient
    with host_waits(monkeypatch) as waits:
        trainer.add_callback(counted := WaitsInSteps(waits))
        trainer.train()
    assert trainer.state.global_step == 4 and counted.found == []


class Evaluating(TrainerCallback):
    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: object, **__: object) -> None:
        self.trainer.evaluation_loop(None, "")


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("is_filtered", (True, False))
def test_non_finite_loss_is_logged_as_by_a_plain_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_filtered: bool, bad: float
) -> None:
    losses = iter((1.0, bad, 4.0, bad))
    monkeypatch.setattr(Trainer, "training_step", lambda self, *_: torch.tensor(next(losses)))
    model = tiny_model()
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    settings = arguments(tmp_path, logging_steps=2, logging_nan_inf_filter=is_filtered)
    trainer = DistillTrainer(model, adapter, settings, some_examples(8), some_examples(2))
    seen = []

    def evaluation_loop(self: Trainer, *_: object) -> EvalLoopOutput:
        seen.append(self.args.logging_nan_inf_filter)
        return EvalLoopOutput(np.empty(0), None, {}, 0)

    monkeypatch.setattr(Trainer, "evaluation_loop", evaluation_loop)
    trainer.add_callback(Evaluating(trainer))
    trainer.train()
    assert set(seen) == {is_filtered} and settings.logging_nan_inf_filter == is_filtered
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [(1.0 + 1.0 / 2) / 2, (4.0 + 4.0 / 2) / 2] if is_filtered else not np.isfinite(logged).any()


def train(folder: Path, stop_at: int | None = None, **more: object) -> dict[str, torch.Tensor]:
    model = tiny_model()
    checkpoint = last_checkpoint(folder)
    adapter = SparseAdapter.attach(model, density=0.05, placement="random")
    trainer = DistillTrainer(model, adapter, arguments(folder, **more), some_examples(12))
    if stop_at is not None:
        trainer.add_callback(Crash(stop_at))
    trainer.train(resume_from_checkpoint=checkpoint)
    return {name: value.clone() for name, value in adapter.state_dict().items()}


class Crash(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("power cut")


def test_interrupted_run_resumes_bitwise(tmp_path: Path) -> None:
    saving = dict(save_strategy="steps", save_steps=2, save_total_limit=1)
    whole = train(tmp_path / "whole", **saving)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", stop_at=5, **saving)
    assert last_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-4")
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = train(tmp_path / "cut", **saving)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_incomplete_checkpoint_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = dict(save_strategy="steps", save_steps=2)
    real = DistillTrainer._save_rng_state

    def fail_second(self: DistillTrainer, folder: str) -> None:
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        real(self, folder)

    monkeypatch.setattr(DistillTrainer, "_save_rng_state", fail_second)
    with pytest.raises(OSError, match=r"No space left on device: .*full"):
        train(tmp_path / "full", **saving)
    assert last_checkpoint(tmp_path / "full") == str(tmp_path / "full" / "checkpoint-2")
    monkeypatch.undo()
    resumed, whole = train(tmp_path / "full", **saving), train(tmp_path / "whole", **saving)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_full_disk_while_saving_the_optimizer_is_reported(tmp_path: Path) -> None:
    saving = dict(save_strategy="steps", save_steps=2)
    train(tmp_path / "whole", **saving)
    adapter = tmp_path / "whole" / "checkpoint-2" / "adapter_model.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the file size stands in for a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (adapter.stat().st_size + 2000, before[1]))
    try:
        with pytest.raises(OSError, match="a checkpoint could not be written, is the disk full"):
            train(tmp_path / "full", **saving)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "name", ["compute_metrics", "compute_loss_func", "label_smoothing_factor", "neftune_noise_alpha"]
)
def test_arguments_without_effect_are_refused(tmp_path: Path, name: str) -> None:
    adapter = SparseAdapter.attach(model := tiny_model(), density=0.05, placement="random")
    is_argument = not name.startswith("compute")
    args = arguments(tmp_path, **({name: 0.1} if is_argument else {}))
    with pytest.raises(ValueError, match=f"{name} would have no effect"):
        DistillTrainer(model, adapter, args, some_examples(2), **({} if is_argument else {name: lambda *_: {}}))


def test_arguments_are_left_unchanged(tmp_path: Path) -> None:
    given, model = arguments(tmp_path), tiny_model()
    adapter, before = SparseAdapter.attach(model, density=0.2), given.to_dict()
    trainer = DistillTrainer(model, adapter, given, some_examples(4), tokens_per_batch=40)
    assert trainer.args.per_device_train_batch_size == 1
    assert given.to_dict() == before


@pytest.mark.parametrize("end", ["merge", "detach", None])
def test_unattached_adapter_is_refused(tmp_path: Path, end: str | None) -> None:
    model = tiny_model()
    adapter = SparseAdapter.attach(model if end else tiny_model(), density=0.05)
    if end:
        getattr(adapter, end)()
    with pytest.raises(ValueError, match="the adapter is not attached to this model"):
        DistillTrainer(model, adapter, arguments(tmp_path), some_examples(2))


def test_adapted_head_is_refused(tmp_path: Path) -> None:
    adapter = SparseAdapter.attach(model := tiny_model(), density=0.2, targets=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head is the output head"):
        DistillTrainer(model, adapter, arguments(tmp_path), some_examples(2))


def test_teacher_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    teacher = tiny_model().train()
    adapter = SparseAdapter.attach(model := tiny_model(), density=0.05, placement="random")
    DistillTrainer(model, adapter, arguments(tmp_path), some_examples(2), teacher=teacher)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())


def test_generator_of_examples_is_refused(tmp_path: Path) -> None:
    adapter = SparseAdapter.attach(model := tiny_model(), density=0.05, placement="random")
    with pytest.raises(TypeError, match="expected a sequence of examples, got generator; make it a list"):
        DistillTrainer(model, adapter, arguments(tmp_path), (one for one in some_examples(2)))  # type: ignore[arg-type]


def test_fsdp_of_the_trainer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = DistillTrainer.create_accelerator_and_postprocess

    def make_sharding(self: DistillTrainer) -> None:
        make(self)
        self.is_fsdp_enabled = True  # as `accelerate launch --use_fsdp` sets it on GPUs

    monkeypatch.setattr(DistillTrainer, "create_accelerator_and_postprocess", make_sharding)
    with pytest.raises(ValueError, match=r"cannot shard the frozen base alone.*--shard PROCESSES"):
        train(tmp_path)


def test_two_accumulated_batches_match_one_large_batch(tmp_path: Path) -> None:
    once = train(tmp_path / "a", per_device_train_batch_size=4)
    twice = train(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for name, value in once.items():
        assert torch.allclose(value.float(), twice[name].float(), rtol=1e-3, atol=1e-5), name


def plain_trainer(folder: Path, model: LlamaForCausalLM) -> Trainer:
    ids = np.random.default_rng(0).integers(0, VOCAB, (8, 12)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model, arguments(folder, save_strategy="steps", save_steps=2), train_dataset=rows)


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_plain_trainer_trains_and_resumes_a_registered_adapter(tmp_path: Path, mode: str) -> None:
    adapters = []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        model = tiny_model()
        model.adapter = SparseAdapter.attach(model, density=0.2, mode=mode)
        plain_trainer(tmp_path, model).train(resume_from_checkpoint=checkpoint and str(checkpoint))
        adapters.append({name: value.detach() for name, value in model.adapter.named_parameters()})
    assert all(value.abs().sum() > 0 for value in adapters[0].values())
    assert all(torch.equal(adapters[0][name], value) for name, value in adapters[-1].items())


def test_plain_trainer_refuses_an_unregistered_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = SparseAdapter.attach(model, density=0.2)
    with pytest.raises(RuntimeError, match=r"set model\.adapter = adapter before you create a Trainer") as refused:
        plain_trainer(tmp_path, model).train()
    assert "adapter.parameters()" not in str(refused.value)  # a Trainer would neither zero nor clip their gradients
    assert not any(site.B.any() for site in adapter.sites().values())


def test_training_in_a_second_thread_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(RuntimeError, match="another thread of this process is training")
    with ThreadPoolExecutor(1) as other_thread, sole_training(), refused:
        other_thread.submit(train, tmp_path).result()
