"""Weights as safetensors with their architecture, and guided-diffusion's flags."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffbackbone import CheckpointError, DiffusionBackbone, UNet, UNetConfig, load_checkpoint
from diffbackbone.checkpoint import read_unet_config
from diffbackbone.saving import guided_diffusion_flags, save_safetensors

CONFIG = UNetConfig(
    32, (1, 2), 1, (2,), num_head_channels=16, image_size=16, noise_schedule="cosine"
)


def test_flags_are_those_of_the_released_models():
    flags = guided_diffusion_flags(UNetConfig.from_preset("gd256_uncond"))
    published = {
        "attention_resolutions": "32,16,8", "class_cond": False, "diffusion_steps": 1000,
        "image_size": 256, "learn_sigma": True, "noise_schedule": "linear", "num_channels": 256,
        "num_head_channels": 64, "num_res_blocks": 2, "resblock_updown": True,
        "use_scale_shift_norm": True, "channel_mult": "1,1,2,2,4,4",
    }  # fmt: skip
    assert published.items() <= flags.items()
    assert guided_diffusion_flags(UNetConfig.from_preset("gd512"))["channel_mult"] == ""
    assert guided_diffusion_flags(UNetConfig.from_preset("gd128"))["num_head_channels"] == -1


def test_architecture_without_flags_is_an_error():
    with pytest.raises(ValueError, match="guided-diffusion"):
        guided_diffusion_flags(CONFIG.replace(channel_mult=(1, 1.5), model_channels=64))


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(CONFIG)


def test_safetensors_contain_the_architecture(tmp_path, unet):
    path = tmp_path / "half.safetensors"
    save_safetensors(path, unet.state_dict(), CONFIG, torch.float16)
    assert {x.dtype for x in load_file(path).values()} == {torch.float16}
    assert read_unet_config(path) == CONFIG
    assert read_unet_config(path, noise_schedule="linear").noise_schedule == "linear"
    fresh = UNet(CONFIG.replace(dropout=0.3, image_size=64))
    load_checkpoint(fresh, path)
    for key, value in unet.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[key], value.half().float(), rtol=0, atol=0)
    for changes, message in (
        ({"num_head_channels": 32}, r"heads: the file has \[4, .*\], this U-Net \[2, "),
        ({"use_new_attention_order": True}, "use_new_attention_order: the file has False"),
        ({"noise_schedule": "linear"}, "noise_schedule: the file has 'cosine'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(UNet(CONFIG.replace(**changes)), path)


def test_safetensors_without_metadata_are_read(tmp_path, unet):
    path = tmp_path / "plain.safetensors"
    save_file(unet.state_dict(), path)
    assert read_unet_config(path, num_head_channels=32).num_head_channels == 32
    load_checkpoint(UNet(CONFIG.replace(num_head_channels=32)), path)


def test_backbones_take_weights_with_and_without_variance(tmp_path):
    path = tmp_path / "three.pt"
    torch.save(UNet(CONFIG.replace(out_channels=3)).state_dict(), path)
    fields = dataclasses.asdict(CONFIG)
    backbone = DiffusionBackbone(fields, path, blocks=5, out_channels=None, out_strides=None)
    assert len(backbone(torch.zeros(1, 3, 32, 32))) == 1
    with pytest.raises(CheckpointError, match="out_channels: the file has 3, this U-Net 6"):
        load_checkpoint(UNet(CONFIG), path)
