"""The training objective, the sampler, averaged weights and what is exported."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffbackbone import (
    CheckpointError,
    DiffusionBackbone,
    NoiseSchedule,
    UNet,
    UNetConfig,
    load_checkpoint,
)
from diffbackbone.checkpoint import METADATA_KEY, read_unet_config
from diffbackbone.pretrain.objective import (
    DiffusionObjective,
    Ema,
    ddim_timesteps,
    learning_rate,
    sample_ddim,
)
from diffbackbone.saving import guided_diffusion_flags, save_safetensors

CONFIG = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_strides=(2,),
    num_head_channels=16,
    image_size=16,
    noise_schedule="cosine",
)


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


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_losses_are_guided_diffusions(name):
    simple = losses(name, learn_variance=False)
    assert set(simple) == {"loss", "simple"}
    torch.testing.assert_close(simple["loss"], torch.tensor(THEIR_SIMPLE), rtol=2e-6, atol=0)
    hybrid = losses(name)
    torch.testing.assert_close(hybrid["simple"], simple["loss"], rtol=0, atol=0)
    torch.testing.assert_close(hybrid["loss"], torch.tensor(THEIR_LOSS[name]), rtol=1e-5, atol=0)


def test_simple_loss_is_a_mean_for_each_image():
    eps = OUTPUT[:, :3]
    expected = [(n - e).pow(2).sum().item() / 48 for n, e in zip(NOISE, eps)]
    assert losses(learn_variance=False)["loss"].tolist() == pytest.approx(expected, rel=1e-6)


def test_bound_is_the_divergence_of_two_normal_distributions():
    schedule = NoiseSchedule("linear")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    signal = torch.cumprod(1 - betas, 0)
    vlb = losses()["vlb"]
    x_t = schedule.add_noise(X_START, T, NOISE).double()
    for row in (1, 2, 3):
        t = int(T[row])
        beta, a, before = betas[t], signal[t], signal[t - 1]
        posterior = beta * (1 - before) / (1 - a)

        def mean(x_start, row=row, beta=beta, a=a, before=before):
            first = beta * before.sqrt() / (1 - a)
            return first * x_start + (1 - before) * (1 - beta).sqrt() / (1 - a) * x_t[row]

        eps, v = OUTPUT[row, :3].double(), OUTPUT[row, 3:].double()
        share = (v + 1) / 2
        sigma = torch.exp(0.5 * (share * beta.log() + (1 - share) * posterior.log()))
        predicted = (x_t[row] - (1 - a).sqrt() * eps) / a.sqrt()
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean(X_START[row].double()), posterior.sqrt()),
            torch.distributions.Normal(mean(predicted), sigma),
        )
        expected = 1000 * divergence.mean() / math.log(2)
        assert float(vlb[row]) == pytest.approx(float(expected), rel=1e-4)


def test_last_step_is_likelihood_of_8_bit_values():
    """A sharp and right prediction costs nearly nothing, on the edges of the range too."""
    schedule = NoiseSchedule("linear")
    x_start = torch.tensor([-1.0, 1.0, 0.0, 3 / 255]).reshape(1, 1, 2, 2)
    noise = torch.zeros_like(x_start)
    t = torch.tensor([0])
    objective = DiffusionObjective(schedule, True)
    x_t = schedule.add_noise(x_start, t, noise)
    v = torch.full_like(x_start, -12.0)  # a variance far below the posterior's
    right = objective(torch.cat([noise, v], 1), x_start, x_t, t, noise)
    assert 0 <= float(right["vlb"]) < 20
    wrong = objective(torch.cat([noise + 2, v], 1), x_start, x_t, t, noise)
    assert float(wrong["vlb"]) > 1000


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


def test_wrong_channels_are_named():
    schedule = NoiseSchedule("linear")
    with pytest.raises(ValueError, match="has 3 output channels.*need 6 with a learned"):
        DiffusionObjective(schedule, True)(OUTPUT[:, :3], X_START, X_START, T, NOISE)
    with pytest.raises(ValueError, match="has 6 output channels.*need 3 without"):
        DiffusionObjective(schedule, False)(OUTPUT, X_START, X_START, T, NOISE)
    with pytest.raises(ValueError, match="at least 2 timesteps"):
        DiffusionObjective(NoiseSchedule("linear", 1))


# ----------------------------------------------------------------------------------------- samples


def test_ddim_timesteps_are_spaced_from_zero():
    assert ddim_timesteps(1000, 50) == list(range(0, 1000, 20))
    assert ddim_timesteps(10, 10) == list(range(10))
    assert len(set(ddim_timesteps(1000, 333))) == 333
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"1\.\.1000, got {steps}"):
            ddim_timesteps(1000, steps)


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


# ----------------------------------------------------------------------------------- averages, rate


def test_average_forgets_its_start_and_then_keeps_its_decay():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    ema = Ema(model, 0.5)
    expected = 1.0
    for index, value in enumerate([2.0, 5.0, -1.0, *[4.0] * 20]):
        torch.nn.init.constant_(model.weight, value)
        ema.update(model, index)
        decay = min(0.5, (1 + index) / (10 + index))
        expected = decay * expected + (1 - decay) * value
        assert float(ema.weights["weight"]) == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 4.0
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="must lie in"):
            Ema(model, decay)


def test_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(2.0, i, warmup=4, iterations=12, decay=4) for i in range(12)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert learning_rate(2.0, 10**6, warmup=4) == 2.0
    assert learning_rate(2.0, 0) == 2.0


# ------------------------------------------------------------------------------------------ export


def test_flags_are_those_of_the_released_models():
    flags = guided_diffusion_flags(UNetConfig.from_preset("gd256_uncond"))
    published = {
        "attention_resolutions": "32,16,8", "class_cond": False, "diffusion_steps": 1000,
        "image_size": 256, "learn_sigma": True, "noise_schedule": "linear", "num_channels": 256,
        "num_head_channels": 64, "num_res_blocks": 2, "resblock_updown": True,
        "use_scale_shift_norm": True,
    }  # fmt: skip
    assert published.items() <= flags.items()
    assert flags["channel_mult"] == "1,1,2,2,4,4"
    without = guided_diffusion_flags(CONFIG.replace(out_channels=3))
    assert without["learn_sigma"] is False
    assert without["noise_schedule"] == "cosine"
    assert without["attention_resolutions"] == "8"
    assert guided_diffusion_flags(UNetConfig.from_preset("gd512"))["channel_mult"] == ""
    assert guided_diffusion_flags(UNetConfig.from_preset("gd128"))["num_head_channels"] == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": (1, 1.5), "model_channels": 64}, "channel_mult"),
        ({"out_channels": 4}, "3 and 4"),
        ({"resblock_updown": False, "conv_resample": False}, "conv_resample"),
    ],
)
def test_what_has_no_flags_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        guided_diffusion_flags(CONFIG.replace(**changes))


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(CONFIG)


def test_safetensors_tell_the_architecture(tmp_path, unet):
    path = tmp_path / "half.safetensors"
    save_safetensors(path, unet.state_dict(), CONFIG, torch.float16)
    assert {x.dtype for x in load_file(path).values()} == {torch.float16}
    assert read_unet_config(path) == CONFIG
    assert read_unet_config(path, noise_schedule="linear").noise_schedule == "linear"
    fresh = UNet(read_unet_config(path))
    load_checkpoint(fresh, path)
    for key, value in unet.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[key], value.half().float(), rtol=0, atol=0)


def test_safetensors_of_others_are_read_as_before(tmp_path, unet):
    path = tmp_path / "plain.safetensors"
    save_file(unet.state_dict(), path)
    assert read_unet_config(path, num_head_channels=32).num_head_channels == 32
    load_checkpoint(UNet(CONFIG.replace(num_head_channels=32)), path)


def test_weights_beyond_half_precision_are_refused(tmp_path, unet):
    torch.nn.init.constant_(unet.out[2].bias, 1e6)
    path = tmp_path / "half.safetensors"
    with pytest.raises(ValueError, match=r"out\.2\.bias and 0 more .*float16"):
        save_safetensors(path, unet.state_dict(), CONFIG, torch.float16)
    assert not path.exists()
    save_safetensors(path, unet.state_dict(), CONFIG, torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_head_channels": 32}, "attention heads of block 4: the file has 4, this U-Net 2"),
        ({"use_new_attention_order": True}, "use_new_attention_order: the file has False"),
        ({"noise_schedule": "linear"}, "noise_schedule: the file has 'cosine'"),
    ],
)
def test_what_shapes_cannot_tell_is_checked(tmp_path, unet, changes, message):
    path = tmp_path / "unet.safetensors"
    save_safetensors(path, unet.state_dict(), CONFIG)
    load_checkpoint(UNet(CONFIG.replace(dropout=0.3, image_size=64)), path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(UNet(CONFIG.replace(**changes)), path)


def test_damaged_metadata_are_named(tmp_path, unet):
    path = tmp_path / "unet.safetensors"
    fields = dataclasses.asdict(CONFIG)
    for text in ("{", json.dumps({**fields, "wings": 2}), json.dumps({**fields, "in_channels": 0})):
        save_file(unet.state_dict(), path, metadata={METADATA_KEY: text})
        with pytest.raises(CheckpointError, match="describe no U-Net"):
            read_unet_config(path)


def test_backbones_take_weights_with_and_without_variance(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "three.pt"
    torch.save(UNet(CONFIG.replace(out_channels=3)).state_dict(), path)
    fields = {**dataclasses.asdict(CONFIG), "out_channels": 6}
    backbone = DiffusionBackbone(fields, path, blocks=5, out_channels=None, out_strides=None)
    assert len(backbone(torch.zeros(1, 3, 32, 32))) == 1
    with pytest.raises(CheckpointError, match="out_channels: the file has 3, this U-Net 6"):
        load_checkpoint(UNet(CONFIG), path)
