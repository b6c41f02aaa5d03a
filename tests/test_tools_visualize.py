"""`tools/visualize_features.py`: principal components of taps as pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import _classification as common
import train_classifier
import visualize_features as visualize
from image_folders import write_folder, write_weights

from diffbackbone import DiffusionBackbone
from diffbackbone.images import normalize, read_image, to_tensor

SMALL = ["--blocks", "19", "24", "--timesteps", "10", "90", "--unet", "tiny", "--device", "cpu"]


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


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(out, *options):
    visualize.main([*SMALL, "--out", str(out), *map(str, options)])


def fails(*options) -> str:
    with pytest.raises(SystemExit) as error:
        visualize.main([*SMALL, *map(str, options)])
    assert str(error.value).startswith("error: ")
    return str(error.value)


def maps_of(seed, *sizes, channels=7):
    generator = torch.manual_seed(seed)
    scale = torch.arange(1, channels + 1)[:, None, None]
    return [torch.randn(channels, *size, generator=generator) * scale for size in sizes]


# ---------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("percentile", [0, 5])
def test_colours_are_the_components_of_all_images_together(percentile):
    maps = maps_of(0, (6, 8), (5, 5))
    pictures, share = visualize.colour(maps, percentile)
    rows = np.concatenate([x.reshape(7, -1).T.double().numpy() for x in maps])
    _, values, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert share == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())
    axes = vectors[:3] * np.sign(vectors[range(3), np.abs(vectors[:3]).argmax(1)])[:, None]
    projected = (rows - rows.mean(0)) @ axes.T
    low, high = np.percentile(projected, [percentile, 100 - percentile], axis=0)
    expected = (255 * ((projected - low) / (high - low)).clip(0, 1)).round()
    found = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    assert [picture.shape for picture in pictures] == [(6, 8, 3), (5, 5, 3)]
    assert np.abs(found - expected).max() <= 1
    assert (found == 255).any(0).all()
    assert (found == 0).any(0).all()


def test_alike_features_get_alike_colours_in_every_image():
    a, b = maps_of(1, (4, 4), (6, 3))
    b[:, 2, 1] = a[:, 1, 3]
    (first, second), _ = visualize.colour([a, b], 1.0)
    assert (second[2, 1] == first[1, 3]).all()
    (alone,), _ = visualize.colour([b], 1.0)
    assert (alone != second).any()


def test_outliers_dont_take_the_range():
    (x,) = maps_of(2, (20, 20))
    x[:, 0, 0] = 1000
    plain, _ = visualize.colour([x], 0)
    robust, _ = visualize.colour([x], 1.0)
    assert plain[0][1:, :, 0].std() < 2
    assert robust[0][1:, :, 0].std() > 30


def test_components_without_variance_are_grey():
    line = torch.arange(12.0).reshape(1, 3, 4) * torch.tensor([1.0, 2, 3])[:, None, None]
    (picture,), share = visualize.colour([line], 1.0)
    assert share == pytest.approx(1)
    assert (picture[..., 1:] == 128).all()
    assert len(np.unique(picture[..., 0])) > 8
    (constant,), share = visualize.colour([torch.ones(4, 2, 2)], 1.0)
    assert (constant == 128).all()
    assert share == 0
    spike = torch.zeros(3, 30, 30)
    spike[0, 4, 5] = 1
    (picture,), _ = visualize.colour([spike], 1.0)  # both percentiles are those of the zeros
    assert picture[4, 5, 0] == 255
    assert picture[0, 0, 0] == 0


def test_taps_are_those_of_the_backbone(images, weights):
    backbone = DiffusionBackbone(
        "tiny", weights, 90, (24, 30), None, out_channels=None, out_strides=None, freeze=True
    )
    pictures = [read_image(images / name) for name in ("wide.png", "tall.png")]
    found = visualize.colour_taps(backbone, pictures, [10, 90], [24, 30])
    assert [list(taps) for taps in found] == [[(10, 24), (10, 30), (90, 24), (90, 30)]] * 2
    maps = [backbone(normalize(to_tensor(picture))[None])[0][0] for picture in pictures]  # b = 24
    expected, share = visualize.colour(maps, 1.0)
    for taps, pixels in zip(found, expected):
        assert (taps[90, 24].pixels == pixels).all()
        assert taps[90, 24].variance == pytest.approx(share)
        assert taps[90, 24].stride == 16
        assert (taps[10, 24].pixels != pixels).any()
    assert found[0][90, 24].pixels.shape == (3, 5, 3)  # 41 x 75 at stride 16
    assert found[1][90, 30].pixels.shape == (17, 13, 3)


# --------------------------------------------------------------------------------------- the panel


def locate(picture, colour):
    """Bounding box (left, top, right, bottom) of a colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_maps_lie_where_their_block_and_timestep_are():
    colours = {(10, 19): (200, 10, 10), (90, 19): (10, 200, 10), (10, 24): (10, 10, 200),
               (90, 24): (200, 10, 200)}  # fmt: skip
    taps = {
        tap: visualize.ColouredTap(np.full((2, 4, 3), c, np.uint8), 16, 0.5)
        for tap, c in colours.items()
    }
    image = Image.new("RGB", (64, 32), (255, 200, 0))
    panel = visualize.draw_panel(image, "name", taps, 100)
    boxes = {tap: locate(panel, colour) for tap, colour in colours.items()}
    for left, top, right, bottom in boxes.values():
        assert (right - left, bottom - top) == (100, 50)
    assert boxes[10, 19][0] == boxes[10, 24][0] < boxes[90, 19][0] == boxes[90, 24][0]
    assert boxes[10, 19][1] == boxes[90, 19][1] < boxes[10, 24][1] == boxes[90, 24][1]
    beside = locate(panel, (255, 200, 0))
    assert beside[2] < boxes[10, 19][0]
    assert (beside[2] - beside[0], beside[3] - beside[1]) == (150, 75)


