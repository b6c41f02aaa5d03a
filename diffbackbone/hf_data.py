"""A folder of images and masks as data sets for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from diffbackbone.images import normalize, read_image, to_tensor
from diffbackbone.utils import RandomStream, UserError

VOID = 255
"""Label of pixels that are neither trained on nor evaluated."""
ADE20K = "ADEChallengeData2016"


def find_data(
    folder: Path, ignore_zero: bool = False
) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]], list[str], bool]:
    """Find the images, masks and classes of a folder; see ``SegmentationConfig.data``.

    Returns:
        Image and mask files to train on, those to evaluate on, names of the classes, and
        ``ignore_zero``, which is True for ADE20K.
    """
    root = folder / ADE20K if (folder / ADE20K).is_dir() else folder
    masks = root / ("masks" if (root / "masks").is_dir() else "annotations")
    ignore_zero = ignore_zero or root.name == ADE20K

    def pairs(split: str) -> list[tuple[Path, Path]]:
        images = sorted(path for path in (root / "images" / split).iterdir() if path.is_file())
        found = [(path, masks / split / f"{path.stem}.png") for path in images]
        if missing := [mask for _, mask in found if not mask.is_file()]:
            raise UserError(f"{len(missing)} images have no mask, for example {missing[0]}")
        return found

    if (root / "images" / "training").is_dir():
        training, validation = pairs("training"), pairs("validation")
    else:
        training = pairs("")
        validation = training[4::5]
        del training[4::5]
    if not training or not validation:
        raise UserError(f"{root} has {len(training)} training and {len(validation)} other images")
    for name, heading in (("objectInfo150.txt", 1), ("classes.txt", 0)):
        if (root / name).is_file():
            lines = (root / name).read_text().splitlines()[heading:]
            classes = [line.split("\t")[-1].strip() for line in lines if line.strip()]
            return training, validation, classes, ignore_zero
    labels = set().union(*(np.unique(read_mask(mask, ignore_zero)) for _, mask in training))
    return training, validation, [str(i) for i in range(max(labels - {VOID}) + 1)], ignore_zero


def read_mask(path: Path, ignore_zero: bool) -> np.ndarray:
    """Read class numbers (H, W), int64."""
    with Image.open(path) as image:
        labels = np.array(image).astype(np.int64)
    if labels.ndim != 2:
        raise UserError(f"the mask {path} has {labels.shape[-1]} channels, not class numbers")
    return np.where(labels == 0, VOID, labels - (labels != VOID)) if ignore_zero else labels


class Scenes(torch.utils.data.Dataset):
    """Images (3, H, W) in [-1, 1] and labels (H, W), as arguments of a segmenter.

    Args:
        pairs: Image and mask files.
        classes: Number of classes.
        ignore_zero: See :func:`find_data`.
        augment: Random transform, for training. The data set is then ``count`` items long, in
            shuffled order, and ``seed`` and its index determine an item.
        count: Number of items; 0 for one of each pair.
        seed: Seed of order and transforms.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        classes: int,
        ignore_zero: bool,
        augment: Callable[..., Any] | None = None,
        count: int = 0,
        seed: int = 0,
    ) -> None:
        self.pairs, self.classes, self.ignore_zero = pairs, classes, ignore_zero
        self.augment, self.length, self.seed = augment, count or len(pairs), seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(index, len(self.pairs))
        if self.augment is not None:
            order = RandomStream.ORDER.generator(self.seed, epoch)
            place = order.permutation(len(self.pairs))[place]
        image_path, mask_path = self.pairs[place]
        labels = read_mask(mask_path, self.ignore_zero)
        if labels.max(initial=0, where=labels != VOID) >= self.classes:
            raise UserError(f"{mask_path} has labels beyond the {self.classes} classes")
        image = tv_tensors.Image(normalize(to_tensor(read_image(image_path))))
        mask = tv_tensors.Mask(labels)
        if self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                key = RandomStream.CROP.generator(self.seed, index).integers(2**62)
                torch.manual_seed(int(key))
                image, mask = self.augment(image, mask)
        return {"pixel_values": torch.as_tensor(image), "labels": torch.as_tensor(mask)}


def random_crop(size: int, augment: bool = False) -> v2.Transform:
    """Return the transform of an image in [-1, 1] and its labels to a square crop.

    With ``augment`` images are flipped and scaled, too; their longer side is one to three crops.
    """
    fill = {tv_tensors.Image: 0.0, tv_tensors.Mask: VOID}
    crop = v2.RandomCrop((size, size), pad_if_needed=True, fill=fill)
    if not augment:
        return crop
    jitter = v2.ScaleJitter((size, size), (1.0, 3.0))
    return v2.Compose([v2.RandomHorizontalFlip(), jitter, crop])
