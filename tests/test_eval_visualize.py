"""Principal components of features as pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tyro")

import image_folders
from PIL import Image

from diffbackbone import DiffusionBackbone
from diffbackbone.eval import visualize_features as visualize
from diffbackbone.eval.options import BackboneOptions, build_backbone
from diffbackbone.images import normalize, read_image, to_tensor

weights = image_folders.weights
pytestmark = pytest.mark.filterwarnings("ignore:DiffusionBackbone. no checkpoint")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two images of unequal, odd size."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, size in (("wide.png", (41, 75)), ("tall.png", (66, 50))):
        pixels = random.integers(0, 255, (*size, 3)).astype(np.uint8)
        pixels[: size[0] // 2] //= 4
        Image.fromarray(pixels).save(folder / name)
    return folder


def maps_of(seed, *sizes, channels=7):
    generator = torch.manual_seed(seed)
    scale = torch.arange(1, channels + 1)[:, None, None]
    return [torch.randn(channels, *size, generator=generator) * scale for size in sizes]


@pytest.mark.parametrize("channels", [7, 80])  # fewer and more than positions
def test_colors_are_the_components_of_all_images_together(channels):
    maps = maps_of(0, (6, 8), (5, 3), channels=channels)
    pictures, share = visualize.colorize(maps)
    rows = np.concatenate([x.reshape(channels, -1).T.double().numpy() for x in maps])
    _, values, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert share == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())
    # the sign of a component follows its axis, so that colors don't flip from run to run
    axes = vectors[:3] * np.sign(vectors[range(3), np.abs(vectors[:3]).argmax(1)])[:, None]
    projected = (rows - rows.mean(0)) @ axes.T
    low, high = np.percentile(projected, [1, 99], axis=0)
    expected = (255 * ((projected - low) / (high - low)).clip(0, 1)).round()
    found = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    assert [picture.shape for picture in pictures] == [(6, 8, 3), (5, 3, 3)]
    assert np.abs(found - expected).max() <= 1


def test_components_without_variance_are_gray():
    line = torch.arange(12.0).reshape(1, 3, 4) * torch.tensor([1.0, 2, 3])[:, None, None] + 100
    (picture,), share = visualize.colorize([line])
    assert share == pytest.approx(1)
    assert (picture[..., 1:] == 128).all()
    assert len(np.unique(picture[..., 0])) > 8
    for constant in (torch.full((4, 2, 2), 0.1), torch.full((4, 1, 1), 0.1)):
        (picture,), share = visualize.colorize([constant])
        assert (picture == 128).all()
        assert share == 0
    spike = torch.zeros(3, 30, 30)
    spike[0, 4, 5] = 1
    (picture,), _ = visualize.colorize([spike])  # both percentiles are those of the zeros
    assert picture[4, 5, 0] == 255
    assert picture[0, 0, 0] == 0


def test_taps_are_those_of_the_backbone(images, weights):
    backbone = DiffusionBackbone(
        "tiny", weights, 90, (24, 30), None, out_channels=None, out_strides=None, freeze=True
    )
    pictures = [read_image(images / name) for name in ("wide.png", "tall.png")]
    found = visualize.color_taps(backbone, pictures, [10, 90], [24, 30])
    assert [list(taps) for taps in found] == [[(10, 24), (10, 30), (90, 24), (90, 30)]] * 2
    maps = [backbone(normalize(to_tensor(picture))[None])[0][0] for picture in pictures]  # b = 24
    expected, share = visualize.colorize(maps)
    for taps, pixels in zip(found, expected):
        assert (taps[90, 24][0] == pixels).all()
        assert taps[90, 24][1] == f"{pixels.shape[0]}x{pixels.shape[1]}, {share:.0%}"
        assert (taps[10, 24][0] != pixels).any()
    assert found[0][90, 24][0].shape == (3, 5, 3)  # 41 x 75 at stride 16
    assert found[1][90, 30][0].shape == (17, 13, 3)


def test_figure_of_all_images(images, weights, tmp_path):
    command = ["--blocks", "19", "24", "--timesteps", "10", "90", "--unet", "tiny", "--device"]
    command += ["cpu", "--checkpoint", weights, "--out"]
    visualize.main([str(images), *command, str(tmp_path / "all.png")])
    command = [*command, str(tmp_path / "one.png"), "--limit", "1", "--image-size", "90"]
    visualize.main([str(images), *command])
    whole, one = (Image.open(tmp_path / name).size for name in ("all.png", "one.png"))
    assert np.prod(one) < np.prod(whole)


def save_classifier(path, weights, feedback, finetune):
    """Write what tools/train_classifier.py writes, with changed weights."""
    options = {"unet": "tiny", "timesteps": (90,), "blocks": (24,), "checkpoint": weights}
    backbone = build_backbone(BackboneOptions(**options), feedback, freeze=not finetune)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    settings = {
        "unet": "tiny", "noise": "none", "seed": 3, "feedback": feedback or "none",
        "value_range": None, "blocks": [24], "finetune": finetune,
        "feedback_layers": ["conv", "batch", "relu"],
    }  # fmt: skip
    content = {"format": "diffbackbone classifier 2", "settings": settings}
    torch.save({**content, "backbone": backbone.state_dict()}, path)
    return backbone


@pytest.mark.parametrize(("feedback", "finetune"), [(None, True), ("windowed", False)])
def test_trained_layers_come_from_a_classifier(images, weights, tmp_path, feedback, finetune):
    saved = save_classifier(tmp_path / "best.pt", weights, feedback, finetune)
    given = visualize.VisualizeFeaturesConfig(
        images=(images,), timesteps=(10, 90), device="cpu", classifier=tmp_path / "best.pt",
        checkpoint=None if finetune else weights,
    )  # fmt: skip
    config, backbone = visualize.build(given)
    assert (config.unet, config.noise, config.seed) == ("tiny", "none", 3)
    assert config.blocks == (12, 19, 24)
    assert (backbone.feedback is None) == (feedback is None)
    x = torch.rand(1, 3, 64, 64, generator=torch.manual_seed(0)) * 2 - 1
    saved.noise, saved.seed = "none", 3
    taps = [b.eval().forward_taps(x, 90, (19, 24)) for b in (saved, backbone)]
    assert all(torch.equal(taps[0][tap], taps[1][tap]) for tap in taps[0])
