"""Folders of small images and weights that tests of the classification tools share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffbackbone import UNet, UNetConfig

CLASSES = 3


def write_folder(
    root: Path, per_class: int, seed: int, suffix: str = ".png", contrast: int = 120
) -> None:
    """Noisy images with a stripe whose width and colour tell the class, up to 135 clearly."""
    from PIL import Image

    random = np.random.default_rng(seed)
    for c in range(CLASSES):
        folder = root / f"class{c}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(0, 120, (40, 36, 3))
            pixels[:, : 10 + 8 * c, c] += contrast
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}{suffix}")


def write_weights(path: Path) -> Path:
    """Guided-diffusion weights of a tiny U-Net whose residual branches do something."""
    torch.manual_seed(3)
    unet = UNet(UNetConfig.from_preset("tiny"))
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    torch.save(unet.state_dict(), path)
    return path
