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
    write: Callable[[Path], None],
) -> bool:
    """Write a folder and its manifest; `out` appears whole or not at all.

    Args:
        out: Folder to make; a UserError if it holds something else, which is never replaced.
        manifest: File name of the manifest.
        parameters: All that the content depends on.
        write: Fills an empty folder.

    Returns:
        False if `out` already has these parameters.
    """
    out = out.resolve()
    if (out / manifest).is_file():
        saved = json.loads((out / manifest).read_text(encoding="utf-8"))
        changes = changed_settings({name: saved.get(name) for name in parameters}, parameters)
        if not changes:
            return False
        raise UserError(
            f"{out} holds data made with other options ({'; '.join(changes)}); remove it or name "
            "another folder with --out"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists without {manifest}; name another folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        write(new)
        write_json(new / manifest, parameters, indent=1)
        new.rename(out)  # fails where another process has filled it meanwhile
    return True
