"""What training runs of every framework share: whole files, seeded draws, lost losses."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# torch.save's own words where the disk is full
_TORCH_WRITER = "PytorchStreamWriter|inline_container|iostream error"


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, and move it there when it is on the disk.

    A process that is killed meanwhile leaves what was there, and ``.NAME.HOST.PID.writing``, which
    the next one to write the same file removes.

    Args:
        path: Where to; folders are made.
        write: Writes the path that it is given.

    Raises:
        OSError: It could not be written, for instance on a full disk; what was there stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    here = f".{path.name}.{platform.node()}."
    for left in path.parent.glob(f"{glob.escape(here)}*.writing"):
        if not _runs(left.name[len(here) : -len(".writing")]):
            left.unlink(missing_ok=True)  # of a killed process: room for this file
    partial = path.with_name(f"{here}{os.getpid()}.writing")  # several ranks may write one file
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and re.search(_TORCH_WRITER, str(error)):
            raise OSError(f"{path} could not be written; is the disk full?") from error
        raise


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):  # another user's, or no process's file
        return True
    return True


def seed_everything(*keys: int) -> None:
    """Seed python's, numpy's and torch's generators by a mixture of the keys (from 0)."""
    state = np.random.SeedSequence(keys).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first floating-point tensor that holds NaN or infinity, if any does."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def lost_loss(what: str) -> str:
    """What to say of a run whose numbers are none any more, and what to try.

    Args:
        what: What was seen, and when.
    """
    return (
        f"{what}. Nothing was written since: --resume goes on from the last checkpoint. What to "
        "try: a lower learning rate or a longer warm-up, clipping the norm of all gradients (at 1, "
        "say), bfloat16 or float32 in place of float16, and a look at that iteration's images and "
        "labels"
    )
