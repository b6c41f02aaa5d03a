"""Processes that hold what is measured: each has its own peak memory and may be killed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import multiprocessing
import os
import re
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffbackbone.benchmark.config import STEPS, BenchmarkConfig, Case
from diffbackbone.utils import UserError

MIN_SECONDS = 0.2
"""A short step is repeated for this long in every round."""


class WorkerError(UserError):
    """A worker failed: ``"out of memory"``, ``"timeout"``, ``"skipped"`` or ``"error"``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Runner:
    """Answers a worker's calls: builds one implementation of a case and measures its steps.

    A module builds it: ``build(who, case, config, folder)`` returns an object with ``model``;
    ``dtype``, the type that it computes in; ``first()``, which runs a step and returns its
    floating-point operations; and ``step()``, which returns the seconds of a step and its parts.
    """

    def load(self, who: str, case: Case, config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
        """Build an implementation and run its first step.

        Weights count as memory in use; loading them does not, nor does the code.

        Args:
            who: ``"ours"``, ``"cpu"`` or a reference.
            case: What is measured.
            config: The options.
            folder: Holds the weights; outputs go there.
        """
        kind = case.name.removesuffix("_difffeed") if case.name in STEPS else "references"
        module = importlib.import_module(f"diffbackbone.benchmark.{kind}")
        self.device: str = "cpu" if who == "cpu" else config.device
        on_cpu = ("float32",) if case.name in STEPS else ("float32", "bfloat16")
        if config.device == "cpu" and case.dtype not in on_cpu:
            raise NotImplementedError(f"{case.dtype} needs a GPU here")
        reset_peak(self.device)
        self.baseline = peak_bytes(self.device) if self.device == "cpu" else 0
        self.target = module.build(who, case, config, folder)
        flops, dtype = self.target.first(), self.target.dtype
        peak = matmul_peak(self.device, dtype.split()[0])
        reset_peak(self.device)
        return {"dtype": dtype, "flops": flops, "matmul_peak": peak}

    def time(self) -> dict[str, float]:
        """Return the mean seconds of steps in a round, and of their parts."""
        if self.device != "cpu":
            self.target.step()  # allocates again what the last round freed
        steps = [self.target.step()]
        while sum(seconds["step"] for seconds in steps) < MIN_SECONDS:
            steps.append(self.target.step())
        if self.device != "cpu":
            torch.cuda.empty_cache()  # for the other implementation
        return {part: statistics.mean(seconds[part] for seconds in steps) for part in steps[0]}

    def peak(self) -> int:
        """Return the peak bytes of the timed steps."""
        return peak_bytes(self.device) - self.baseline


class Worker(contextlib.AbstractContextManager):
    """A runner in a process of its own.

    Args:
        name: For messages.
        log: File for what the process prints.
        timeout: Seconds that all calls together may take.
        factory: Makes the runner, in the process.
    """

    def __init__(
        self, name: str, log: Path, timeout: float, factory: Callable[[], Any] = Runner
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, connection = context.Pipe()
        self.name, self.log, self.deadline = name, log, time.monotonic() + timeout
        self.process = context.Process(target=_serve, args=(connection, log, factory))
        self.process.start()
        connection.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the runner.

        Raises:
            WorkerError: It failed, the process ended, or time was up.
        """
        try:
            self.connection.send((method, arguments))
            status, result = "timeout", "too slow"
            if self.connection.poll(max(self.deadline - time.monotonic(), 0)):
                status, result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code, printed = self.process.exitcode, self.log.read_text(errors="replace").strip()
            status = "out of memory" if code == -signal.SIGKILL else "error"  # as Linux kills then
            result = f"exit code {code}: {printed.rpartition(chr(10))[2]}"
        if status != "ok":
            raise WorkerError(status, f"{self.name}: {method}: {result}")
        return result

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Any, log: Path, factory: Callable[[], Any]) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    runner = factory()
    with contextlib.suppress(EOFError):
        while True:
            connection.send(call(runner, *connection.recv()))


def call(runner: Any, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    """Call a method; return ``"ok"`` and its result, or the kind of error and a message."""
    try:
        return "ok", getattr(runner, method)(*arguments)
    except (NotImplementedError, ImportError) as error:
        return "skipped", str(error)
    except Exception as error:
        traceback.print_exc()
        no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
            isinstance(error, RuntimeError) and re.search("(allocate|enough) memory", str(error))
        )
        message = traceback.format_exception_only(error)[0].strip().partition("\n")[0]
        return "out of memory" if no_memory else "error", message


def peak_bytes(device: str) -> int:
    """Return the peak memory since :func:`reset_peak`: allocated by torch, or the resident set."""
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # getrusage on Linux starts at the parent's figure
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_peak(device: str) -> None:
    """Release freed memory and reset the peak (on CPUs: on Linux only)."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


@functools.cache
def matmul_peak(device: str, dtype: str) -> float:
    """Return the FLOP/s of a large square matrix product."""
    from torch.utils.benchmark import Timer

    n = 2048 if device == "cpu" else 8192
    a, b = (torch.rand(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n**3 / min(timer.blocked_autorange().times)
