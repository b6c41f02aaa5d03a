"""What the Detectron2 command lines share: arguments, configs, and checks before work begins."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _common

CONFIG_DIR = _common.ROOT / "configs" / "detectron2"
SUFFIXES = {".yaml": (".yaml", ".yml"), ".py": (".py",)}
"""Kinds of configs and the suffixes of each."""
TOOLS = "YAML configs go to tools/train_net.py, Python configs to tools/lazyconfig_train_net.py"


def prepare() -> None:
    """Make `diffbackbone` importable from the checkout, and check and repair the environment.

    Raises:
        SystemExit: Says what is missing.
    """
    _common.add_root()
    try:
        import diffbackbone.detectron2  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"error: {error}") from None


def parse_args(argv: Sequence[str] | None, suffix: str, doc: str) -> argparse.Namespace:
    """Detectron2's own arguments, with ``--config`` for ``--config-file``, and bare names.

    Args:
        argv: Arguments; None takes the command line's.
        suffix: ``".yaml"`` or ``".py"``.
        doc: The tool's docstring.

    Raises:
        SystemExit: Wrong arguments, or no such config.
    """
    import torch
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser(epilog=doc)
    parser.prog = os.path.basename(sys.argv[0])
    parser.add_argument("--config", dest="config_file", metavar="FILE", help="same as above")
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error(f"--config FILE is needed; {CONFIG_DIR} holds {', '.join(configs(suffix))}")
    (other,) = SUFFIXES.keys() - {suffix}
    if args.config_file.endswith(SUFFIXES[other]):
        parser.error(f"{args.config_file}: {TOOLS}")
    args.config_file = _common.find_config(args.config_file, CONFIG_DIR, SUFFIXES[suffix])
    if args.num_gpus < 1 or args.num_machines < 1:
        parser.error("--num-gpus and --num-machines must be at least 1")
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(f"--machine-rank must be from 0 to {args.num_machines - 1}, as --num-machines "
                     f"is {args.num_machines}")  # fmt: skip
    gpus = torch.cuda.device_count()
    if gpus and args.num_gpus > gpus:
        parser.error(f"--num-gpus {args.num_gpus}: this machine has {gpus}")
    return args


def configs(suffix: str) -> list[str]:
    """Names of this checkout's configs of a kind."""
    return sorted(path.name for path in CONFIG_DIR.glob(f"*{suffix}"))


def explain(error: BaseException) -> str | None:
    """What an exception says, where that says what was wrong with the input; else None.

    Detectron2 checks its input by assertions, and looks names up in registries.
    """
    from omegaconf.errors import OmegaConfBaseException

    text = _common.own_words(error)
    if isinstance(error, FloatingPointError):  # Detectron2's, of losses and of proposals
        from diffbackbone.runs import lost_loss

        return lost_loss(" ".join(text.split()).rstrip("."))
    if isinstance(error, (ValueError, OSError, FloatingPointError, OmegaConfBaseException)):
        return text
    if isinstance(error, KeyError):  # its text is quoted
        return str(error.args[0]) if "registry" in text else None
    if isinstance(error, TypeError):  # a Python config's key that its class doesn't take
        return text if "unexpected keyword argument" in text else None
    if isinstance(error, AssertionError):
        if text.startswith("No valid data found"):
            text += " No image has an annotation that is no crowd: there is nothing to learn from"
        return text or None
    return _common.lost_worker(error)


