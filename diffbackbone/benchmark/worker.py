"""Processes that hold what is measured: each has its own peak memory and may be killed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import platform
import re
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from diffbackbone.utils import UserError

aten = torch.ops.aten
CPU_ATTENTION = {
    getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}"): flop_registry[
        getattr(aten, f"_scaled_dot_product_flash_attention{suffix}")
    ]
    for suffix in ("", "_backward")
}
"""Formulas that torch's counter lacks."""


class NotAvailableError(Exception):
    """An implementation can't do what is asked for; the message says why."""


class WorkerError(UserError):
    """A worker failed: ``"out of memory"``, ``"timeout"``, ``"skipped"`` or ``"error"``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """An object in a process of its own.

    Args:
        factory: Makes the object, in the process.
        log: File for what the process prints.
        timeout: Seconds that all calls together may take.
        threads: Threads that torch may use; None leaves its choice.
    """

    def __init__(
        self, factory: Callable[[], Any], log: Path, timeout: float, threads: int | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, connection = context.Pipe()
        self.log, self.timeout, self.deadline = log, timeout, time.monotonic() + timeout
        self.process = context.Process(target=_serve, args=(connection, log, factory, threads))
        self.process.start()
        connection.close()

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call a method of the object.

        Raises:
            WorkerError: It failed, the process ended, or time was up.
        """
        try:
            self.connection.send((method, arguments))
            if not self.connection.poll(max(self.deadline - time.monotonic(), 0)):
                self.close()
                raise WorkerError("timeout", f"{method}: more than {self.timeout:.4g} s in all")
            status, result = self.connection.recv()
        except (EOFError, OSError):
            raise self._death(method) from None
        if status != "ok":
            raise WorkerError(status, result)
        return result

    def _death(self, method: str) -> WorkerError:
        self.process.join()
        code = self.process.exitcode
        if code == -signal.SIGKILL:  # as Linux does when memory runs out
            return WorkerError("out of memory", f"{method}: the process was killed (signal 9)")
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return WorkerError("error", f"{method}: exit code {code}: {lines[-1] if lines else ''}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Any, log: Path, factory: Callable[[], Any], threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    with contextlib.suppress(OSError):  # let this process be killed if memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if threads:
        torch.set_num_threads(threads)
    target = factory()
    with contextlib.suppress(EOFError):
        while True:
            connection.send(call(target, *connection.recv()))


def call(target: Any, method: str, arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """Call a method; return ``"ok"`` and its result, or the kind of error and a message."""
    try:
        return "ok", getattr(target, method)(**arguments)
    except (NotAvailableError, ImportError) as error:
        return "skipped", str(error)
    except Exception as error:
        traceback.print_exc()
        kind = "out of memory" if out_of_memory(error) else "error"
        lines = str(error).strip().splitlines() or [""]
        return kind, f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is not enough memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    texts = ("can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


# --------------------------------------------------------------------------------------------------
# measuring inside a process


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
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def synchronize(device: str) -> None:
    """Wait for a GPU's work."""
    if device != "cpu":
        torch.cuda.synchronize()


def count_flops(step: Callable[[], Any]) -> int:
    """Return the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        counter.flop_registry.update(CPU_ATTENTION)
        # Don't count by module: the hooks break re-entrant activation checkpointing.
        counter.mod_tracker.__exit__(None, None, None)
        step()
    return counter.get_total_flops()


def describe_machine(device: str) -> dict[str, Any]:
    """Return names and numbers of the machine."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    found = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found |= {"torch": torch.__version__, "python": platform.python_version()}
    return found if device == "cpu" else {**found, "gpu": torch.cuda.get_device_name()}
