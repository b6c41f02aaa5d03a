"""Training a diffusion U-Net from images alone: the objective, averaged weights, samples, export.

Equation 4 of the paper is the objective of Ho et al. (2020). The learned variance is that of Nichol
and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021; the sampler is that of Song
et al., "Denoising Diffusion Implicit Models", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffbackbone.diffusion import NoiseSchedule

VLB_WEIGHT = 0.001
"""Weight of the variational bound beside the simple loss (Nichol and Dhariwal, Section 3.1)."""


class DiffusionObjective:
    """What a diffusion U-Net is trained to minimise, for each image of a batch.

    Without a learned variance it is the simple loss ||noise - eps(x_t, t)||^2 (Eq. 4), averaged
    over channels and pixels. With one the U-Net has as many outputs again: v, by which the log
    variance of a denoising step lies between that of the posterior (v = -1) and that of the noising
    step (v = 1). It learns by the variational bound, whose gradient doesn't reach the predicted
    noise. The bound is in bits for each dimension, summed over the timesteps, and weighs 0.001.

    Args:
        schedule: Noise schedule, of two timesteps at least.
        learn_variance: Whether the U-Net has the additional outputs.

    Raises:
        ValueError: The schedule has a single timestep.
    """

    def __init__(self, schedule: NoiseSchedule, learn_variance: bool = False) -> None:
        if schedule.num_timesteps < 2:
            raise ValueError("the schedule needs at least 2 timesteps, got 1")
        self.schedule = schedule
        self.learn_variance = learn_variance
        signal = schedule.alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        beta = 1 - signal / before
        posterior = beta * (1 - before) / (1 - signal)
        posterior[0] = posterior[1]  # it is zero, whose logarithm isn't finite
        self._tables = {
            "signal": signal.sqrt(),
            "sigma": (1 - signal).sqrt(),
            "mean_x_start": beta * before.sqrt() / (1 - signal),
            "mean_x_t": (1 - before) * (1 - beta).sqrt() / (1 - signal),
            "log_beta": beta.log(),
            "log_posterior": posterior.log(),
        }

    def __call__(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """The loss of each image.

        Args:
            output: The U-Net's output (N, C, H, W), or (N, 2C, H, W) with a learned variance.
            x_start: Images x_0 (N, C, H, W) in [-1, 1].
            x_t: The same noised to t.
            t: 0-based timesteps (N,).
            noise: What they were noised with (N, C, H, W).

        Returns:
            ``loss`` (N,), and its parts ``simple`` and, with a learned variance, ``vlb`` (N,).

        Raises:
            ValueError: The output has another number of channels.
        """
        channels = x_start.shape[1]
        wanted = 2 * channels if self.learn_variance else channels
        if output.shape[1] != wanted:
            how = "with" if self.learn_variance else "without"
            raise ValueError(
                f"the U-Net has {output.shape[1]} output channels; images of {channels} channels "
                f"need {wanted} {how} a learned variance"
            )
        output, x_start, x_t, noise = (x.float() for x in (output, x_start, x_t, noise))
        eps = output[:, :channels]
        simple = (noise - eps).square().flatten(1).mean(1)
        if not self.learn_variance:
            return {"loss": simple, "simple": simple}
        terms = self._bound(eps.detach(), output[:, channels:], x_start, x_t, t)
        vlb = self.schedule.num_timesteps * terms
        return {"loss": simple + VLB_WEIGHT * vlb, "simple": simple, "vlb": vlb}

    def _bound(self, eps: Tensor, v: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term of timestep t (N,), in bits for each dimension."""
        table = {
            name: values.to(t.device)[t].float()[:, None, None, None]
            for name, values in self._tables.items()
        }
        predicted = (x_t - table["sigma"] * eps) / table["signal"]
        true_mean = table["mean_x_start"] * x_start + table["mean_x_t"] * x_t
        mean = table["mean_x_start"] * predicted + table["mean_x_t"] * x_t
        share = (v + 1) / 2
        log_variance = share * table["log_beta"] + (1 - share) * table["log_posterior"]
        excess = table["log_posterior"] - log_variance
        distance = (true_mean - mean).square() * torch.exp(-log_variance)
        divergence = 0.5 * (torch.expm1(excess) - excess + distance)
        likelihood = _log_likelihood(x_start, mean, 0.5 * log_variance)
        last = (t == 0)[:, None, None, None]
        return torch.where(last, -likelihood, divergence).flatten(1).mean(1) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """Logarithm of a normal distribution's mass in the bin of an 8-bit value in [-1, 1]."""

    def below(bound: Tensor) -> Tensor:  # Page's approximation (1977) of the distribution function
        z = (bound - mean) * torch.exp(-log_sigma)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper, lower = below(x + 1 / 255), below(x - 1 / 255)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)  # the outermost bins are open
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


def ddim_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """Evenly spaced timesteps from 0, ascending.

    Raises:
        ValueError: There are not so many.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"the number of steps must lie in 1..{num_timesteps}, got {steps}")
    return [index * num_timesteps // steps for index in range(steps)]


@torch.no_grad()
def sample_ddim(
    predict: Callable[[Tensor, int], Tensor],
    schedule: NoiseSchedule,
    noise: Tensor,
    steps: int = 50,
) -> Tensor:
    """Make images of noise by DDIM, which draws nothing (eta 0); x_0 is clipped in each step.

    Args:
        predict: A U-Net, or anything that gives its output for x_t and one timestep.
        schedule: The schedule that it was trained with.
        noise: Standard normal noise (N, C, H, W).
        steps: Number of steps, evenly spaced over the timesteps.

    Returns:
        Images (N, C, H, W) in [-1, 1].

    Raises:
        ValueError: The number of steps is out of range.
    """
    times = ddim_timesteps(schedule.num_timesteps, steps)
    signals = [1.0, *(float(schedule.alphas_cumprod[t]) for t in times)]
    x = noise.float()
    for index in range(steps, 0, -1):
        now, then = signals[index], signals[index - 1]
        eps = predict(x, times[index - 1])[:, : noise.shape[1]].float()
        x_start = ((x - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-1, 1)
        eps = (x - math.sqrt(now) * x_start) / math.sqrt(1 - now)
        x = math.sqrt(then) * x_start + math.sqrt(1 - then) * eps
    return x


class Ema:
    """Exponential moving average of a model's weights.

    Args:
        model: The model; its weights are where the average starts.
        decay: What the average keeps in an update, in [0, 1). It is less at first:
            (1 + i) / (10 + i) in update i, so that the random start is forgotten soon.

    Attributes:
        weights: The averages by the names of the model's state dict, float32.

    Raises:
        ValueError: The decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.weights = {name: x.detach().float().clone() for name, x in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, index: int) -> None:
        """Take in the model's weights after its 0-based update ``index``."""
        decay = min(self.decay, (1 + index) / (10 + index))
        current = model.state_dict()
        torch._foreach_lerp_(
            list(self.weights.values()),
            [current[name].float() for name in self.weights],
            1 - decay,
        )


def learning_rate(
    base: float, index: int, warmup: int = 0, iterations: int | None = None, decay: int = 0
) -> float:
    """Learning rate of an iteration: linear warm-up, constant, linear to the end.

    Args:
        base: The rate in between.
        index: 0-based iteration.
        warmup: Iterations that it rises over.
        iterations: Number of all iterations, where there is a decay.
        decay: Iterations at the end that it falls over.
    """
    factor = min(1.0, (index + 1) / warmup) if warmup else 1.0
    if decay and iterations is not None:
        factor = min(factor, max(0.0, (iterations - index) / decay))
    return base * factor
