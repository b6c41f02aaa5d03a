"""Padding of images by reflection, and cropping of their maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad images to multiples of a number; see :func:`pad_to_size`."""
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
