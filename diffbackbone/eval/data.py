"""Folders of images: listing, checking, subsets, splits and loading."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import find_classes, make_dataset
from tqdm.contrib.concurrent import thread_map

from diffbackbone.images import check_header, normalize, read_image, resize, to_tensor
from diffbackbone.utils import RandomStream, UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
DECODE_UP_TO = 20_000
"""check_images decodes so many images; of a larger folder it reads only the headers."""
MIN_CROP = 0.8
"""Smallest random crop as a share of the short side, as in the published code."""
PREPROCESSING = "upright RGB, short side to the size (Pillow, bicubic), center crop, [-1, 1]"


# ---------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class Listing:
    """Images in a fixed order.

    Attributes:
        paths: Path of each image relative to its folder, with ``/``.
        labels: Class index of each image.
        sizes: Size of each file in bytes.
        mtimes: Time of each file's last change in nanoseconds.
        classes: Class names.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    sizes: tuple[int, ...]
    mtimes: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self) -> list[tuple[Any, ...]]:
        """Return ``(path, label, size, mtime)`` of each image."""
        return list(zip(self.paths, self.labels, self.sizes, self.mtimes))

    def subset(self, indices: Iterable[int]) -> Listing:
        """Return the listing of some images, in the given order."""
        rows = self.rows()
        columns = zip(*(rows[int(i)] for i in indices))
        return Listing(*columns, self.classes)

    def digest(self) -> str:
        """Return the SHA-256 of the paths, labels, sizes and times."""
        digest = hashlib.sha256()
        for row in self.rows():
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageFolder:
    """Images with class labels.

    Attributes:
        root: Folder that the listing's paths are relative to.
        listing: The images.
        value_range: See :func:`diffbackbone.images.read_image`.
    """

    root: Path
    listing: Listing
    value_range: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.listing)

    @property
    def labels(self) -> np.ndarray:
        """Class index of each image (N,), int64."""
        return np.asarray(self.listing.labels, dtype=np.int64)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self.listing.classes

    def subset(self, indices: Iterable[int]) -> ImageFolder:
        """Return some of the images, in the given order."""
        return replace(self, listing=self.listing.subset(indices))

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.root / self.listing.paths[index]

    def read(self, index: int) -> np.ndarray:
        """Read an image (H, W, 3), see :func:`diffbackbone.images.read_image`."""
        return read_image(self.path(index), self.value_range)


def list_folder(
    root: Path, classes: Sequence[str] | None = None, value_range: Sequence[float] | None = None
) -> ImageFolder:
    """List a folder with one subfolder per class.

    Args:
        root: The folder.
        classes: Class names of the training data; None takes the names of the subfolders.
        value_range: See :func:`diffbackbone.images.read_image`.

    Raises:
        UserError: Fewer than two classes, a class that ``classes`` lacks or that has no images, or
            an empty file.
    """
    try:
        names = [name for name in find_classes(str(root))[0] if not name.startswith(".")]
    except FileNotFoundError as error:
        raise UserError(f"{root} has no class folders: {root}/<class>/*.jpg") from error
    if classes is None:
        if len(names) < 2:
            raise UserError(f"{root} has one class ({', '.join(names)}); at least two are needed")
        classes = names
    elif unknown := sorted(set(names) - set(classes)):
        raise UserError(
            f"{root} has {len(unknown)} classes that training lacks: {', '.join(unknown[:5])}; "
            f"training has {len(classes)}, from {classes[0]} to {classes[-1]}"
        )
    index = {name: i for i, name in enumerate(classes)}
    return _list(root, {name: index[name] for name in names}, classes, value_range)


