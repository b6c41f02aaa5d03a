"""A cache of the taps of a frozen backbone, so that probes and kNN pay for the U-Net once.

A U-Net that is neither trained nor fed back to gives the same taps in every epoch. They are
computed once, pooled (:func:`extract_features`), rounded to half precision and written
(:func:`write_cache`); training then reads them through memory maps (:class:`FeatureCache`).

A cache is a folder::

    manifest.json             what made it; written last, so that a folder with it is whole
    samples.json              path, label, size and time of change of each image
    shard-00000.t150.b24.npy  (rows, C, h, w) of one tap; rows follow the order of the images
    partial.json, shard-00000.json   while it is being written; gone afterwards

Every file is written under another name and renamed when it is on the disk. A writer that was
killed leaves whole shards, from which the next one goes on. Row r belongs to image r modulo the
number of images: with two copies, the second one holds the mirrored images.

This module needs torch and numpy, and no framework.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.utils import atomic_write as write_whole
from diffbackbone.utils import weights_digest

try:
    import fcntl
except ImportError:  # not on Windows; two writers then have to be kept apart by hand
    fcntl = None  # type: ignore[assignment]

FORMAT = "diffbackbone features"
VERSION = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}
SHARD_BYTES = 512 * 2**20
"""Largest file of one tap and shard, unless a single row is larger."""
MANIFEST, PARTIAL, SAMPLES, LOCK = "manifest.json", "partial.json", "samples.json", ".lock"
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_OPEN_MAPS = 64

Tap = tuple[int, int]
"""Timestep t (0-based) and block b (1-based)."""


class CacheError(ValueError):
    """A cache is absent, partial, broken, of other settings, or cannot be written."""


@dataclass(frozen=True)
class Listing:
    """The images that features belong to, in order.

    Attributes:
        paths: Path of each image, relative to the data folder, with ``/``.
        labels: Class index of each image.
        sizes: Bytes of each file.
        mtimes: Time of the last change of each file, in nanoseconds.
        classes: Names of the classes.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    sizes: tuple[int, ...]
    mtimes: tuple[int, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.paths), len(self.labels), len(self.sizes), len(self.mtimes)}
        if len(lengths) != 1:
            raise ValueError(f"a listing needs as many labels, sizes and times as paths: {lengths}")

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Iterable[int]) -> Listing:
        """The listing of some of the images, in the order given."""
        indices = [int(i) for i in indices]
        return Listing(
            *(
                tuple(values[i] for i in indices)
                for values in (self.paths, self.labels, self.sizes, self.mtimes)
            ),
            self.classes,
        )

    def summary(self) -> dict[str, Any]:
        """What goes into the settings: count, classes, and a digest of everything else."""
        digest = hashlib.sha256()
        for row in zip(self.paths, self.labels, self.sizes, self.mtimes):
            digest.update(json.dumps(row).encode())
        return {
            "images": len(self),
            "classes": list(self.classes),
            "sha256": digest.hexdigest(),
        }


# ---------------------------------------------------------------------------------------- features


