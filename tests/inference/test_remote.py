"""The client against a loopback server that writes a script and misbehaves on request."""

import math

import pytest
from scripted_server import PROMPT, WORDS, guide, samples_of

from rbfast.data.instruction import BOXED
from rbfast.inference.guide import OTHER, VERIFY, WAIT, WRAP_UP, Guide, Limits
from rbfast.inference.remote import ServerSolver, chat, write
from rbfast.inference.solver import calibrate
from rbfast.inference.state import STABLE
from rbfast.teacher.client import IncompleteReply, Server, ServerError

pytestmark = pytest.mark.usefixtures("no_pauses")


def test_stream_is_read_to_its_end(start):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    received = []
    solution = write(server, PROMPT, guide(), listen=lambda kind, text: received.append((kind, text)))
    assert (solution.thinking, solution.answer) == ("So x = 4.</think>", "It is 4.")
    assert {"thinking": "So x = 4.", "answer": "It is 4."}.items() <= solution.to_dict().items()
    assert (solution.tokens, solution.truncated, solution.events) == (8, False, ())
    assert received[0] == ("think", "So ") and received[-1] == ("answer", ".")
    assert state.requests[0]["max_tokens"] == 80 and state.requests[0]["stream"] is True


def test_interventions_continue_from_the_kept_text(start):
    state, server = start("Easy: |12|</think>|Hm, |so |3| words.\n|</think>|3")
    solution = write(server, PROMPT, guide(minimum=8))
    assert (solution.events[0].kind, solution.events[0].struck) == (WAIT, "</think>")
    assert solution.text.startswith("Easy: 12\n\nWait.\n")
    # Text that the client did not read before it closed is lost; the next prompt is the kept text.
    assert state.requests[1]["prompt"] == PROMPT + "Easy: 12\n\nWait.\n"


def test_budget_ends_the_thinking_and_then_the_answer(start):
    _, server = start("|".join(["word "] * 500))
    solution = write(server, PROMPT, guide(budget=60, reserve=40))
    assert [event.kind for event in solution.events] == [WRAP_UP]
    assert solution.tokens <= 60 and solution.truncated
    assert solution.thinking.endswith("Stop.\n</think>") and solution.answer.startswith("word ")


def test_given_token_count_is_used(start):
    _, server = start("|".join(["two words "] * 100))
    solution = write(server, PROMPT, guide(budget=60, reserve=20), count=lambda text: len(text.split()))
    assert solution.tokens <= 60 and 35 < len(solution.text.split()) <= 60


@pytest.mark.parametrize("fault", ["close", "garbage"])
def test_broken_stream_is_continued(start, fault):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    state.faults = [fault]
    solution = write(server, PROMPT, guide())
    assert solution.text == "So x = 4.</think>It is 4." and solution.tokens == 8
    assert state.requests[1]["prompt"] == PROMPT + "So x" and state.requests[1]["max_tokens"] == 78


def test_text_is_kept_if_a_server_always_breaks_off(start):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    state.faults = ["close"] * 2 + [429] * 9
    with pytest.raises(ServerError, match="429") as caught:
        write(server, PROMPT, guide())
    assert caught.value.partial.text == "So x = 4." and caught.value.status == 429


def test_only_consecutive_empty_streams_count_as_retries(start, no_pauses, monkeypatch):
    state, server = start("|".join(["word "] * 8) + "|</think>|4", retries=1)
    state.faults = ["close"] * 4
    assert write(server, PROMPT, guide()).answer == "4"
    tries = []

    def send_nothing(*args):
        tries.append(args)
        raise IncompleteReply("nothing")

    monkeypatch.setattr("rbfast.inference.remote._one_stream", send_nothing)
    with pytest.raises(ServerError, match="broke off 2 times"):
        write(server, PROMPT, guide())
    assert len(tries) == 2


def test_pieces_of_several_tokens_cause_no_extra_request(start):
    state, server = start(WORDS)
    state.pieces = lambda body, ignore: ["word word "]
    solution = write(server, PROMPT, guide(interventions=()))
    assert len(state.requests) == 1 and solution.tokens == 120 and solution.truncated


def test_text_stopped_by_a_filter_is_refused(start):
    state, server = start("It is |4")
    state.finish = "content_filter"
    with pytest.raises(ServerError, match="content_filter") as caught:
        write(server, PROMPT, guide())
    assert caught.value.partial.text == "It is 4"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_retried(start, status):
    state, server = start("</think>|4")
    state.faults = [status, status]
    assert write(server, PROMPT, guide()).answer == "4"
    assert len(state.requests) == 3


def test_refusal_is_not_retried(start):
    state, server = start("</think>|4")
    state.faults = [401]
    with pytest.raises(ServerError, match=r"returned 401: .*not now"):
        write(server, PROMPT, guide())
    assert len(state.requests) == 1


