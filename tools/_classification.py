"""What the classification tools share: folders of images, backbones, caches, processes, files."""

# ruff: noqa: E402 - the checkout has to be importable first

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _common
import numpy as np

_common.add_root()

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

try:
    from PIL import Image, ImageDraw, ImageFont
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"error: {error}; the tools for classification need Pillow and tqdm: "
        "pip install diffbackbone[tools]"
    ) from error

from diffbackbone import CheckpointError, DiffusionBackbone, NoiseSchedule, runs
from diffbackbone import features as feature_cache
from diffbackbone.checkpoint import read_unet_config
from diffbackbone.diffusion import NOISE_POLICIES
from diffbackbone.features import CacheError, FeatureCache, Listing, Tap
from diffbackbone.images import (
    ImageError,
    check_header,
    normalize,
    read_image,
    resize,
    to_tensor,
)
from diffbackbone.models.gd_config import PRESETS, UNetConfig

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
CHECK_WHOLE = 20_000
"""Up to so many images all are decoded before anything starts; of more, only headers are read."""
MIN_CROP = 0.8
"""Random crops are at least this share of the short side, as in the published code."""
PREPROCESSING = "upright RGB, short side to the size (Pillow, bicubic), centre crop, [-1, 1]"
_PERMUTATION, _FLIPS, _CROP, _STEP, _HOLDOUT, _SUBSET = range(6)


Range = Sequence[float]


class ToolError(ValueError):
    """The command cannot be done as given; the message says why and what would do."""


# --------------------------------------------------------------------------------- folders, images


@dataclass(frozen=True)
class ImageFolder:
    """Images in one folder for each class.

    Attributes:
        root: The folder.
        listing: Its images; paths are relative to ``root``.
        value_range: See :func:`diffbackbone.images.read_image`.
    """

    root: Path
    listing: Listing
    value_range: Range | None = None

    def subset(self, indices: Iterable[int]) -> ImageFolder:
        """Some of the images, in the order given."""
        return replace(self, listing=self.listing.subset(indices))

    def path(self, index: int) -> Path:
        """Path of an image."""
        return self.root / self.listing.paths[index]

    def read(self, index: int) -> np.ndarray:
        """Pixels of an image (H, W, 3), see :func:`diffbackbone.images.read_image`."""
        return read_image(self.path(index), self.value_range)

    @property
    def labels(self) -> np.ndarray:
        """Class index of each image (N,), int64."""
        return np.asarray(self.listing.labels, dtype=np.int64)


def find_folders(data: str | None, train: str | None, val: str | None) -> tuple[Path, Path]:
    """Folders of training and validation images, from one folder or two.

    Raises:
        ToolError: One is not given or not there.
    """
    return find_folder("train", data, train), find_folder("val", data, val)


def find_folder(name: str, data: str | None, given: str | None) -> Path:
    """Folder of training or validation images.

    Raises:
        ToolError: It is not given or not there.
    """
    if given is None and data is None:
        raise ToolError(f"give --data DIR (with DIR/train and DIR/val), or --{name}-dir")
    folder = Path(given if given is not None else os.path.join(str(data), name)).expanduser()
    if not folder.is_dir():
        hint = ""
        if folder.parent.is_dir():
            inside = sorted(p.name for p in folder.parent.iterdir() if p.is_dir())[:8]
            hint = f"; {folder.parent} holds {', '.join(inside) or 'no folders'}"
        raise ToolError(f"there is no folder {folder} of {name} images{hint}")
    return folder


def list_folder(
    root: Path, classes: Sequence[str] | None = None, value_range: Range | None = None
) -> ImageFolder:
    """List the images of a folder that has one folder for each class.

    Args:
        root: The folder.
        classes: Names of the classes, for another folder of the same data; None takes the names
            of the folders, in order.
        value_range: See :func:`diffbackbone.images.read_image`.

    Raises:
        ToolError: No or one class, a class that ``classes`` lacks, a class without images, or an
            empty file.
    """
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if classes is None:
        if len(folders) < 2:
            what = f"one class only ({folders[0]})" if folders else "no folders of classes"
            raise ToolError(f"{root} has {what}; at least two are needed: {root}/<class>/*.jpg")
        classes = folders
    elif unknown := [name for name in folders if name not in set(classes)]:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ToolError(
            f"{root} has classes that training lacks: {', '.join(unknown[:5])}{more}; training "
            f"has {len(classes)}, from {classes[0]} to {classes[-1]}"
        )
    elif not folders:
        raise ToolError(f"{root} has no folders of classes: {root}/<class>/*.jpg")
    paths: list[Path] = []
    labels: list[int] = []
    for name in folders:
        found = _find_images(root / name)
        if not found:
            raise ToolError(
                f"the class folder {root / name} has no images ({', '.join(SUFFIXES)}): remove it "
                "or fill it"
            )
        paths += found
        labels += [classes.index(name)] * len(found)
    return ImageFolder(root, _listing(root, paths, labels, classes), value_range)


