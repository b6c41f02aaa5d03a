"""Runs what benchmarks put into processes of their own in the test's process."""

from __future__ import annotations

import pickle

from diffbackbone.benchmark.worker import WorkerError, call


def use(monkeypatch, *modules):
    """Replace ``Worker`` in modules; return its replacement, which notes who was asked what."""

    class InProcess:
        asked: list = []  # noqa: RUF012
        before = staticmethod(lambda who, method: None)

        def __init__(self, factory, log, timeout, threads=None):
            self.who, self.target = log.stem, factory()

        def ask(self, method, **arguments):
            assert self.target is not None
            self.asked.append((self.who, method))
            self.before(self.who, method)
            arguments = pickle.loads(pickle.dumps(arguments))
            status, result = call(self.target, method, arguments)
            if status != "ok":
                raise WorkerError(status, result)
            return pickle.loads(pickle.dumps(result))

        def close(self):
            self.target = None

    for module in modules:
        monkeypatch.setattr(module, "Worker", InProcess)
    return InProcess
