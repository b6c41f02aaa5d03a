"""A cache of a frozen backbone's taps, so that the network runs over the images only once.

A cache is a folder with one array per tap, ``t150.b24.npy`` (rows, C, h, w), and ``manifest.json``
(settings, paths and labels). Row r belongs to image r modulo the number of images; with two copies
the second one is of the mirrored images. While it is written, ``done.npy`` marks the rows that are
on the disk: a writer that was killed continues from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from filelock import FileLock
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.eval.data import ImageFolder, RowImages, load_batches
from diffbackbone.eval.options import check_settings
from diffbackbone.models.base import BlockInfo
from diffbackbone.utils import UserError, weights_digest, write_json

FORMAT = "diffbackbone features 3"
MANIFEST, DONE, LOCK = "manifest.json", "done.npy", ".lock"
FLUSH_SECONDS = 10.0
"""A killed writer loses at most the work of this time."""

Tap = tuple[int, int]
"""Timestep t (0-based) and block b (1-based)."""


@dataclasses.dataclass
class FeatureSpec:
    """Which features are taken of an image.

    Maps with longer sides than ``pool`` are averaged down to it and rounded to ``dtype``.
    ``compute`` is the type for autocast. Batches smaller than ``batch`` are filled up, so that an
    image has the same features to the bit with and without a cache.
    """

    timesteps: tuple[int, ...]
    blocks: tuple[int, ...]
    image_size: int
    pool: int | None = None
    dtype: str = "float16"
    compute: torch.dtype | None = None
    batch: int = 1

    @classmethod
    def of(cls, config: Any, pool: int, state: PartialState) -> FeatureSpec:
        """Return what the options of a command ask for, with maps pooled to ``pool``."""
        size, compute = config.image_size, config.compute_dtype(state.device)
        return cls(
            config.timesteps, config.blocks, size or config.network().image_size, pool,
            config.feature_dtype, compute, config.batch_size,
        )  # fmt: skip

    @property
    def taps(self) -> list[Tap]:
        """All (t, b), timesteps first."""
        return [(t, b) for t in self.timesteps for b in self.blocks]

    def shape(self, info: BlockInfo) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of a block's features."""
        side = min(math.ceil(self.image_size / info.stride), self.pool or math.inf)
        return info.channels, side, side

    @torch.no_grad()
    def extract(self, backbone: DiffusionBackbone, images: Tensor) -> dict[Tap, Tensor]:
        """Return the taps {(t, b): (N, C, h, w)} of images (N, 3, H, W), pooled and rounded."""
        count = len(images)
        if count < self.batch:
            images = torch.cat([images, images[-1:].expand(self.batch - count, -1, -1, -1)])
        with autocast(images.device, self.compute):
            taps = backbone.forward_taps(images, self.timesteps, self.blocks)
        features = {}
        for (t, b), x in taps.items():
            x = pool_maps(x[:count], self.pool)
            features[t, b] = x.to(getattr(torch, self.dtype)).contiguous()
            if not torch.isfinite(features[t, b]).all():
                raise UserError(
                    f"features of t={t}, b={b} don't fit into {self.dtype}: the largest is "
                    f"{float(x.float().abs().max()):.4g}; use float32"
                )
        return features

    def settings(self, backbone: DiffusionBackbone, images: ImageFolder) -> dict[str, Any]:
        """Return everything that determines the features, as JSON."""
        if not backbone.frozen or backbone.feedback is not None or backbone.noise == "random":
            raise UserError(
                "only constant features can be cached: the U-Net must be frozen, without feedback, "
                "and the noise must follow from the seed"
            )
        network = backbone.unet
        config = getattr(network, "config", {})
        config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
        alphas = backbone.schedule.alphas_cumprod
        settings = {
            "format": FORMAT,
            "network": type(network).__name__,
            **{f"unet.{name}": value for name, value in config.items()},
            "weights_sha256": weights_digest(network),
            "schedule": [len(alphas), *(round(a, 6) for a in alphas[::250].tolist())],
            "class_label": backbone.class_label,
            "timesteps": self.timesteps,
            "blocks": self.blocks,
            "noise": backbone.noise,
            "seed": backbone.seed if backbone.noise == "fixed" else None,
            "image_size": self.image_size,
            "preprocessing": RowImages.PREPROCESSING,
            "value_range": images.value_range,
            "precision": str(self.compute or torch.float32).removeprefix("torch."),
            "pool": self.pool,
            "dtype": self.dtype,
            "images": len(images),
            "classes": images.classes,
            "images_sha256": images.digest(),
        }
        return json.loads(json.dumps(settings, default=str))


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Compute in mixed precision; None leaves float32."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def pool_maps(x: Tensor, pool: int | None) -> Tensor:
    """Average maps (N, C, h, w) down to ``pool`` x ``pool`` where they are larger."""
    if pool is None:
        return x
    grid = (min(x.shape[-2], pool), min(x.shape[-1], pool))
    return F.adaptive_avg_pool2d(x.float(), grid)


