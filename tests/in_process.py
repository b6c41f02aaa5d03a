"""Runs what the benchmark puts into processes of their own in the test's process."""

from __future__ import annotations

import contextlib
import pickle

from diffbackbone.benchmark import timing
from diffbackbone.benchmark.worker import Runner, WorkerError, call


class Worker(contextlib.AbstractContextManager):
    """Takes the place of ``diffbackbone.benchmark.worker.Worker``; notes who was asked what."""

    asked: list = []  # noqa: RUF012
    before = staticmethod(lambda who, method: None)

    def __init__(self, name, log, timeout):
        self.name, self.runner = name, Runner()

    def ask(self, method, *arguments):
        self.asked.append((self.name, method))
        self.before(self.name, method)
        status, result = call(self.runner, method, pickle.loads(pickle.dumps(arguments)))
        if status != "ok":
            raise WorkerError(status, f"{self.name}: {method}: {result}")
        return pickle.loads(pickle.dumps(result))

    def __exit__(self, *_):
        self.runner = None


def use(set_attribute=setattr):
    """Let the benchmark use such workers; returns a class of them."""
    kind = type("InProcess", (Worker,), {"asked": []})
    set_attribute(timing, "Worker", kind)
    return kind
