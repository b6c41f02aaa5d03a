"""Run a command: options from a dataclass, user errors without a traceback."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffbackbone.utils import UserError

Config = TypeVar("Config")

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""Folder of the checkout's configs; it does not exist where the package is installed."""


def run_command(
    config_class: Callable[..., Config],
    run: Callable[[Config], Any],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    default: Config | None = None,
) -> Any:
    """Parse options into a dataclass and run the command.

    Args:
        config_class: Dataclass whose fields and docstrings are the options and their help.
        run: Called with the parsed options.
        argv: Arguments; None takes the process's.
        description: Text of ``--help``; None takes the dataclass's docstring.
        default: Options that the command line changes; None takes the dataclass's defaults.

    Returns:
        What ``run`` returns.

    Raises:
        SystemExit: Wrong options, or a UserError, OSError or CheckpointError from ``run``.
    """
    try:
        import tyro
    except ImportError as error:
        raise SystemExit(f"error: {error}; pip install 'diffbackbone[tools]'") from error
    with user_errors():
        given = {} if default is None else {"default": default}
        config = tyro.cli(config_class, args=argv, description=description, **given)
        return run(config)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the process with a message in place of a traceback where the user can act on it.

    ``DIFFBACKBONE_TRACEBACK=1`` in the environment keeps the traceback.

    Raises:
        SystemExit: In place of a UserError or an OSError.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if os.environ.get("DIFFBACKBONE_TRACEBACK"):
            raise
        raise SystemExit(f"error: {error}") from error


def find_config(name: str, folder: Path, suffixes: Sequence[str]) -> str:
    """Find a config: a path as it is, a bare name also among the checkout's configs.

    Args:
        name: Path of a config, or the name of one in ``folder``, with or without suffix.
        folder: Folder of configs, such as ``CONFIGS / "detectron2"``.
        suffixes: Suffixes of configs, such as ``(".py",)``.

    Returns:
        The path.

    Raises:
        UserError: There is no such config.
    """
    if os.path.isfile(name):
        return name
    if name and os.path.basename(name) == name:
        for suffix in ("", *suffixes):
            if (folder / f"{name}{suffix}").is_file():
                return str(folder / f"{name}{suffix}")
    names = sorted(path.name for suffix in suffixes for path in folder.glob(f"*{suffix}"))
    raise UserError(
        f"config {name!r} does not exist; give a path, or one of the configs in {folder}: "
        f"{', '.join(names)}"
    )


def check_checkpoint(checkpoint: str) -> None:
    """Check that a checkpoint exists, unless it is a URL.

    Raises:
        UserError: There is no such file.
    """
    path = Path(checkpoint).expanduser()
    if "://" in checkpoint or path.is_file():
        return
    found = ", ".join(sorted(other.name for other in path.parent.glob("*.pth"))) or "no *.pth"
    raise UserError(f"checkpoint {checkpoint!r} does not exist; {path.parent} holds {found}")


def strip_worker_traceback(text: str) -> str:
    """Return an error's message without the traceback that a data loader's worker adds."""
    if not re.match(r"Caught \w+ in DataLoader worker process", text):
        return text
    return re.sub(r"^[\w.]+: ", "", text.strip().rpartition("\n")[2])


def end_with_parent() -> None:
    """End this process when its parent ends, however that ends (Linux only).

    Torch sends SIGINT, which background jobs of a shell script ignore: orphans would train on and
    write checkpoints beside those of the resumed run.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
