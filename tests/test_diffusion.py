"""Schedules, Eq. 2 and the coordinate noise."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffbackbone import NoiseSchedule
from diffbackbone.diffusion import FixedNoise, coordinate_noise, image_seeds


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules_equal_the_reference(name):
    schedule = NoiseSchedule(name)
    with np.load(golden.FILE) as reference:
        steps = [0, 1, 75, 90, 150, 300, 500, 999]
        ours = schedule.alphas_cumprod[steps].numpy()
        assert np.allclose(ours, reference[f"schedule/{name}/alphas_cumprod"], rtol=1e-9, atol=0)
        x_start, noise = (
            torch.from_numpy(golden.normal(key, (2, 3, 8, 8))) for key in ("x0", "eps")
        )
        x_t = schedule.add_noise(x_start, torch.tensor([90, 300]), noise)
        assert golden.relative_error(x_t, reference, f"schedule/{name}/x_t") < 1e-6


def test_number_and_tensor_timesteps_agree():
    schedule = NoiseSchedule()
    x, noise = torch.randn(2, 2, 3, 4, 4)
    one = schedule.add_noise(x, 90, noise)
    assert torch.allclose(one, schedule.add_noise(x, torch.tensor([90, 90]), noise))
    assert torch.allclose(
        schedule.add_noise(x, 90, None), x * schedule.alphas_cumprod[90].sqrt().float()
    )
    assert schedule.add_noise(x.half(), 90, noise).dtype == torch.float16


def test_noise_is_standard_normal_and_uncorrelated():
    noise = coordinate_noise(3, 256, 256)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1
    for dims in ((0,), (1,), (2,), (1, 2)):
        assert abs((noise * noise.roll([1] * len(dims), dims)).mean()) < 0.01
    spectrum = torch.fft.fft2(noise).abs().square().mean(0) / 256**2
    assert spectrum.max() < 15  # a lattice would stand out by orders of magnitude; seen: under 7
    quantiles = torch.quantile(noise[0], torch.tensor([0.025, 0.5, 0.975]))
    assert torch.allclose(quantiles, torch.tensor([-1.96, 0.0, 1.96]), atol=0.03)


def test_noise_depends_on_coordinates_alone():
    small, large = coordinate_noise(3, 40, 50), coordinate_noise(3, 64, 96)
    assert torch.equal(small, large[:, :40, :50])
    assert not torch.equal(small, coordinate_noise(3, 40, 50, seed=1))
    state = torch.get_rng_state()
    coordinate_noise(3, 8, 8)
    assert torch.equal(state, torch.get_rng_state())


class Float64Error(TorchDispatchMode):
    """Refuses float64 on the meta device, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_meta and out.dtype == torch.float64:
            raise TypeError("no float64 on this device")
        return out


def test_devices_without_float64(monkeypatch):
    monkeypatch.setattr("diffbackbone.diffusion._WITHOUT_FLOAT64", ("meta",), raising=False)
    with Float64Error():
        noise = coordinate_noise(3, 8, 8, device=torch.device("meta"))
        assert noise.device.type == "meta"
        NoiseSchedule().add_noise(noise[None], torch.tensor([90]), noise)


def test_noise_is_the_same_in_every_release():
    """Trained weights rely on these values: they must never change."""
    expected = [1.73824, 0.26334, -2.07876]
    assert coordinate_noise(3, 2, 2)[:, 1, 1].tolist() == pytest.approx(expected, abs=1e-4)


def test_image_seeds_depend_on_pixels_of_8_bits():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 6, 7), generator=generator) / 127.5 - 1
    seeds = image_seeds(pixels)
    assert seeds.tolist() == [2009792305, 15321841, 608353057]  # trained weights rely on them, too
    assert torch.equal(image_seeds(pixels.half()), seeds)
    assert torch.equal(image_seeds(torch.nn.functional.pad(pixels, (0, 9, 0, 13))), seeds)
    changed = pixels.clone()
    changed[0, 0, 5, 5] += 1 / 127.5 if changed[0, 0, 5, 5] < 0 else -1 / 127.5
    assert (image_seeds(changed) == seeds).tolist() == [False, True, True]
    turned = torch.stack([pixels[0], pixels[0].flip(-1), pixels[0].flip(0)])
    assert len({*image_seeds(turned).tolist(), *image_seeds(pixels, 1).tolist()}) == 6


def test_fixed_noise_keeps_at_most_twice_the_largest_image():
    noise = FixedNoise()
    for turn in range(6):  # from high to wide images
        height, width = 1024 >> turn, 32 << turn
        field = noise(3, height, width, 0, torch.device("cpu"))
        assert torch.equal(field, coordinate_noise(3, height, width))
        assert field.untyped_storage().nbytes() <= 2 * 3 * 4 * 1024 * 32


@pytest.mark.parametrize("t", [-1, 1000, 90.0, True, torch.tensor([5, -1]), torch.tensor([1000])])
def test_timestep_out_of_range(t):
    with pytest.raises(ValueError, match="from 0 to 999"):
        NoiseSchedule().add_noise(torch.zeros(1, 3, 4, 4), t, None)
