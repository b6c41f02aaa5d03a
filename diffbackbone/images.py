"""Reads image files as RGB: 8-bit ones as uint8, deeper ones as float32 in [0, 1].

Pixels are (H, W, 3) arrays in torchvision's convention, uint8 in 0..255 or float32 in [0, 1], and
never stretched image by image: the same value in a file is the same value everywhere. Images of
one channel or of any number of channels are read on request.

* 8 bits and fewer: Pillow's conversion to RGB (grey, palette, CMYK; alpha is dropped) or to grey.
* Integers of 16 and 32 bits: 0..65535 becomes 0..1. 12 bits stored in 16 are therefore dark but
  keep all their levels; a value range of 0..4095 brightens them.
* Floats: have to lie in [0, 1] already.
* A value range (low, high) maps images deeper than 8 bits linearly. Values that are not finite or
  outside of the range are errors.
* Arrays of numpy (.npy), (H, W) or (H, W, channels): the range of an integer type becomes 0..1.
* Color of 16 bits a channel, which Pillow would cut to 8, is read by OpenCV.
* The EXIF orientation is applied.
* Files of several frames are errors, but for the previews in MPO photographs, and the overviews
  and masks in TIFFs, which are left out.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffbackbone.utils import UserError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".npy")
CHECK_WHOLE = 20_000
"""Up to this number of images :func:`check_images` decodes all; of more it reads the headers."""
_SUBFILE_TYPE, _OVERVIEW_OR_MASK = 254, 1 | 4  # TIFF 6.0, section 8


class ImageError(UserError):
    """An image is broken, or its values have no known range."""


def read_image(
    path: str | os.PathLike[str], value_range: Sequence[float] | None = None, channels: int = 3
) -> np.ndarray:
    """Read an image (H, W, channels), uint8 or float32 in [0, 1].

    Args:
        path: The file.
        value_range: Values of images deeper than 8 bits that become 0 and 1.
        channels: 3 for RGB, 1 for grey; other numbers are those of a .npy file.

    Raises:
        ImageError: It is broken or has other channels, or values outside of the range.
    """
    with _named(path):
        if Path(path).suffix.lower() == ".npy":
            pixels = _read_array(path, value_range)
        else:
            pixels = _read_picture(path, value_range, "L" if channels == 1 else "RGB")
        if pixels.shape[2:] != (channels,):
            raise ImageError(f"shape {pixels.shape}, expected (H, W, {channels})")
    return pixels


def _read_array(path: str | os.PathLike[str], value_range: Sequence[float] | None) -> np.ndarray:
    """Read a .npy file, which can hold no code."""
    values = np.load(path, allow_pickle=False)
    if values.ndim == 2:
        values = values[..., None]
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f":
        return _scale(values, value_range or (0, 1))
    known = np.iinfo(values.dtype)
    return _scale(values, value_range or (known.min, known.max))


def _read_picture(
    path: str | os.PathLike[str], value_range: Sequence[float] | None, mode: str
) -> np.ndarray:
    """Read an image file in mode RGB or L; deep color stays RGB."""
    from PIL import ImageOps

    with _open(path) as image:
        maximum = _color_maximum(image)  # before Pillow decodes anything
        if maximum is not None:
            return _scale(_read_color(path, image), value_range or (0, maximum))
        image.load()
        with contextlib.suppress(Exception):  # metadata may be damaged where the image is whole
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            known = (0, 1) if image.mode == "F" else (0, 65535)
            values = _scale(np.asarray(image), value_range or known)
            return np.repeat(values[..., None], len(mode), axis=-1)
        palette = image.mode == "P" and "transparency" in image.info
        shown = (image.convert("RGBA") if palette else image).convert(mode)
        return np.asarray(shown).reshape(image.height, image.width, len(mode))


def check_header(path: str | os.PathLike[str]) -> None:
    """Raise an ImageError for an image of no known format or of several frames."""
    with _named(path):
        if Path(path).suffix.lower() == ".npy":
            np.load(path, mmap_mode="r", allow_pickle=False)
            return
        with _open(path):
            pass


def check_images(
    paths: Sequence[Path], value_range: Sequence[float] | None = None, channels: int = 3
) -> None:
    """Raise an ImageError for an image that :func:`read_image` can't read, before work starts."""
    from tqdm import tqdm

    check = check_header
    if len(paths) <= CHECK_WHOLE:
        check = functools.partial(read_image, value_range=value_range, channels=channels)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(check, paths)
        for _ in tqdm(results, "checking images", len(paths), disable=None, leave=False):
            pass


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of a damaged file, which can fail in any way, into ones that name it."""
    try:
        yield
    except Exception as error:
        raise ImageError(f"image {path}: {error}") from error


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    from PIL import Image

    # by name, Pillow would map the file, and scramble TIFFs of orientation 5 to 8
    with open(path, "rb") as file, Image.open(file) as image:
        count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        for frame in range(1, count):
            image.seek(frame)
            if not getattr(image, "tag_v2", {}).get(_SUBFILE_TYPE, 0) & _OVERVIEW_OR_MASK:
                raise ImageError(f"{count} frames; store each in a file of its own")
        image.seek(0)
        yield image


def _color_maximum(image: Image.Image) -> int | None:
    """Largest possible value of color that Pillow would cut to 8 bits, else None."""
    for tile in image.tile:
        codec, arguments = tile[0], tile[3]
        if codec == "ppm" and image.mode == "RGB" and arguments[-1] > 255:
            return arguments[-1]
        found = re.search(r"(\w+);16[BLN]\b", str(arguments))
        if found and not image.mode.startswith("I"):
            if found[1] not in ("RGB", "RGBA", "RGBX", "LA"):
                raise ImageError(f"{found[1]} of 16 bits a channel; store it as RGB")
            return 65535
    return None


def _read_color(path: str | os.PathLike[str], image: Image.Image) -> np.ndarray:
    """Values (H, W, 3) of color of 16 bits a channel, upright."""
    try:
        import cv2
    except ImportError as error:
        raise ImageError("16 bits a channel need OpenCV: pip install opencv-python") from error

    content = np.fromfile(path, dtype=np.uint8)
    values = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if values is None or values.dtype != np.uint16:
        raise ImageError(f"{image.mode} of 16 bits a channel that OpenCV can't read")
    return values[..., ::-1]


def _scale(values: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """Map a range of values to [0, 1], float32; an ImageError where it does not hold them all."""
    low, high = value_range
    least, most = values.min(), values.max()
    if not -np.inf < low <= least <= most <= high < np.inf or low == high:
        raise ImageError(
            f"values from {least:g} to {most:g}, outside of {low:g} to {high:g}: give their true "
            "range (--value-range LOW HIGH)"
        )
    exact = values.astype(np.promote_types(values.dtype, np.float32))
    return ((exact - low) / (high - low)).astype(np.float32)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image to (width, height) by Pillow's bicubic filter, with antialiasing."""
    from PIL import Image

    def resized(part: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(part))
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))

    if pixels.dtype == np.uint8 and pixels.shape[-1] == 3:
        return resized(pixels)
    result = np.stack([resized(pixels[..., i]) for i in range(pixels.shape[-1])], axis=-1)
    return result if pixels.dtype == np.uint8 else result.clip(0, 1)  # the filter overshoots


def to_tensor(pixels: np.ndarray) -> Tensor:
    """An image (H, W, C) as a tensor (C, H, W) of the same type."""
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def normalize(images: Tensor) -> Tensor:
    """Images of :func:`to_tensor` as the backbone takes them, float32 in [-1, 1]."""
    return images.float() / (127.5 if images.dtype == torch.uint8 else 0.5) - 1


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """An image for display, rounded to 8 bits."""
    return pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8)
