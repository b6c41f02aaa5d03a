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

from diffbackbone.images import SUFFIXES, check_images, normalize, read_image, resize, to_tensor
from diffbackbone.utils import RandomStream, UserError

MIN_CROP = 0.8
"""Smallest random crop as a share of the short side, as in the published code."""


@dataclass(frozen=True)
class ImageFolder:
    """Images in a fixed order: paths relative to a folder, class indices (N,), class names.

    For ``value_range`` and ``channels`` see :func:`diffbackbone.images.read_image`.
    """

    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    value_range: Sequence[float] | None = None
    channels: int = 3

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Iterable[int]) -> ImageFolder:
        """Return some of the images, in the given order."""
        rows = np.array(list(indices), dtype=np.int64)
        return replace(self, paths=tuple(self.paths[i] for i in rows), labels=self.labels[rows])

    def read(self, index: int) -> np.ndarray:
        """Read an image (H, W, channels), see :func:`diffbackbone.images.read_image`."""
        return read_image(self.root / self.paths[index], self.value_range, self.channels)

    def check(self) -> None:
        """Raise an ImageError for a broken image, see :func:`diffbackbone.images.check_images`."""
        check_images([self.root / path for path in self.paths], self.value_range, self.channels)

    def digest(self) -> str:
        """Return the SHA-256 of the paths, labels, file sizes and times of the last change."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels.tolist()):
            stat = (self.root / path).stat()
            digest.update(json.dumps([path, label, stat.st_size, stat.st_mtime_ns]).encode())
        return digest.hexdigest()


def list_folder(
    root: Path,
    classes: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    **options: Any,
) -> ImageFolder:
    """List a folder with one subfolder per class; the classes are those of training, if given.

    ``only`` leaves out all classes but these. Options are ``value_range`` and ``channels`` of
    :class:`ImageFolder`.

    Raises:
        UserError: There is one class only, or one that ``classes`` lacks.
        FileNotFoundError: A class has no images.
    """
    names = [name for name in find_classes(str(root))[0] if not name.startswith(".")]
    if only is not None:
        names = sorted(set(only))
    if classes is None and len(names) < 2:
        raise UserError(f"{root} must have a subfolder for each of at least two classes")
    classes = classes or names
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(f"{root} has classes that training lacks: {', '.join(unknown[:5])}")
    index = {name: i for i, name in enumerate(classes) if name in names}
    return _list(root, index, classes, options)


def list_images(root: Path, **options: Any) -> ImageFolder:
    """List all images below a folder, as one class with an empty name; see list_folder."""
    try:
        return _list(root, {"": 0}, ("",), options)
    except FileNotFoundError as error:
        raise UserError(f"{root} has no images") from error


def _list(
    root: Path, index: dict[str, int], classes: Sequence[str], options: dict[str, Any]
) -> ImageFolder:
    def is_image(path: str) -> bool:
        name = os.path.basename(path).lower()
        return name.endswith(SUFFIXES) and not name.startswith(".")

    samples = make_dataset(str(root), index, is_valid_file=is_image)
    paths = tuple(Path(path).relative_to(root).as_posix() for path, _ in samples)
    labels = np.array([label for _, label in samples], dtype=np.int64)
    return ImageFolder(root, paths, labels, tuple(classes), **options)


def choose_subset(folder: ImageFolder, subset: str, seed: int) -> np.ndarray:
    """Return the ascending indices of the training images that a share or a list file names.

    A share ("1%", "0.01") is drawn with equally many images per class where the classes are large
    enough; a smaller share is part of a larger one. A file has one path a line, relative to the
    folder, or a bare file name that occurs once.

    Raises:
        UserError: An unknown image, or a class is left without images.
    """
    try:
        share = float(subset.strip().removesuffix("%")) / (100 if "%" in subset else 1)
    except ValueError:
        chosen = _read_list(folder, Path(subset).expanduser())
    else:
        # 12,811 and 128,116 images of ImageNet, as in Table 7
        count = int(share * len(folder) + 1e-6) if 0 < share <= 1 else 0
        chosen = _draw_balanced(folder.labels, count, seed)
    if absent := set(range(len(folder.classes))) - set(folder.labels[chosen].tolist()):
        raise UserError(
            f"subset {subset} has no image of class {folder.classes[min(absent)]}; give a share up "
            "to 1 (100%) or a list file that has some of each class"
        )
    return chosen


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
    names = [p.rsplit("/", 1)[-1] for p in folder.paths]
    count = Counter(names)
    index = {name: i for i, name in enumerate(names) if count[name] == 1}
    index.update((p, i) for i, p in enumerate(folder.paths))
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if unknown := [line for line in lines if line and line not in index]:
        raise UserError(f"{path}: {unknown[0]} is no image of {folder.root}, or several")
    return np.array(sorted({index[line] for line in lines if line}), dtype=np.int64)


Split = tuple[np.ndarray, np.ndarray]
"""Ascending indices of the training images to learn from, and to select by."""


def split_holdout(labels: np.ndarray, share: float, seed: int) -> Split:
    """Hold out a stratified share of images with labels (N,): one per class on average, at least.

    Each class needs two images.
    """
    classes = len(np.unique(labels))
    held = min(max(round(share * len(labels)), classes), len(labels) - classes)
    splitter = StratifiedShuffleSplit(1, test_size=held, random_state=_random_state(seed))
    learn, held_out = next(splitter.split(labels, labels))
    return np.sort(learn), np.sort(held_out)


def split_folds(labels: np.ndarray, folds: int, seed: int) -> list[Split]:
    """Hold out stratified folds of images with labels (N,), one after the other.

    There are fewer folds where the smallest class has fewer images; it needs two.
    """
    smallest = int(np.unique(labels, return_counts=True)[1].min())
    splitter = StratifiedKFold(min(folds, smallest), shuffle=True, random_state=_random_state(seed))
    return list(splitter.split(labels, labels))


def _random_state(seed: int) -> int:
    return int(RandomStream.HOLDOUT.generator(seed).integers(2**32))


def prepare_image(
    pixels: np.ndarray, size: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Resize and crop an image (H, W, 3) to ``size`` x ``size``.

    Without ``rng`` the center is cropped, else a square of 0.8 to 1 short sides at a random place,
    as in the published code.
    """
    short, left, top = size, 0.5, 0.5
    if rng is not None:
        short = int(rng.integers(size, int(np.ceil(size / MIN_CROP)) + 1))
        left, top = rng.random(2)
    pixels = resize_short_side(pixels, short)
    height, width = pixels.shape[:2]
    x, y = int(left * (width - size)), int(top * (height - size))
    return pixels[y : y + size, x : x + size]


