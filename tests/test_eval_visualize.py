"""Principal components of features as pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tyro")

from image_folders import write_weights
from PIL import Image

from diffbackbone import DiffusionBackbone
from diffbackbone.eval import visualize_features as visualize
from diffbackbone.eval.options import BackboneOptions, build_backbone
from diffbackbone.images import normalize, read_image, to_tensor
from diffbackbone.utils import UserError

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"blocks": (19, 24), "timesteps": (10, 90), "unet": "tiny", "device": "cpu", "cell": 40}

pytestmark = pytest.mark.filterwarnings("ignore:DiffusionBackbone. no checkpoint")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.pt")


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


def draw(*images, **options):
    return visualize.run(visualize.VisualizeFeaturesConfig(images=images, **{**SMALL, **options}))


def maps_of(seed, *sizes, channels=7):
    generator = torch.manual_seed(seed)
    scale = torch.arange(1, channels + 1)[:, None, None]
    return [torch.randn(channels, *size, generator=generator) * scale for size in sizes]


# ---------------------------------------------------------------------------------------- colors


@pytest.mark.parametrize("percentile", [0, 5])
@pytest.mark.parametrize("channels", [7, 80])  # fewer and more than positions
def test_colors_are_the_components_of_all_images_together(percentile, channels):
    maps = maps_of(0, (6, 8), (5, 3), channels=channels)
    pictures, share = visualize.colorize(maps, percentile)
    rows = np.concatenate([x.reshape(channels, -1).T.double().numpy() for x in maps])
    _, values, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert share == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())
    axes = vectors[:3] * np.sign(vectors[range(3), np.abs(vectors[:3]).argmax(1)])[:, None]
    projected = (rows - rows.mean(0)) @ axes.T
    low, high = np.percentile(projected, [percentile, 100 - percentile], axis=0)
    expected = (255 * ((projected - low) / (high - low)).clip(0, 1)).round()
    found = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    assert [picture.shape for picture in pictures] == [(6, 8, 3), (5, 3, 3)]
    assert np.abs(found - expected).max() <= 1


def test_sign_of_components_follows_the_features():
    (x,) = maps_of(0, (5, 5))
    rows = x.double().flatten(1).T
    axes = visualize.principal_components(rows)[1]
    assert torch.allclose(axes, visualize.principal_components(-rows)[1], atol=1e-9)


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


# ------------------------------------------------------------------------------------- the command


def test_one_sheet_or_one_figure_an_image(images, weights, tmp_path):
    sheet = tmp_path / "all.png"
    command = ["--blocks", "19", "24", "--timesteps", "10", "90", "--unet", "tiny"]
    command += ["--device", "cpu", "--cell", "40", "--checkpoint", weights, "--out", sheet]
    script = ROOT / "tools/visualize_features.py"
    subprocess.run([sys.executable, script, images, *map(str, command)], check=True)
    written = draw(images, checkpoint=weights, out=tmp_path / "folder")
    assert [path.name for path in written] == ["0_tall.png", "1_wide.png"]
    draw(images, checkpoint=weights, out=tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == sheet.read_bytes()
    draw(images, checkpoint=weights, limit=1, out=tmp_path / "one.png")
    assert np.prod(Image.open(tmp_path / "one.png").size) < np.prod(Image.open(sheet).size)


def save_classifier(path, weights, feedback, finetune, checkpoint):
    """Write what tools/train_classifier.py writes, with changed weights."""
    options = {"unet": "tiny", "timesteps": (90,), "blocks": (24,), "checkpoint": checkpoint}
    backbone = build_backbone(BackboneOptions(**options), feedback, freeze=not finetune)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    settings = {
        "unet": "tiny", "noise": "none", "seed": 3, "feedback": feedback or "none",
        "value_range": None, "blocks": [24], "finetune": finetune,
    }  # fmt: skip
    content = {"format": "diffbackbone classifier 2", "settings": settings}
    torch.save({**content, "backbone": backbone.state_dict()}, path)
    return backbone.state_dict()


@pytest.mark.parametrize(("feedback", "finetune"), [(None, True), ("windowed", False)])
def test_trained_layers_come_from_a_classifier(images, weights, tmp_path, feedback, finetune):
    path = tmp_path / "best.pt"
    saved = save_classifier(path, weights, feedback, finetune, weights)
    options = {"images": (images,), **SMALL, "unet": "gd256_uncond", "blocks": ()}
    options.update(classifier=path, checkpoint=None if finetune else weights)
    config, backbone = visualize.build(visualize.VisualizeFeaturesConfig(**options))
    assert (config.unet, config.noise, config.seed) == ("tiny", "none", 3)
    assert config.blocks == (12, 19, 24)
    assert (backbone.feedback is None) == (feedback is None)
    state = backbone.state_dict()
    prefix = "unet." if finetune else "feedback."
    compared = [key for key in saved if key.startswith(prefix)]
    assert compared
    assert all(torch.equal(state[key], saved[key]) for key in compared)
    draw(images, **{k: v for k, v in options.items() if k != "images"}, out=tmp_path / "x.png")
    assert (tmp_path / "x.png").is_file()
    last = backbone.unet.last_block
    options["blocks"] = (last + 1,)
    with pytest.raises(UserError, match=f"has blocks 1 to {last}"):
        visualize.build(visualize.VisualizeFeaturesConfig(**options))
    with pytest.raises(UserError, match="not a checkpoint of tools/train_classifier"):
        visualize.read_classifier(weights)


def test_feedback_shows_the_second_pass(images, weights, tmp_path):
    for feedback in ("none", "bottleneck"):
        draw(
            images / "wide.png",
            checkpoint=weights,
            feedback=feedback,
            out=tmp_path / f"{feedback}.png",
        )
    plain, fed = (
        np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("none", "bottleneck")
    )
    assert plain.shape == fed.shape
    assert (plain != fed).any()


def test_image_size_enlarges_small_images(tmp_path):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"small.png has 20 x 30 px"):
        draw(tmp_path / "small.png")
    assert visualize.read_resized(tmp_path / "small.png", 40).shape == (60, 40, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 50}, "--percentile"),
        ({"blocks": (38,)}, "from 1 to 37"),
        ({"timesteps": (5, 5)}, "each once"),
        ({"feedback": "multi-scale", "blocks": (3,)}, "feedback into blocks"),
        ({"classifier": "nowhere.pt"}, "nowhere.pt"),
    ],
)
def test_bad_options_are_errors(images, tmp_path, options, message):
    with pytest.raises((UserError, OSError), match=message):
        draw(images / "wide.png", out=tmp_path / "out.png", **options)
    assert not (tmp_path / "out.png").exists()
