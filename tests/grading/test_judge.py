"""The worker process that compares expressions: each question gets its own answer."""

import os
import signal
from multiprocessing import get_context

import pytest

from rbfast.grading import judge as judging
from rbfast.grading.judge import Judge, judge

pytest.importorskip("math_verify")
pytestmark = pytest.mark.slow
RIGHT, WRONG = ["$1/2$", "$0.5$"], ["$1/2$", "$0.4$"]


@pytest.mark.parametrize("waits", [0, 1], ids=["as the worker starts", "as it compares"])
def test_after_an_interrupt_the_next_question_gets_its_own_answer(waits, monkeypatch):
    """waits: how many lines of the worker are read before Ctrl-C."""
    start = judging._start

    def start_and_interrupt(kind):
        process, answers = start(kind)
        take, lines = answers.get, iter(range(waits))

        def get(**limit):
            if next(lines, None) is None:
                raise KeyboardInterrupt
            return take(**limit)

        monkeypatch.setattr(answers, "get", get)
        return process, answers

    own = Judge("math-verify")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(judging, "_start", start_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                own.ask(RIGHT)
        assert [own.ask(question) for question in (WRONG, RIGHT)] == [False, True]
    finally:
        own.close()


def test_a_worker_that_does_not_start_in_time_raises_timeout_error(monkeypatch):
    own = Judge("math-verify")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(judging, "_START_LIMIT", 0.001)
            with pytest.raises(TimeoutError, match=r"math-verify did not start within 0.001 s.*grade again when"):
                own.ask(RIGHT)
        assert own.ask(RIGHT)
    finally:
        own.close()


def test_a_worker_that_was_killed_between_questions_is_replaced():
    own = Judge("math-verify")
    try:
        assert own.ask(RIGHT)
        own._process.kill()
        own._process.wait()
        assert own.ask(RIGHT) and own.killed == 0
    finally:
        own.close()


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C reaches a group of processes on POSIX")
def test_ctrl_c_between_questions_does_not_end_the_worker():
    own = Judge("math-verify")
    try:
        assert own.ask(RIGHT)
        own._process.send_signal(signal.SIGINT)
        assert own.ask(RIGHT) and own.killed == 0
    finally:
        own.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_starts_its_own_worker():
    shared = judge("math-verify")
    assert shared.ask(RIGHT)
    worker = shared._process.pid
    context = get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(
        target=lambda: answers.put((judge("math-verify").ask(WRONG), judge("math-verify")._process.pid))
    )
    child.start()
    verdict, child_worker = answers.get()
    child.join()
    assert verdict is False and child_worker != worker
    assert [shared.ask(question) for question in (RIGHT, WRONG)] == [True, False] and shared._process.pid == worker


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_exit_of_a_forked_process_leaves_the_parents_worker_running(monkeypatch):
    at_exit = []
    monkeypatch.setattr(judging.atexit, "register", at_exit.append)
    own = judging._judge_of.__wrapped__(os.getpid(), "math-verify")
    assert own.ask(RIGHT)
    if (child := os.fork()) == 0:
        try:
            at_exit[0]()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert own.ask(RIGHT) and own.killed == 0
    at_exit[0]()
    assert own._process is None