def test_what_lies_beyond_the_image_is_cut():
    pixels = np.zeros((3, 3, 3), np.uint8)
    pixels[:, 2] = (250, 0, 0)  # covers pixels 32 to 47 of an image of 40
    tap = visualize.ColouredTap(pixels, 16, 0.5)
    panel = visualize.draw_panel(Image.new("RGB", (40, 40)), "", {(9, 24): tap}, 200)
    left, top, right, bottom = locate(panel, (250, 0, 0))
    assert right - left == pytest.approx(200 * 8 / 40, abs=1)
    assert bottom - top == 200
    smooth = np.asarray(
        visualize.draw_panel(Image.new("RGB", (40, 40)), "", {(9, 24): tap}, 200, smooth=True)
    )
    assert len(np.unique(smooth[top + 100, left - 60 : right, 0])) > 10


def test_sheet_is_about_square_and_holds_all():
    panels = [Image.new("RGB", (100, 300), (10 * i, 0, 0)) for i in range(1, 8)]
    sheet = visualize.arrange(panels)
    assert sheet.size == (400, 600)
    pixels = np.asarray(sheet)
    assert [int(pixels[150, x, 0]) for x in (50, 150, 250, 350)] == [10, 20, 30, 40]
    assert [int(pixels[450, x, 0]) for x in (50, 150, 250)] == [50, 60, 70]
    assert visualize.arrange(panels[:1]).size == (100, 300)


# ------------------------------------------------------------------------------------- the command


def test_one_sheet_or_one_picture_an_image(images, weights, tmp_path, capsys):
    draw(tmp_path / "all.png", images, "--checkpoint", weights, "--cell", 40)
    draw(tmp_path / "folder", images, "--checkpoint", weights, "--cell", 40)
    assert "2 images" in capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert names == ["0_tall.png", "1_wide.png", "all.png"]
    panels = [Image.open(tmp_path / "folder" / name) for name in names[:2]]
    sheet = np.asarray(Image.open(tmp_path / "all.png"))
    first = np.asarray(panels[0])
    assert (sheet[: first.shape[0], : first.shape[1]] == first).all()
    draw(tmp_path / "again.png", images, "--checkpoint", weights, "--cell", 40)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "all.png").read_bytes()
    draw(tmp_path / "one.png", images, "--limit", 1, "--checkpoint", weights, "--cell", 40)
    assert Image.open(tmp_path / "one.png").size == panels[0].size


