"""A cache of a frozen backbone's taps, so that the U-Net runs over the images only once.

A cache is a folder with one array per tap, ``t150.b24.npy`` (rows, C, h, w), ``manifest.json`` (the
settings) and ``images.json`` (the listing). Row r belongs to image r modulo the number of images;
with two copies the second one is of the mirrored images. While it is written, ``done.npy`` marks
the rows that are on the disk: a writer that was killed goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from filelock import FileLock, Timeout
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.eval.data import (
    PREPROCESSING,
    ImageFolder,
    Listing,
    RowImages,
    check_images,
    image_batches,
)
from diffbackbone.models.base import DiffusionModel
from diffbackbone.utils import UserError, changed_settings, weights_digest, write_json

FORMAT = "diffbackbone features 2"
MANIFEST, IMAGES, DONE, LOCK = "manifest.json", "images.json", "done.npy", ".lock"
FLUSH_SECONDS = 10.0
"""A killed writer loses at most the work of so many seconds."""

Tap = tuple[int, int]
"""Timestep t (0-based) and block b (1-based)."""
Compute = Callable[[Sequence[Sequence[int]]], Iterable[Mapping[Tap, Tensor]]]
"""Takes batches of rows and yields the features (n, C, h, w) of each."""


@dataclass
class FeatureSpec:
    """Which features are taken of an image, and how they are rounded.

    Attributes:
        timesteps: 0-based timesteps t.
        blocks: 1-based blocks b.
        image_size: Height and width of the images.
        pool: Maps with longer sides are averaged down to it; None keeps them.
        dtype: ``"float16"`` or ``"float32"``.
        compute: Type that autocast computes in; None leaves float32.
        batch: Images that are computed together; smaller batches are filled up, so that an image
            has the same features to the bit with and without a cache.
    """

    timesteps: tuple[int, ...]
    blocks: tuple[int, ...]
    image_size: int
    pool: int | None = None
    dtype: str = "float16"
    compute: torch.dtype | None = None
    batch: int = 1

    @property
    def taps(self) -> list[Tap]:
        """All (t, b), timesteps first."""
        return [(t, b) for t in self.timesteps for b in self.blocks]

    def shapes(self, unet: DiffusionModel) -> dict[Tap, tuple[int, int, int]]:
        """Return the shape (C, h, w) of each tap."""
        shapes = {}
        for t, b in self.taps:
            side = min(math.ceil(self.image_size / unet.blocks[b].stride), self.pool or math.inf)
            shapes[t, b] = (unet.blocks[b].channels, side, side)
        return shapes

    @torch.no_grad()
    def extract(self, backbone: DiffusionBackbone, images: Tensor) -> dict[Tap, Tensor]:
        """Return the taps as a cache holds them: pooled, rounded, without gradient.

        Args:
            backbone: Frozen, without feedback.
            images: (N, 3, H, W) RGB in [-1, 1].

        Raises:
            UserError: A value does not fit into ``dtype`` or is not finite.
        """
        count = len(images)
        if count < self.batch:
            images = torch.cat([images, images[-1:].expand(self.batch - count, -1, -1, -1)])
        with autocast(images.device, self.compute):
            taps = backbone.forward_taps(images, self.timesteps, self.blocks)
        dtype = getattr(torch, self.dtype)
        features = {}
        for (t, b), x in taps.items():
            x = pool_maps(x[:count], self.pool)
            features[t, b] = x.to(dtype).contiguous()
            if not torch.isfinite(features[t, b]).all():
                raise UserError(
                    f"features of t={t}, b={b} don't fit into {self.dtype}: the largest is "
                    f"{float(x.float().abs().max()):.4g}; use float32"
                )
        return features

    def settings(
        self, backbone: DiffusionBackbone, images: ImageFolder, copies: int = 1
    ) -> dict[str, Any]:
        """Return everything that determines the features, as JSON gives it back.

        Raises:
            UserError: The backbone's features change during training or at random.
        """
        if not backbone.frozen or backbone.feedback is not None or backbone.noise == "random":
            raise UserError(
                "only features that stay the same can be cached: the U-Net must be frozen, without "
                "feedback, and the noise must follow from the seed"
            )
        settings = {
            **{f"unet.{name}": value for name, value in asdict(backbone.unet.config).items()},
            "weights_sha256": weights_digest(backbone.unet),
            "schedule": [backbone.schedule.name, backbone.schedule.num_timesteps],
            "class_label": backbone.class_label,
            "timesteps": self.timesteps,
            "blocks": self.blocks,
            "noise": backbone.noise,
            "seed": backbone.seed if backbone.noise in ("fixed", "image") else None,
            "image_size": self.image_size,
            "preprocessing": PREPROCESSING,
            "value_range": images.value_range,
            "precision": str(self.compute or torch.float32).removeprefix("torch."),
            "pool": self.pool,
            "dtype": self.dtype,
            "copies": copies,
            "images": len(images),
            "classes": images.classes,
            "images_sha256": images.listing.digest(),
        }
        return json.loads(json.dumps(settings))


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Compute in mixed precision; None leaves float32."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def pool_maps(x: Tensor, pool: int | None) -> Tensor:
    """Average maps (N, C, h, w) down to ``pool`` x ``pool`` where they are larger."""
    if pool is None:
        return x
    grid = (min(x.shape[-2], pool), min(x.shape[-1], pool))
    return F.adaptive_avg_pool2d(x.float(), grid)


def open_features(
    folder: str | os.PathLike[str],
    images: ImageFolder,
    backbone: DiffusionBackbone,
    spec: FeatureSpec,
    state: PartialState,
    *,
    copies: int = 1,
    workers: int = 0,
    overwrite: bool = False,
) -> FeatureCache:
    """Open a cache of the images' features; compute first what is missing of it.

    Args:
        folder: Where the cache is, or shall be.
        images: The images.
        backbone: Frozen, without feedback, with noise that is not random.
        spec: Which features.
        state: The processes, which share the work.
        copies: 2 adds the features of the mirrored images.
        workers: Processes that read images.
        overwrite: Replace a cache of other settings.

    Raises:
        UserError: See :func:`write_cache`.
    """

    def compute(batches: Sequence[Sequence[int]]) -> Iterator[Mapping[Tap, Tensor]]:
        backbone.to(state.device).eval()
        loaded = image_batches(RowImages(images, spec.image_size), batches, workers)
        name = f"features of {images.root.name}"
        disable = None if state.is_main_process else True
        for pixels in tqdm(loaded, name, len(batches), unit="batch", leave=False, disable=disable):
            yield spec.extract(backbone, pixels.to(state.device, non_blocking=True))

    settings = spec.settings(backbone, images, copies)
    shapes = spec.shapes(backbone.unet)
    return write_cache(
        Path(folder), settings, images.listing, shapes, compute, state, spec.batch, overwrite
    )


def open_splits(
    root: Path,
    folders: Mapping[str, ImageFolder],
    backbone: DiffusionBackbone,
    spec: FeatureSpec,
    state: PartialState,
    **options: Any,
) -> list[FeatureCache]:
    """Open a cache ``root / name`` for each folder; check all images before any is computed.

    See :func:`open_features`.
    """
    if state.is_main_process and not all(_is_whole(root / name) for name in folders):
        for folder in folders.values():
            check_images(folder)
    state.wait_for_everyone()
    return [
        open_features(root / name, folder, backbone, spec, state, **options)
        for name, folder in folders.items()
    ]


def write_cache(
    folder: Path,
    settings: Mapping[str, Any],
    listing: Listing,
    shapes: Mapping[Tap, tuple[int, int, int]],
    compute: Compute,
    state: PartialState,
    batch: int = 64,
    overwrite: bool = False,
) -> FeatureCache:
    """Write a cache, or what is missing of it, and open it.

    Args:
        folder: Where the cache is, or shall be.
        settings: From :meth:`FeatureSpec.settings`.
        listing: The images.
        shapes: From :meth:`FeatureSpec.shapes`.
        compute: Computes the features; may read ahead.
        state: The processes; each writes its own range of rows.
        batch: Rows of a batch. Batches are the same after a restart and in any number of processes.
        overwrite: Replace a cache of other settings.

    Raises:
        UserError: The folder holds something else or a cache of other settings (the message names
            those that differ), another process writes it, or the disk is too small.
    """
    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            if not _is_whole(folder) or _read_manifest(folder)["settings"] != settings:
                try:
                    stack.enter_context(FileLock(folder / LOCK, timeout=0))
                except Timeout as error:
                    raise UserError(f"another process is writing the cache {folder}") from error
                _begin(folder, settings, listing, shapes, overwrite)
        state.wait_for_everyone()
        if not _is_whole(folder):
            _write_rows(folder, shapes, compute, state, batch)
            state.wait_for_everyone()
            if state.is_main_process:
                (folder / DONE).unlink()
            state.wait_for_everyone()
    return FeatureCache(folder)


def _begin(
    folder: Path,
    settings: Mapping[str, Any],
    listing: Listing,
    shapes: Mapping[Tap, tuple[int, int, int]],
    overwrite: bool,
) -> None:
    """Check the settings of a cache that exists, or reserve the space of a new one."""
    if (folder / MANIFEST).is_file():
        changes = changed_settings(_read_manifest(folder)["settings"], settings)
        if not changes:
            return
        images = set(_read_listing(folder).rows()) ^ set(listing.rows())
        changes += [f"image {path}" for path in sorted({row[0] for row in images})[:3]]
        if not overwrite:
            raise UserError(
                f"the cache {folder} was made with other settings:\n  "
                + "\n  ".join(changes)
                + "\nTake another folder, or have it overwritten"
            )
        (folder / MANIFEST).unlink()
    foreign = [p.name for p in folder.iterdir() if not _is_ours(p)]
    if foreign:
        raise UserError(f"{folder} holds other files ({foreign[0]}, ...): take another folder")
    for path in folder.glob("*.np*"):
        path.unlink()
    rows, dtype = len(listing) * settings["copies"], np.dtype(settings["dtype"])
    needed = sum(rows * math.prod(shape) * dtype.itemsize for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the cache needs {needed / 2**30:.4g} GiB and the disk has "
            f"{free / 2**30:.4g} GiB left; take another disk, a smaller pool or fewer taps"
        )
    for tap, shape in shapes.items():
        open_memmap(_file(folder, tap), "w+", dtype, (rows, *shape)).flush()
        if hasattr(os, "posix_fallocate"):  # writing to a map fails badly on a full disk
            with open(_file(folder, tap), "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    open_memmap(folder / DONE, "w+", bool, (rows,)).flush()
    write_json(folder / IMAGES, asdict(listing), indent=None)
    taps = [{"t": t, "b": b, "shape": list(shape)} for (t, b), shape in shapes.items()]
    write_json(folder / MANIFEST, {"format": FORMAT, "settings": settings, "taps": taps})


def _write_rows(
    folder: Path,
    shapes: Mapping[Tap, tuple[int, int, int]],
    compute: Compute,
    state: PartialState,
    batch: int,
) -> None:
    """Write this process's rows that are not done."""
    done = open_memmap(folder / DONE, "r+")
    files = {tap: open_memmap(_file(folder, tap), "r+") for tap in shapes}
    rows = np.arange(len(done))
    batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    rank, world = state.process_index, state.num_processes
    mine = batches[len(batches) * rank // world : len(batches) * (rank + 1) // world]
    mine = [rows for rows in mine if not done[rows].all()]
    written: list[np.ndarray] = []
    flushed = time.monotonic()
    for rows, features in zip(mine, compute(mine), strict=True):
        for tap, file in files.items():
            file[rows[0] : rows[-1] + 1] = features[tap].cpu().numpy()
        written.append(rows)
        if rows is mine[-1] or time.monotonic() - flushed >= FLUSH_SECONDS:
            for file in files.values():
                file.flush()
            done[np.concatenate(written)] = True  # after their features
            done.flush()
            written, flushed = [], time.monotonic()


class FeatureCache:
    """A whole cache, read through memory maps: only the rows asked for are copied.

    Args:
        folder: Written by :func:`write_cache`.

    Attributes:
        settings: What determined the features.
        listing: The images.
        labels: Class index of each image (N,), int64.
        copies: 2 where rows N to 2N - 1 are the mirrored images, else 1.
        shapes: ``{(t, b): (C, h, w)}``.

    Raises:
        UserError: There is no cache, or it is partial or broken.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.settings = manifest["settings"]
        self.listing = _read_listing(self.folder)
        if not _is_whole(self.folder):
            raise UserError(f"the cache {folder} is partial: run the command that writes it again")
        self.labels = np.asarray(self.listing.labels, dtype=np.int64)
        self.copies = int(self.settings["copies"])
        self.shapes = {(tap["t"], tap["b"]): tuple(tap["shape"]) for tap in manifest["taps"]}
        self._maps: dict[Tap, np.ndarray] = {}
        for tap, shape in self.shapes.items():
            path = _file(self.folder, tap)
            try:
                self._maps[tap] = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise UserError(f"the cache {folder} is broken: {path.name}: {error}") from error
            if self._maps[tap].shape != (len(self), *shape):
                raise UserError(f"the cache {folder} is broken: {path.name} has another shape")

    def __len__(self) -> int:
        """Number of rows: images times copies."""
        return len(self.listing) * self.copies

    def read(
        self, rows: Sequence[int] | np.ndarray, taps: Iterable[Tap] | None = None
    ) -> dict[Tap, Tensor]:
        """Return the features ``{(t, b): (n, C, h, w)}`` of some rows, of some or all taps."""
        rows = np.asarray(rows, dtype=np.int64)
        return {
            tap: torch.from_numpy(self._maps[tap][rows])
            for tap in (self.shapes if taps is None else taps)
        }


def _file(folder: Path, tap: Tap) -> Path:
    return folder / f"t{tap[0]}.b{tap[1]}.npy"


def _is_whole(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and not (folder / DONE).is_file()


def _is_ours(path: Path) -> bool:
    return path.suffix == ".npy" or path.name in (IMAGES, LOCK) or path.name.startswith(".partial")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"there is no feature cache in {folder}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not of a feature cache of this version ({FORMAT})")
    return content


def _read_listing(folder: Path) -> Listing:
    content = json.loads((folder / IMAGES).read_text(encoding="utf-8"))
    return Listing(**{name: tuple(values) for name, values in content.items()})
