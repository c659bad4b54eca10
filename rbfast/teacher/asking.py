"""Send jobs concurrently until every reply has arrived, the budget is used up, the teacher fails, or Ctrl-C."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from threading import Thread
from typing import Any

from rbfast.teacher.client import PATIENCE, ServerError, Unreachable
from rbfast.teacher.jobs import Job
from rbfast.teacher.reply_store import ReplyStore
from rbfast.utils.interrupts import announce_wait, counted_interrupts

_HOPELESS = {401, 402, 404}  # every further request would fail too; 403 may refuse one question (moderation)
_SPENT = "insufficient_quota"  # OpenAI's error code for an empty account, sent with status 429
_MOST_FAILURES = 8  # in a row
# Wait for a teacher that has answered before if it is busy or unreachable: waiting costs nothing.
_BUSY = {429, 502, 503, 504, 529}  # a proxy returns 502 and 504 while its server restarts
_REST = 15.0  # seconds before the next request
_LONGEST_SILENCE = 0.2  # seconds between progress reports and checks for Ctrl-C

Reply = dict[str, Any]


def ask_all(jobs: Sequence[Job], store: ReplyStore, concurrency: int, report: Callable[[str], None]) -> str | None:
    """Send jobs and store their replies. Returns why some jobs stay open, or None if none does.

    After Ctrl-C, nothing more is sent, but pending replies are waited for, because they are paid for. A second Ctrl-C
    drops them. If a teacher that has answered becomes busy or unreachable, requests are retried for ten minutes.

    Args:
        report: called several times a second, with a message while waiting for the teacher.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        ServerError: the teacher refuses every request, or has failed several times in a row.
        OSError: a reply could not be stored. Nothing more was sent; pending replies were waited for and stored.
    """
    sender = _Sender(jobs, store, concurrency)
    with counted_interrupts() as interrupts:
        while sender.queue or sender.pending:
            if interrupts and sender.stop_sending(len(interrupts)):
                break
            rests = sender.is_resting()
            if not rests:
                sender.send()
            if not sender.pending and not rests:
                sender.reason = f"the budget does not allow another question ({store.budget.describe()} so far)"
                break
            report("the teacher is busy or unreachable" if rests else "")
            if sender.pending:
                done, _ = wait(sender.pending, _LONGEST_SILENCE, return_when=FIRST_COMPLETED)
                sender.take(done)
            else:
                time.sleep(_LONGEST_SILENCE)
        sender.take([future for future in sender.pending if future.done()])
        sender.store_again()
        report("")
    if interrupts:
        raise KeyboardInterrupt
    if sender.stopped is not None:
        raise sender.stopped
    return sender.reason


class _Sender:
    """The jobs to send, in `queue`, and the jobs sent but not answered, in `pending`.

    Attributes:
        reason: why a job stays open (the last reason if there are several).
        stopped: the error that ended the sending.
    """

    def __init__(self, jobs: Sequence[Job], store: ReplyStore, concurrency: int) -> None:
        self.queue = deque(jobs)
        self.pending: dict[Future[Reply], tuple[Job, Thread]] = {}
        self.reason: str | None = None
        self.stopped: ServerError | OSError | None = None
        self._unstored: list[tuple[Reply, Job]] = []
        self._store, self._concurrency = store, concurrency
        self._failures = 0
        self._answered: float | None = None  # when the last reply came
        self._rest_ends = 0.0
        self._interrupted = False

    def send(self) -> None:
        """Send jobs from the queue up to the concurrency limit, as long as the budget covers the worst case.

        After an odd number of failures in a row, the next job is taken from the end: an earlier call may have left only
        questions that the teacher refuses at the front. After too many failures, nothing is sent while jobs are
        pending: their results decide whether to continue.
        """
        budget = self._store.budget
        while self.queue and len(self.pending) < budget.max_concurrency(self._concurrency):
            if self.pending and self._failed_too_often():
                return
            under_way = [job for job, _ in self.pending.values()]
            at = -(self._failures % 2)
            if not budget.can_afford([job.worst_case() for job in (*under_way, self.queue[at])]):
                return
            job = self.queue[at]
            del self.queue[at]
            future, thread = _start(job)
            self.pending[future] = job, thread

    def is_resting(self) -> bool:
        """Whether queued jobs wait because the teacher is busy."""
        return bool(self.queue) and time.monotonic() < self._rest_ends

    def take(self, done: Iterable[Future[Reply]]) -> None:
        """Store replies and count failures."""
        for future in done:
            job, _ = self.pending.pop(future)
            try:
                self._keep(future.result(), job)
            except ServerError as error:
                self._fail(job, error)

    def _keep(self, reply: Reply, job: Job) -> None:
        """Store a reply. If that fails (a full disk), stop sending. Pending replies are paid for, and may still fit."""
        self._failures, self._answered = 0, time.monotonic()
        try:
            self._store.add(reply, job.worst_case())
        except OSError as error:
            self.stopped = error
            self.queue.clear()
            self._unstored.append((reply, job))

    def store_again(self) -> None:
        """Try again to store the replies that could not be stored on arrival: there may be room by now."""
        for reply, job in self._unstored:
            with suppress(OSError):
                self._store.add(reply, job.worst_case())

    def _fail(self, job: Job, error: ServerError) -> None:
        if self._should_wait_for(error):
            self.queue.append(job)
            self._rest_ends = time.monotonic() + max(_REST, error.pause or 0.0)
            return
        self._failures, self.reason = self._failures + 1, str(error)
        is_hopeless = error.status in _HOPELESS or _SPENT in str(error)
        if is_hopeless or (not self.pending and self._failed_too_often()):
            self.stopped = self.stopped or error
            self.queue.clear()

    def _failed_too_often(self) -> bool:
        return self._failures >= max(_MOST_FAILURES, self._concurrency)

    def _should_wait_for(self, error: ServerError) -> bool:
        if self._answered is None or self._interrupted or self.stopped or _SPENT in str(error):
            return False
        if error.pause is not None and error.pause > PATIENCE:
            return False
        is_away = error.status in _BUSY or isinstance(error, Unreachable)
        return is_away and time.monotonic() - self._answered < PATIENCE

    def stop_sending(self, interrupts: int) -> bool:
        """Stop sending after Ctrl-C. Returns whether to leave now, without waiting for pending replies."""
        if not self._interrupted:
            self._interrupted = True
            self.queue.clear()
            for job, thread in self.pending.values():
                job.server.retried.give_up(thread)
            announce_wait(self._expected_replies())
        return interrupts > 1 or not self._expected_replies()

    def _expected_replies(self) -> int:
        """The number of replies that may still come: the requests that are not waiting for a retry."""
        return sum(not job.server.retried.is_waiting(thread) for job, thread in self.pending.values())


def _start(job: Job) -> tuple[Future[Reply], Thread]:
    """Send a job in a daemon thread, which ends with the program. A pool's threads would keep the program alive."""
    future: Future[Reply] = Future()

    def ask() -> None:
        try:
            future.set_result(job.ask())
        except BaseException as error:
            future.set_exception(error)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    return future, thread