def test_server_that_ignores_the_limit_is_reported(start):
    state, server = start("|".join(["word "] * 500))
    state.faults = ["ignore"]
    with pytest.raises(ServerError, match="ignores max_tokens: requested at most 80, got 500"):
        write(server, PROMPT, guide())


def test_stream_beyond_the_limit_is_cut_off(start):
    state, server = start(WORDS)
    state.faults = ["deaf"] * 9
    solution = write(server, PROMPT, guide(budget=60))
    assert solution.tokens == 60 and solution.truncated and solution.thinking.endswith("Stop.\n</think>")


def test_chat_is_the_fallback_and_is_checked(start):
    state, server = start("It is |<answer>|4|</answer>")
    state.completions = False
    solution = samples_of(server, guide(), "2+2?", samples=1)[0]
    assert solution.text == "It is <answer>4</answer>" and solution.tokens == 4
    assert state.requests[-1]["messages"][0]["content"].startswith("2+2?\n\n")
    with pytest.raises(ServerError, match=r"not honour the budget: requested at most 3 tokens, it reports 4") as caught:
        chat(server, "2+2?", Guide(Limits(3)))
    assert caught.value.partial.text == "It is <answer>4</answer>"
    ServerSolver(server, instruction=BOXED).solve(["2+2?"], guide())
    assert state.requests[-1]["messages"][0]["content"] == BOXED.request("2+2?")
    state.usage = False
    with pytest.raises(ServerError, match="it reports no count"):
        chat(server, "2+2?", guide())


@pytest.mark.parametrize(("text", "closed"), [("", False), ("4", True)])
def test_thinking_of_a_chat_reply_truncated_in_it_stays_open(monkeypatch, text, closed):
    message = {"content": text, "reasoning_content": "Add."}
    reply = {"choices": [{"message": message, "finish_reason": "length"}], "usage": {"completion_tokens": 3}}
    monkeypatch.setattr(Server, "ask", lambda *_: reply)
    solution = chat(Server("http://127.0.0.1:9/v1", "m"), "2+2?", guide())
    assert solution.thinking.startswith("<think>\nAdd.\n") and ("</think>" in solution.thinking) == closed


def test_refusal_in_a_chat_is_reported(monkeypatch):
    message = {"content": None, "refusal": "I do not do sums."}
    reply = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
    monkeypatch.setattr(Server, "ask", lambda *_: reply)
    with pytest.raises(ServerError, match=r"the teacher refused: I do not do sums\."):
        chat(Server("http://127.0.0.1:9/v1", "m"), "2+2?", guide())


def test_unreachable_server_and_invalid_url_are_reported():
    server = Server("http://127.0.0.1:9/v1", "m", timeout=2, retries=1)
    with pytest.raises(ServerError, match="did not answer: ConnectError"):
        write(server, PROMPT, guide())
    with pytest.raises(ValueError, match="url must look like"):
        Server("localhost:8000", "m")


def test_key_is_sent_and_never_shown(start, monkeypatch):
    monkeypatch.setenv("RBFAST_API_KEY", "sk-secret")
    state, plain = start("</think>|4")
    server = Server(plain.url, "m", retries=0)
    write(server, PROMPT, guide())
    assert state.headers[0]["Authorization"] == "Bearer sk-secret"
    state.faults = [500]
    with pytest.raises(ServerError) as caught:
        write(server, PROMPT, guide())
    assert "sk-secret" not in repr(server) + str(caught.value)


# ----------------------------------------------------------------------------------------- log-probs, probes and counts


UNSURE, SURE = [math.log(0.2)] * 5, [math.log(0.999)]


def test_unsure_model_gets_verify(start):
    state, server = start(WORDS)
    state.logprobs = [UNSURE]
    verifying = guide(budget=400, verify_above=1.0, cooldown=0, cap=1, loop_length=999)
    solution = write(server, PROMPT, verifying)
    assert [event.kind for event in solution.events] == [VERIFY, WRAP_UP] and "Check.\n" in solution.thinking
    assert {round(measured, 9) for measured in solution.sentences} == {round(math.log(5), 9)}
    assert state.requests[0]["logprobs"] == 5
    state, server = start(WORDS)
    state.logprobs = [SURE]
    assert [event.kind for event in write(server, PROMPT, verifying).events] == [WRAP_UP]
    state, server = start(WORDS)
    write(server, PROMPT, guide())
    assert "logprobs" not in state.requests[0]


def test_rest_of_a_distribution_counts_as_one_token(start):
    state, server = start("One. |</think>|4")
    state.logprobs = [[math.log(0.5), math.log(0.25)]]
    [measured] = write(server, PROMPT, guide(verify_above=9.0)).sentences
    assert measured == pytest.approx(1.5 * math.log(2))


