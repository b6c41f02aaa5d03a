"""Where weights come from: local files, files of this package, and downloads."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import stat
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from diffbackbone.models.gd_config import PRESETS, UNetConfig
from diffbackbone.utils import UserError, atomic_write

logger = logging.getLogger(__name__)

RELEASED_CHECKPOINTS: dict[str, str] = {
    preset: f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/{name}.pt"
    for preset, name in {
        "gd64": "64x64_diffusion",
        "gd128": "128x128_diffusion",
        "gd256": "256x256_diffusion",
        "gd256_uncond": "256x256_diffusion_uncond",
        "gd512": "512x512_diffusion",
        **{name: name for name in ("lsun_bedroom", "lsun_cat", "lsun_horse")},
    }.items()
}
"""Where OpenAI serves the weights of each preset."""

PACKAGED = "diffbackbone://"  # weights that ship with this package


class CheckpointError(UserError):
    """A checkpoint can't be used; the message says why and what would fit."""


def find_file(source: str | os.PathLike[str], config: UNetConfig | None = None) -> Path:
    """Return the local file of a path, URL or ``diffbackbone://<file of this package>``.

    ``config`` is the architecture wanted, to name OpenAI's address if the file is absent.
    """
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        return _download(name)
    if name.startswith(PACKAGED):
        path = Path(__file__).parent / "weights" / os.path.basename(name)
    else:
        path = Path(os.path.expanduser(name))
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        urls = [
            url
            for preset, url in RELEASED_CHECKPOINTS.items()
            if config in (PRESETS[preset], PRESETS[preset].replace(num_classes=None))
        ]
        text = ", ".join(urls or RELEASED_CHECKPOINTS.values())
        raise FileNotFoundError(
            f"checkpoint {name} does not exist; OpenAI's files: {text}"
        ) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"checkpoint {name} is a folder, pipe or device, expected a file")
    return path


def _cache_path(url: str) -> Path:
    """Return the path of a URL in torch.hub's cache; distinct URLs never share one."""
    name = Path(url.split("?")[0]).name
    if url not in RELEASED_CHECKPOINTS.values():  # which may be there already
        suffix = Path(name).suffix[:20]
        digest = hashlib.sha256(url.encode()).hexdigest()
        name = f"{name.removesuffix(suffix)[:100]}.{digest[:16]}{suffix}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _download(url: str) -> Path:
    """Fetch a file into torch.hub's cache; one process downloads, others of the machine wait."""
    from filelock import FileLock

    path = _cache_path(url)
    if path.is_file():  # also in a cache that is read-only
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):  # ends with the process that holds it
            if not path.is_file():
                logger.info("downloading %s to %s", url, path)
                atomic_write(path, lambda partial: _fetch(url, partial))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"{url} could not be downloaded ({first_line(error)}); fetch it by other means and "
            "give the local path"
        ) from error
    return path


def _fetch(url: str, path: Path) -> None:
    """Download a file, and check its length and the checksum in its name if it has one."""
    digest, received = hashlib.sha256(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "diffbackbone"})
    with urllib.request.urlopen(request, timeout=60) as response, open(path, "wb") as file:
        length = response.headers["Content-Length"]
        size = None if length is None else int(length)
        with torch.hub.tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if size is not None and received != size:
        raise OSError(f"the connection ended after {received} of {size} bytes")
    # torch.hub's and MMEngine's convention; digits alone are rather a date
    expected = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.", Path(url.split("?")[0]).name)
    if expected and not digest.hexdigest().startswith(expected[1]):
        raise ValueError(f"its SHA-256 is {digest.hexdigest()}, its name says {expected[1]}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:297]}..."


def some_keys(keys: Iterable[Any], count: int = 4) -> str:
    """Join the first few keys for a message, long ones shortened."""
    names = [key if isinstance(key, str) else repr(key) for _, key in zip(range(count), keys)]
    return ", ".join(name if len(name) <= 80 else f"{name[:77]}..." for name in names)
