"""Generate images by DDIM (Song et al., 2021) or DDPM (Ho et al., 2020)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
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


@torch.no_grad()
def sample_ddpm(
    predict: Callable[[Tensor, int], Tensor],
    schedule: NoiseSchedule,
    noises: Iterator[Tensor],
    steps: int,
) -> Tensor:
    """Generate images from noise by ancestral sampling; x_0 is clipped in each step.

    A U-Net with twice the channels predicts its variance, between the smaller one of DDPM and the
    larger one (Nichol & Dhariwal, Eq. 15); with the images' channels, the larger one is taken.

    Args:
        predict: See :func:`sample_ddim`.
        schedule: The schedule that it was trained with.
        noises: New standard normal noise (N, C, H, W) for the start and each step but the last.
        steps: Number of steps, from 2, evenly spaced from the first to the last timestep.

    Returns:
        Images (N, C, H, W) in [-1, 1].
    """
    last = schedule.num_timesteps - 1
    times = [round(index * last / (steps - 1)) for index in range(steps)]
    signals = [1.0, *(float(schedule.alphas_cumprod[t]) for t in times)]
    betas = [1 - now / then for then, now in itertools.pairwise(signals)]
    small = [beta * (1 - then) / (1 - now) for beta, then, now in zip(betas, signals, signals[1:])]
    small[0] = small[1]  # it is 0, which has no logarithm
    large = [small[0], *betas[1:]]
    x = next(noises).float()
    channels = x.shape[1]
    for index in reversed(range(steps)):
        now, then, beta = signals[index + 1], signals[index], betas[index]
        output = predict(x, times[index]).float()
        x_start = (x - math.sqrt(1 - now) * output[:, :channels]) / math.sqrt(now)
        mean = math.sqrt(then) * beta / (1 - now) * x_start.clamp(-1, 1)
        mean += math.sqrt(1 - beta) * (1 - then) / (1 - now) * x
        if index == 0:
            x = mean
            continue
        log_variance = math.log(large[index])
        if output.shape[1] == 2 * channels:
            share = (output[:, channels:] + 1) / 2
            log_variance = share * math.log(beta) + (1 - share) * math.log(small[index])
        x = mean + torch.exp(torch.as_tensor(0.5 * log_variance)) * next(noises)
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
