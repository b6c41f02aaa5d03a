"""The training objective, the sampler, averaged weights and the learning rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffbackbone import NoiseSchedule
from diffbackbone.pretrain.objective import DiffusionObjective, average_weights, rate_factor
from diffbackbone.pretrain.sampling import sample_ddim, save_grid


def wave(n: int, c: int, frequency: float) -> torch.Tensor:
    x = torch.sin(frequency * torch.arange(n * c * 16, dtype=torch.float64))
    return x.reshape(n, c, 4, 4).float()


X_START = (1.2 * wave(4, 3, 0.7)).clamp(-1, 1)  # some values lie on the edges
NOISE = 1.5 * wave(4, 3, 1.3)
OUTPUT = 1.2 * wave(4, 6, 2.9)
T = torch.tensor([0, 1, 500, 999])
# what guided-diffusion's own code computes for these inputs
THEIR_SIMPLE = [1.825033, 1.888139, 1.795489, 1.855311]
THEIR_LOSS = {
    "linear": [4.179399, 3.113041, 1.809768, 1.882625],
    "cosine": [3.654664, 3.044151, 1.803579, 1338.843],
}
THEIR_SAMPLE = {  # the first values of 50 steps of DDIM
    "linear": [-0.01844, 1.0, 0.857987, -1.0, -1.0, 0.388133, 1.0, 0.551983],
    "cosine": [-0.220084, 1.0, 0.868363, -1.0, -1.0, 0.314661, 1.0, 0.541924],
}


def losses(name: str = "linear", learn_variance: bool = True, output: torch.Tensor = OUTPUT):
    schedule = NoiseSchedule(name)
    x_t = schedule.add_noise(X_START, T, NOISE)
    channels = 6 if learn_variance else 3
    objective = DiffusionObjective(schedule, learn_variance)
    return objective(output[:, :channels], X_START, x_t, T, NOISE)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_losses_are_guided_diffusions(name):
    simple = losses(name, learn_variance=False)
    assert set(simple) == {"loss", "simple"}
    torch.testing.assert_close(simple["loss"], torch.tensor(THEIR_SIMPLE), rtol=2e-6, atol=0)
    hybrid = losses(name)
    torch.testing.assert_close(hybrid["simple"], simple["loss"], rtol=0, atol=0)
    torch.testing.assert_close(hybrid["loss"], torch.tensor(THEIR_LOSS[name]), rtol=1e-5, atol=0)


def test_variance_does_not_teach_the_mean():
    output = OUTPUT.clone().requires_grad_()
    losses(output=output)["vlb"].sum().backward()
    assert not output.grad[:, :3].any()
    assert output.grad[:, 3:].any(dim=3).any(dim=2).any(dim=1).all()
    output.grad = None
    losses(output=output)["loss"].sum().backward()
    torch.testing.assert_close(output.grad[:, :3], 2 * (OUTPUT[:, :3] - NOISE) / 48)


def test_loss_is_float32_for_bfloat16_outputs():
    assert losses(output=OUTPUT.bfloat16())["loss"].dtype == torch.float32


def test_output_needs_the_channels_of_the_objective():
    with pytest.raises(ValueError, match="has 3 output channels"):
        losses(output=OUTPUT[:, :3])


def test_grid_shows_every_image_in_its_place(tmp_path):
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    save_grid(values[:, None, None, None].expand(5, 3, 4, 6), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture, dtype=int)
    assert pixels.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    centers = [pixels[4 + 6 * (i // 3), 5 + 8 * (i % 3), 0] for i in range(6)]
    np.testing.assert_allclose(centers, [0, 64, 128, 191, 255, 255], atol=1)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddim_is_guided_diffusions(name):
    def predict(x, t):
        return 0.6 * x + 0.3 * torch.sin(torch.tensor(0.01 * t))

    made = sample_ddim(predict, NoiseSchedule(name), NOISE[:1], 50)
    expected = torch.tensor(THEIR_SAMPLE[name])
    torch.testing.assert_close(made.flatten()[:8], expected, rtol=0, atol=2e-5)


def test_ddim_finds_the_image_that_an_oracle_knows():
    schedule = NoiseSchedule("linear")

    def oracle(x, t, x_start=X_START):
        a = float(schedule.alphas_cumprod[t])
        eps = (x - math.sqrt(a) * x_start) / math.sqrt(1 - a)
        return torch.cat([eps, torch.full_like(eps, math.nan)], dim=1)  # the variance isn't read

    made = sample_ddim(oracle, schedule, NOISE, 10)
    torch.testing.assert_close(made, X_START, rtol=0, atol=1e-4)
    clipped = sample_ddim(lambda x, t: oracle(x, t, 3 * X_START), schedule, NOISE, 10)
    torch.testing.assert_close(clipped, (3 * X_START).clamp(-1, 1), rtol=0, atol=1e-4)


def test_average_forgets_its_start_and_then_keeps_its_decay():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    average = average_weights(model, 0.5)
    expected = 1.0
    for index, value in enumerate([2.0, 5.0, -1.0, *[4.0] * 20]):
        torch.nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        decay = min(0.5, (1 + index) / (10 + index))
        expected = decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 4.0


def test_learning_rate_rises_stays_and_falls():
    factors = [rate_factor(i, (4, 12, 4)) for i in range(12)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rate_factor(10**6, (4, 12, 0)) == rate_factor(0, (0, 12, 0)) == 1
