"""The queue of `nla serve`: whose rows share a batch, what is cancelled, what a failure says."""

import collections
import threading

import pytest
from test_serve import within

from nla_jax.runtime.errors import InputError
from nla_jax.serve.worker import Job, Worker


class Waiting:
    """What a job was answered; `jobs` of a worker that computes only once it may."""

    def __init__(self, batch=4, queue=100):
        self.worker, self.may, self.batches = Worker(batch, queue), threading.Event(), []
        self.answers = collections.defaultdict(list)

    def job(self, name, rows, key="k", patient=False) -> Job:
        return Job(
            key, collections.deque((name, row) for row in rows), self.compute, self.answers[name].append, patient
        )

    def compute(self, rows):
        self.may.wait(10)
        self.batches.append(rows)
        return [{"row": row} for row in rows]

    def ended(self, *names) -> None:
        within(10, lambda: all(self.answers[name][-1:] == [None] for name in names))


@pytest.fixture
def waiting():
    made = Waiting()
    made.first = made.job("first", [0], key="other")
    made.worker.add(made.first)
    within(10, lambda: not made.worker.waiting)  # it is under way, and what comes now must wait
    yield made
    made.may.set()
    made.worker.close()


def test_patient_rows_fill_what_is_left_of_a_batch(waiting):
    waiting.worker.add(waiting.job("long", range(5), patient=True), waiting.job("other long", [7], patient=True))
    waiting.worker.add(waiting.job("click", [9]), waiting.job("other click", [8]))
    waiting.may.set()
    waiting.ended("long", "other long", "click", "other click")
    assert [len(rows) for rows in waiting.batches] == [1, 4, 4]
    assert {name for name, _ in waiting.batches[1]} == {"long", "other long", "click", "other click"}
    assert waiting.batches[1][0][0].endswith("click") and waiting.batches[1][1][0].endswith("click")
    assert [answer and answer["row"] for answer in waiting.answers["long"]] == [*(("long", i) for i in range(5)), None]


def test_rows_of_another_key_get_a_batch_of_their_own(waiting):
    waiting.worker.add(waiting.job("a", [1, 2]), waiting.job("b", [3], key="another"))
    waiting.may.set()
    waiting.ended("a", "b")
    assert sorted(len(rows) for rows in waiting.batches) == [1, 1, 2]


def test_what_is_cancelled_is_not_computed(waiting):
    gone, kept = waiting.job("gone", range(6)), waiting.job("kept", [1])
    waiting.worker.add(gone, kept)
    waiting.worker.cancel(gone)
    assert waiting.worker.waiting == 1
    waiting.may.set()
    waiting.ended("kept")
    assert all(name != "gone" for rows in waiting.batches for name, _ in rows) and waiting.answers["gone"] == []


def test_a_failure_is_said_to_who_waits_and_the_worker_goes_on(waiting, capsys):
    def fail(rows):
        raise (InputError("This is wrong.") if rows == [1] else RuntimeError("boom\nmore"))

    waiting.worker.add(
        Job("x", collections.deque([1]), fail, waiting.answers["x"].append),
        Job("y", collections.deque([2]), fail, waiting.answers["y"].append),
        waiting.job("z", [3]),
    )
    waiting.may.set()
    waiting.ended("x", "y", "z")
    assert waiting.answers["x"][0] == {"error": "This is wrong."}
    assert waiting.answers["y"][0] == {"error": "The server could not compute this: boom."}
    assert waiting.answers["z"][0] == {"row": ("z", 3)} and "RuntimeError: boom" in capsys.readouterr().err
