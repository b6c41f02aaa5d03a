"""What the Detectron2 command lines share: arguments, configs, and checks before work begins."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _common

CONFIG_DIR = _common.ROOT / "configs" / "detectron2"
COMPARISON = ("YAML configs go to tools/train_net.py", "Python configs go to "
              "tools/lazyconfig_train_net.py")  # fmt: skip


def prepare() -> None:
    """Make `diffbackbone` importable from the checkout, and check and repair the environment.

    Raises:
        SystemExit: Says what is missing.
    """
    _common.add_root()
    from diffbackbone import compat

    try:
        compat.check_detectron2_stack()
    except ImportError as error:
        raise SystemExit(f"error: {error}") from None
    import diffbackbone.detectron2  # noqa: F401


def parse_args(argv: Sequence[str] | None, suffix: str, doc: str) -> argparse.Namespace:
    """Detectron2's own arguments, with ``--config`` for ``--config-file``, and bare names.

    Args:
        argv: Arguments; None takes the command line's.
        suffix: ``".yaml"`` or ``".py"``.
        doc: The tool's docstring.

    Raises:
        SystemExit: Wrong arguments, or no such config.
    """
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser(epilog=doc)
    parser.prog = os.path.basename(sys.argv[0])
    parser.add_argument("--config", dest="config_file", metavar="FILE", help="same as above")
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error(f"--config FILE is needed; {CONFIG_DIR} holds {', '.join(configs(suffix))}")
    other = {".yaml": ".py", ".py": ".yaml"}[suffix]
    if args.config_file.endswith(other):
        parser.error(f"{args.config_file}: {' and '.join(COMPARISON)}")
    args.config_file = _common.find_config(args.config_file, CONFIG_DIR, (suffix,))
    if args.num_gpus < 1 or args.num_machines < 1:
        parser.error("--num-gpus and --num-machines must be at least 1")
    return args


def configs(suffix: str) -> list[str]:
    """Names of this checkout's configs of a kind."""
    return sorted(path.name for path in CONFIG_DIR.glob(f"*{suffix}"))


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End with a message in place of a traceback where it says what was wrong.

    Raises:
        SystemExit: In place of a ValueError, a missing file and their like.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("DIFFBACKBONE_TRACEBACK"):
            raise
        raise SystemExit(
            f"error: {error}\n(DIFFBACKBONE_TRACEBACK=1 shows where it came from)"
        ) from error


def load_yaml(config_file: str, options: Sequence[str]) -> Any:
    """A YAML config with Detectron2's defaults and ours; nothing in it runs.

    Args:
        config_file: Its path.
        options: Keys and values in turn, which win over the file's.

    Returns:
        Detectron2's ``CfgNode``, frozen.

    Raises:
        ValueError: A key doesn't exist or has a value of the wrong type.
    """
    from detectron2.config import get_cfg
    from detectron2.utils.file_io import PathManager  # noqa: F401  registers handlers

    from diffbackbone.detectron2 import add_diffusion_config

    cfg = get_cfg()
    add_diffusion_config(cfg)
    keys = list(_keys(cfg))
    options = list(options)
    if options[:1] == ["--"]:
        options = options[1:]
    if len(options) % 2:
        raise ValueError(f"options come as KEY VALUE pairs, got {' '.join(options)}")
    for key in options[::2]:
        if key not in keys and not key.startswith("MODEL.DIFFUSION.UNET_OPTIONS."):
            raise ValueError(f"there is no config key {key!r}{_similar(key, keys)}")
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except KeyError as error:
        key = str(error.args[0]).rpartition(": ")[2]
        raise ValueError(f"{config_file}: no config key {key!r}{_similar(key, keys)}") from error
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"{config_file}: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ValueError(f"{config_file} is no YAML config: {error}") from error
        raise
    for key, value in zip(options[::2], options[1::2]):
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{key} {value}: {error}") from error
    _use_device(cfg)
    cfg.freeze()
    return cfg


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if hasattr(value, "items"):
            yield from _keys(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


def _similar(key: str, keys: Sequence[str]) -> str:
    last = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, keys, 3, 0.75)
    close += [k for k in keys if k.rpartition(".")[2] == last and k not in close][:3]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    parent = key.rpartition(".")[0]
    children = [k for k in keys if k.rpartition(".")[0] == parent]
    return f"; {parent} has {', '.join(k.rpartition('.')[2] for k in children)}" if children else ""


def _use_device(cfg: Any) -> None:
    import torch

    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU here: MODEL.DEVICE cpu", file=sys.stderr)
        cfg.MODEL.DEVICE = "cpu"


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Start as many processes as were asked for, by Detectron2's launcher."""
    from detectron2.engine import launch

    return launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