def open_caches(
    config: Any,
    folders: Mapping[str, ImageFolder],
    backbone: DiffusionBackbone,
    spec: FeatureSpec,
    state: PartialState,
    mirrored: Collection[str] = (),
) -> list[FeatureCache]:
    """Open a cache of each folder; check the images and compute what is missing.

    The command's options say where. The processes of ``state`` share the work. ``mirrored`` names
    the folders whose mirrored images are added as a second copy.

    Raises:
        UserError: A cache has other settings; the message names those that differ.
        TimeoutError: Another process is writing a cache.
        OSError: The disk is too small.
    """
    root = config.cache or config.out / "cache"
    if state.is_main_process:
        for name, folder in folders.items():
            if not _is_whole(root / name):
                folder.check()
    state.wait_for_everyone()
    caches = []
    for name, images in folders.items():
        folder = root / name
        settings = {**spec.settings(backbone, images), "copies": 2 if name in mirrored else 1}
        with contextlib.ExitStack() as stack:
            if state.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                if not _is_whole(folder) or _read_manifest(folder)["settings"] != settings:
                    stack.enter_context(FileLock(folder / LOCK, timeout=0))
                    shapes = {(t, b): spec.shape(backbone.unet.blocks[b]) for t, b in spec.taps}
                    _begin(folder, settings, images, shapes, config.overwrite_cache)
            state.wait_for_everyone()
            if not _is_whole(folder):
                _write_rows(folder, images, backbone, spec, state, config.workers)
                state.wait_for_everyone()
                if state.is_main_process:
                    (folder / DONE).unlink()
                state.wait_for_everyone()
        caches.append(FeatureCache(folder))
    return caches


def _begin(
    folder: Path,
    settings: Mapping[str, Any],
    images: ImageFolder,
    shapes: Mapping[Tap, tuple[int, int, int]],
    overwrite: bool,
) -> None:
    """Check the settings of a cache that exists, or reserve the space of a new one."""
    if (folder / MANIFEST).is_file():
        saved = _read_manifest(folder)["settings"]
        if saved == settings:
            return
        if not overwrite:
            check_settings(folder, saved, settings)
        (folder / MANIFEST).unlink()
    for path in (folder / DONE, *folder.glob("t*.b*.npy")):
        path.unlink(missing_ok=True)
    rows = len(images) * settings["copies"]
    for tap, shape in shapes.items():
        open_memmap(_file(folder, tap), "w+", settings["dtype"], (rows, *shape)).flush()
        if hasattr(os, "posix_fallocate"):  # writing to a map crashes on a full disk
            with open(_file(folder, tap), "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    open_memmap(folder / DONE, "w+", bool, (rows,)).flush()
    content = {"settings": settings, "paths": images.paths, "labels": images.labels.tolist()}
    write_json(folder / MANIFEST, content, indent=None)


def _write_rows(
    folder: Path,
    images: ImageFolder,
    backbone: DiffusionBackbone,
    spec: FeatureSpec,
    state: PartialState,
    workers: int,
) -> None:
    """Write this process's missing rows; batches don't depend on restarts or processes."""
    done = open_memmap(folder / DONE, "r+")
    files = {tap: open_memmap(_file(folder, tap), "r+") for tap in spec.taps}
    rows = np.arange(len(done))
    batches = [rows[i : i + spec.batch] for i in range(0, len(rows), spec.batch)]
    rank, world = state.process_index, state.num_processes
    mine = batches[len(batches) * rank // world : len(batches) * (rank + 1) // world]
    mine = [rows for rows in mine if not done[rows].all()]
    backbone.to(state.device).eval()
    loaded = load_batches(RowImages(images, spec.image_size), mine, workers)
    disable = None if state.is_main_process else True
    bar = tqdm(mine, f"features of {images.root.name}", unit="batch", leave=False, disable=disable)
    written: list[np.ndarray] = []
    flushed = time.monotonic()
    for rows, pixels in zip(bar, loaded):
        features = spec.extract(backbone, pixels.to(state.device, non_blocking=True))
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

    It has the ``settings`` that determined the features, and of the images the ``paths`` relative
    to their folder and the ``labels`` (N,).
    """

    def __init__(self, folder: Path) -> None:
        manifest = _read_manifest(folder)
        if not _is_whole(folder):
            raise UserError(f"the cache {folder} is partial: run the command that writes it again")
        self.folder = folder
        self.settings = manifest["settings"]
        self.paths = tuple(manifest["paths"])
        self.labels = np.array(manifest["labels"], dtype=np.int64)
        self.taps = [(t, b) for t in self.settings["timesteps"] for b in self.settings["blocks"]]
        self._maps = {tap: np.load(_file(folder, tap), mmap_mode="r") for tap in self.taps}

    def __len__(self) -> int:
        """Number of images, without mirrored copies."""
        return len(self.paths)

    def read(self, rows: int | Sequence[int] | np.ndarray | slice, tap: Tap) -> Tensor:
        """Return the features (n, C, h, w) of some rows at one tap, (C, h, w) of one row."""
        return torch.from_numpy(np.array(self._maps[tap][rows]))

    def images(self, tap: Tap) -> Tensor:
        """Return the features (N, C, h, w) of all images at one tap."""
        return self.read(slice(len(self)), tap)


class CachedRows(Dataset):
    """Cached features by row, as RowImages has images; the cache may hold other images too."""

    def __init__(self, folder: ImageFolder, cache: FeatureCache) -> None:
        rows = {path: row for row, path in enumerate(cache.paths)}
        self.rows = [rows[path] for path in folder.paths]
        self.cache = cache

    def __getitem__(self, key: tuple[int, int]) -> dict[Tap, Tensor]:
        """Return the features {(t, b): (C, h, w)} of (epoch, row)."""
        copy, image = divmod(key[1], len(self.rows))
        row = self.rows[image] + copy * len(self.cache)
        return {tap: self.cache.read(row, tap) for tap in self.cache.taps}


def _file(folder: Path, tap: Tap) -> Path:
    return folder / f"t{tap[0]}.b{tap[1]}.npy"


def _is_whole(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and not (folder / DONE).is_file()


def _read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
