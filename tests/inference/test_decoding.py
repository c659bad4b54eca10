"""Batched decoding: rows independent of each other, the model left unchanged, invalid requests refused."""

import contextlib

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_models import attach, disturb, family, vision_model

from rbfast.inference.decoding import Completion, complete, evaluating
from rbfast.inference.guide import Guide, Limits
from rbfast.inference.local import guided
from rbfast.inference.solver import Sampling

PROMPTS = ["a", "a much longer prompt than the others", "two words", "2 + 2 =", "xyz", "The end is near", "b", "?"]
# Many end tokens, so that a random model ends its rows at different times.
STOPS = [0, *range(2, 258, 30)]


@pytest.fixture
def model():
    model = tiny_model()
    model.generation_config.eos_token_id = STOPS
    return model


def alone(model, tokenizer, prompt: str, max_new_tokens: int) -> list[int]:
    """The plain definition: one row, no cache, argmax."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    written = []
    while len(written) < max_new_tokens and (not written or written[-1] not in STOPS):
        with torch.no_grad():
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_decoding_matches_each_prompt_alone(model, batch_size):
    tokenizer = tiny_tokenizer()
    expected = [alone(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    assert len({len(written) for written in expected}) > 2, (
        "rows must end at different times for this test to mean much"
    )
    assert 0 < sum(written[-1] not in STOPS for written in expected) < len(PROMPTS)
    completions = complete(model, tokenizer, PROMPTS, max_new_tokens=24, batch_size=batch_size)
    assert completions == [
        Completion(tokenizer.decode(w, skip_special_tokens=True), len(w), w[-1] not in STOPS) for w in expected
    ]


@pytest.mark.parametrize("make", [tiny_model, vision_model])
def test_completion_beyond_the_model_positions_is_refused(make):
    model = make()
    model.config.get_text_config().max_position_embeddings = 256
    with pytest.raises(ValueError, match="the longest prompt has 200 tokens and 57 more were requested"):
        complete(model, tiny_tokenizer(), ["x" * 200, "y"], max_new_tokens=57)


def test_head_gets_contiguous_rows(model):
    contiguous = []  # for other rows the head's weight would be copied
    model.lm_head.register_forward_hook(lambda head, args, output: contiguous.append(args[0].is_contiguous()))
    complete(model, tiny_tokenizer(), PROMPTS, max_new_tokens=4)
    assert all(contiguous)


@pytest.mark.parametrize("name", ["falcon-h1", "jamba", "lfm2"])
def test_batched_decoding_of_recurrent_models_matches_alone(name):
    model, tokenizer = family(name, vocab_size=258, initializer_range=0.5), tiny_tokenizer()
    model.generation_config.eos_token_id = STOPS
    expected = [alone(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    assert len({len(written) for written in expected}) > 2
    assert [c.tokens for c in complete(model, tokenizer, PROMPTS, max_new_tokens=24)] == [len(w) for w in expected]
    plain = Guide(Limits(24), interventions=())
    texts = [tokenizer.decode(written, skip_special_tokens=True) for written in expected]
    assert [solution.text for [solution] in guided(model, tokenizer, PROMPTS, plain)] == texts
    sampled = [guided(model, tokenizer, PROMPTS, plain, Sampling(2, 1.0), batch_size=size) for size in (2, 32)]
    assert sampled[0] == sampled[1]


def test_cache_is_passed_under_the_current_name(model, recwarn):
    complete(model, tiny_tokenizer(), PROMPTS[:2], max_new_tokens=4)
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


def test_batch_shrinks_once_half_of_its_rows_have_ended(model, monkeypatch):
    widths = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **kwargs: widths.append(len(kwargs["input_ids"])) or forward(*args, **kwargs)
    )
    tokenizer = tiny_tokenizer()
    completions = complete(model, tokenizer, PROMPTS, max_new_tokens=24, batch_size=8)
    assert widths[0] == 8 and widths == sorted(widths, reverse=True) and widths[-1] < 4
    assert sum(widths) < 8 * max(completion.tokens for completion in completions)


def test_sampling_settings_of_the_model_are_ignored(model):
    tokenizer = tiny_tokenizer()
    expected = complete(model, tokenizer, PROMPTS, max_new_tokens=8)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 1.5
    assert complete(model, tokenizer, PROMPTS, max_new_tokens=8) == expected


@pytest.mark.parametrize(
    "own", [{"use_cache": False}, {"cache_implementation": "dynamic"}, {"num_beams": 2}, {"stop_strings": ["a"]}]
)
def test_other_generation_settings_of_the_model_are_ignored(model, own):
    tokenizer = tiny_tokenizer()
    expected = complete(model, tokenizer, PROMPTS, max_new_tokens=24)
    plain = Guide(Limits(24), interventions=())
    sampled = guided(model, tokenizer, PROMPTS, plain, Sampling(2, temperature=1.0))
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert complete(model, tokenizer, PROMPTS, max_new_tokens=24) == expected
    assert guided(model, tokenizer, PROMPTS, plain, Sampling(2, temperature=1.0)) == sampled
    assert own.items() <= model.generation_config.to_dict().items()


def test_mode_and_hooks_return_after_the_last_concurrent_decoding(model):
    adapter = attach(model.train())
    linear = next(iter(adapter.sites().values())).linear
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(part.training for part in model.modules())
    assert not linear._forward_hooks
    second.__exit__(None, None, None)
    assert all(part.training for part in model.modules())
    assert len(linear._forward_hooks) == 1
    adapter.detach()


def test_decoding_enforces_evaluation_mode(model):
    with evaluating(model):
        model.train()
        with evaluating(model):
            assert not any(part.training for part in model.modules())


def test_training_mode_is_restored_and_progress_counts_prompts(model):
    seen = []
    model.train()
    complete(
        model,
        tiny_tokenizer(),
        PROMPTS,
        max_new_tokens=2,
        batch_size=3,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert model.training and seen == [(3, 8), (6, 8), (8, 8)]
    assert complete(model, tiny_tokenizer(), []) == []


def test_folded_adapter_decodes_without_hooks_and_regains_them(model, monkeypatch):
    adapter = attach(model)
    disturb(adapter, size=1.0)
    tokenizer, hooked = tiny_tokenizer(), []
    with monkeypatch.context() as patch:
        patch.setattr("rbfast.inference.decoding.unhooked", contextlib.nullcontext)
        expected = complete(model, tokenizer, PROMPTS, max_new_tokens=24)
    assert expected != complete(tiny_model(), tokenizer, PROMPTS, max_new_tokens=24), "the adapter must matter here"
    forward = model.forward
    linears = [site.linear for site in adapter.sites().values()]
    monkeypatch.setattr(
        model,
        "forward",
        lambda *args, **kwargs: (
            hooked.extend(linear for linear in linears if linear._forward_hooks or linear._forward_pre_hooks)
            or forward(*args, **kwargs)
        ),
    )
    assert complete(model, tokenizer, PROMPTS, max_new_tokens=24) == expected and hooked == []
    assert all(linear._forward_hooks and linear._forward_pre_hooks for linear in linears)


def test_compiled_model_keeps_its_generation_config(model):
    own, expected = model.generation_config, complete(model, tiny_tokenizer(), ["ab"], max_new_tokens=4)
    assert complete(torch.compile(model), tiny_tokenizer(), ["ab"], max_new_tokens=4) == expected
    assert model.generation_config is own


def test_model_whose_class_cannot_be_instantiated_decodes(model):
    class Sharded(type(model)):  # like FSDP2's classes
        def __new__(cls):
            raise TypeError

    expected = complete(model, tiny_tokenizer(), ["ab"], max_new_tokens=4)
    model.__class__ = Sharded
    assert complete(model, tiny_tokenizer(), ["ab"], max_new_tokens=4) == expected


def test_requests_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="longest prompt has 250 tokens and 10 more"):
        complete(model, tiny_tokenizer(), ["short", "x" * 250], max_new_tokens=10)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        complete(model, tiny_tokenizer(), PROMPTS, max_new_tokens=0, batch_size=4)


def test_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="every prompt needs at least one token, got ''"):
        complete(model, tiny_tokenizer(), ["a", ""])


def test_end_of_turn_of_the_chat_template_ends_a_row(model):
    tokenizer = tiny_tokenizer()
    [expected] = complete(model, tokenizer, ["two words"], max_new_tokens=24)
    last = alone(model, tokenizer, "two words", 24)[2]
    turn_end = tokenizer.convert_ids_to_tokens(last)
    tokenizer.add_special_tokens({"additional_special_tokens": [turn_end]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + turn_end + "{% endfor %}"
    [shorter] = complete(model, tokenizer, ["two words"], max_new_tokens=24)
    assert shorter.tokens == 3 < expected.tokens and not shorter.truncated
