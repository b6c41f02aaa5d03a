"""The training objective, the average of the weights and the learning rate.

The simple loss is Eq. 4 of the paper, of Ho et al. (2020). The learned variance is that of Nichol
and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from diffbackbone.diffusion import NoiseSchedule

VLB_WEIGHT = 0.001
"""Weight of the variational bound beside the simple loss (Nichol and Dhariwal, Section 3.1)."""


class DiffusionObjective:
    """The loss of a diffusion U-Net for each image of a batch.

    Without a learned variance it is ||noise - eps(x_t, t)||^2 (Eq. 4), averaged over channels and
    pixels. With one, the U-Net has twice the output channels: the second half is v, by which the
    log variance of a denoising step is interpolated between that of the posterior (v = -1) and that
    of the noising step (v = 1). It is trained by the variational bound in bits per dimension,
    summed over the timesteps; the bound's gradient does not reach the predicted noise.

    Args:
        schedule: Noise schedule of at least two timesteps.
        learn_variance: Whether the U-Net predicts v.
    """

    def __init__(self, schedule: NoiseSchedule, learn_variance: bool = False) -> None:
        self.schedule = schedule
        self.learn_variance = learn_variance
        signal = schedule.alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        beta = 1 - signal / before
        posterior = beta * (1 - before) / (1 - signal)
        posterior[0] = posterior[1]  # zero has no logarithm
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
        """Compute the loss of each image.

        Args:
            output: The U-Net's output (N, C, H, W), or (N, 2C, H, W) with a learned variance.
            x_start: Images x_0 (N, C, H, W) in [-1, 1].
            x_t: The images noised to t.
            t: 0-based timesteps (N,).
            noise: The noise in x_t (N, C, H, W).

        Returns:
            ``loss`` (N,), and its parts ``simple`` and, with a learned variance, ``vlb`` (N,).

        Raises:
            ValueError: The output has another number of channels.
        """
        channels = x_start.shape[1]
        expected = 2 * channels if self.learn_variance else channels
        if output.shape[1] != expected:
            raise ValueError(
                f"the U-Net has {output.shape[1]} output channels, this objective needs {expected}"
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
        """The bound's term of timestep t (N,), in bits per dimension."""
        table = {
            name: values.float().to(t.device)[t][:, None, None, None]
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
    """Log of a normal distribution's mass in the bin of an 8-bit value in [-1, 1]."""

    def cdf(bound: Tensor) -> Tensor:  # Page's approximation (1977)
        z = (bound - mean) * torch.exp(-log_sigma)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper, lower = cdf(x + 1 / 255), cdf(x - 1 / 255)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)  # the outermost bins are open
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


def average_weights(model: nn.Module, decay: float = 0.9999) -> AveragedModel:
    """Start an exponential moving average of a model's weights, in evaluation mode.

    Args:
        model: The model; the average starts at its weights.
        decay: Share that the average keeps in an update. It is min(decay, (1 + i) / (10 + i)) in
            the 0-based update i, so that the random start is forgotten soon.
    """

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
        number = int(count)  # i + 1: the start counts as one
        kept = min(decay, number / (9 + number))
        torch._foreach_lerp_(averages, weights, 1 - kept)

    average = AveragedModel(model, multi_avg_fn=update)
    average.update_parameters(model)
    return average.eval()


def rate_factor(index: int, schedule: tuple[int, int, int]) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear decay.

    Args:
        index: 0-based iteration.
        schedule: Iterations of the warm-up, of all the run, and of the decay at its end.
    """
    warmup, iterations, decay = schedule
    rise = min(1.0, (index + 1) / warmup) if warmup else 1.0
    return min(rise, max(0.0, (iterations - index) / decay)) if decay else rise
