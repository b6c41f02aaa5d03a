"""What training runs of every framework share: whole files, seeded draws, lost losses."""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# torch.save's own words where the disk is full
_TORCH_WRITER = "PytorchStreamWriter|inline_container|iostream error"
_ABANDONED = 3600  # seconds since a temporary file was written to


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Write to a temporary file in the same folder, then rename it.

    A process that is killed meanwhile leaves what was there, and a ``.partial-….writing``, which a
    later call for the same folder removes once nobody has written to it for an hour.

    Args:
        path: Where to; folders are made. A link stays, its target is written.
        write: Writes the path that it is given.

    Raises:
        OSError: It could not be written, for instance on a full disk; what was there stays.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".partial-*.writing"):
        with contextlib.suppress(OSError):  # another process may have removed it
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
    # not tempfile's, which only their owner may read; several ranks may write one file
    partial = path.with_name(f".partial-{uuid.uuid4().hex}.writing")
    try:
        write(partial)
        with open(partial, "r+b") as file:  # Windows syncs no file that is open for reading
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and re.search(_TORCH_WRITER, str(error)):
            raise OSError(f"{path} could not be written; is the disk full?") from error
        raise


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
