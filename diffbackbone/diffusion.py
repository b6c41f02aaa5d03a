"""The forward (noising) process: schedules, Eq. 2 of the paper, and where the noise comes from."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffbackbone.models.base import as_tuple, integer
from diffbackbone.utils import hash_integers

NOISE_POLICIES = ("random", "fixed", "image", "none")
_WITHOUT_FLOAT64 = ("mps",)


class NoiseSchedule:
    """Variance schedule of a diffusion model.

    Args:
        name: ``"linear"`` (Ho et al., 2020), ``"cosine"`` (Nichol and Dhariwal, 2021) or the betas
            of all timesteps.

    Attributes:
        num_timesteps: Number of timesteps T; 1000, or that of the betas where they are given.
        alphas_cumprod: (T,) float64, the product of 1 - beta up to and including timestep t.

    Raises:
        ValueError: Unknown schedule.
    """

    def __init__(self, name: str | Sequence[float] = "linear") -> None:
        if not isinstance(name, str):
            betas = np.array(name, dtype=np.float64)
            name = f"betas {zlib.crc32(betas.tobytes()):08x}"
        elif name == "linear":
            betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
        elif name == "cosine":
            steps = np.arange(1001, dtype=np.float64) / 1000
            alpha_bar = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        else:
            raise ValueError(f"unknown noise schedule {name!r}; choose 'linear' or 'cosine'")
        self.name = name
        self.num_timesteps = len(betas)
        alphas_cumprod = np.cumprod(1.0 - betas)
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod)
        # as numbers too: under torch.export a tensor's value can't be read
        self._alphas_cumprod: list[float] = alphas_cumprod.tolist()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, num_timesteps={self.num_timesteps})"

    def check_timestep(self, t: int) -> int:
        """Return a timestep as an int; a ValueError says what is allowed, 0 to T - 1."""
        number = integer(t)
        if number is None or not 0 <= number < self.num_timesteps:
            raise ValueError(
                f"timestep must be an integer from 0 to {self.num_timesteps - 1} (0-based index "
                f"into the schedule), got {t!r:.200}"
            )
        return number

    def check_timesteps(self, timesteps: int | Iterable[int]) -> tuple[int, ...]:
        """Validate one or more timesteps, each given once; see :meth:`check_timestep`."""
        given = as_tuple("timesteps", timesteps)
        numbers = tuple(map(self.check_timestep, given))
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"timesteps must name at least one, each once, got {given!r:.200}")
        return numbers

    def add_noise(self, x_start: Tensor, t: int | Tensor, noise: Tensor | None) -> Tensor:
        """Noise images to timestep t (Eq. 2): sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

        Args:
            x_start: Images x_0 (N, C, H, W) in [-1, 1].
            t: 0-based timestep, one for the batch or (N,).
            noise: Standard normal noise that broadcasts to ``x_start``; None leaves the noise out.

        Returns:
            x_t, of the shape and type of ``x_start``.

        Raises:
            ValueError: A timestep is out of range.
        """
        if isinstance(t, Tensor):
            t = t.reshape(-1).cpu()  # not every device has float64
            if t.min() < 0 or t.max() >= self.num_timesteps:
                last = self.num_timesteps - 1
                raise ValueError(f"timesteps must be from 0 to {last}, got {t.tolist()}")
            alpha_bar = self.alphas_cumprod[t][:, None, None, None]
            signal = alpha_bar.sqrt().float().to(x_start.device)
            sigma = (1 - alpha_bar).sqrt().float().to(x_start.device)
        else:
            alpha_bar = self._alphas_cumprod[self.check_timestep(t)]
            signal, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x_t = signal * x_start.float()
        if noise is not None:
            x_t = x_t + sigma * noise.float()
        return x_t.to(x_start.dtype)


def coordinate_noise(
    channels: int,
    height: int,
    width: int,
    seed: int | Tensor = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Standard normal noise whose value at a pixel depends on (seed, channel, y, x) alone.

    Padding an image or putting it into another batch changes nothing. A hash of the coordinates
    gives two uniform numbers, from which Box and Muller's transform makes a normal one.

    Returns:
        Noise (channels, height, width), float32; (N, channels, height, width) for seeds (N,).
    """
    if device is not None and torch.device(device).type in _WITHOUT_FLOAT64:
        seed = seed.cpu() if isinstance(seed, Tensor) else seed
        return coordinate_noise(channels, height, width, seed).to(device)
    if isinstance(seed, Tensor):
        seed = seed[:, None, None, None]
    key = _hash_coordinates(channels, height, width, (seed & 0xFFFFFFFF) + 0x9E3779B9, device)
    uniform = (key.double() + 0.5) / 2**32  # in (0, 1), never 0
    angle = (hash_integers(key ^ 0x5851F42D).double() + 0.5) * (2 * math.pi / 2**32)
    return (torch.sqrt(-2 * torch.log(uniform)) * torch.cos(angle)).float()


