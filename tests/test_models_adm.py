"""guided-diffusion's U-Nets in diffusers' format and back."""

from __future__ import annotations

import json

import pytest
import torch

from diffbackbone import UNet, UNetConfig
from diffbackbone.models.adm import (
    diffusers_config,
    from_diffusers,
    read_folder,
    to_diffusers,
    unet_config,
    write_folder,
)
from diffbackbone.models.gd_config import PRESETS

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2, 3),
    num_res_blocks=2,
    attention_strides=(2, 4),
    num_head_channels=16,
    num_classes=10,
    image_size=32,
)
CONFIGS = {
    "legacy": SMALL,
    "new_order": SMALL.replace(use_new_attention_order=True, noise_schedule="cosine"),
    "convolutions": SMALL.replace(
        resblock_updown=False, use_scale_shift_norm=False, out_channels=3
    ),
    "one_block": SMALL.replace(num_res_blocks=1, attention_strides=(4,), num_classes=None),
}


def filled(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    unet = UNet(config).eval()
    for parameter in unet.parameters():
        parameter.data = torch.randn_like(parameter) * (parameter[0].numel() ** -0.5) * 0.5
    return unet


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_and_the_same_output(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    unet = filled(config)
    write_folder(tmp_path, unet.state_dict(), config)
    read, weights = read_folder(tmp_path, config.use_new_attention_order)
    assert read == config
    own = unet.state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], own[key]) for key in own)

    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, use_safetensors=True)
    x, t = torch.randn(2, 3, 32, 64), torch.tensor([7, 800])
    y = None if config.num_classes is None else torch.tensor([0, 9])
    with torch.no_grad():
        theirs, ours = pipeline.unet(x, t, class_labels=y).sample, unet(x, t, y)
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()
    assert pipeline.scheduler.config.variance_type == (
        "fixed_small" if config.out_channels == 3 else "learned_range"
    )


def test_taps_of_the_exported_folder_are_the_same(tmp_path):
    pytest.importorskip("diffusers")
    from diffbackbone import DiffusionBackbone

    config = SMALL.replace(num_classes=None, attention_strides=(4,))
    unet = filled(config)
    write_folder(tmp_path, unet.state_dict(), config)
    options = {"blocks": (3, 10, 14), "out_channels": None, "out_strides": None, "freeze": True}
    theirs = DiffusionBackbone(f"diffusers://{tmp_path}", **options)
    ours = DiffusionBackbone(unet, **options)
    images = torch.rand(1, 3, 37, 53) * 2 - 1
    assert theirs.unet.blocks.keys() == ours.unet.blocks.keys()
    for x, y in zip(theirs(images), ours(images)):
        assert (x - y).abs().max() < 1e-4 * y.abs().max()


@pytest.mark.parametrize("name", ["gd64", "gd256", "gd256_uncond", "tiny"])
def test_released_models_map_there_and_back(name):
    config = PRESETS[name]
    with torch.device("meta"):
        shapes = {key: x.shape for key, x in UNet(config).state_dict().items()}
        weights = to_diffusers(UNet(config).state_dict(), config)
        back = from_diffusers(weights, config)
    assert {key: x.shape for key, x in back.items()} == shapes
    rest = {"noise_schedule": config.noise_schedule}
    rest["use_new_attention_order"] = config.use_new_attention_order
    assert unet_config(json.loads(json.dumps(diffusers_config(config))), **rest) == config


def test_what_diffusers_lacks_is_refused():
    with pytest.raises(ValueError, match=r"first level of 0\.5"):
        diffusers_config(PRESETS["gd512"])
    with pytest.raises(ValueError, match="different widths"):
        diffusers_config(PRESETS["gd128"])
    weights = to_diffusers(filled(SMALL).state_dict(), SMALL)
    del weights["conv_in.bias"]
    with pytest.raises(ValueError, match="missing: .'conv_in.bias'"):
        from_diffusers(weights, SMALL)


def test_export_command_writes_a_pipelines_folder(tmp_path):
    pytest.importorskip("tyro", reason="tyro is not installed")
    from diffbackbone import export
    from diffbackbone.saving import save_safetensors

    unet = filled(SMALL)
    save_safetensors(tmp_path / "unet.safetensors", unet.state_dict(), SMALL)
    arguments = ["--format", "diffusers", "--out", tmp_path / "out"]
    export.main(list(map(str, [*arguments, "--checkpoint", tmp_path / "unet.safetensors"])))
    config, weights = read_folder(tmp_path / "out")
    assert config == SMALL
    assert torch.equal(weights["out.2.weight"], unet.out[2].weight)