def list_images(root: Path, value_range: Range | None = None) -> ImageFolder:
    """List all images of a folder, however deep, as images of one class without a name.

    Raises:
        ToolError: It is no folder or has no images, or one is empty.
    """
    if not root.is_dir():
        raise ToolError(f"there is no folder {root} of images")
    paths = _find_images(root)
    if not paths:
        raise ToolError(f"{root} has no images ({', '.join(SUFFIXES)})")
    return ImageFolder(root, _listing(root, paths, [0] * len(paths), ("",)), value_range)


def _find_images(folder: Path) -> list[Path]:
    found: list[Path] = []
    for inside, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        found += [
            Path(inside, file)
            for file in sorted(files)
            if not file.startswith(".") and file.lower().endswith(SUFFIXES)
        ]
    return found


def _listing(
    root: Path, paths: Sequence[Path], labels: Sequence[int], classes: Sequence[str]
) -> Listing:
    stats = [_stat(path) for path in paths]
    return Listing(
        tuple(path.relative_to(root).as_posix() for path in paths),
        tuple(labels),
        tuple(s.st_size for s in stats),
        tuple(s.st_mtime_ns for s in stats),
        tuple(classes),
    )


def _stat(path: Path) -> os.stat_result:
    try:
        found = path.stat()
    except OSError as error:
        raise ToolError(f"the image {path} cannot be read: {error.strerror}") from error
    if found.st_size == 0:
        raise ToolError(f"the image {path} is empty (0 bytes)")
    return found


def check_images(folder: ImageFolder, progress: bool = True) -> None:
    """Make sure, before work begins, that every image can be read.

    Raises:
        ImageError: One is broken, or its values have no known range.
    """
    whole = len(folder.listing) <= CHECK_WHOLE

    def check(index: int) -> None:
        if whole:
            folder.read(index)
        else:
            check_header(folder.path(index))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(check, range(len(folder.listing)))
        bar = tqdm(
            found,
            total=len(folder.listing),
            desc=f"checking {folder.root.name}",
            unit="image",
            disable=None if progress else True,
        )
        try:
            for _ in bar:
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prepare_image(pixels: np.ndarray, size: int, seed: Sequence[int] | None = None) -> np.ndarray:
    """Bring an image to ``size`` x ``size``.

    Args:
        pixels: Of :func:`diffbackbone.images.read_image`, of any size.
        size: Height and width.
        seed: None crops the centre. Otherwise a square of 0.8 to 1 short sides is cropped
            anywhere, as in the published code; a seed gives the same one each time.
    """
    short, left, top = size, 0.5, 0.5
    if seed is not None:
        rng = np.random.default_rng(list(seed))
        short = int(rng.integers(size, int(np.ceil(size / MIN_CROP)) + 1))
        left, top = (float(x) for x in rng.random(2))
    scale = short / min(pixels.shape[:2])
    height, width = (max(short, round(side * scale)) for side in pixels.shape[:2])
    if (height, width) != pixels.shape[:2]:
        pixels = resize(pixels, (width, height))
    x, y = int(left * (width - size)), int(top * (height - size))
    return pixels[y : y + size, x : x + size]


class RowImages(Dataset):
    """Images by row, as a feature cache counts: image = row modulo N, mirrored from row N on.

    Args:
        folder: N images.
        size: Height and width that they are brought to.
        seed: Random crops follow from it, the epoch and the row; None crops the centre.
    """

    def __init__(self, folder: ImageFolder, size: int, seed: int | None = None) -> None:
        self.folder = folder
        self.size = size
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """Image (3, size, size) in [-1, 1] of (epoch, row)."""
        epoch, row = key
        index = row % len(self.folder.listing)
        seed = None if self.seed is None else (self.seed, epoch, _CROP, row)
        pixels = normalize(to_tensor(prepare_image(self.folder.read(index), self.size, seed)))
        return pixels.flip(-1) if row >= len(self.folder.listing) else pixels


def image_batches(
    images: RowImages, epoch: int, batches: Sequence[Sequence[int]], workers: int
) -> Iterator[Tensor]:
    """Read batches of rows in order, ahead where there are workers: (n, 3, H, W) each."""
    keys = [[(epoch, int(row)) for row in batch] for batch in batches]
    if not keys:
        return iter(())
    loader = DataLoader(
        images,
        batch_sampler=keys,
        num_workers=min(workers, len(keys)),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else every start draws from the global one
    )
    return iter(loader)


