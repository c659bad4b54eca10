"""Jobs asked one by one, many at a time, until every reply is there, the budget ends, the teacher fails, or Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from threading import Thread
from typing import Any

from rbfast.teacher.client import ServerError, Unreachable
from rbfast.teacher.jobs import Job
from rbfast.teacher.reply_store import ReplyStore
from rbfast.utils.interrupts import counted_interrupts

_HOPELESS = {401, 402, 403, 404}  # the next question would be refused too
_SPENT = "insufficient_quota"  # OpenAI's word for an empty account, which it sends with 429
_MOST_FAILURES = 8  # in a row
# A teacher that has answered is waited for, if it is too busy or cannot be reached; it bills nothing then.
_BUSY = {429, 503, 529}
_PATIENCE = 600.0  # seconds since its last reply
_REST = 15.0  # seconds before it is asked again
_LONGEST_SILENCE = 0.2  # seconds, however long a reply takes; a Ctrl-C is seen after them

Reply = dict[str, Any]


def ask_all(jobs: Sequence[Job], store: ReplyStore, concurrency: int, report: Callable[[str], None]) -> str | None:
    """Adds what comes to the store; returns why some jobs stay open, None if none does.

    After Ctrl-C nothing more is sent, and the replies under way, which are paid for, are waited for. A second Ctrl-C
    leaves them. A teacher that has answered, and then is too busy or cannot be reached, is asked again for ten minutes.

    Args:
        report: called several times a second, with a word on a teacher that is waited for.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        ServerError: the teacher refuses every question, or has failed several times in a row.
    """
    asking = _Asking(jobs, store, concurrency)
    with counted_interrupts() as interrupts:
        while asking.queue or asking.pending:
            if interrupts and asking.leaves(len(interrupts)):
                break
            rests = asking.rests()
            if not rests:
                asking.send()
            if not asking.pending and not rests:
                asking.reason = f"the budget does not allow another question ({store.purse.words()} so far)"
                break
            report("the teacher is busy or away" if rests else "")
            if asking.pending:
                done, _ = wait(asking.pending, _LONGEST_SILENCE, return_when=FIRST_COMPLETED)
                asking.take(done)
            else:
                time.sleep(_LONGEST_SILENCE)
        asking.take([future for future in asking.pending if future.done()])
        report("")
    if interrupts:
        raise KeyboardInterrupt
    if asking.stopped is not None:
        raise asking.stopped
    return asking.reason


class _Asking:
    """The jobs to send, in `queue`, and those under way, in `pending`.

    Attributes:
        reason: why a job stays open; of several the last.
        stopped: the error that ends the asking.
    """

    def __init__(self, jobs: Sequence[Job], store: ReplyStore, concurrency: int) -> None:
        self.queue = deque(jobs)
        self.pending: dict[Future[Reply], tuple[Job, Thread]] = {}
        self.reason: str | None = None
        self.stopped: ServerError | None = None
        self._store, self._concurrency = store, concurrency
        self._failures = 0
        self._answered: float | None = None  # when the last reply came
        self._rest_ends = 0.0
        self._interrupted = False

    def send(self) -> None:
        """Sends jobs from the queue until so many are under way, or the budget may not cover another."""
        purse = self._store.purse
        while self.queue and len(self.pending) < purse.at_a_time(self._concurrency):
            under_way = [job for job, _ in self.pending.values()]
            if not purse.affords([job.worst() for job in (*under_way, self.queue[0])]):
                return
            job = self.queue.popleft()
            future, thread = _ask(job)
            self.pending[future] = job, thread

    def rests(self) -> bool:
        """Whether jobs wait until a busy teacher is asked again."""
        return bool(self.queue) and time.monotonic() < self._rest_ends

    def take(self, done: Iterable[Future[Reply]]) -> None:
        """Stores replies, and counts failures."""
        for future in done:
            job, _ = self.pending.pop(future)
            try:
                self._store.add(future.result(), job.worst())
                self._failures, self._answered = 0, time.monotonic()
            except ServerError as error:
                self._fail(job, error)

    def _fail(self, job: Job, error: ServerError) -> None:
        if self._is_waited_for(error):
            self.queue.append(job)
            self._rest_ends = time.monotonic() + _REST
            return
        self._failures, self.reason = self._failures + 1, str(error)
        if (
            error.status in _HOPELESS
            or _SPENT in str(error)
            or self._failures >= max(_MOST_FAILURES, self._concurrency)
        ):
            self.stopped = self.stopped or error
            self.queue.clear()

    def _is_waited_for(self, error: ServerError) -> bool:
        if self._answered is None or self._interrupted or self.stopped or _SPENT in str(error):
            return False
        if error.pause is not None and error.pause > _PATIENCE:
            return False
        is_away = error.status in _BUSY or isinstance(error, Unreachable)
        return is_away and time.monotonic() - self._answered < _PATIENCE

    def leaves(self, interrupts: int) -> bool:
        """Lets nothing more be sent after Ctrl-C; returns whether no reply is waited for."""
        if not self._interrupted:
            self._interrupted = True
            self.queue.clear()
            for job, thread in self.pending.values():
                job.server.retried.give_up(thread)
            if coming := self._coming():
                print(f"waiting for replies under way: {coming}; Ctrl-C again leaves them", file=sys.stderr)
        return interrupts > 1 or not self._coming()

    def _coming(self) -> int:
        """How many replies may come: of requests that do not just wait to be sent again."""
        return sum(not job.server.retried.waits(thread) for job, thread in self.pending.values())


def _ask(job: Job) -> tuple[Future[Reply], Thread]:
    """Asks in a thread that ends with the program: a pool's threads would keep it waiting."""
    future: Future[Reply] = Future()

    def ask() -> None:
        try:
            future.set_result(job.ask())
        except BaseException as error:
            future.set_exception(error)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    return future, thread