def refusal(error: BaseException) -> str | None:
    """What to print in place of a traceback, None where the traceback is wanted."""
    return _common.refusal(explain(error))


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End with a message in place of a traceback where it says what was wrong.

    Raises:
        SystemExit: In place of a ValueError, a missing file and their like.
    """
    try:
        yield
    except Exception as error:
        text = refusal(error)
        if text is None:
            raise
        raise SystemExit(text) from error


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
    pairs = _pairs(options, keys)
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except KeyError as error:
        key = str(error.args[0]).rpartition(": ")[2]
        raise ValueError(f"{config_file}: no config key {key!r}{_similar(key, keys)}") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{config_file} is no config of keys and values: {error}") from error
    except RecursionError as error:
        raise ValueError(
            f"{config_file}: _BASE_ leads back to the file itself, or values are nested too deeply"
        ) from error
    except (ValueError, AssertionError, OSError) as error:
        raise ValueError(f"{config_file}: {_short(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ValueError(f"{config_file} is no plain YAML: {error}") from error
        raise
    unet_options = cfg.MODEL.DIFFUSION.UNET_OPTIONS
    for key, value in pairs:
        if key.startswith(UNET_OPTIONS):  # yacs adds keys from files only
            unet_options[key[len(UNET_OPTIONS) :]] = type(cfg)._decode_cfg_value(value)
            continue
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{key} {value}: {_short(error)}") from error
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    return cfg


UNET_OPTIONS = "MODEL.DIFFUSION.UNET_OPTIONS."


def _pairs(options: Sequence[str], keys: Sequence[str]) -> list[tuple[str, str]]:
    options = list(options)
    if options[:1] == ["--"]:
        options = options[1:]
    for key in options[::2]:
        if key.startswith("--"):
            raise ValueError(f"flags stand before the first KEY VALUE pair: {key} came later")
    if len(options) % 2:
        raise ValueError(f"options come as KEY VALUE pairs, got {' '.join(options)}")
    for key in options[::2]:
        if key not in keys and not key.startswith(UNET_OPTIONS):
            raise ValueError(f"there is no config key {key!r}{_similar(key, keys)}")
    return list(zip(options[::2], options[1::2]))


def _short(error: Exception) -> str:
    """What yacs says, without a whole section of the config where a value was given for it."""
    section = re.search(r"CfgNode.*for config key: (\S+)$", str(error), re.DOTALL)
    if section:
        return f"{section[1]} is a section of keys, not a value"
    text = str(error)
    return text if len(text) <= 600 else f"{text[:300]} ... {text[-200:]}"


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if hasattr(value, "items"):
            yield from _keys(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


def _similar(key: str, keys: Sequence[str]) -> str:
    parent, _, last = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == parent]
    prefix = f"{parent}." if parent else ""
    close = [prefix + k for k in difflib.get_close_matches(last.upper(), siblings, 3, 0.7)]
    if not siblings:
        close = difflib.get_close_matches(key.upper(), keys, 3, 0.75)
    close += [k for k in keys if k.rpartition(".")[2] == last and k not in close][:3]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; {parent or 'the config'} has {', '.join(siblings)}" if siblings else ""


def available_device(name: str) -> str:
    """A device's name, the CPU's in place of a GPU that isn't there.

    Raises:
        ValueError: It is no name of a device.
    """
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device, such as cuda or cpu") from error
    if kind != "cuda" or torch.cuda.is_available():
        return name
    _say_once("no GPU here: the model runs on the CPU")
    return "cpu"


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def check_evaluation(names: Sequence[str]) -> None:
    """Check that there is something to evaluate on, before hours of training.

    Raises:
        ValueError: A dataset is empty or damaged.
    """
    from diffbackbone.detectron2_engine import load_dicts

    for name in names:
        load_dicts(name)


def check_weights(weights: str, folder: str, resume: bool) -> bool:
    """Check the weights that a run starts from.

    Args:
        weights: What the config names, perhaps nothing.
        folder: The run's output folder.
        resume: Whether the last checkpoint in ``folder`` goes first.

    Returns:
        Whether there are any.

    Raises:
        SystemExit: A local file is missing.
    """
    if resume and os.path.isfile(os.path.join(folder, "last_checkpoint")):
        return True
    if weights:
        path = weights.partition("?")[0]
        # Detectron2 takes ~ for a folder's name
        _common.check_checkpoint(os.path.abspath(path) if path.startswith("~") else path)
    return bool(weights)


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Start as many processes as were asked for, by Detectron2's launcher.

    Raises:
        SystemExit: One of several processes ended with a clear error.
    """
    import torch
    from detectron2.engine import launch

    several = args.num_gpus * args.num_machines > 1
    refusals = torch.multiprocessing.get_context("spawn").SimpleQueue() if several else None
    try:
        launch(
            _Process(main, refusals) if several else main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except torch.multiprocessing.ProcessExitedException:
        if refusals.empty():
            raise
        raise SystemExit(refusals.get()) from None


class _Process:
    """One of several processes, which hands its clear errors to the one that started it."""

    def __init__(self, main: Callable[[argparse.Namespace], Any], refusals: Any) -> None:
        self.main, self.refusals = main, refusals

    def __call__(self, args: argparse.Namespace) -> Any:
        end_with_parent()
        try:
            return self.main(args)
        except Exception as error:
            text = refusal(error)
            if text is None:
                raise
            self.refusals.put(text)
            raise SystemExit(1) from error


def end_with_parent() -> None:
    """Have this process end when the one that started it does, however that ends.

    Torch sends SIGINT then, which jobs in the background of a script ignore: they would train on,
    and write checkpoints beside those of the run that is resumed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
