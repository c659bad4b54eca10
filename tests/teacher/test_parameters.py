"""Servers that refuse a parameter: it is dropped or renamed with one warning, unless the user set it by name."""

import warnings

import pytest
from fake_api import Answer, answering, chat_reply

from rbfast.teacher.client import ServerError
from rbfast.teacher.jobs import Question
from rbfast.teacher.solutions import teach

GOOD = chat_reply("So.\n<answer>4</answer>")
QUESTIONS = [Question(f"What is {n} + 2?") for n in range(4)]


def refusing(*names, message="Unsupported parameter: '{}' is not supported with this model.", status=400):
    """A server that refuses a request with any of these fields."""

    def answer(request):
        refused = next((name for name in names if name in request.body), None)
        return GOOD if refused is None else Answer({"error": {"message": message.format(refused)}}, status)

    return answer


def ask(api, **options):
    return api.client(temperature=0.7, seed=3, **options).ask("/chat/completions", {"messages": [], "max_tokens": 50})


REFUSALS = [
    ("Unsupported parameter: '{}' is not supported with this model.", 400),
    ("Unsupported value: '{}' does not support 0.7 with this model. Only the default (1) value is supported.", 400),
    ("Unrecognized request argument supplied: {}", 400),
    ("property '{}' is unsupported", 400),
    ("`{}` may only be set to 1 when thinking is enabled.", 400),
    ("{} is deprecated for this model.", 400),
    ('[{{"type": "extra_forbidden", "loc": ["body", "{}"], "msg": "Extra inputs are not permitted"}}]', 422),
    ('Unknown name "{}": Cannot find field.', 400),
]


@pytest.mark.parametrize(("message", "status"), REFUSALS)
@pytest.mark.parametrize("name", ["temperature", "seed"])
def test_refused_parameter_is_dropped_with_a_warning(name, message, status):
    with answering(refusing(name, message=message, status=status)) as api:
        with pytest.warns(UserWarning, match=f"refuses {name}: requests are sent without it") as warned:
            assert ask(api) == GOOD
        first, second = api.bodies
        assert first.pop(name) is not None and first == second and len(warned) == 1


def test_several_refused_parameters_stay_dropped(tmp_path):
    with answering(refusing("seed", "temperature")) as api, pytest.warns(UserWarning) as warned:
        server = api.client(temperature=0.7)
        assert len(teach(server, QUESTIONS, tmp_path, concurrency=1).traces) == 4
        assert len(warned) == 2 and len(api.requests) == 2 + 4


def test_threads_warn_once(tmp_path):
    with answering(refusing("seed")) as api, pytest.warns(UserWarning, match="seed") as warned:
        assert len(teach(api.client(), QUESTIONS, tmp_path, concurrency=4).traces) == 4
        assert len(warned) == 1


def test_value_out_of_range_is_not_dropped():
    message = "temperature: Input should be less than or equal to 2"
    with answering(refusing("temperature", message=message)) as api:
        with warnings.catch_warnings(), pytest.raises(ServerError, match="less than or equal to 2"):
            warnings.simplefilter("error")
            ask(api)
        assert len(api.requests) == 1


def test_token_limit_is_renamed_and_never_dropped():
    message = "Unsupported parameter: '{}' is not supported with this model. Use 'max_completion_tokens' instead."
    with answering(refusing("max_tokens", message=message)) as api:
        server = api.client()
        for _ in range(2):
            assert server.ask("/chat/completions", {"messages": [], "max_tokens": 50}) == GOOD
        assert [body.get("max_completion_tokens") for body in api.bodies] == [None, 50, 50]
    with answering(refusing("max_tokens")) as api, pytest.raises(ServerError, match="max_tokens"):
        ask(api)


def test_parameters_of_the_extra_body_are_never_dropped(tmp_path):
    with answering(refusing("reasoning_effort")) as api:
        taught = teach(api.client(), QUESTIONS[:1], tmp_path, extra={"reasoning_effort": "high"})
        assert taught.open == 1 and "reasoning_effort" in taught.reason


def test_extra_body_is_sent_and_needs_another_reply(tmp_path):
    extra = {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": True}}
    with answering(GOOD) as api:
        teach(api.client(), QUESTIONS[:1], tmp_path, extra=extra)
        teach(api.client(), QUESTIONS[:1], tmp_path, extra=extra)
        assert len(api.requests) == 1 and extra.items() <= api.bodies[0].items()
        teach(api.client(), QUESTIONS[:1], tmp_path)
        assert len(api.requests) == 2


@pytest.mark.parametrize("name", ["model", "messages", "max_tokens", "max_completion_tokens", "n", "stream"])
def test_extra_body_cannot_change_the_budget_or_the_question(tmp_path, name):
    with answering(GOOD) as api, pytest.raises(ValueError, match=f"extra body cannot set {name}"):
        teach(api.client(), QUESTIONS, tmp_path, extra={name: 3})