def extract_features(
    backbone: DiffusionBackbone,
    images: Tensor,
    timesteps: Sequence[int],
    blocks: Sequence[int],
    pool: int | None = None,
    dtype: torch.dtype = torch.float16,
) -> dict[Tap, Tensor]:
    """Taps as a cache holds them: pooled, rounded, without gradient.

    Training without a cache goes through here too, so that it sees the same numbers, rounded in the
    same way. (The U-Net's float32 arithmetic may differ in its last place between batches of
    different sizes; an image's features are the same to the bit only in batches of one size.)

    Args:
        backbone: Frozen, without feedback, and with noise that is not random.
        images: (N, 3, H, W) RGB in [-1, 1].
        timesteps: 0-based timesteps t.
        blocks: 1-based blocks b.
        pool: Sides of a map that are longer than this are averaged down to it; None keeps them.
        dtype: float16 or float32.

    Returns:
        ``{(t, b): (N, C_b, h, w)}`` of type ``dtype``.

    Raises:
        CacheError: A value does not fit into ``dtype``, or is not finite.
        ValueError: See :meth:`DiffusionBackbone.forward_taps`.
    """
    with torch.no_grad():
        taps = backbone.forward_taps(images, timesteps, blocks)
        features = {}
        for tap, x in taps.items():
            if pool is not None:
                grid = (min(x.shape[-2], pool), min(x.shape[-1], pool))
                x = F.adaptive_avg_pool2d(x.float(), grid)
            features[tap] = x.to(dtype).contiguous()
            if not bool(torch.isfinite(features[tap]).all()):
                largest = float(x.float().abs().max())
                raise CacheError(
                    f"features of t={tap[0]}, b={tap[1]} don't fit into {_name(dtype)}: the "
                    f"largest is {largest:.4g}; use float32"
                )
    return features


def tap_shapes(
    config: UNetConfig,
    timesteps: Sequence[int],
    blocks: Sequence[int],
    image_size: int,
    pool: int | None = None,
) -> dict[Tap, tuple[int, int, int]]:
    """Shape (C, h, w) of each tap of a square image, as :func:`extract_features` returns it.

    Args:
        config: Architecture.
        timesteps: 0-based timesteps t.
        blocks: 1-based blocks b.
        image_size: Height and width of the images.
        pool: See :func:`extract_features`.

    Raises:
        ValueError: A block is out of range.
    """
    shapes = {}
    for t in timesteps:
        for b in config.blocks.check(blocks):
            side = math.ceil(image_size / config.blocks[b].stride)
            side = side if pool is None else min(side, pool)
            shapes[t, b] = (config.blocks[b].channels, side, side)
    return shapes


def feature_settings(
    backbone: DiffusionBackbone,
    timesteps: Sequence[int],
    blocks: Sequence[int],
    listing: Listing,
    *,
    image_size: int,
    pool: int | None = None,
    dtype: str = "float16",
    copies: int = 1,
    preprocessing: str = "",
    precision: str = "float32",
) -> dict[str, Any]:
    """Everything that determines the content of a cache.

    Args:
        backbone: Frozen, without feedback, and with noise that is not random.
        timesteps: 0-based timesteps t.
        blocks: 1-based blocks b.
        listing: The images.
        image_size: Height and width of the images after preprocessing.
        pool: See :func:`extract_features`.
        dtype: One of :data:`DTYPES`.
        copies: 1, or 2 where mirrored images follow.
        preprocessing: How a file becomes an image, in words.
        precision: What the U-Net computes in.

    Returns:
        Plain values, as JSON gives them back.

    Raises:
        CacheError: This backbone's features change from epoch to epoch.
        ValueError: A timestep or block is out of range, or there is no such type.
    """
    if not backbone.frozen or backbone.feedback is not None:
        what = "trained feedback" if backbone.feedback is not None else "a U-Net that is trained"
        raise CacheError(f"features of {what} change with every step and can't be cached")
    if backbone.noise == "random":
        raise CacheError("features of random noise can't be cached; take noise 'fixed' or 'none'")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config = backbone.unet.config
    settings = {
        "unet": asdict(config),
        "weights_sha256": weights_digest(backbone.unet),
        "schedule": [backbone.schedule.name, backbone.schedule.num_timesteps],
        "class_label": backbone.class_label,
        "timesteps": [backbone.schedule.check_timestep(t) for t in timesteps],
        "blocks": list(config.blocks.check(blocks)),
        "noise": backbone.noise,
        "seed": backbone.seed if backbone.noise == "fixed" else None,
        "image_size": image_size,
        "preprocessing": preprocessing,
        "precision": precision,
        "pool": pool,
        "dtype": dtype,
        "copies": copies,
        "data": listing.summary(),
    }
    return json.loads(json.dumps(settings))


# ----------------------------------------------------------------------------------------- writing


