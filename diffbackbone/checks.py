"""Checks of a backbone's images and settings."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from diffbackbone.models.base import as_tuple, integer
from diffbackbone.models.ops import is_readable

MIN_SIZE = 32
"""Smallest height and width of an image, in pixels."""


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return a setting's value; raise a ValueError where it is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.200}")
    return value


def check_strides(out_strides: Sequence[int], count: int) -> tuple[int, ...]:
    """Return strides as integers; raise a ValueError unless ``count`` powers of two to 128."""
    given = as_tuple("out_strides", out_strides)
    strides = tuple(map(integer, given))
    if len(strides) != count or not set(strides) <= {2**i for i in range(8)}:
        raise ValueError(
            f"out_strides must be powers of two from 1 to 128, one for each of {count} blocks, got "
            f"{given!r:.200}"
        )
    return strides


def check_images(images: Tensor, channels: int = 3) -> None:
    """Validate a batch of images; compiled and exported programs don't.

    Raises:
        ValueError: Not (N, ``channels``, H, W) floating-point images of at least 32 px in [-1, 1],
            or NaN.
    """
    if torch.compiler.is_compiling():
        return
    kind = ", RGB," if channels == 3 else ""
    what = f"images must be a floating-point tensor (N, {channels}, H, W){kind} in [-1, 1]"
    given, valid = type(images).__name__, False
    if isinstance(images, Tensor):
        given = f"{images.dtype} {tuple(images.shape)}"
        shaped = images.ndim == 4 and images.shape[1] == channels and images.numel() > 0
        valid = shaped and images.is_floating_point() and min(images.shape[-2:]) >= MIN_SIZE
    if not valid:
        raise ValueError(f"{what}, of at least {MIN_SIZE} x {MIN_SIZE} px, got {given}")
    if not is_readable(images):
        return
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()  # NaN wins
    if not (low >= -1.01 and high <= 1.01):
        raise ValueError(
            f"{what}; the values given reach from {low:.4g} to {high:.4g}. Images of 0..255 are "
            "brought there by mean 127.5 and std 127.5"
        )
    if 0 <= low < 0.1 and high > 0.5:
        _warn_unit_range()


@functools.cache  # once per process
def _warn_unit_range() -> None:
    warnings.warn(
        "images must be in [-1, 1], but this batch has no value below 0. If its images are in "
        "[0, 1], scale them by 2 * x - 1. (This is said once.)",
        UserWarning,
        stacklevel=4,
    )
