"""Images, crops, timesteps and noise of a training run, all by the number of the example."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffbackbone.images import SUFFIXES, normalize, read_image, resize, to_tensor
from diffbackbone.utils import RandomStream, UserError


def find_images(root: Path) -> list[Path]:
    """List the images of a folder and its subfolders.

    Raises:
        UserError: It has none.
    """
    paths = [
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if not paths:
        raise UserError(f"folder {root} does not exist or has no images ({', '.join(SUFFIXES)})")
    return sorted(paths)


def describe_images(root: Path, paths: Sequence[Path]) -> str:
    """Return the number of the images and a digest of their names and sizes."""
    lines = [f"{path.relative_to(root).as_posix()}\t{path.stat().st_size}" for path in paths]
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{len(paths)} images, {digest[:16]}"


@dataclasses.dataclass
class Examples(Dataset):
    """Training examples by their number in the run; each image comes once in an epoch.

    Order, crops, flips, timesteps and noise depend on the seed and the number alone.
    """

    paths: Sequence[Path]
    size: int
    """Height and width of the crops."""
    num_timesteps: int = 1000
    seed: int = 0
    flip: bool = True
    """Mirror half of the crops."""
    shrink: float | None = None
    """Shrink images to a short side of at most ``shrink * size``."""
    value_range: Sequence[float] | None = None
    """See :func:`diffbackbone.images.read_image`."""
    channels: int = 3
    """Channels of the images."""
    _order: tuple[int, np.ndarray] | None = None  # of an epoch

    def index(self, number: int) -> int:
        """Return the index of an example's image."""
        epoch, position = divmod(number, len(self.paths))
        if self._order is None or self._order[0] != epoch:
            random = RandomStream.PERMUTATION.generator(self.seed, epoch)
            self._order = (epoch, random.permutation(len(self.paths)))
        return int(self._order[1][position])

    def crop(self, number: int) -> Tensor:
        """Return an example's crop (channels, size, size) in [-1, 1]."""
        pixels = read_image(self.paths[self.index(number)], self.value_range, self.channels)
        short = min(pixels.shape[:2])
        wanted = max(short, self.size)
        if self.shrink is not None:
            wanted = min(wanted, round(self.shrink * self.size))
        if wanted != short:
            height, width = (max(wanted, round(side * wanted / short)) for side in pixels.shape[:2])
            pixels = resize(pixels, (width, height))
        random = RandomStream.CROP.generator(self.seed, number)
        left, top = (int(random.integers(pixels.shape[i] - self.size + 1)) for i in (1, 0))
        pixels = pixels[top : top + self.size, left : left + self.size]
        if self.flip and RandomStream.FLIPS.generator(self.seed, number).random() < 0.5:
            pixels = pixels[:, ::-1]
        return normalize(to_tensor(pixels))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return ``x_start`` and ``noise`` (channels, size, size), and the 0-based timestep t."""
        t = RandomStream.TIMESTEP.generator(self.seed, number).integers(self.num_timesteps)
        noise = draw_noise(RandomStream.NOISE, self.seed, number, self.size, self.channels)
        return {"x_start": self.crop(number), "t": int(t), "noise": noise}


def draw_noise(
    stream: RandomStream, seed: int, number: int, size: int, channels: int = 3
) -> Tensor:
    """Return standard normal noise (channels, size, size) by its number."""
    random = stream.generator(seed, number)
    return torch.from_numpy(random.standard_normal((channels, size, size), dtype=np.float32))
