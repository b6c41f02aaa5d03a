"""Batches of images: validation, padding by reflection, and cropping of their maps."""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor

from diffbackbone.models.ops import is_readable

MIN_SIZE = 32
"""Smallest height and width of an image, in pixels."""


def check_images(images: Tensor, channels: int = 3) -> None:
    """Validate a batch of images.

    Raises:
        ValueError: Not (N, ``channels``, H, W) floating-point images of at least 32 px in [-1, 1],
            or NaN.
    """
    if torch.compiler.is_compiling():
        return
    kind = ", RGB" if channels == 3 else ""
    what = f"images must be a floating-point tensor (N, {channels}, H, W){kind} in [-1, 1]"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{what}, got {given}")
    if images.ndim != 4 or images.shape[1] != channels or images.shape[0] == 0:
        raise ValueError(f"{what}, got shape {tuple(images.shape)}")
    if min(images.shape[-2:]) < MIN_SIZE:
        raise ValueError(
            f"images must be at least {MIN_SIZE} x {MIN_SIZE} px, got {tuple(images.shape[-2:])}"
        )
    if not is_readable(images):
        return
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if math.isnan(low) or math.isnan(high):
        raise ValueError(f"{what}; there are NaN values in the batch")
    if low < -1.01 or high > 1.01:
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


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad at the right and bottom by reflection to multiples of ``multiple``.

    Args:
        images: (N, C, H, W), of any size.
        multiple: Positive.

    Returns:
        (N, C, H', W'); the same tensor where nothing is to be padded.
    """
    height, width = (math.ceil(size / multiple) * multiple for size in images.shape[-2:])
    return pad_to_size(images, height, width)


def pad_to_size(images: Tensor, height: int, width: int) -> Tensor:
    """Pad at the right and bottom by reflection, as often as it takes.

    Args:
        images: (N, C, H, W), of any size.
        height: At least H.
        width: At least W.

    Returns:
        (N, C, height, width); the same tensor where nothing is to be padded.
    """
    for dim, padded in ((-2, height), (-1, width)):
        size = images.shape[dim]
        if padded != size:
            period = max(2 * (size - 1), 1)
            index = torch.arange(padded, device=images.device) % period
            index = torch.where(index < size, index, period - index)
            images = images.index_select(dim, index)
    return images


def crop_map(x: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Cut the map of a padded image back to ceil(H / stride) x ceil(W / stride)."""
    return x[..., : math.ceil(height / stride), : math.ceil(width / stride)]
