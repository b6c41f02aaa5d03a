"""MMSegmentation's own training and test scripts, after checks with clear errors.

The scripts inside the mmseg package run unmodified, in this process and with all their options.
Before they start, the environment is checked and repaired, a bare config name is looked up in
``configs/mmseg``, and the folders and files that they need are looked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diffbackbone.cli import (
    CONFIGS,
    check_checkpoint,
    find_config,
    strip_worker_traceback,
    user_errors,
)
from diffbackbone.openmmlab.repairs import prepare
from diffbackbone.utils import UserError

if TYPE_CHECKING:
    from mmengine.config import Config


def train() -> None:
    """Train by mmseg's ``tools/train.py``."""
    _run("train.py", ["train_dataloader", "val_dataloader"])


def evaluate() -> None:
    """Evaluate by mmseg's ``tools/test.py``."""
    _run("test.py", ["test_dataloader"])


def _run(name: str, dataloaders: Sequence[str]) -> None:
    with user_errors():
        script = _load_script(name)
        args = script.parse_args()
        script.parse_args = lambda: args
        if "checkpoint" in args:
            check_checkpoint(args.checkpoint)
        args.config = read_config(args.config, args.cfg_options, dataloaders).filename
        try:
            script.main()
        except (ValueError, FloatingPointError) as error:
            raise UserError(strip_worker_traceback(str(error))) from error


def _load_script(name: str) -> ModuleType:
    prepare("mmseg")
    path = Path(*importlib.util.find_spec("mmseg").submodule_search_locations, ".mim/tools", name)
    spec = importlib.util.spec_from_file_location(f"mmseg_tools_{path.stem}", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def read_config(
    name: str, options: Mapping[str, Any] | None, dataloaders: Sequence[str] = ()
) -> Config:
    """Read a config and check the folders of its datasets.

    Args:
        name: Path of a config, or the name of one in ``configs/mmseg``.
        options: Changes to it.
        dataloaders: Keys of the dataloaders to check.

    Raises:
        UserError: MMSegmentation, the config or the data are missing.
    """
    prepare("mmseg")
    from mmengine.config import Config

    from diffbackbone.openmmlab.checks import check_folders

    path = find_config(name, CONFIGS / "mmseg", (".py",))
    cfg = Config.fromfile(path, import_custom_modules=False)
    cfg.merge_from_dict(dict(options or {}))
    check_folders(cfg, dataloaders)
    return cfg
