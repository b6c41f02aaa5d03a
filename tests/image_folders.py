"""Small images, weights and fixtures that tests of the evaluation commands share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffbackbone import UNet, UNetConfig

CLASSES = 3


def write_folder(
    root: Path, per_class: int, seed: int, suffix: str = ".png", contrast: int = 120
) -> None:
    """Noisy images with a stripe whose width and color tell the class, up to 135 clearly."""
    from PIL import Image

    random = np.random.default_rng(seed)
    for c in range(CLASSES):
        folder = root / f"class{c}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(0, 120, (40, 36, 3))
            pixels[:, : 10 + 8 * c, c] += contrast
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}{suffix}")


def fill_zeros(unet: UNet) -> UNet:
    """Give the layers that start at zero weights, so that residual branches do something."""
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return unet


def write_weights(path: Path) -> Path:
    """Guided-diffusion weights of a tiny U-Net whose residual branches do something."""
    torch.manual_seed(3)
    torch.save(fill_zeros(UNet(UNetConfig.from_preset("tiny"))).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(write_weights(tmp_path_factory.mktemp("weights") / "tiny.pt"))


@pytest.fixture(scope="module")
def one_thread():
    """Compute on one thread: runs in this process equal those in subprocesses to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