def test_feedback_shows_the_second_pass(images, weights, tmp_path, capsys):
    options = [images / "wide.png", "--checkpoint", weights, "--cell", 32]
    draw(tmp_path / "plain.png", *options)
    draw(tmp_path / "fed.png", *options, "--feedback", "bottleneck")
    assert "the feedback layers are random" in capsys.readouterr().out
    plain, fed = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("plain", "fed"))
    assert plain.shape == fed.shape
    assert (plain != fed).any()


@pytest.mark.parametrize("finetune", [False, True])
def test_trained_layers_come_from_a_classifier(images, weights, tmp_path, finetune, capsys):
    write_folder(tmp_path / "train", 2, 0)
    write_folder(tmp_path / "val", 1, 1)
    mode = ["--finetune"] if finetune else ["--feedback", "windowed"]
    train_classifier.main(
        [*map(str, mode), "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--unet", "tiny",
         "--image-size", "32", "--workers", "0", "--device", "cpu", "--epochs", "1", "--width",
         "32", "--num-heads", "2", "--layers", "1", "--batch-size", "6", "--lr", "0.05",
         "--checkpoint", str(weights)]
    )  # fmt: skip
    best = tmp_path / "run/best.pt"
    options = [str(images), "--device", "cpu", "--timesteps", "90", "--blocks", "12", "24"]
    options += ["--classifier", str(best), "--out", str(tmp_path / "x.png")]
    if not finetune:
        options += ["--checkpoint", str(weights)]
    capsys.readouterr()
    args = visualize.parse(options)
    assert args.unet == "tiny"
    assert args.feedback == ("none" if finetune else "windowed")
    backbone = visualize._build(args, common.Processes())
    saved = train_classifier.read_checkpoint(best)["backbone"]
    state = backbone.state_dict()
    prefix = "unet." if finetune else "feedback."
    compared = [key for key in saved if key.startswith(prefix)]
    assert compared
    assert all(torch.equal(state[key], saved[key]) for key in compared)
    assert "warning" not in capsys.readouterr().out
    visualize.main(options)
    assert (tmp_path / "x.png").is_file()
    last = backbone.unet.last_block
    with pytest.raises(SystemExit, match=f"the U-Net of --classifier has blocks 1 to {last}"):
        visualize.main([*options, "--blocks", str(last + 1)])


def test_image_size_enlarges_small_images(tmp_path):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "small.png")
    message = fails(tmp_path / "small.png")
    assert "small.png has 20 x 30 px, at least 32 x 32 are needed" in message
    found = visualize.read_resized(tmp_path / "small.png", 40, None)
    assert found.shape == (60, 40, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.png"], "there is no image nowhere.png"),
        (["--cell", "8"], "--cell must be at least 16"),
        (["--percentile", "50"], "--percentile must be from 0 to below 50"),
        (["--image-size", "31"], "--image-size must be at least 32"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--blocks", "38"], "block numbers from 1 to 37"),
        (["--timesteps", "5", "5"], "one comes twice"),
        (["--checkpoint", "nowhere.pt"], "there is no checkpoint"),
        (["--classifier", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--feedback", "multi-scale", "--blocks", "3"], "feedback into blocks"),
        (["--unet", "huge"], "choose from"),
    ],
)
def test_bad_options_are_errors(images, tmp_path, options, message):
    out = tmp_path / "out.png"
    given = (
        options if options[0] == "nowhere.png" else [images / "wide.png", *options]
    )  # first: options take what follows
    assert message in fails(*given, "--out", out)
    assert not out.exists()
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "broken.png is broken" in fails(tmp_path / "broken.png", "--out", out)
