"""Reads image files as RGB: 8-bit ones as uint8, deeper ones as float32 in [0, 1].

Pixels are (H, W, 3) arrays in torchvision's convention, uint8 in 0..255 or float32 in [0, 1], and
never stretched image by image: the same value in a file is the same value everywhere.

* 8 bits and fewer: Pillow's conversion to RGB (grey, palette, CMYK; alpha is dropped).
* Integers of 16 and 32 bits: 0..65535 becomes 0..1. 12 bits stored in 16 are therefore dark but
  keep all their levels; a value range of 0..4095 brightens them.
* Floats: have to lie in [0, 1] already.
* A value range (low, high) maps images deeper than 8 bits linearly. Values that are not finite or
  outside of the range are errors.
* Color of 16 bits a channel, which Pillow would cut to 8, is read by OpenCV.
* The EXIF orientation is applied.
* Files of several frames are errors, but for the previews in MPO photographs, and the overviews
  and masks in TIFFs, which are left out.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffbackbone.utils import UserError

if TYPE_CHECKING:
    from PIL import Image

_ORIENTATION = 0x0112
_SUBFILE_TYPE, _OVERVIEW_OR_MASK = 254, 1 | 4  # TIFF 6.0, section 8


class ImageError(UserError):
    """An image is broken, or its values have no known range."""


def read_image(
    path: str | os.PathLike[str], value_range: Sequence[float] | None = None
) -> np.ndarray:
    """Read an image as RGB (H, W, 3), uint8 or float32 in [0, 1].

    Args:
        path: The file.
        value_range: Values of images deeper than 8 bits that become 0 and 1.

    Raises:
        ImageError: It is broken, of no known format, or has values outside of the range.
    """
    with _open(path) as image:
        maximum = _color_maximum(image)  # before Pillow decodes anything
        try:
            orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # damaged metadata fails in any way, the image may be whole
            orientation = 1
        if maximum is not None:
            pixels = _scale(_read_color(path, image), value_range or (0, maximum))
        elif image.mode.startswith(("I", "F")):
            values = np.asarray(image)
            known = (0, 1) if image.mode == "F" else (0, 65535)
            pixels = np.repeat(_scale(values, value_range or known)[..., None], 3, axis=-1)
        elif image.mode == "P" and "transparency" in image.info:
            pixels = np.asarray(image.convert("RGBA").convert("RGB"))
        else:
            pixels = np.asarray(image.convert("RGB"))
        return pixels if image.format == "TIFF" else _orient(pixels, orientation)  # by the decoders


def check_header(path: str | os.PathLike[str]) -> None:
    """Raise an ImageError for an image of no known format or of several frames."""
    with _open(path):
        pass


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image; what fails meanwhile becomes an error that names the file."""
    from PIL import Image

    try:
        # by name, Pillow would map the file, and scramble TIFFs of orientation 5 to 8
        with open(path, "rb") as file, Image.open(file) as image:
            _check_frames(image)
            yield image
    except Exception as error:  # a damaged file can fail in the reader in any way
        raise ImageError(f"image {path}: {error}") from error


def _check_frames(image: Image.Image) -> None:
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format == "MPO":
        return
    for frame in range(1, count):
        image.seek(frame)
        if not getattr(image, "tag_v2", {}).get(_SUBFILE_TYPE, 0) & _OVERVIEW_OR_MASK:
            raise ImageError(f"{count} frames; store each in a file of its own")
    image.seek(0)


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
    """Values (H, W, 3) of color of 16 bits a channel."""
    try:
        import cv2
    except ImportError as error:
        raise ImageError("16 bits a channel need OpenCV: pip install opencv-python") from error

    values = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise ImageError(f"{image.mode} of 16 bits a channel that OpenCV can't read")
    return values[..., 2::-1]


def _scale(values: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    """Map a range of values to [0, 1], float32.

    Raises:
        ImageError: That is no range, or values are outside of it or not finite.
    """
    low, high = value_range
    least, most = values.min(), values.max()
    if not -np.inf < low <= least <= most <= high < np.inf or low == high:
        raise ImageError(
            f"values from {least:g} to {most:g}, outside of {low:g} to {high:g}: give their true "
            "range (--value-range LOW HIGH)"
        )
    exact = values.astype(np.promote_types(values.dtype, np.float32))
    return ((exact - low) / (high - low)).astype(np.float32)


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image upright by its EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image to (width, height) by Pillow's bicubic filter, with antialiasing."""
    from PIL import Image

    def resized(part: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(part))
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))

    if pixels.dtype == np.uint8:
        return resized(pixels)
    channels = [resized(pixels[..., i]) for i in range(pixels.shape[-1])]
    return np.stack(channels, axis=-1).clip(0, 1)  # the filter overshoots


def to_tensor(pixels: np.ndarray) -> Tensor:
    """An image (H, W, C) as a tensor (C, H, W) of the same type."""
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def normalize(images: Tensor) -> Tensor:
    """Images of :func:`to_tensor` as the backbone takes them, float32 in [-1, 1]."""
    return images.float() / (127.5 if images.dtype == torch.uint8 else 0.5) - 1


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """An image for display, rounded to 8 bits."""
    return pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8)