def write_cache(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    listing: Listing,
    shapes: Mapping[Tap, tuple[int, int, int]],
    compute: Callable[[list[list[int]]], Iterable[Mapping[Tap, Tensor]]],
    *,
    batch_size: int = 64,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> FeatureCache:
    """Write a cache, or what is missing of it, and open it.

    A whole cache of the same settings is opened as it is; a partial one is completed. Shards are
    divided among the processes.

    Args:
        folder: Where the cache is, or shall be.
        settings: From :func:`feature_settings`.
        listing: The images.
        shapes: From :func:`tap_shapes`.
        compute: Takes batches of rows and gives the features of each, in that order: ``{(t, b):
            (n, C, h, w)}``. It may read ahead.
        batch_size: Rows of a batch. Batches never cross shards, so they are the same ones after
            a restart and with any number of processes.
        shard_bytes: Upper bound of a file, unless one row is larger.
        overwrite: Replace a cache of other settings.
        rank: Number of this process.
        world_size: Number of processes that write together.
        barrier: Waits for all of them.

    Returns:
        The whole cache.

    Raises:
        CacheError: The folder holds a cache of other settings (the message names those that
            differ) or something else, the disk is full, or ``compute`` gave something else.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        if rank == 0:
            _prepare(folder, settings, overwrite)
            if not (folder / MANIFEST).is_file():
                stack.enter_context(_lock(folder))
                if not (folder / MANIFEST).is_file():
                    _begin(folder, settings, listing, shapes, shard_bytes)
        barrier()
        if not (folder / MANIFEST).is_file():
            plan = _Plan.read(folder / PARTIAL)
            _write_shards(folder, plan, compute, batch_size, rank, world_size)
            barrier()
            if rank == 0:
                _finish(folder, plan)
        barrier()
    return FeatureCache(folder, settings, listing)


@dataclass(frozen=True)
class _Plan:
    """How rows are laid out in files."""

    settings: dict[str, Any]
    rows: int
    rows_per_shard: int
    shapes: dict[Tap, tuple[int, ...]]
    dtype: np.dtype

    @property
    def num_shards(self) -> int:
        return math.ceil(self.rows / self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def files(self, shard: int) -> dict[Tap, str]:
        return {(t, b): f"shard-{shard:05d}.t{t}.b{b}.npy" for t, b in self.shapes}

    def header(self, shard: int, tap: Tap) -> dict[str, Any]:
        return {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (len(self.rows_of(shard)), *self.shapes[tap]),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "rows": self.rows,
            "rows_per_shard": self.rows_per_shard,
            "taps": [{"t": t, "b": b, "shape": list(s)} for (t, b), s in self.shapes.items()],
            "dtype": self.dtype.name,
        }

    @classmethod
    def read(cls, path: Path) -> _Plan:
        content = _read_json(path)
        if content.get("format") != FORMAT:
            raise CacheError(f"{path} does not belong to a feature cache")
        if content.get("version") != VERSION:
            raise CacheError(
                f"{path.parent} is a feature cache of version {content.get('version')}, this is "
                f"version {VERSION}: make it anew"
            )
        try:
            return cls(
                content["settings"],
                content["rows"],
                content["rows_per_shard"],
                {(tap["t"], tap["b"]): tuple(tap["shape"]) for tap in content["taps"]},
                np.dtype(content["dtype"]).newbyteorder("<"),
            )
        except (KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged ({error}): make the cache anew") from error


def _prepare(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Make the folder; refuse one that holds something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"cannot make the folder {folder} for a cache: {error}") from error
    ours = [name for name in (MANIFEST, PARTIAL) if (folder / name).is_file()]
    if not ours:
        strange = [p.name for p in folder.iterdir() if not _is_ours(p.name)]
        if strange:
            raise CacheError(f"{folder} holds other files ({strange[0]}, ...): take another folder")
    elif overwrite and _read_json(folder / ours[0]).get("settings") != dict(settings):
        with _lock(folder):
            _clear(folder)


def _begin(
    folder: Path,
    settings: Mapping[str, Any],
    listing: Listing,
    shapes: Mapping[Tap, tuple[int, int, int]],
    shard_bytes: int,
) -> None:
    """Write down what shall be made, unless that was done before; check the room on the disk."""
    for leftover in folder.glob(".*.writing*"):  # of a writer that was killed; we hold the lock
        leftover.unlink(missing_ok=True)
    dtype = np.dtype(settings["dtype"]).newbyteorder("<")
    row_bytes = {tap: math.prod(shape) * dtype.itemsize for tap, shape in shapes.items()}
    if not (folder / PARTIAL).is_file():
        rows = len(listing) * settings["copies"]
        per_shard = max(1, min(rows, int(shard_bytes) // max(row_bytes.values())))
        plan = _Plan(dict(settings), rows, per_shard, dict(shapes), dtype)
        _write_json(folder / SAMPLES, asdict(listing))
        _write_json(folder / PARTIAL, plan.to_json())
    plan = _Plan.read(folder / PARTIAL)
    _check_settings(plan.settings, settings, folder, listing)
    left = sum(len(plan.rows_of(s)) for s in range(plan.num_shards) if not _is_done(folder, s))
    needed, free = left * sum(row_bytes.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"{folder}: the cache needs {_size(needed)} and the disk has {_size(free)} left; take "
            "another disk, a smaller pool or fewer taps"
        )


def _write_shards(
    folder: Path,
    plan: _Plan,
    compute: Callable[[list[list[int]]], Iterable[Mapping[Tap, Tensor]]],
    batch_size: int,
    rank: int,
    world_size: int,
) -> None:
    """Write this process's shards that are not there yet."""
    shards = [s for s in range(rank, plan.num_shards, world_size) if not _is_done(folder, s)]
    batches = {
        s: [
            list(plan.rows_of(s)[i : i + batch_size])
            for i in range(0, len(plan.rows_of(s)), batch_size)
        ]
        for s in shards
    }
    features = iter(compute([batch for s in shards for batch in batches[s]]))
    for shard in shards:
        try:
            _write_shard(folder, plan, shard, batches[shard], features)
        except OSError as error:
            if error.errno in _FULL:
                raise CacheError(
                    f"{folder}: the disk is full ({error.strerror}). Whole shards are kept, and "
                    "the same command goes on from them when there is room"
                ) from error
            raise CacheError(f"{folder}: cannot write shard {shard}: {error}") from error


def _write_shard(
    folder: Path,
    plan: _Plan,
    shard: int,
    batches: Sequence[Sequence[int]],
    features: Iterator[Mapping[Tap, Tensor]],
) -> None:
    names = plan.files(shard)
    partial = {tap: folder / f".{name}.writing" for tap, name in names.items()}
    files: dict[Tap, BinaryIO] = {}
    try:
        for tap, path in partial.items():
            files[tap] = open(path, "wb")  # noqa: SIM115
            np.lib.format.write_array_header_1_0(files[tap], plan.header(shard, tap))
        for rows in batches:
            found = next(features, None)
            if found is None or set(found) != set(plan.shapes):
                raise CacheError(f"features of {sorted(plan.shapes)} expected for {len(rows)} rows")
            for tap, x in found.items():
                array = x.detach().cpu().numpy()
                if array.shape != (len(rows), *plan.shapes[tap]) or array.dtype != plan.dtype:
                    raise CacheError(
                        f"features of t={tap[0]}, b={tap[1]}: {array.dtype.name} {array.shape}, "
                        f"expected {plan.dtype.name} {(len(rows), *plan.shapes[tap])}"
                    )
                files[tap].write(np.ascontiguousarray(array, plan.dtype).data)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        sizes = {names[tap]: path.stat().st_size for tap, path in partial.items()}
        for tap, path in partial.items():
            os.replace(path, folder / names[tap])
        _write_json(folder / f"shard-{shard:05d}.json", sizes)
    except BaseException:
        for file in files.values():
            with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
                file.close()
        for path in partial.values():
            path.unlink(missing_ok=True)
        raise


def _is_done(folder: Path, shard: int) -> bool:
    """Whether a shard is whole: its note is written after its files."""
    try:
        sizes = json.loads((folder / f"shard-{shard:05d}.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _finish(folder: Path, plan: _Plan) -> None:
    missing = [s for s in range(plan.num_shards) if not _is_done(folder, s)]
    if missing:
        raise CacheError(f"{folder}: shards {missing} are missing; run the same command again")
    files: dict[str, int] = {}
    for shard in range(plan.num_shards):
        files.update(_read_json(folder / f"shard-{shard:05d}.json"))
    _write_json(folder / MANIFEST, {**plan.to_json(), "files": files})
    (folder / PARTIAL).unlink()
    for shard in range(plan.num_shards):
        (folder / f"shard-{shard:05d}.json").unlink()


def _is_ours(name: str) -> bool:
    return (
        name in (MANIFEST, PARTIAL, SAMPLES, LOCK)
        or name.startswith("shard-")
        or name.endswith(".writing")
    )


def _clear(folder: Path) -> None:
    """Remove a cache, its manifest first: what is left of it is never taken for a whole one."""
    for name in (MANIFEST, PARTIAL):
        (folder / name).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if _is_ours(path.name) and path.name != LOCK:
            path.unlink()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep a second writer out; the lock goes with its process, however that ends."""
    with open(folder / LOCK, "wb") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CacheError(f"another process is writing the cache {folder}") from error
            except OSError:  # a file system without locks
                pass
        yield


# ----------------------------------------------------------------------------------------- reading


class FeatureCache:
    """A whole cache, read through memory maps.

    No more than the rows asked for is copied, and only a few files are mapped at a time.

    Args:
        folder: Written by :func:`write_cache`.
        settings: What the cache must have been made with; None takes any.
        listing: The images that it should hold, to name those that changed.

    Attributes:
        settings: What made it.
        listing: Its images.
        labels: Class index of each image (N,), int64.
        paths: Relative path of each image.
        copies: 1, or 2 where rows N to 2N - 1 hold the mirrored images.
        shapes: ``{(t, b): (C, h, w)}``.

    Raises:
        CacheError: There is none, it is partial, broken or of other settings.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any] | None = None,
        listing: Listing | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            if (self.folder / PARTIAL).is_file():
                raise CacheError(
                    f"{folder} is a partial cache, its writer was stopped: write_cache completes it"
                )
            raise CacheError(f"there is no feature cache in {folder}")
        self._plan = _Plan.read(self.folder / MANIFEST)
        self.settings = self._plan.settings
        if settings is not None:
            _check_settings(self.settings, settings, self.folder, listing)
        for name, size in _read_json(self.folder / MANIFEST)["files"].items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "missing" if found is None else f"{found} bytes long, not {size}"
                raise CacheError(f"the cache {folder} is broken: {name} is {state}; make it anew")
        self.listing = _read_listing(self.folder)
        self.labels = np.asarray(self.listing.labels, dtype=np.int64)
        self.paths = self.listing.paths
        self.copies = int(self.settings["copies"])
        self.shapes = dict(self._plan.shapes)
        if len(self.listing) * self.copies != self._plan.rows:
            raise CacheError(f"the cache {folder} is broken: {SAMPLES} belongs to another one")
        self._maps: OrderedDict[tuple[int, Tap], np.memmap] = OrderedDict()

    def __len__(self) -> int:
        """Number of rows: images times copies."""
        return self._plan.rows

    def read(
        self, rows: Sequence[int] | np.ndarray, taps: Iterable[Tap] | None = None
    ) -> dict[Tap, Tensor]:
        """Features of some rows.

        Args:
            rows: Numbers from 0 to ``len(cache) - 1``, in any order.
            taps: Those wanted; None for all.

        Returns:
            ``{(t, b): (n, C, h, w)}`` of the cache's type, copies that may be changed.

        Raises:
            IndexError: A row is out of range.
            KeyError: There is no such tap.
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}, got {rows.min()}..{rows.max()}")
        shards = rows // self._plan.rows_per_shard
        features = {}
        for tap in self.shapes if taps is None else taps:
            if tap not in self.shapes:
                raise KeyError(f"the cache has {sorted(self.shapes)}, not (t, b) = {tap}")
            out = np.empty((len(rows), *self.shapes[tap]), self._plan.dtype)
            for shard in np.unique(shards):
                chosen = shards == shard
                within = rows[chosen] - shard * self._plan.rows_per_shard
                out[chosen] = self._map(int(shard), tap)[within]
            features[tap] = torch.from_numpy(out.astype(out.dtype.newbyteorder("="), copy=False))
        return features

    def _map(self, shard: int, tap: Tap) -> np.memmap:
        key = (shard, tap)
        if key not in self._maps:
            path = self.folder / self._plan.files(shard)[tap]
            try:
                array = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise CacheError(
                    f"the cache {self.folder} is broken: {path.name}: {error}"
                ) from error
            shape = self._plan.header(shard, tap)["shape"]
            if array.shape != shape or array.dtype != self._plan.dtype:
                raise CacheError(
                    f"the cache {self.folder} is broken: {path.name} holds {array.dtype.name} "
                    f"{array.shape}, not {self._plan.dtype.name} {shape}"
                )
            self._maps[key] = array
            if len(self._maps) > _OPEN_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]


def setting_differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The settings that differ, one line each: ``name: that of the cache, that wanted``."""
    before, after = _flat(made), _flat(wanted)
    return [
        f"{name}: the cache has {before.get(name, 'none')!r}, wanted is {after.get(name, 'none')!r}"
        for name in {**before, **after}
        if before.get(name, "none") != after.get(name, "none")
    ]


def _check_settings(
    made: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path, listing: Listing | None
) -> None:
    differences = setting_differences(made, wanted)
    if not differences:
        return
    if listing is not None:
        differences += _listing_differences(_read_listing(folder), listing)
    raise CacheError(
        f"the cache {folder} was made with other settings:\n  "
        + "\n  ".join(differences)
        + "\nTake another folder, or have it overwritten"
    )


def _listing_differences(made: Listing, wanted: Listing, limit: int = 3) -> list[str]:
    """The first images that came, went or changed."""
    before = dict(zip(made.paths, zip(made.labels, made.sizes, made.mtimes)))
    after = dict(zip(wanted.paths, zip(wanted.labels, wanted.sizes, wanted.mtimes)))
    lines = [f"image {p}: is gone" for p in before if p not in after]
    lines += [f"image {p}: is new" for p in after if p not in before]
    lines += [f"image {p}: has changed" for p in after if p in before and after[p] != before[p]]
    more = [f"... and {len(lines) - limit} more images"] if len(lines) > limit else []
    return lines[:limit] + more


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _read_listing(folder: Path) -> Listing:
    content = _read_json(folder / SAMPLES)
    try:
        return Listing(**{name: tuple(values) for name, values in content.items()})
    except (TypeError, ValueError) as error:
        raise CacheError(f"{folder / SAMPLES} is damaged ({error}): make the cache anew") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CacheError(f"{path} does not belong to a feature cache")
    return content


def _write_json(path: Path, content: Any) -> None:
    """Write a file whole: beside its place, and moved there when it is on the disk."""
    try:
        write_whole(path, lambda partial: partial.write_text(json.dumps(content), "utf-8"))
    except OSError as error:
        if error.errno in _FULL:
            raise CacheError(f"{path.parent}: the disk is full ({error.strerror})") from error
        raise CacheError(f"cannot write {path}: {error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
