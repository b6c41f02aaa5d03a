"""Shared helpers: user errors, atomic files, seeded random streams, digests and tables."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class UserError(ValueError):
    """The request can't be carried out as given; commands print it without a traceback."""


class MissingPackageError(UserError, ImportError):
    """A package that the request needs is not installed."""


class RandomStream(enum.IntEnum):
    """Independent streams of random numbers drawn from one seed.

    The values are part of every seeded result: append, never renumber.
    """

    PERMUTATION = 0
    FLIPS = 1
    CROP = 2
    STEP = 3
    HOLDOUT = 4
    SUBSET = 5
    ORDER = 6
    SCENES = 7
    TIMESTEP = 8
    NOISE = 9
    SAMPLES = 10

    def generator(self, seed: int, *keys: int) -> np.random.Generator:
        """Return numpy's generator for ``(seed, *keys)``, each at least 0."""
        return np.random.default_rng([seed, *keys, self])


def require(what: str, modules: Iterable[str], install: str) -> None:
    """Raise a MissingPackageError where modules that ``what`` needs are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"{what} needs {', '.join(missing)}, not installed: {install}")


def seed_everything(*keys: int) -> None:
    """Seed Python's, numpy's and torch's generators from integer keys (at least 0)."""
    state = np.random.SeedSequence(keys).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))


_TORCH_WRITER = "PytorchStreamWriter|inline_container|iostream error"  # of torch on a full disk
_ABANDONED = 3600  # seconds since a temporary file was written to


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Write to a temporary file in the same folder, then rename it.

    A process that is killed leaves what was there, and a ``.partial-….writing``, which a later call
    removes once nobody has written to it for an hour. An error (on a full disk an OSError) also
    leaves what was there.

    Args:
        path: Where to; folders are made. A link stays, its target is written.
        write: Writes the path that it is given.
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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically; numbers that JSON lacks (NaN, infinity) become null."""
    write_text(path, json.dumps(_finite(content), indent=indent) + "\n")


def write_json_lines(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    """Write a file of JSON lines atomically; see :func:`write_json`."""
    write_text(path, "".join(json.dumps(_finite(record)) + "\n" for record in records))


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int = 120) -> None:
    """Write a matplotlib figure as PNG atomically."""
    atomic_write(path, lambda partial: figure.savefig(partial, format="png", dpi=dpi))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def weights_digest(module: nn.Module, ignore: Collection[str] = ()) -> str:
    """Return a digest of the names, shapes and values (in float32) of a module's weights.

    The values enter as sums of bits times hashed positions, computed where the weights are.
    """
    digest = hashlib.sha256()
    sums = []
    for name, value in module.state_dict().items():
        if name in ignore:
            continue
        digest.update(f"{name}{tuple(value.shape)}".encode())
        bits = (value.detach().float().reshape(-1) + 0).view(torch.int32)  # -0 counts as 0
        positions = torch.arange(1, min(len(bits), _CHUNK) + 1, device=bits.device)
        factors = hash_integers(positions)
        sums += [(part * factors[: len(part)]).sum() for part in bits.split(_CHUNK)]
    digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()


_CHUNK = 1 << 18


def hash_integers(x: torch.Tensor) -> torch.Tensor:
    """Mix 32-bit integers held in int64; no product reaches 2^63, so all devices agree."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def check_names(where: str, given: Iterable[Any], allowed: Iterable[str]) -> None:
    """Raise a ValueError that lists the allowed names where a config's key is none of them."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            raise ValueError(f"{where} has no {name!r:.200}; choose from {', '.join(allowed)}")


def changed_settings(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Iterable[str] = ()
) -> list[str]:
    """Describe the settings in which a run, read from JSON, and its continuation differ."""
    current = json.loads(json.dumps(current))
    names = sorted((saved.keys() | current.keys()) - set(ignore))
    pairs = ((name, saved.get(name), current.get(name)) for name in names)
    return [f"{name}: {old!r}, now {new!r}" for name, old, new in pairs if old != new]


def settings_of(config: Any) -> dict[str, Any]:
    """Return a dataclass's fields as JSON gives them back: paths as text, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a Markdown table; a heading that ends in ``:`` marks a right-aligned column."""

    def line(cells: Iterable[Any]) -> str:
        texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    heads = [column.rstrip(":") for column in columns]
    rule = "|".join("--:" if column.endswith(":") else "---" for column in columns)
    return "\n".join([line(heads), f"|{rule}|", *map(line, rows)]) + "\n"


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; None if none does."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def lost_loss(what: str) -> str:
    """Return the error text for, say, "the loss is nan in iteration 12"."""
    return (
        f"{what}. Nothing was written since: --resume goes on from the last checkpoint. What to "
        "try: a lower learning rate or a longer warm-up, clipping the norm of all gradients (at 1, "
        "say), bfloat16 or float32 in place of float16, and a look at that iteration's images and "
        "labels"
    )
