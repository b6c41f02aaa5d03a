"""The mmseg package's own training and test scripts, unmodified and with all their options."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from diffbackbone.cli import (
    CONFIGS,
    check_checkpoint,
    find_config,
    strip_worker_traceback,
    user_errors,
)
from diffbackbone.openmmlab.repairs import prepare
from diffbackbone.utils import UserError


def train() -> None:
    """Train by mmseg's ``tools/train.py``."""
    _run("train.py")


def evaluate() -> None:
    """Evaluate by mmseg's ``tools/test.py``."""
    _run("test.py")


def _run(name: str) -> None:
    with user_errors():
        prepare("mmseg")
        folder = Path(importlib.util.find_spec("mmseg").origin).parent
        spec = importlib.util.spec_from_file_location("mmseg_tool", folder / ".mim/tools" / name)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        args = script.parse_args()
        args.config = find_config(args.config, CONFIGS / "mmseg", (".py",))
        if "checkpoint" in args:
            check_checkpoint(args.checkpoint)
        script.parse_args = lambda: args
        try:
            script.main()
        except (ValueError, FloatingPointError) as error:
            raise UserError(strip_worker_traceback(str(error))) from error