class FixedNoise:
    """Coordinate noise that is kept from call to call.

    The field grows to hold all sizes asked for, unless that takes more than twice the values of the
    present size; then only the present size is kept.
    """

    def __init__(self) -> None:
        self._made_for: tuple[Any, ...] = ()
        self._field = torch.empty(0, 0, 0)

    def __call__(
        self, channels: int, height: int, width: int, seed: int, device: torch.device
    ) -> Tensor:
        """Return :func:`coordinate_noise` (channels, height, width)."""
        made_for = channels, seed, device
        if torch.compiler.is_compiling() and not (
            _is_exporting() and self._made_for == made_for and self._holds(height, width)
        ):
            return coordinate_noise(channels, height, width, seed, device)
        if self._made_for != made_for:
            self._made_for, self._field = made_for, torch.empty(channels, 0, 0)
        if not self._holds(height, width):
            size = max(self._field.shape[1], height), max(self._field.shape[2], width)
            if math.prod(size) > 2 * height * width:
                size = height, width
            self._field = coordinate_noise(channels, *size, seed, device)
        return self._field[:, :height, :width]

    def _holds(self, height: int, width: int) -> bool:
        return self._field.shape[1] >= height and self._field.shape[2] >= width


def _is_exporting() -> bool:
    """Whether ``torch.export`` runs; kept noise becomes a constant, which any runtime can read."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()  # since torch 2.7


def image_seeds(images: Tensor, seed: int = 0) -> Tensor:
    """Seeds that depend on the images' pixels, for noise that differs from image to image.

    Pixels are rounded to 8 bits first, so that the precision of normalization does not matter.
    Pixels that are exactly 0 don't count: frameworks pad batches with them, and no pixel of an
    8-bit image becomes 0 in [-1, 1].

    Args:
        images: (N, C, H, W) in [-1, 1].
        seed: Another seed gives other seeds.

    Returns:
        (N,) integers from 0 to 2^32 - 1, int64.
    """
    pixels = ((images.detach().float() + 1) * 127.5).round().long()
    mixed = hash_integers(_hash_coordinates(*images.shape[1:], 0, images.device) ^ pixels)
    total = torch.where(images != 0, mixed, 0).sum(dim=(1, 2, 3))  # exact in any order
    return hash_integers(hash_integers(total ^ (total >> 32)) + (seed & 0xFFFFFFFF))


def _hash_coordinates(
    channels: int, height: int, width: int, seed: int | Tensor, device: torch.device | None
) -> Tensor:
    """Hash (channel, y, x) and the seed to integers below 2^32, (..., channels, height, width)."""
    c = torch.arange(channels, device=device)[:, None, None]
    y = torch.arange(height, device=device)[:, None]
    x = torch.arange(width, device=device)
    return hash_integers(hash_integers(hash_integers(c + seed) ^ y) ^ x)
