"""Folders that appear whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffbackbone.utils import UserError, changed_settings, write_json


def write_folder(
    out: Path,
    manifest: str,
    parameters: Mapping[str, Any],
    write: Callable[[Path], Mapping[str, Any]],
    force: bool = False,
) -> bool:
    """Write a folder and its manifest; `out` appears whole or not at all.

    Args:
        out: Folder to make.
        manifest: File name of the manifest.
        parameters: All that the content depends on, and the name of the "tool".
        write: Fills an empty folder and returns further entries of the manifest.
        force: Replace a folder that the same tool made with other parameters.

    Returns:
        False if `out` already has these parameters.

    Raises:
        UserError: `out` holds something else.
    """
    if not _may_write(out, manifest, parameters, force):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        write_json(new / manifest, {**parameters, **write(new)}, indent=1)
        _may_write(out, manifest, parameters, force)  # another process may have written meanwhile
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
    return True


def _may_write(out: Path, manifest: str, parameters: Mapping[str, Any], force: bool) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    try:
        saved = json.loads((out / manifest).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        saved = None
    if not isinstance(saved, dict) or saved.get("tool") != parameters["tool"]:
        raise UserError(f"{out} was not made by {parameters['tool']}, so it is never replaced")
    changes = changed_settings({name: saved.get(name) for name in parameters}, parameters)
    if changes and not force:
        raise UserError(
            f"{out} holds data made with other options ({'; '.join(changes)}); "
            "replace it with --force or name another folder with --out"
        )
    return force or bool(changes)
