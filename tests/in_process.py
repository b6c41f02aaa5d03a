"""Runs the workers of benchmarks in the test's process, behind the same JSON as in their own."""

from __future__ import annotations

import json
from typing import Any


class InProcess:
    """Stands in for a ``Worker`` of tools/benchmark.py or tools/benchmark_steps.py.

    Attributes:
        tool: The module that asks.
        worker: The module with ``answers``.
        commands: Gets who was asked for what.
    """

    tool: Any
    worker: Any
    commands: list

    def make(self, args):
        """What answers."""
        raise NotImplementedError

    def on_ask(self, command):
        """Called before a command."""

    def __init__(self, args, log):
        self.who, self.line = log.stem, ""
        self.answers = self.worker.answers(self.make(args), iter(lambda: self.line, None))

    def ask(self, command, **arguments):
        assert self.answers is not None
        self.commands.append((self.who, command))
        self.on_ask(command)
        self.line = json.dumps({"command": command, **arguments})
        answer = json.loads(json.dumps(next(self.answers)))
        if "error" in answer:
            raise self.tool.WorkerError(answer["error"], answer["message"])
        return answer["result"]

    def close(self):
        self.answers = None
