"""The presets in timm's registry, alone and under segmentation_models_pytorch's decoders."""

from __future__ import annotations

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra timm")

import diffbackbone.timm  # noqa: E402, F401  registers the models
from diffbackbone import DiffusionBackbone  # noqa: E402
from diffbackbone.models.gd_config import PRESETS  # noqa: E402

TINY = "diffbackbone_tiny"
WEIGHTS = "diffbackbone://tiny.safetensors"


def make_images(height=70, width=90):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_describes_its_maps(preset):
    with torch.device("meta"):
        model = timm.create_model(f"diffbackbone_{preset}", features_only=True)
    blocks, info = PRESETS[preset].blocks, model.feature_info
    numbers = [int(name.removeprefix("block")) for name in info.module_name()]
    strides = [2**level for level in range(1, len(PRESETS[preset].channel_mult))]
    assert info.reduction() == strides == [blocks[b].stride for b in numbers]
    assert info.channels() == [blocks[b].channels for b in numbers]
    assert model.pretrained_cfg["mean"] == model.pretrained_cfg["std"] == (0.5, 0.5, 0.5)
    assert timm.models.is_model_pretrained(f"diffbackbone_{preset}")
    if len(blocks) == 37:
        assert numbers == [33, 30, 27, 24, 21]


def test_features_are_the_backbones():
    model = timm.create_model(TINY, pretrained=True, features_only=True, timestep=75)
    backbone = DiffusionBackbone(
        "tiny", WEIGHTS, 75, (33, 30, 27, 24, 21), out_channels=None, out_strides=None
    )
    images = make_images()
    assert all(map(torch.equal, model.eval()(images), backbone.eval()(images)))


@pytest.mark.parametrize(("indices", "blocks"), [((1, 3), [30, 24]), ((-1,), [21]), (2, [24, 21])])
def test_maps_follow_the_indices(indices, blocks):
    model = timm.create_model(
        TINY, pretrained=True, features_only=True, out_indices=indices, feedback="windowed"
    ).eval()
    names = [f"block{b}" for b in blocks]
    assert model.feature_info.module_name() == names
    images = make_images(32, 48)
    maps = model(images)
    assert [x.shape[1] for x in maps] == model.feature_info.channels()
    last, chosen = model.model.forward_intermediates(images, indices)
    assert all(map(torch.equal, maps, chosen))
    assert torch.equal(last, model.model.forward_intermediates(images)[1][-1])
    assert isinstance(model.model.forward_intermediates(images, intermediates_only=True), list)


def test_options_of_the_backbone():
    model = timm.create_model(
        TINY,
        features_only=True,
        checkpoint=WEIGHTS,
        blocks=(33, 24),
        out_strides=(4, 16),
        out_channels=8,
        freeze=True,
    )
    assert model.feature_info.channels() == [8, 8]
    assert model.feature_info.reduction() == [4, 16]
    model.train()
    assert not model.model.backbone.unet.training
    sum(x.sum() for x in model(make_images(32, 32))).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {
        f"model.backbone.proj.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }


def test_weights_from_a_file(tmp_path):
    unet = DiffusionBackbone("tiny", WEIGHTS).unet
    with torch.no_grad():
        unet.time_embed[0].bias += 1
    torch.save(unet.state_dict(), tmp_path / "unet.pt")
    overlay = {"file": str(tmp_path / "unet.pt")}
    model = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.backbone.unet.time_embed[0].bias, unet.time_embed[0].bias)


def test_random_weights_warn_and_shapes_do_not(recwarn):
    with torch.device("meta"):
        timm.create_model(TINY)
    assert not recwarn
    with pytest.warns(UserWarning, match="RANDOM"):
        timm.create_model(TINY)


def test_classifier_trains():
    model = timm.create_model(TINY, pretrained=True, num_classes=5)
    scores = model(make_images())
    assert scores.shape == (2, 5)
    scores.logsumexp(1).sum().backward()
    assert model.head.weight.grad.any()
    assert timm.create_model(TINY, pretrained=True)(make_images()).shape == (2, model.num_features)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 64, 64)


@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
def test_decoders_of_segmentation_models_pytorch(decoder):
    smp = pytest.importorskip(
        "segmentation_models_pytorch", reason="needs segmentation_models_pytorch"
    )
    model = getattr(smp, decoder)(f"tu-{TINY}", encoder_weights=True, classes=4, timestep=50)
    weights = DiffusionBackbone("tiny", WEIGHTS).unet.state_dict()
    backbone = model.encoder.model.model.backbone
    assert backbone.timestep == 50
    assert all(torch.equal(x, weights[name]) for name, x in backbone.unet.state_dict().items())
    scores = model(make_images(64, 96))
    assert scores.shape == (2, 4, 64, 96)
    scores.logsumexp(1).sum().backward()
    assert backbone.unet.time_embed[0].weight.grad.any()
    assert next(model.decoder.parameters()).grad.any()
    preprocessing = smp.encoders.get_preprocessing_params(f"tu-{TINY}")
    assert preprocessing["mean"] == preprocessing["std"] == [0.5, 0.5, 0.5]
