"""Run a command: options from a dataclass, user errors without a traceback."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from diffbackbone.utils import UserError

Config = TypeVar("Config")


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
