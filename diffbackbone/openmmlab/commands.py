"""MMSegmentation's own training and test scripts, after checks with clear errors.

The scripts inside the mmseg package run unmodified, in this process and with all their options.
Before they start, the environment is checked and repaired, a bare config name is looked up in
``configs/mmseg``, and the folders and files that they need are looked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    _run("train.py", ["train_dataloader", "val_dataloader"])


def evaluate() -> None:
    """Evaluate by mmseg's ``tools/test.py``."""
    _run("test.py", ["test_dataloader"])


def _run(name: str, dataloaders: Sequence[str]) -> None:
    with user_errors():
        prepare("mmseg")
        folder = Path(importlib.util.find_spec("mmseg").origin).parent
        spec = importlib.util.spec_from_file_location("mmseg_tool", folder / ".mim/tools" / name)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        args = script.parse_args()
        script.parse_args = lambda: args
        if "checkpoint" in args:
            check_checkpoint(args.checkpoint)
        args.config = read_config(args.config, args.cfg_options, dataloaders).filename
        try:
            script.main()
        except (ValueError, FloatingPointError) as error:
            raise UserError(strip_worker_traceback(str(error))) from error


def read_config(
    name: str, options: Mapping[str, Any] | None, dataloaders: Sequence[str] = ()
) -> Any:
    """Read a config, by its path or its name in ``configs/mmseg``, and check its data's folders."""
    from mmengine.config import Config

    from diffbackbone.openmmlab.checks import check_folders

    path = find_config(name, CONFIGS / "mmseg", (".py",))
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options or {})
    check_folders(cfg, dataloaders)
    return cfg
