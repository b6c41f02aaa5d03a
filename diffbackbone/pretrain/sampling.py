"""Generate images by DDIM (Song et al., "Denoising Diffusion Implicit Models", 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from diffbackbone.diffusion import NoiseSchedule
from diffbackbone.utils import atomic_write


@torch.no_grad()
def sample_ddim(
    predict: Callable[[Tensor, int], Tensor],
    schedule: NoiseSchedule,
    noise: Tensor,
    steps: int = 50,
) -> Tensor:
    """Generate images from noise by DDIM with eta = 0; x_0 is clipped in each step.

    Args:
        predict: A U-Net, or any function that returns its output for x_t and one timestep.
        schedule: The schedule that it was trained with.
        noise: Standard normal noise (N, C, H, W).
        steps: Number of steps, at most one a timestep, evenly spaced from timestep 0.

    Returns:
        Images (N, C, H, W) in [-1, 1].
    """
    times = [index * schedule.num_timesteps // steps for index in range(steps)]
    signals = [1.0, *(float(schedule.alphas_cumprod[t]) for t in times)]
    x = noise.float()
    for index in range(steps, 0, -1):
        now, then = signals[index], signals[index - 1]
        eps = predict(x, times[index - 1])[:, : noise.shape[1]].float()
        x_start = ((x - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-1, 1)
        eps = (x - math.sqrt(now) * x_start) / math.sqrt(1 - now)
        x = math.sqrt(then) * x_start + math.sqrt(1 - then) * eps
    return x


def save_grid(images: Tensor, path: Path) -> None:
    """Write images (N, C, H, W) in [-1, 1] side by side as one PNG.

    The first three channels are shown as RGB, one or the first of two as grey.
    """
    columns = math.ceil(math.sqrt(len(images)))
    shown = images[:, : 3 if images.shape[1] >= 3 else 1]
    pixels = (shown.float() + 1) / 2
    options = {"format": "png", "nrow": columns, "pad_value": 1}
    atomic_write(path, lambda file: save_image(pixels, file, **options))