# ------------------------------------------------------------------------------------- randomness


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of the training images in an epoch (count,)."""
    return np.random.default_rng([seed, epoch, _PERMUTATION]).permutation(count)


def flips(seed: int, epoch: int, count: int) -> np.ndarray:
    """Which training images are mirrored in an epoch (count,), bool."""
    return np.random.default_rng([seed, epoch, _FLIPS]).random(count) < 0.5


def seed_step(*keys: int) -> None:
    """Seed torch's generators for one step, from numbers that name it."""
    state = np.random.SeedSequence([*keys, _STEP]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


def balanced(labels: np.ndarray, count: int, key: Sequence[int]) -> np.ndarray:
    """Choose ``count`` images so that classes differ by no more than one, where they are large.

    Args:
        labels: Class index of each image (N,).
        count: How many; at least one for each class that occurs.
        key: Seed.

    Returns:
        Ascending indices (count,).
    """
    rng = np.random.default_rng(list(key))
    orders = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    taken = np.zeros(len(orders), dtype=np.int64)
    priority = rng.permutation(len(orders))
    rooms = np.array([len(order) for order in orders])
    left = count
    while left > 0 and (open_ := [i for i in priority if taken[i] < rooms[i]]):
        share = max(1, left // len(open_))
        for i in open_:
            step = min(share, int(rooms[i] - taken[i]), left)
            taken[i] += step
            left -= step
    return np.sort(np.concatenate([order[:n] for order, n in zip(orders, taken)]))


def choose_subset(folder: ImageFolder, subset: str, seed: int) -> ImageFolder:
    """The images that a share ("1%", "0.01") or a list file names.

    Args:
        folder: All training images.
        subset: A share is drawn class by class alike. A file has one path a line, relative to the
            folder, or a bare file name where no other image has the same.
        seed: Of the draw.

    Raises:
        ToolError: Not such a share, no such file, a line without image, or a class is left out.
    """
    text = subset.strip()
    share = None
    with contextlib.suppress(ValueError):
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    labels = folder.labels
    classes = len(folder.listing.classes)
    if share is not None:
        if not 0 < share <= 1:
            raise ToolError(f"--subset {subset}: a share must lie above 0 and up to 1 (100%)")
        count = round(share * len(labels))
        if count < classes:
            raise ToolError(
                f"--subset {subset}: {count} of {len(labels)} images are fewer than the {classes} "
                "classes; take a larger share"
            )
        return folder.subset(balanced(labels, count, (seed, _SUBSET)))
    path = Path(subset).expanduser()
    if not path.is_file():
        raise ToolError(f"--subset {subset}: neither a share (1%, 0.01) nor a file with a list")
    by_path = {p: i for i, p in enumerate(folder.listing.paths)}
    by_name: dict[str, list[int]] = {}
    for p, i in by_path.items():
        by_name.setdefault(p.rsplit("/", 1)[-1], []).append(i)
    chosen, bad = set(), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not (name := line.strip()):
            continue
        found = [by_path[name]] if name in by_path else by_name.get(name, [])
        if len(found) == 1:
            chosen.add(found[0])
        else:
            bad.append(f"line {number}, {name}: {'no such image' if not found else 'ambiguous'}")
    if bad:
        more = f", and {len(bad) - 1} more such lines" if len(bad) > 1 else ""
        raise ToolError(f"{path}: {bad[0]}{more}; paths are relative to {folder.root}")
    absent = set(range(classes)) - {int(labels[i]) for i in chosen}
    if absent:
        raise ToolError(
            f"{path} leaves {len(absent)} classes without an image, such as "
            f"{folder.listing.classes[min(absent)]}"
        )
    return folder.subset(sorted(chosen))


def split_holdout(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide training images into those to learn from and those to choose by.

    Args:
        labels: Class index of each image (N,).
        share: Share of the images to choose by, drawn class by class.
        seed: Of the draw.

    Returns:
        Ascending indices of the two parts.

    Raises:
        ToolError: A class is too small to be divided.
    """
    rng = np.random.default_rng([seed, _HOLDOUT])
    held: list[int] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise ToolError(
                "a class has one training image only, so none can be held out to choose by: take "
                "--select-on val or, with one learning rate, none"
            )
        held += members[: min(max(1, round(share * len(members))), len(members) - 1)].tolist()
    mask = np.zeros(len(labels), dtype=bool)
    mask[held] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def split_folds(labels: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide training images into folds; each is held out once.

    Args:
        labels: Class index of each image (N,).
        folds: How many, at least two; fewer where the smallest class has fewer images.
        seed: Of the draw, class by class.

    Returns:
        For each fold the ascending indices of those to learn from and of those to choose by.

    Raises:
        ToolError: A class has one image only.
    """
    rng = np.random.default_rng([seed, _HOLDOUT])
    fold_of = np.empty(len(labels), dtype=np.int64)
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        raise ToolError("a class has one training image only, so none can be held out")
    folds = min(folds, int(counts.min()))
    first = 0
    for label in classes:
        members = rng.permutation(np.flatnonzero(labels == label))
        fold_of[members] = (first + np.arange(len(members))) % folds
        first += len(members)  # so that what is left over of the classes is spread as well
    return [(np.flatnonzero(fold_of != k), np.flatnonzero(fold_of == k)) for k in range(folds)]


# -------------------------------------------------------------------------------------- processes


@dataclass
class Processes:
    """The processes that torchrun started, or the one there is.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        device: Where this process computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def start(cls, device: str = "auto") -> Processes:
        """Join the other processes: nccl on GPUs, gloo on CPUs.

        Raises:
            ToolError: No such device.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise ToolError(f"--device {device}: not a device; take auto, cpu or cuda") from error
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise ToolError(f"--device {device}: this torch finds no GPU; take auto or cpu")
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(0, 1, chosen)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(dist.get_rank(), world_size, chosen)

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.world_size > 1:
            value = value.to(self.device)
            dist.all_reduce(value)
        return value.cpu()

    def stop(self) -> None:
        """Leave the group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def say(self, text: str) -> None:
        """Print once."""
        if self.first:
            tqdm.write(text)

    def bar(self, items: Iterable[Any], total: int, desc: str, unit: str = "batch") -> tqdm:
        """Progress bar, of the first process and on a terminal only."""
        return tqdm(
            items,
            total=total,
            desc=desc,
            unit=unit,
            leave=False,
            disable=None if self.first else True,
        )


# ---------------------------------------------------------------------------- backbones and caches


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say where the images are."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DIR", help="folder with train/<class>/ and val/<class>/")
    group.add_argument("--train-dir", metavar="DIR", help="instead of DIR/train")
    group.add_argument("--val-dir", metavar="DIR", help="instead of DIR/val")
    group.add_argument("--image-size", type=int, help="height and width; default: the U-Net's")
    group.add_argument("--workers", type=int, default=None, help="processes that read images")
    add_value_range(group)


def add_value_range(group: argparse._ArgumentGroup) -> None:
    """The argument that says what the values of deep images mean."""
    group.add_argument(
        "--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="values of images deeper than 8 bits that are black and white; default: 0 65535 for "
        "integers, 0 1 for floats",
    )  # fmt: skip


def add_backbone_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which features are taken."""
    group = parser.add_argument_group("backbone")
    group.add_argument(
        "--unet", default="gd256_uncond", metavar="PRESET",
        help=f"one of {', '.join(PRESETS)}; or a .safetensors of tools/pretrain.py, which tells "
        "its own architecture",
    )  # fmt: skip
    group.add_argument(
        "--checkpoint", metavar="FILE", help="guided-diffusion weights; without, they are random"
    )
    group.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="0-based timesteps")
    group.add_argument("--blocks", type=int, nargs="+", metavar="B", help="1-based blocks")
    group.add_argument(
        "--noise", choices=NOISE_POLICIES, default="fixed", help="noise added to the images"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on a GPU that has it, float32 else",
    )  # fmt: skip


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the feature cache."""
    group = parser.add_argument_group("feature cache")
    group.add_argument(
        "--cache", metavar="DIR", help="keep the taps of a frozen U-Net here, and read them after"
    )
    group.add_argument(
        "--feature-dtype", choices=sorted(feature_cache.DTYPES), default="float16",
        help="what taps of a frozen U-Net are rounded to, with or without a cache",
    )  # fmt: skip
    group.add_argument(
        "--shard-mib", type=float, default=feature_cache.SHARD_BYTES / 2**20,
        help="largest file of a cache in MiB",
    )  # fmt: skip
    group.add_argument(
        "--overwrite-cache", action="store_true", help="replace a cache of other settings"
    )


@functools.lru_cache
def unet_config(unet: str) -> UNetConfig:
    """The architecture that ``--unet`` names.

    Raises:
        ToolError: It is neither a preset nor a file that could tell it.
        CheckpointError: The file is damaged or of something else.
    """
    if unet in PRESETS:
        return PRESETS[unet]
    if not unet.endswith(".safetensors"):
        raise ToolError(
            f"--unet {unet}: choose from {', '.join(PRESETS)}, or give a .safetensors file of "
            "tools/pretrain.py"
        )
    _common.check_checkpoint(unet)
    return read_unet_config(unet)


def check_backbone(args: argparse.Namespace) -> None:
    """Check the arguments of :func:`add_backbone_arguments` without reading anything.

    Raises:
        ToolError: A value is out of range.
    """
    unet_config(args.unet)
    if args.seed < 0:
        raise ToolError(f"--seed must be at least 0, got {args.seed}")
    for name in ("timesteps", "blocks"):
        check_different(args, name)


def check_different(args: argparse.Namespace, name: str) -> None:
    """Check that no value of a list is given twice.

    Raises:
        ToolError: One is.
    """
    values = getattr(args, name)
    if values is not None and len(set(values)) != len(values):
        option = name.replace("_", "-")
        raise ToolError(f"--{option} {' '.join(map(str, values))}: one comes twice")


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Check counts of the command line.

    Raises:
        ToolError: One is below 1.
    """
    for name in names:
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ToolError(f"--{option} must be at least 1, got {getattr(args, name)}")


def check_common(args: argparse.Namespace) -> None:
    """Check what can be checked without reading anything, and fill in what follows.

    Raises:
        ToolError: A value is out of range.
    """
    check_backbone(args)
    if args.image_size is None:
        args.image_size = unet_config(args.unet).image_size
    if args.image_size < 32:
        raise ToolError(f"--image-size must be at least 32, got {args.image_size}")
    if args.workers is None:
        args.workers = min(4, (os.cpu_count() or 1) - 1)
    if args.workers < 0:
        raise ToolError(f"--workers must be at least 0, got {args.workers}")
    if args.shard_mib is not None and not args.shard_mib > 0:
        raise ToolError(f"--shard-mib must be above 0, got {args.shard_mib}")


def build_backbone(
    args: argparse.Namespace, feedback: str | None = None, freeze: bool = True, **options: Any
) -> DiffusionBackbone:
    """The backbone that the arguments describe; random weights follow from the seed.

    Raises:
        ToolError: A block, timestep or feedback does not fit, or the checkpoint is not there.
    """
    if args.checkpoint:
        _common.check_checkpoint(args.checkpoint)
    torch.manual_seed(args.seed)
    config = unet_config(args.unet)
    schedule = NoiseSchedule(config.noise_schedule)
    try:
        for t in args.timesteps:
            schedule.check_timestep(t)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said below in the tool's words
            return DiffusionBackbone(
                config,
                checkpoint=args.checkpoint,
                timestep=args.timesteps[0],
                blocks=args.blocks,
                feedback=feedback,
                out_channels=None,
                out_strides=None,
                noise=args.noise,
                freeze=freeze,
                seed=args.seed,
                save_frozen=False,
                **options,
            )
    except FileNotFoundError as error:
        raise ToolError(str(error)) from error
    except ValueError as error:
        raise ToolError(str(error)) from error


def warn_random(args: argparse.Namespace, processes: Processes) -> None:
    """Say where no weights were given."""
    if not args.checkpoint:
        processes.say(
            "warning: no --checkpoint, so the U-Net's weights are random; they follow from --seed"
        )


def compute_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What autocast shall compute in; None leaves float32."""
    if precision == "float32" or device.type != "cuda":
        if precision == "bfloat16":
            raise ToolError("--precision bfloat16 needs a GPU")
        return None
    if precision == "bfloat16" or torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return None


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Mixed precision where there is a type for it."""
    with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
        yield


@dataclass
class FeatureOptions:
    """Which features are taken, and how they are rounded.

    ``batch`` images are always computed together: smaller batches are filled up. With and without
    a cache an image then has the same features to the bit, where the U-Net's arithmetic depends on
    the size of a batch alone (another size changes some features in their last place).
    """

    timesteps: tuple[int, ...]
    blocks: tuple[int, ...]
    pool: int | None
    dtype: str
    image_size: int
    compute: torch.dtype | None
    batch: int = 1

    def extract(self, backbone: DiffusionBackbone, images: Tensor) -> dict[Tap, Tensor]:
        """Taps of a frozen backbone, as a cache holds them."""
        count = len(images)
        if count < self.batch:
            filling = images[-1:].expand(self.batch - count, -1, -1, -1)
            images = torch.cat([images, filling])
        with autocast(images.device, self.compute):
            features = feature_cache.extract_features(
                backbone,
                images,
                self.timesteps,
                self.blocks,
                self.pool,
                feature_cache.DTYPES[self.dtype],
            )
        return {tap: x[:count] for tap, x in features.items()}


def cache_settings(
    images: ImageFolder, backbone: DiffusionBackbone, options: FeatureOptions, copies: int = 1
) -> dict[str, Any]:
    """Everything that determines the content of a cache of these images."""
    return feature_cache.feature_settings(
        backbone,
        options.timesteps,
        options.blocks,
        images.listing,
        image_size=options.image_size,
        pool=options.pool,
        dtype=options.dtype,
        copies=copies,
        preprocessing=f"{PREPROCESSING}, value range {images.value_range}",
        precision="float32" if options.compute is None else str(options.compute),
    )


def open_cache(
    folder: Path,
    images: ImageFolder,
    backbone: DiffusionBackbone,
    options: FeatureOptions,
    processes: Processes,
    *,
    copies: int = 1,
    workers: int = 0,
    shard_mib: float = feature_cache.SHARD_BYTES / 2**20,
    overwrite: bool = False,
) -> FeatureCache:
    """Open a cache of the images' features; write first what is missing of it."""
    settings = cache_settings(images, backbone, options, copies)
    rows = RowImages(images, options.image_size)
    device = processes.device

    def compute(batches: list[list[int]]) -> Iterator[Mapping[Tap, Tensor]]:
        backbone.to(device).eval()
        loaded = image_batches(rows, 0, batches, workers)
        for pixels in processes.bar(loaded, len(batches), f"features of {images.root.name}"):
            yield options.extract(backbone, pixels.to(device, non_blocking=True))

    return feature_cache.write_cache(
        folder,
        settings,
        images.listing,
        feature_cache.tap_shapes(
            backbone.unet.config,
            options.timesteps,
            options.blocks,
            options.image_size,
            options.pool,
        ),
        compute,
        batch_size=options.batch,
        shard_bytes=int(shard_mib * 2**20),
        overwrite=overwrite,
        rank=processes.rank,
        world_size=processes.world_size,
        barrier=processes.barrier,
    )


# ------------------------------------------------------------------------------------------ scores


def true_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one.

    Classes of the same score come in order of their index, so a head that says the same for all
    gets no point by it; where a score is not finite, the true class comes last.

    Args:
        scores: (N, num_classes).
        labels: (N,).

    Returns:
        (N,) int64, 0 where the true class is first.
    """
    own = scores.gather(1, labels[:, None])
    index = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (index < labels[:, None]))
    ranks = before.sum(1)
    broken = ~torch.isfinite(scores).all(1)
    return torch.where(broken, torch.full_like(ranks, scores.shape[1]), ranks)


# ------------------------------------------------------------------------------------------- files


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, and move it there when it is on the disk.

    Raises:
        ToolError: The disk is full or cannot be written; what was there before is kept.
    """
    try:
        runs.write_whole(path, write)
    except OSError as error:
        raise ToolError(
            f"cannot write {path}: {error}; what was saved before is kept, and can be gone on from"
        ) from error


def finite(value: Any) -> Any:
    """Replace numbers that JSON does not know by null."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines whole."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------------------------------- pictures

_NUMBERS_UP_TO = 30


def draw_confusion(counts: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """Picture of a confusion matrix, each row coloured by its shares.

    Args:
        counts: (K, K): images of class i (row) that were taken for class j (column).
        classes: K names.
    """
    number = len(classes)
    labelled = number <= _NUMBERS_UP_TO
    cell = 34 if labelled else max(1, 900 // number)
    font, small = ImageFont.load_default(12), ImageFont.load_default(11)
    names = [name if len(name) <= 16 else name[:15] + "…" for name in classes]
    margin = 24 + (int(max(font.getlength(name) for name in names)) if labelled else 20)
    side = number * cell
    picture = Image.new("RGB", (margin + side + 16, margin + side + 30), "white")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    low, high = np.array([247, 250, 252]), np.array([20, 82, 140])
    pixels = (low + shares[..., None] * (high - low)).round().astype(np.uint8)
    matrix = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    picture.paste(matrix, (margin, margin))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((margin - 1, margin - 1, margin + side, margin + side), outline="black")
    right = int(np.trace(counts))
    total = int(counts.sum())
    caption = f"rows: true class, columns: predicted; {right} of {total} right"
    pen.text((8, margin + side + 8), caption, fill="black", font=font)
    if labelled:
        for i, name in enumerate(names):
            y = margin + i * cell + cell // 2 - 7
            pen.text((margin - 6 - font.getlength(name), y), name, fill="black", font=font)
            column = vertical_text(name, font, margin - 8)
            picture.paste(column, (margin + i * cell + cell // 2 - 8, 2))
            for j in range(number):
                if counts[i, j]:
                    text = str(int(counts[i, j]))
                    x = margin + j * cell + (cell - small.getlength(text)) / 2
                    colour = "white" if shares[i, j] > 0.5 else "black"
                    pen.text((x, y), text, fill=colour, font=small)
    return picture


def vertical_text(text: str, font: Any, length: int) -> Image.Image:
    """Text on white that reads from bottom to top, from the bottom of ``length`` pixels."""
    picture = Image.new("RGB", (length, round(1.35 * font.size)), "white")
    ImageDraw.Draw(picture).text((0, 1), text, fill="black", font=font)
    return picture.rotate(90, expand=True)


def shorten(text: str, font: Any, width: float) -> str:
    """Text that fits into a width, its end cut off if need be."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


COLOURS = ((250, 251, 240), (190, 223, 192), (99, 181, 187), (42, 118, 174), (20, 44, 104))
"""From low to high values, ever darker."""
BEST_COLOUR, CHEAPER_COLOUR, MISSING_COLOUR = (232, 84, 16), (206, 40, 166), (222, 222, 222)
_INK = (40, 40, 40)


def colour_of(value: float, low: float, high: float) -> tuple[int, int, int]:
    """Colour of a value; what lies outside takes the nearest end, NaN is grey."""
    if math.isnan(value):
        return MISSING_COLOUR
    share = (value - low) / (high - low) if high > low else 0.5
    at = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    first = min(int(at), len(COLOURS) - 2)
    mixed = (a + (at - first) * (b - a) for a, b in zip(COLOURS[first], COLOURS[first + 1]))
    red, green, blue = (round(x) for x in mixed)
    return red, green, blue


def draw_heatmap(
    values: np.ndarray,
    rows: Sequence[Any],
    columns: Sequence[Any],
    title: str,
    *,
    row_name: str,
    column_name: str,
    caption: str = "",
    texts: Sequence[Sequence[str]] | None = None,
    low: float | None = None,
    high: float | None = None,
    marks: Mapping[tuple[int, int], tuple[int, int, int]] | None = None,
    legend: Sequence[tuple[tuple[int, int, int], str]] = (),
    scale: str = "{:.2f}",
    square: bool = False,
) -> Image.Image:
    """Picture of a table of numbers: a colour for each, with the number in it and a colour bar.

    Args:
        values: (R, C); NaN where there is none.
        rows: Labels of the R rows, from the top.
        columns: Labels of the C columns.
        title: Above all.
        row_name: What the rows are.
        column_name: What the columns are.
        caption: A second, smaller line.
        texts: What is written into the cells, several lines if need be; None formats the values
            as on the colour bar. Left out where it does not fit.
        low: Value of the lightest colour; None takes the smallest.
        high: Value of the darkest; None takes the largest.
        marks: Colour of a frame around a cell (row, column).
        legend: What the colours of frames mean.
        scale: Format of the numbers on the colour bar.
        square: Make the cells as high as wide.
    """
    head, label, small = (ImageFont.load_default(size) for size in (25, 19, 16))
    known = values[~np.isnan(values)]
    low = float(known.min()) if low is None and known.size else float(low or 0.0)
    high = float(known.max()) if high is None and known.size else float(high or 1.0)
    if texts is None:
        texts = [["" if math.isnan(v) else scale.format(v) for v in row] for row in values]
    cell = max(26, min(60 if square else 84, 1400 // len(columns)))
    tall = cell if square else max(22, min(54, 1000 // len(rows)))
    left = 56 + round(max(label.getlength(str(name)) for name in rows))
    top = 62 + (24 if caption else 0)
    width, height = cell * len(columns), tall * len(rows)
    ends = [scale.format(low + (high - low) * share) for share in (1, 0.75, 0.5, 0.25, 0)]
    tick = max(label.getlength(text) for text in ends)
    right = left + width + 84 + round(tick)
    wide = [16 + head.getlength(title), 16 + small.getlength(caption)]
    wide += [left + 30 + label.getlength(text) for _, text in legend]
    bottom = top + height + 72 + 28 * len(legend)
    picture = Image.new("RGB", (max(right, *(16 + round(w) for w in wide)), bottom), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((16, 12), title, fill="black", font=head)
    pen.text((16, 48), caption, fill=(90, 90, 90), font=small)
    for i, j in np.ndindex(*values.shape):
        x, y = left + j * cell, top + i * tall
        colour = colour_of(float(values[i, j]), low, high)
        pen.rectangle((x, y, x + cell - 1, y + tall - 1), fill=colour)
        lines = texts[i][j].split("\n")
        fonts = [font for font in (label, small) if _fits(lines, font, cell - 6, tall - 4)]
        if fonts:
            ink = "white" if _luminance(colour) < 140 else _INK
            step = fonts[0].size + 2
            for n, line in enumerate(lines):
                at = y + tall / 2 + (n - (len(lines) - 1) / 2) * step
                pen.text((x + cell / 2, at), line, fill=ink, font=fonts[0], anchor="mm")
    for (i, j), colour in (marks or {}).items():
        x, y = left + j * cell, top + i * tall
        pen.rectangle((x, y, x + cell - 1, y + tall - 1), outline="white", width=6)
        pen.rectangle((x + 1, y + 1, x + cell - 2, y + tall - 2), outline=colour, width=4)
    pen.rectangle((left - 1, top - 1, left + width, top + height), outline=_INK)
    for i, name in enumerate(rows):
        at = (left - 10, top + (i + 0.5) * tall)
        pen.text(at, str(name), fill="black", font=label, anchor="rm")
    longest = max(label.getlength(str(name)) for name in columns)
    every = max(1, math.ceil((longest + 8) / cell))
    for j, name in list(enumerate(columns))[::every]:
        at = (left + (j + 0.5) * cell, top + height + 8)
        pen.text(at, str(name), fill="black", font=label, anchor="ma")
    at = (left + width / 2, top + height + 38)
    pen.text(at, column_name, fill="black", font=label, anchor="ma")
    name = vertical_text(row_name, label, round(label.getlength(row_name)) + 2)
    picture.paste(name, (12, max(top, top + (height - name.height) // 2)))
    _draw_colour_bar(pen, (left + width + 28, top, left + width + 50, top + height), ends, label)
    for n, (colour, text) in enumerate(legend):
        y = top + height + 72 + 28 * n
        pen.rectangle((left, y, left + 22, y + 18), outline=colour, width=4)
        pen.text((left + 32, y + 9), text, fill="black", font=label, anchor="lm")
    return picture


def _draw_colour_bar(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], ends: Sequence[str], font: Any
) -> None:
    """A bar from high (top) to low, with numbers at equal distances, as many as there is room."""
    left, top, right, bottom = box
    for y in range(top, bottom):
        share = (bottom - 1 - y) / max(1, bottom - 1 - top)
        pen.line((left, y, right, y), fill=colour_of(share, 0.0, 1.0))
    pen.rectangle((left - 1, top - 1, right + 1, bottom), outline=_INK)
    if bottom - top < 5 * font.size:
        ends = (ends[0], ends[-1])
    for n, text in enumerate(ends):
        y = top + (bottom - top) * n / (len(ends) - 1)
        anchor = {0: "lt", len(ends) - 1: "lb"}.get(n, "lm")
        pen.text((right + 8, y), text, fill="black", font=font, anchor=anchor)


def _fits(lines: Sequence[str], font: Any, width: float, height: float) -> bool:
    return (
        max(font.getlength(line) for line in lines) <= width
        and len(lines) * (font.size + 2) <= height
    )


def _luminance(colour: tuple[int, int, int]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def draw_bars(title: str, values: Mapping[str, float]) -> Image.Image:
    """Bar chart of shares from 0 to 1."""
    font, head = ImageFont.load_default(14), ImageFont.load_default(16)
    left = 24 + int(max(font.getlength(name) for name in values))
    width, line = 460, 34
    picture = Image.new("RGB", (left + width + 90, 50 + line * len(values)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((12, 10), title, fill="black", font=head)
    for i, (name, value) in enumerate(values.items()):
        y = 44 + i * line
        pen.text((left - 10 - font.getlength(name), y + 3), name, fill="black", font=font)
        pen.rectangle((left, y, left + width, y + 22), fill=(234, 238, 242))
        pen.rectangle((left, y, left + round(width * value), y + 22), fill=(38, 110, 172))
        pen.text((left + width + 8, y + 3), f"{value:.1%}", fill="black", font=font)
    return picture


def run_tool(
    parse: Callable[[], argparse.Namespace], run: Callable[[argparse.Namespace, Processes], Any]
) -> None:
    """Run a tool in as many processes as torchrun started.

    Args:
        parse: Reads its command line.
        run: The tool.

    Raises:
        SystemExit: It cannot be done as given; the message says why.
    """
    processes = None
    try:
        args = parse()
        processes = Processes.start(args.device)
        run(args, processes)
    except (ToolError, ImageError, CacheError, CheckpointError) as error:
        if processes is not None and processes.world_size > 1:
            print(f"error: {error}", flush=True)
            os._exit(1)  # the others wait for this one; torchrun ends them
        raise SystemExit(f"error: {error}") from error
    finally:
        if processes is not None:
            processes.stop()
