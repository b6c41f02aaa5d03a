"""Load images of any depth and number of channels in OpenMMLab pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from diffbackbone.images import read_image


@TRANSFORMS.register_module()
class LoadDeepImage(BaseTransform):
    """In place of ``LoadImageFromFile``: 16-bit and float images, grey ones, arrays of numpy.

    Pixels are 0..255 as everywhere in OpenMMLab, uint8 or, for deeper images, float32 that keeps
    all levels; mean and std of 127.5 bring them to [-1, 1]. Three channels come as BGR. OpenMMLab's
    transforms of color take three channels only.

    Args:
        channels: 3 for color, 1 for grey; other numbers are those of .npy files (H, W, channels).
        value_range: Values of images deeper than 8 bits that become 0 and 255; None takes 0 and
            65535 for integers, 0 and 1 for floats, and the range of an array's integer type.
    """

    def __init__(self, channels: int = 3, value_range: Sequence[float] | None = None) -> None:
        self.channels, self.value_range = channels, value_range

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``img`` (H, W, channels), ``img_shape`` and ``ori_shape``."""
        pixels = read_image(results["img_path"], self.value_range, self.channels)
        if pixels.dtype != np.uint8:
            pixels = pixels * np.float32(255)
        if self.channels == 3:
            pixels = np.ascontiguousarray(pixels[..., ::-1])
        shape = pixels.shape[:2]
        return {**results, "img": pixels, "img_shape": shape, "ori_shape": shape}
