"""The queue, and the one thread that uses the models. Rows that several tabs wait for are computed in one batch."""

import collections
import dataclasses
import sys
import threading
import traceback
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from nla_jax.runtime.errors import InputError, first_line


@dataclasses.dataclass(eq=False)
class Job:
    """Rows that one request waits for.

    Jobs of equal `key` may share a batch: `compute` gets the rows of all of them, and gives an answer for each. `answer`
    is called in the worker's thread with each answer as it is ready, with `{"error": sentence}` where there is none, and
    at the end with None. A `patient` job gets what others leave of a batch."""

    key: Hashable
    rows: collections.deque
    compute: Callable[[list], Sequence[dict]]
    answer: Callable[[dict | None], None]
    patient: bool = False


class Worker:
    """Takes jobs, and computes `batch` rows at a time in a thread of its own. At most `queue` rows may wait."""

    def __init__(self, batch: int, queue: int):
        self.batch, self.queue = batch, queue
        self.jobs: list[Job] = []  # that have rows left to compute
        self._condition, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="models", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many rows wait."""
        return sum(len(job.rows) for job in list(self.jobs))

    def add(self, *jobs: Job) -> None:
        """Puts jobs into the queue. Raises `InputError` where it is full; none of them is then in it."""
        with self._condition:
            new = sum(len(job.rows) for job in jobs)
            if (waiting := self.waiting) + new > self.queue:
                raise InputError(f"The server is busy: {waiting:,} explanations are waiting; try again in a while.")
            self.jobs += jobs
            self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Takes a job out of the queue. A batch that is under way ends as it would."""
        with self._condition:
            if job in self.jobs:
                self.jobs.remove(job)

    def close(self) -> None:
        """Ends the thread after the batch that is under way."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._compute(batch)

    def _next(self) -> list[tuple[Job, Any]] | None:
        """The rows of the next batch with their jobs; None at the end."""
        with self._condition:
            self._condition.wait_for(lambda: self.jobs or self._closed)
            if self._closed:
                return None
            batch = self._taken()
            self.jobs = [job for job in self.jobs if job.rows]
            self.jobs.append(self.jobs.pop(0)) if self.jobs else None  # so that nobody waits for another's long text
            return batch

    def _taken(self) -> list[tuple[Job, Any]]:
        """Rows for a batch: of the first job that is not patient and of those like it, each in turn; then of patient
        ones."""
        ordered = sorted(self.jobs, key=lambda job: job.patient)
        alike = [job for job in ordered if job.key == ordered[0].key]
        batch: list[tuple[Job, Any]] = []
        for patient in (False, True):
            turn = collections.deque(job for job in alike if job.patient == patient)
            while turn and len(batch) < self.batch:
                job = turn.popleft()
                batch.append((job, job.rows.popleft()))
                if job.rows:
                    turn.append(job)
        return batch

    def _compute(self, batch: list[tuple[Job, Any]]) -> None:
        """Computes a batch and hands the answers out; what fails is said to those that wait for it."""
        try:
            answers = batch[0][0].compute([row for _, row in batch])
            if len(answers) != len(batch):
                raise ValueError(f"{len(batch)} rows got {len(answers)} answers")
        except InputError as error:
            answers = [{"error": str(error)}] * len(batch)
        except Exception as error:  # the server goes on, and whoever started it sees what happened
            traceback.print_exc(file=sys.stderr)
            answers = [{"error": f"The server could not compute this: {first_line(error)}."}] * len(batch)
        left = collections.Counter(job for job, _ in batch)
        for (job, _), answer in zip(batch, answers):
            job.answer(answer)
            left[job] -= 1
            if not left[job] and not job.rows:
                job.answer(None)
