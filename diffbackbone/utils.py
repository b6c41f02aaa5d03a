"""Shared helpers: user errors, atomic files, seeded random streams, digests and tables."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from diffbackbone.runs import write_whole as atomic_write

__all__ = [
    "MissingPackageError",
    "RandomStream",
    "UserError",
    "atomic_write",
    "changed_settings",
    "markdown_table",
    "require",
    "save_figure",
    "settings_of",
    "weights_digest",
    "write_json",
    "write_text",
]


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

    def generator(self, seed: int, *keys: int) -> np.random.Generator:
        """Return numpy's generator for ``(seed, *keys)``, each at least 0."""
        return np.random.default_rng([seed, *keys, self])


def require(what: str, modules: Iterable[str], install: str) -> None:
    """Check that modules are installed, without importing them.

    Args:
        what: Package that needs them, for the message.
        modules: Their names.
        install: How to install them.

    Raises:
        MissingPackageError: Names all that are missing.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"{what} needs {', '.join(missing)}, not installed: {install}")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically; numbers that JSON lacks (NaN, infinity) become null."""
    write_text(path, json.dumps(_finite(content), indent=indent) + "\n")


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int = 120) -> None:
    """Write a matplotlib figure as PNG atomically."""
    atomic_write(path, lambda partial: figure.savefig(partial, format="png", dpi=dpi))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def changed_settings(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Iterable[str] = ()
) -> list[str]:
    """Describe the settings in which a run differs from its continuation.

    Args:
        saved: Settings of the run, as JSON gives them back.
        current: Settings of the continuation.
        ignore: Names that may differ.

    Returns:
        One ``"name: saved value, now current value"`` for each difference.
    """
    current = json.loads(json.dumps(current))
    names = sorted((saved.keys() | current.keys()) - set(ignore))
    return [
        f"{name}: {saved.get(name)!r}, now {current.get(name)!r}"
        for name in names
        if saved.get(name) != current.get(name)
    ]


def settings_of(config: Any) -> dict[str, Any]:
    """Return a dataclass's fields as JSON gives them back: paths as text, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a Markdown table.

    Args:
        columns: Headings; one that ends in ``:`` marks a right-aligned column.
        rows: Cells; numbers and text. Line breaks and ``|`` in a cell are escaped.
    """

    def line(cells: Iterable[Any]) -> str:
        texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    heads = [column.rstrip(":") for column in columns]
    rule = "|".join("--:" if column.endswith(":") else "---" for column in columns)
    return "\n".join([line(heads), f"|{rule}|", *map(line, rows)]) + "\n"
