"""Shared helpers of the training commands: arguments, processes and error messages."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as launch_processes
from omegaconf.errors import OmegaConfBaseException

from diffbackbone.cli import (
    CONFIGS,
    check_checkpoint,
    end_with_parent,
    find_config,
    strip_worker_traceback,
)
from diffbackbone.detectron2.datasets import check_datasets, load_dicts
from diffbackbone.utils import UserError, lost_loss

CONFIG_DIR = CONFIGS / "detectron2"
TRACEBACK = "DIFFBACKBONE_TRACEBACK"
"""Environment variable that keeps the traceback of errors with a message."""


def run_training(
    argv: Sequence[str] | None,
    suffixes: Sequence[str],
    description: str,
    check: Callable[[argparse.Namespace], Any],
    run: Callable[[argparse.Namespace], Any],
) -> None:
    """Run a training command with Detectron2's own options.

    ``check`` is called before processes start, ``run`` (picklable) in each process.
    """
    parser = default_argument_parser(epilog=description)
    parser.add_argument("--config", dest="config_file", metavar="FILE", help="same as above")
    args = parser.parse_args(argv)
    with user_errors():
        args.config_file = find_config(args.config_file, CONFIG_DIR, suffixes)
        if Path(args.config_file).suffix not in suffixes:
            raise UserError(
                f"{args.config_file}: tools/train_net.py takes YAML configs, "
                "tools/lazyconfig_train_net.py Python configs"
            )
        check(args)
        _run_processes(run, args)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the process with a message in place of a traceback where the user can act on it."""
    try:
        yield
    except Exception as error:
        text = format_user_error(error)
        if text is None:
            raise
        raise SystemExit(text) from error


def format_user_error(error: Exception) -> str | None:
    """Return the message that replaces a traceback; None if the traceback is needed."""
    text = strip_worker_traceback(str(error))
    if isinstance(error, FloatingPointError):  # Detectron2's, of losses and proposals
        text = lost_loss(" ".join(text.split()).rstrip("."))
    elif isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        text += (
            " Workers are killed when memory runs out, often the shared memory (df -h /dev/shm): "
            "fewer workers need less. --resume continues from the last checkpoint"
        )
    elif not isinstance(error, (ValueError, OSError, OmegaConfBaseException)):
        return None
    if os.environ.get(TRACEBACK):
        return None
    return f"error: {text}\n({TRACEBACK}=1 prints the traceback)"


def check_run(args: argparse.Namespace, train: Sequence[str], test: Sequence[str]) -> list[str]:
    """Check the datasets of a run before it starts; return the names of those it reads."""
    names = [*(() if args.eval_only else train), *test]
    if not (test if args.eval_only else train):
        raise UserError(f"no dataset to {'evaluate' if args.eval_only else 'train'} on")
    check_datasets(names)
    for name in test:
        load_dicts(name)
    return names


def check_weights(args: argparse.Namespace, weights: str, folder: str, key: str) -> None:
    """Check that the weights under the config's key exist; ``folder`` is the run's output."""
    if args.resume and os.path.isfile(os.path.join(folder, "last_checkpoint")):
        return
    if weights:
        check_checkpoint(weights.partition("?")[0])
    elif args.eval_only:
        raise UserError(f"--eval-only needs {key}, or --resume with a checkpoint in {folder}")


def _run_processes(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    several = args.num_gpus * args.num_machines > 1
    try:
        launch_processes(
            functools.partial(_run_process, run) if several else run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except torch.multiprocessing.ProcessExitedException as error:  # it printed its own message
        raise SystemExit(f"error: {error}") from error


def _run_process(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    end_with_parent()
    with user_errors():
        run(args)
