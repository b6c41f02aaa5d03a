"""Shared helpers of the training commands: arguments, processes and error messages."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import default_argument_parser
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from diffbackbone import cli
from diffbackbone.utils import UserError

CONFIG_DIR = cli.CONFIGS / "detectron2"


def run_training(
    argv: Sequence[str] | None,
    suffixes: Sequence[str],
    description: str,
    run: Callable[[argparse.Namespace], Any],
) -> None:
    """Run a training command with Detectron2's own options; each process calls ``run``."""
    parser = default_argument_parser(epilog=description)
    parser.add_argument("--config", dest="config_file", metavar="FILE", help="same as above")
    args = parser.parse_args(argv)
    with user_errors():
        args.config_file = cli.find_config(args.config_file, CONFIG_DIR, suffixes)
        if Path(args.config_file).suffix not in suffixes:
            raise UserError(
                f"{args.config_file}: tools/train_net.py takes YAML configs, "
                "tools/lazyconfig_train_net.py Python configs"
            )
        launch_processes(
            functools.partial(_run_process, run),
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


def _run_process(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    if comm.get_world_size() > 1:
        cli.end_with_parent()
    with user_errors():
        run(args)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the process with a message in place of a traceback where the user can act on it."""
    with cli.user_errors():
        try:
            yield
        except (ValueError, FloatingPointError, ProcessExitedException) as error:
            raise UserError(cli.strip_worker_traceback(str(error))) from error
