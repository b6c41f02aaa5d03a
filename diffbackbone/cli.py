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

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent / "configs" / "detectron2"
CONFIGS = _CHECKOUT.parent if _CHECKOUT.is_dir() else _PACKAGE / "configs"
"""Folder of the configs: the checkout's, or the wheel's."""


def run_command(
    config_class: Callable[..., Config],
    run: Callable[[Config], Any],
    argv: Sequence[str] | None = None,
    default: Config | None = None,
) -> Any:
    """Parse options into a dataclass, run the command and return what it returns.

    Args:
        config_class: Dataclass whose fields are the options, their docstrings the help.
        run: Called with the parsed options.
        argv: Arguments; None takes the process's.
        default: Options that the command line changes; None takes the dataclass's defaults.
    """
    try:
        import tyro
    except ImportError as error:
        raise SystemExit(f"error: {error}; pip install 'diffbackbone[tools]'") from error
    with user_errors():
        given = {} if default is None else {"default": default}
        return run(tyro.cli(config_class, args=argv, **given))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError or OSError into an exit with its message in place of a traceback.

    ``DIFFBACKBONE_TRACEBACK=1`` in the environment keeps the traceback.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if os.environ.get("DIFFBACKBONE_TRACEBACK"):
            raise
        raise SystemExit(f"error: {error}") from error


def find_config(name: str, folder: Path, suffixes: Sequence[str]) -> str:
    """Return the path of a config: ``name``, or in ``folder``, there with or without suffix."""
    in_folder = [folder / f"{name}{suffix}" for suffix in ("", *suffixes)]
    for path in [Path(name), *(in_folder if os.path.basename(name) == name else [])]:
        if path.is_file():
            return str(path)
    names = sorted(path.name for suffix in suffixes for path in folder.glob(f"*{suffix}"))
    raise UserError(f"config {name!r} does not exist; {folder} holds {', '.join(names)}")


def check_checkpoint(checkpoint: str) -> None:
    """Raise a UserError where a checkpoint that is no URL does not exist."""
    path = Path(checkpoint).expanduser()
    if "://" not in checkpoint and not path.is_file():
        found = ", ".join(sorted(other.name for other in path.parent.glob("*.pth"))) or "no *.pth"
        raise UserError(f"checkpoint {checkpoint!r} does not exist; {path.parent} holds {found}")


def strip_worker_traceback(text: str) -> str:
    """Return an error's message without the traceback that a data loader's worker adds."""
    if not re.match(r"Caught \w+ in DataLoader worker process", text):
        return text
    return re.sub(r"^[\w.]+: ", "", text.strip().rpartition("\n")[2])


def end_with_parent() -> None:
    """End this process when its parent ends, however that ends (Linux only).

    Torch sends SIGINT, which background jobs of a shell script ignore: orphans would train on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
