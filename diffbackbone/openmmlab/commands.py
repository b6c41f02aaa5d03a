"""What mmseg_train.py and mmseg_test.py share: MMSegmentation's own scripts, after some checks.

The scripts inside the mmseg package run unmodified, in this process and with all their options.
Before they start, the environment is checked and repaired (`diffbackbone.compat`), a bare config
name is looked up in this checkout, and folders and files that will be needed are looked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common

CONFIG_DIR = _common.ROOT / "configs" / "mmseg"


def run(script: str, dataloaders: Sequence[str]) -> None:
    """Check what the command line asks for, then run one of MMSegmentation's scripts.

    Args:
        script: File name of the script in mmseg's tools.
        dataloaders: The config's dataloaders that the script reads from.

    Raises:
        SystemExit: With a message, where the environment, the config, the data or the checkpoint
            is missing; and wherever the script itself exits.
    """
    prepare()
    path = _script_path(script)
    # upstream's own parser: --help and wrong options end here, as they would there
    parse_args: Callable[[], Namespace] = runpy.run_path(path)["parse_args"]
    args = parse_args()
    config = find_config(args.config)
    if config != args.config:
        _replace_config(args.config, config, parse_args)
    if "checkpoint" in args:
        _common.check_checkpoint(args.checkpoint)
    check_data(config, args.cfg_options, dataloaders)
    with clear_errors():
        runpy.run_path(path, run_name="__main__")


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End with a message in place of a traceback where it says what was wrong.

    Raises:
        SystemExit: In place of a ValueError, a missing file, a full disk and their like.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, (ValueError, OSError, FloatingPointError))
        text = _common.own_words(error) if known else _common.lost_worker(error)
        text = _common.refusal(text)
        if text is None:
            raise
        raise SystemExit(text) from error


def prepare() -> None:
    """Make `diffbackbone` importable from the checkout, and check and repair the environment.

    Raises:
        SystemExit: Says what is missing or too new.
    """
    _common.add_root()
    from diffbackbone.openmmlab import repairs

    try:
        repairs.check_mmseg_stack()
    except ImportError as error:
        raise SystemExit(f"error: {error}") from None
    repairs.apply_mmengine_repairs()


def _script_path(script: str) -> str:
    spec = importlib.util.find_spec("mmseg")
    for package in spec.submodule_search_locations if spec else ():
        path = Path(package, ".mim", "tools", script)
        if path.is_file():
            return str(path)
    raise SystemExit(
        f"error: the installed mmseg ships no .mim/tools/{script}; "
        "its wheel does: pip install mmsegmentation==1.2.2"
    )


def _replace_config(old: str, new: str, parse_args: Callable[[], Namespace]) -> None:
    """Put the path in place of the config's name, wherever among the options that stands."""
    for index, argument in enumerate(sys.argv):
        if index and argument == old:
            sys.argv[index] = new
            if parse_args().config == new:
                return
            sys.argv[index] = old  # the same word was an option's value


def find_config(name: str) -> str:
    """Find a config among this checkout's; see :func:`_common.find_config`."""
    return _common.find_config(name, CONFIG_DIR, (".py",))


def check_data(
    config: str, cfg_options: Mapping[str, Any] | None, dataloaders: Sequence[str]
) -> None:
    """Check that the folders that the datasets read from exist and hold files.

    Args:
        config: Path of the config.
        cfg_options: What ``--cfg-options`` changes in it.
        dataloaders: Keys of the dataloaders to look at.

    Raises:
        SystemExit: Names each folder that is missing or empty, what is expected there, and how to
            read from somewhere else.
    """
    from mmengine.config import Config

    cfg = Config.fromfile(config, import_custom_modules=False)
    if cfg_options:
        cfg.merge_from_dict(dict(cfg_options))
    problems, options = [], []
    for name in dataloaders:
        for key, dataset in _single_datasets(name, cfg.get(name)):
            found = list(_data_problems(dataset))
            if found:
                problems += [f"\n  {key}: {problem}" for problem in found]
                options.append(f"{key}.data_root=DIR")
    if problems:
        raise SystemExit(
            f"error: there are no data to read:{''.join(problems)}\n"
            f"Relative paths start at {os.getcwd()}. To read from elsewhere, add\n"
            f"  --cfg-options {' '.join(options)}\n"
            "Sample data in ADE20K's layout, with DIR data/sample/ADEChallengeData2016, come from\n"
            "  python tools/make_sample_data.py"
        )


def _single_datasets(key: str, dataset: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Descend through wrappers (``dataset`` and ``datasets``) to what reads from folders."""
    if not isinstance(dataset, Mapping):
        return
    if "dataset" in dataset:
        yield from _single_datasets(f"{key}.dataset", dataset["dataset"])
    elif "datasets" in dataset:
        for index, part in enumerate(dataset["datasets"]):
            yield from _single_datasets(f"{key}.datasets.{index}", part)
    else:
        yield key, dataset


def _data_problems(dataset: Mapping[str, Any]) -> Iterator[str]:
    if dataset.get("backend_args"):  # not on the local disk
        return
    prefixes = dataset.get("data_prefix") or {}
    kind = getattr(dataset.get("type"), "__name__", dataset.get("type"))
    for key, argument in (("img_path", "img_suffix"), ("seg_map_path", "seg_map_suffix")):
        if not isinstance(prefixes.get(key), str):  # no label maps in some test sets
            continue
        folder = os.path.join(dataset.get("data_root") or "", prefixes[key])
        if "://" in folder:
            continue
        suffix = _suffix(dataset, argument)
        wanted = f"{kind} expects *{suffix} there ({key})"
        if not os.path.isdir(folder):
            yield f"no folder {folder}; {wanted}"
            continue
        name = None
        for name in _files(folder):
            if name.endswith(suffix):
                break
        else:
            holds = f"only other files, such as {name}" if name else "no files"
            yield f"{holds} in the folder {folder}; {wanted}"


def _suffix(dataset: Mapping[str, Any], argument: str) -> str:
    """The suffix of a dataset's files: the config's, its class's, or "" where neither is known."""
    if isinstance(dataset.get(argument), str):
        return dataset[argument]
    from mmseg.registry import DATASETS

    kind = dataset.get("type")
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    for base in inspect.getmro(kind) if inspect.isclass(kind) else ():
        parameter = inspect.signature(base.__init__).parameters.get(argument)
        if parameter is not None and isinstance(parameter.default, str):
            return parameter.default
    return ""


def _files(folder: str) -> Iterator[str]:
    for _, _, names in os.walk(folder, followlinks=True):
        yield from (name for name in names if not name.startswith("."))
