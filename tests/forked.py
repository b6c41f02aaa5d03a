"""Scripts in processes of their own, without the seconds that importing torch takes each of them.

A server that has imported what is in forked_imports.py forks for each script. It has run nothing,
so a script finds what it would find in a process that was started anew; and nothing of this project
has been imported.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _become(command: Sequence[str], log: str, env: Mapping[str, str], paths: str | None) -> None:
    """Run a script as ``python SCRIPT ...`` would, as the leader of a group of processes."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the platform's, not what started this
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    del os.environ["PYTHONPATH"]
    os.environ.update(env if paths is None else {"PYTHONPATH": paths, **env})
    os.chdir(ROOT)
    path = str(ROOT / command[0])
    sys.argv[:] = command
    ours = {"", str(ROOT), str(ROOT / "tests")}.difference((paths or "").split(os.pathsep))
    sys.path[:] = [os.path.dirname(path), *(entry for entry in sys.path if entry not in ours)]
    runpy.run_path(path, run_name="__main__")


class Script:
    """A script that runs in a process group of its own, ``pid``, its output in the file ``log``."""

    def __init__(self, command: Sequence, log: Path, env: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["forked_imports"])
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parent), *([before] if before else [])]
        )
        try:
            forkserver.ensure_running()  # where it isn't; it finds forked_imports.py by the path
        finally:
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
        log.write_bytes(b"")
        self.log = log
        words = [str(word) for word in command]
        self.process = context.Process(target=_become, args=(words, str(log), dict(env), before))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end; the exit status, None where it still runs."""
        self.process.join(timeout)
        return self.process.exitcode

    def finish(self, seconds: float) -> str:
        """Wait for an end without errors; what it printed."""
        assert self.wait(seconds) == 0, self.log.read_text()[-4000:]
        return self.log.read_text()

    def kill(self) -> None:
        """Kill it and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()  # where it has no group yet
        self.process.join()


def run(*command, log: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a script to its end, which has to be one without errors; what it printed."""
    script = Script(command, log, env or {})
    try:
        return script.finish(300)
    finally:
        script.kill()


def ranks(count: int) -> list[dict[str, str]]:
    """The environment variables that ``torchrun`` gives to each process of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    return [{**where, **sizes, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