def list_images(root: Path, value_range: Sequence[float] | None = None) -> ImageFolder:
    """List all images below a folder, as one class with an empty name.

    Raises:
        UserError: No such folder, no images in it, or an empty file.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    return _list(root, {"": 0}, ("",), value_range)


def _list(
    root: Path,
    index: dict[str, int],
    classes: Sequence[str],
    value_range: Sequence[float] | None,
) -> ImageFolder:
    def is_image(path: str) -> bool:
        name = os.path.basename(path).lower()
        return name.endswith(SUFFIXES) and not name.startswith(".")

    try:
        samples = make_dataset(str(root), index, is_valid_file=is_image)
    except FileNotFoundError as error:
        names = str(error).splitlines()[0].removesuffix(".")
        raise UserError(f"{root}: {names} ({', '.join(SUFFIXES)})") from error
    paths = [Path(path) for path, _ in samples]
    stats = [path.stat() for path in paths]
    if empty := [path for path, stat in zip(paths, stats) if stat.st_size == 0]:
        raise UserError(f"the image {empty[0]} is empty (0 bytes)")
    listing = Listing(
        tuple(path.relative_to(root).as_posix() for path in paths),
        tuple(label for _, label in samples),
        tuple(stat.st_size for stat in stats),
        tuple(stat.st_mtime_ns for stat in stats),
        tuple(classes),
    )
    return ImageFolder(root, listing, value_range)


def check_images(folder: ImageFolder) -> None:
    """Read every image once, so that a broken one is found before the work starts.

    Raises:
        ImageError: An image is broken, or its values have no known range.
    """
    decode = len(folder) <= DECODE_UP_TO

    def check(index: int) -> None:
        folder.read(index) if decode else check_header(folder.path(index))

    thread_map(
        check,
        range(len(folder)),
        max_workers=min(8, os.cpu_count() or 1),
        desc=f"checking {folder.root.name}",
        unit="image",
        leave=False,
        disable=None,  # off where there is no terminal
    )


# ------------------------------------------------------------------------------ subsets and splits


def choose_subset(folder: ImageFolder, subset: str, seed: int) -> ImageFolder:
    """Return the images that a share or a list file names.

    Args:
        folder: All training images.
        subset: A share ("1%", "0.01"), drawn with equally many images per class where the classes
            are large enough; or a file with one path a line, relative to the folder, or a bare
            file name that occurs once. A smaller share is part of a larger one.
        seed: Seed of the draw.

    Raises:
        UserError: Not a share or file, an unknown image, or a class is left without images.
    """
    try:
        share = float(subset.strip().removesuffix("%")) / (100 if "%" in subset else 1)
    except ValueError:
        chosen = _read_list(folder, Path(subset).expanduser())
    else:
        count = round(share * len(folder)) if 0 < share <= 1 else 0
        if count < len(folder.classes):
            raise UserError(
                f"subset {subset}: take a share up to 1 (100%) that holds at least one image for "
                f"each of the {len(folder.classes)} classes; there are {len(folder)} images"
            )
        chosen = _draw_balanced(folder.labels, count, seed)
    if absent := set(range(len(folder.classes))) - set(folder.labels[chosen].tolist()):
        name = folder.classes[min(absent)]
        raise UserError(f"subset {subset} has no image of {len(absent)} classes, such as {name}")
    return folder.subset(chosen)


def _draw_balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the indices of ``count`` images: one of each class, another of each, and so on."""
    rng = RandomStream.SUBSET.generator(seed)
    classes = np.unique(labels)
    rank = np.empty(len(labels), dtype=np.int64)
    for label in classes:
        members = rng.permutation(np.flatnonzero(labels == label))
        rank[members] = np.arange(len(members))
    priority = np.argsort(rng.permutation(len(classes)))
    order = np.lexsort((priority[np.searchsorted(classes, labels)], rank))
    return np.sort(order[:count])


def _read_list(folder: ImageFolder, path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"subset {path}: neither a share (1%, 0.01) nor a list file")
    paths = folder.listing.paths
    count = Counter(p.rsplit("/", 1)[-1] for p in paths)
    index = {p.rsplit("/", 1)[-1]: i for i, p in enumerate(paths)}
    index = {name: i for name, i in index.items() if count[name] == 1}
    index.update((p, i) for i, p in enumerate(paths))
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if unknown := [line for line in lines if line and line not in index]:
        raise UserError(
            f"{path}: {len(unknown)} lines name no image of {folder.root}, or several: {unknown[0]}"
        )
    return np.array(sorted({index[line] for line in lines if line}), dtype=np.int64)