def resize_short_side(pixels: np.ndarray, short: int) -> np.ndarray:
    """Resize an image (H, W, C) so that its short side has ``short`` pixels."""
    scale = short / min(pixels.shape[:2])
    height, width = (max(short, round(side * scale)) for side in pixels.shape[:2])
    if (height, width) == pixels.shape[:2]:
        return pixels
    return resize(pixels, (width, height))


class RowImages(Dataset):
    """N images of a size by row: rows N to 2N - 1 are mirror images.

    A seed, the epoch and the row determine random crops; without a seed, the center is cropped.
    """

    PREPROCESSING = "upright RGB, short side to the size (Pillow, bicubic), center crop, [-1, 1]"

    def __init__(self, folder: ImageFolder, size: int, seed: int | None = None) -> None:
        self.folder = folder
        self.size = size
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """Return the image (C, size, size) in [-1, 1] of (epoch, row)."""
        epoch, row = key
        rng = None if self.seed is None else RandomStream.CROP.generator(self.seed, epoch, row)
        pixels = prepare_image(self.folder.read(row % len(self.folder)), self.size, rng)
        x = normalize(to_tensor(pixels))
        return x.flip(-1) if row >= len(self.folder) else x


def load_batches(
    dataset: Dataset, batches: Sequence[Sequence[int]], workers: int, epoch: int = 0
) -> Iterator[Any]:
    """Load batches of rows, in order, of a data set that is indexed by (epoch, row)."""
    loader = DataLoader(
        dataset,
        batch_sampler=[[(epoch, int(row)) for row in batch] for batch in batches],
        num_workers=min(workers, len(batches)),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # leaves the global one alone
    )
    return iter(loader)
