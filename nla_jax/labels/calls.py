"""Calls of a labeller, one after the other or several at a time."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

PATIENCE = 60.0  # seconds that calls under way are waited for when another has failed
Task, Result = TypeVar("Task"), TypeVar("Result")


def as_done(function: Callable[[Task], Result], tasks: Iterator[Task], at_once: int) -> Iterator[tuple[Task, Result]]:
    """`(task, function(task))` as each is done; `at_once` of them run at a time, each in a thread (one: in none).

    A task is taken from `tasks` only when a thread is free for it and the results before it have been used. When one
    fails, or `tasks` does, no further ones begin, the results of those under way are yielded (they have `PATIENCE`
    seconds), and the error is raised. The threads do not keep a process from ending."""
    if at_once == 1:
        for task in tasks:
            yield task, function(task)
        return
    todo, done = queue.SimpleQueue(), queue.SimpleQueue()

    def work() -> None:
        while (task := todo.get()) is not None:
            try:
                done.put((task, function(task), None))
            except Exception as error:
                done.put((task, None, error))

    running, failure, limit = 0, None, None
    try:
        for task in itertools.islice(tasks, at_once):
            threading.Thread(target=work, daemon=True).start()
            todo.put(task)
            running += 1
        while running:
            try:
                task, result, error = done.get(timeout=limit and max(0.0, limit - time.monotonic()))
            except queue.Empty:
                break
            running -= 1
            if error is None:
                yield task, result
            failure = failure or error
            try:
                if failure is None and (task := next(tasks, None)) is not None:
                    todo.put(task)
                    running += 1
            except Exception as raised:
                failure = raised
            if failure is not None and limit is None:
                limit = time.monotonic() + PATIENCE
    finally:
        for _ in range(at_once):
            todo.put(None)
    if failure is not None:
        raise failure
