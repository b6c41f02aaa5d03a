"""guided-diffusion's U-Nets in diffusers' format."""

from __future__ import annotations

import golden
import pytest
import torch
from safetensors.torch import load_file

from diffbackbone import UNet, UNetConfig
from diffbackbone.models.adm import WEIGHTS, diffusers_config, to_diffusers, write_folder
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


@pytest.mark.parametrize("name", CONFIGS)
def test_the_pipeline_gives_the_same_output(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    unet = golden.fill(UNet(config))
    write_folder(tmp_path, unet.state_dict(), config)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, use_safetensors=True)
    x, t = torch.randn(2, 3, 32, 64), torch.tensor([7, 800])
    y = None if config.num_classes is None else torch.tensor([0, 9])
    with torch.no_grad():
        theirs, ours = pipeline.unet(x, t, class_labels=y).sample, unet(x, t, y)
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()
    scheduler = pipeline.scheduler.config
    learned = config.out_channels == 6
    assert scheduler.variance_type == ("learned_range" if learned else "fixed_small")
    cosine = config.noise_schedule == "cosine"
    assert scheduler.beta_schedule == ("squaredcos_cap_v2" if cosine else "linear")


def test_taps_of_the_exported_folder_are_the_same(tmp_path):
    pytest.importorskip("diffusers")
    from diffbackbone import DiffusionBackbone

    config = SMALL.replace(num_classes=None, attention_strides=(4,))
    unet = golden.fill(UNet(config))
    write_folder(tmp_path, unet.state_dict(), config)
    options = {"blocks": (3, 10, 14), "out_channels": None, "out_strides": None, "freeze": True}
    theirs = DiffusionBackbone(f"diffusers://{tmp_path}", **options)
    ours = DiffusionBackbone(unet, **options)
    images = torch.rand(1, 3, 37, 53) * 2 - 1
    assert theirs.unet.blocks.keys() == ours.unet.blocks.keys()
    for x, y in zip(theirs(images), ours(images)):
        assert (x - y).abs().max() < 1e-4 * y.abs().max()


@pytest.mark.parametrize("name", ["gd64", "gd256", "gd256_uncond", "tiny"])
def test_released_models_have_the_names_and_shapes_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    config = PRESETS[name]
    with torch.device("meta"):
        weights = to_diffusers(UNet(config).state_dict(), config)
        theirs = diffusers.UNet2DModel.from_config(diffusers_config(config)).state_dict()
    assert {key: x.shape for key, x in weights.items()} == {k: x.shape for k, x in theirs.items()}


def test_what_diffusers_lacks_is_refused():
    with pytest.raises(ValueError, match=r"first level of 0\.5"):
        diffusers_config(PRESETS["gd512"])
    with pytest.raises(ValueError, match="different widths"):
        diffusers_config(PRESETS["gd128"])
    with pytest.raises(ValueError, match="missing or not of this U-Net.*input_blocks"):
        to_diffusers(UNet(SMALL, 3).state_dict(), SMALL)


def test_export_command_writes_a_pipelines_folder(tmp_path):
    pytest.importorskip("tyro", reason="tyro is not installed")
    from diffbackbone import export
    from diffbackbone.saving import save_safetensors

    unet = golden.fill(UNet(SMALL))
    save_safetensors(tmp_path / "unet.safetensors", unet.state_dict(), SMALL)
    arguments = ["--format", "diffusers", "--out", tmp_path / "out"]
    export.main(list(map(str, [*arguments, "--checkpoint", tmp_path / "unet.safetensors"])))
    written = load_file(tmp_path / "out" / WEIGHTS)
    expected = to_diffusers(unet.state_dict(), SMALL)
    assert written.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in written.items())
