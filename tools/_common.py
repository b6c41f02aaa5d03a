"""What the command lines share: finding configs and checkpoints, with clear errors."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def add_root() -> None:
    """Make `diffbackbone` importable from the checkout."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # last: folders of the checkout must not shadow a package


def find_config(name: str, folder: Path, suffixes: Sequence[str]) -> str:
    """Find a config: a path as it is, a bare name also in this checkout.

    Args:
        name: Path of a config, or the name of one in ``folder``, with or without suffix.
        folder: Where this checkout keeps configs of the kind.
        suffixes: Suffixes of such configs.

    Returns:
        The path.

    Raises:
        SystemExit: There is no such config.
    """
    if os.path.isfile(name):
        return name
    if name and os.path.basename(name) == name:
        for suffix in ("", *suffixes):
            if (folder / f"{name}{suffix}").is_file():
                return str(folder / f"{name}{suffix}")
    paths = sorted(path for suffix in suffixes for path in folder.glob(f"*{suffix}"))
    available = "".join(f"\n  {path.name}" for path in paths)
    raise SystemExit(
        f"error: there is no config {name!r}. Give the path of a config file, or one of these "
        f"from {folder}:{available}"
    )


def check_checkpoint(checkpoint: str) -> None:
    """Check that a checkpoint is there, where it is a local file.

    Raises:
        SystemExit: There is no such file.
    """
    path = Path(checkpoint).expanduser()
    if "://" in checkpoint or path.is_file():
        return
    others = sorted(other.name for other in path.parent.glob("*.pth"))
    hint = f"{path.parent} holds {', '.join(others)}" if others else f"{path.parent} holds no *.pth"
    if not path.parent.is_dir():
        hint = f"there is no folder {path.parent} either"
    raise SystemExit(f"error: there is no checkpoint {checkpoint!r}; {hint}")


def refusal(text: str | None) -> str | None:
    """What to print in place of a traceback, None where the traceback is wanted.

    Args:
        text: What an error says, None where that says nothing of what was wrong.
    """
    if text is None or os.environ.get("DIFFBACKBONE_TRACEBACK"):
        return None
    return f"error: {text}\n(DIFFBACKBONE_TRACEBACK=1 shows where it came from)"


def own_words(error: BaseException) -> str:
    """What an error says, without the traceback that a data loader's worker wraps around it."""
    text = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process", text):
        return text
    return re.sub(r"^[\w.]+: ", "", text.strip().rpartition("\n")[2])


def lost_worker(error: BaseException) -> str | None:
    """What to say of a data loader's worker that is gone, None of any other error."""
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker"):
        return None
    return (
        f"{str(error).rstrip('. ')}. Workers are killed where memory runs out, often the shared "
        "memory (df -h /dev/shm): fewer workers need less. --resume goes on from the last "
        "checkpoint"
    )


def save_picture(picture: Any, path: str | os.PathLike[str]) -> None:
    """Write a PIL image as PNG, whole or not at all."""
    _write_whole(path, lambda partial: picture.save(partial, format="PNG"))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all."""
    _write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    add_root()
    from diffbackbone.runs import write_whole

    write_whole(path, write)