def test_verify_needs_logprobs_from_the_server(start):
    _, server = start("So it is. |</think>|4")
    with pytest.raises(ServerError, match="sends no log-probs, which verify_above needs: leave it out"):
        write(server, PROMPT, guide(verify_above=1.0))


def test_calibration_is_a_quantile_of_the_servers_entropies(start):
    state, server = start("|".join(["On. "] * 60))
    state.logprobs = [UNSURE, SURE]
    low, high = (calibrate(ServerSolver(server), ["q"], guide(budget=50), quantile=q) for q in (0.1, 0.9))
    assert 0 < low < high < math.log(5)
    with pytest.raises(ValueError, match="quantile must lie in"):
        calibrate(ServerSolver(server), ["q"], guide(), quantile=1.0)


def test_loop_gets_another_approach(start):
    _, server = start("|".join(["round and ", "round. "] * 20 + ["</think>", "4"]))
    solution = write(server, PROMPT, guide(loop_length=4, cooldown=0, cap=1))
    assert solution.events[0].kind == OTHER and "Else.\n" in solution.thinking


def probing(**options):
    return guide(budget=300, probe_every=5, probe_agree=2, probe_tokens=3, probe="A:", finish="</answer>", **options)


def test_stable_probe_ends_the_thinking(start):
    state, server = start(WORDS)
    state.probed = ["5", " 4 </answer> and", "\n4\nso"]
    solution = write(server, PROMPT, probing(interventions=()), count=lambda text: len(text.split()))
    assert [event.kind for event in solution.events] == [STABLE]
    assert [request["prompt"] for request in state.probes] == [
        PROMPT + "word. " * words + "\n\n</think>A:" for words in (5, 10, 15)
    ]
    assert {(probe["max_tokens"], probe["temperature"], *probe["stop"]) for probe in state.probes} == {
        (3, 0.0, "</answer>")
    }
    assert solution.thinking == "word. " * 15 + "\n\n</think>"
    # A probe costs the tokens it inserts, one here, and those it writes.
    assert solution.probe_tokens == 3 + 1 + 3 + 2
    assert solution.tokens == 300 and solution.text.count("word") + 1 == 300 - solution.probe_tokens


@pytest.mark.parametrize("usage", [True, False])
def test_probes_are_paid_from_the_budget(start, usage):
    state, server = start(WORDS)
    state.probed, state.usage = [f"{n}" for n in range(99)], usage
    solution = write(server, PROMPT, probing(), count=lambda text: len(text.split()))
    written = len((solution.text).split())
    assert solution.probe_tokens == len(state.probes) * (2 if usage else 4) and len(state.probes) > 5
    assert written <= solution.tokens - solution.probe_tokens and solution.tokens <= 300


def test_probe_that_ignores_the_limit_is_reported(start):
    state, server = start(WORDS)
    state.probed = ["far more than was asked for"]
    with pytest.raises(ServerError, match="ignores max_tokens: requested at most 3, got 6") as caught:
        write(server, PROMPT, probing())
    assert caught.value.partial.thinking == "word. " * 5


def test_answer_continues_beyond_the_thinkings_share(start):
    # The first request covers the thinking's share and ends within the answer: the reserve is still unused.
    state, server = start("|".join(["word "] * 60 + ["</think>"] + ["answer "] * 30))
    solution = write(server, PROMPT, guide(loop_length=99))
    assert [request["max_tokens"] for request in state.requests] == [80, 40]
    assert solution.answer == "answer " * 30 and solution.tokens == 91 and not solution.truncated


def test_reported_usage_corrects_the_count_of_pieces(start):
    state, server = start("two words. |</think>|it is 4")
    state.usage = "exact"
    assert write(server, PROMPT, guide()).tokens == 6


def test_full_context_is_not_charged_as_written(start):
    # llama.cpp ends the stream with "length" where its context ends, and refuses the next request.
    state, server = start("|".join(["word "] * 10))
    state.usage, state.finish, state.faults = "exact", "length", [None, 400]
    with pytest.raises(ServerError, match="returned 400") as caught:
        write(server, PROMPT, guide())
    assert (caught.value.partial.tokens, caught.value.partial.events) == (10, ())
    assert state.requests[1]["prompt"] == PROMPT + "word " * 10


def test_inaccurate_token_count_is_not_blamed_on_the_server(start):
    _, server = start("|".join(["word "] * 90))
    solution = write(server, PROMPT, guide(budget=61), count=lambda text: 3)
    assert solution.tokens <= 61 and solution.truncated


def test_chunks_that_are_no_completion_are_reported(start):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    state.faults = ["close", "nonsense"]
    with pytest.raises(ServerError, match="sent no completion: TypeError") as caught:
        write(server, PROMPT, guide())
    assert caught.value.partial.text == "So x"