def split_holdout(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split training images into those to learn from and those to select by, stratified.

    Args:
        labels: Class index of each image (N,).
        share: Share of the images to select by; at least one image per class on average.
        seed: Seed of the draw.

    Returns:
        Ascending indices of the two parts.

    Raises:
        UserError: A class has a single image.
    """
    classes, counts = np.unique(labels, return_counts=True)
    _check_divisible(counts)
    held = min(max(round(share * len(labels)), len(classes)), len(labels) - len(classes))
    splitter = StratifiedShuffleSplit(1, test_size=held, random_state=_random_state(seed))
    learn, held_out = next(splitter.split(labels, labels))
    return np.sort(learn), np.sort(held_out)


def split_folds(labels: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split training images into stratified folds; each is held out once.

    Args:
        labels: Class index of each image (N,).
        folds: Number of folds, at most; the smallest class may have fewer images.
        seed: Seed of the draw.

    Returns:
        For each fold, the ascending indices to learn from and to select by.

    Raises:
        UserError: A class has a single image.
    """
    smallest = _check_divisible(np.unique(labels, return_counts=True)[1])
    splitter = StratifiedKFold(min(folds, smallest), shuffle=True, random_state=_random_state(seed))
    return list(splitter.split(labels, labels))


def _check_divisible(counts: np.ndarray) -> int:
    if counts.min() < 2:
        raise UserError("a class has a single training image, so none can be held out")
    return int(counts.min())


def _random_state(seed: int) -> int:
    return int(RandomStream.HOLDOUT.generator(seed).integers(2**32))


# ---------------------------------------------------------------------------------------- loading


def prepare_image(
    pixels: np.ndarray, size: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Resize and crop an image to ``size`` x ``size``.

    Args:
        pixels: (H, W, 3) of any size.
        size: Height and width.
        rng: None crops the center. Otherwise a square of 0.8 to 1 short sides is cropped at a
            random place, as in the published code.
    """
    short, left, top = size, 0.5, 0.5
    if rng is not None:
        short = int(rng.integers(size, int(np.ceil(size / MIN_CROP)) + 1))
        left, top = rng.random(2)
    scale = short / min(pixels.shape[:2])
    height, width = (max(short, round(side * scale)) for side in pixels.shape[:2])
    if (height, width) != pixels.shape[:2]:
        pixels = resize(pixels, (width, height))
    x, y = int(left * (width - size)), int(top * (height - size))
    return pixels[y : y + size, x : x + size]


class RowImages(Dataset):
    """Images by row: rows 0 to N - 1 are the images, rows N to 2N - 1 their mirror images.

    Args:
        folder: N images.
        size: Height and width they are brought to.
        seed: With the epoch and the row, it determines random crops; None crops the center.
    """

    def __init__(self, folder: ImageFolder, size: int, seed: int | None = None) -> None:
        self.folder = folder
        self.size = size
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """Return the image (3, size, size) in [-1, 1] of (epoch, row)."""
        epoch, row = key
        rng = None if self.seed is None else RandomStream.CROP.generator(self.seed, epoch, row)
        pixels = prepare_image(self.folder.read(row % len(self.folder)), self.size, rng)
        x = normalize(to_tensor(pixels))
        return x.flip(-1) if row >= len(self.folder) else x


def image_batches(
    images: RowImages, batches: Sequence[Sequence[int]], workers: int, epoch: int = 0
) -> Iterator[Tensor]:
    """Load batches of rows in order: (n, 3, H, W) each."""
    loader = DataLoader(
        images,
        batch_sampler=[[(epoch, int(row)) for row in batch] for batch in batches],
        num_workers=min(workers, len(batches)),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the global one stays as it is
    )
    return iter(loader)
