"""`tools/train_classifier.py`, `tools/knn.py`, `tools/compare_heads.py` and what they share."""

# ruff: noqa: E402 - the tools are found by their folder

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path.append(str(TOOLS))

import _classification as common
import compare_heads
import knn
import train_classifier
from _classification import ToolError
from image_folders import CLASSES, write_folder, write_weights

from diffbackbone import DiffusionBackbone
from diffbackbone.features import CacheError, Listing
from diffbackbone.pretrain.data import Examples, find_images

TRAIN, VAL, SIZE = 6, 3, 32
SMALL = [
    "--unet", "tiny", "--image-size", "32", "--workers", "0", "--device", "cpu", "--epochs", "2",
    "--batch-size", "10", "--width", "32", "--num-heads", "2", "--layers", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", TRAIN, 0)
    write_folder(root / "val", VAL, 1, ".jpg")
    return root


@pytest.fixture
def own_data(tmp_path, data):
    """A copy that a test may spoil."""
    for split, count, seed in (("train", 2, 0), ("val", 1, 1)):
        write_folder(tmp_path / "own" / split, count, seed)
    return tmp_path / "own"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(data, out, *options):
    arguments = ["--data", str(data), "--out", str(out), *SMALL, *map(str, options)]
    return train_classifier.run(train_classifier.parse(arguments))


def fails(*options) -> str:
    with pytest.raises(SystemExit) as error:
        train_classifier.main([*SMALL, *map(str, options)])
    message = str(error.value)
    assert message.startswith("error: ")
    return message


def numbers(out: Path) -> tuple:
    """Everything a run reports, less times and paths."""
    results = json.loads((out / "results.json").read_text())
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for record in history:
        del record["seconds"]
    keys = ("lr", "epoch", "val", "learning_rates", "confusion", "trained_parameters")
    return history, {key: results[key] for key in keys}


def history(out: Path) -> list:
    return numbers(out)[0]


# -------------------------------------------------------------------------------------- folders


def test_folder_is_listed_class_by_class(data):
    folder = common.list_folder(data / "train")
    assert folder.listing.classes == ("class0", "class1", "class2")
    assert len(folder.listing) == CLASSES * TRAIN
    assert folder.labels.tolist() == sorted(folder.labels.tolist())
    assert folder.listing.paths[0] == "class0/0.png"
    assert folder.listing.sizes[0] == (data / "train/class0/0.png").stat().st_size


def test_missing_folders(tmp_path, data):
    out = ["--out", tmp_path / "out"]
    assert "no folder" in (message := fails("--data", tmp_path / "nowhere", *out))
    assert "nowhere/train" in message
    (tmp_path / "half" / "train").mkdir(parents=True)
    assert "of val images; " in (message := fails("--data", tmp_path / "half", *out))
    assert "holds train" in message
    assert "--train-dir" in fails("--val-dir", data / "val", *out)
    assert not (tmp_path / "out").exists()


def spoil_unknown_class(root):
    (root / "val/class1").rename(root / "val/classX")
    return "classes that training lacks: classX"


def spoil_one_class(root):
    for c in (1, 2):
        for split in ("train", "val"):
            for path in (root / split / f"class{c}").iterdir():
                path.unlink()
            (root / split / f"class{c}").rmdir()
    return "one class only (class0)"


def spoil_empty_class(root):
    for path in (root / "train/class1").iterdir():
        path.unlink()
    (root / "train/class1/notes.txt").write_text("no image")
    return "train/class1 has no images"


def spoil_empty_image(root):
    (root / "val/class2/0.png").write_bytes(b"")
    return "val/class2/0.png is empty (0 bytes)"


def spoil_truncated_image(root):
    path = root / "train/class2/1.png"
    path.write_bytes(path.read_bytes()[:-500])
    return "train/class2/1.png is broken"


def spoil_no_image(root):
    (root / "train/class0/0.png").write_text("this is text")
    return "train/class0/0.png is broken: no known format"


def spoil_dangling_link(root):
    (root / "train/class0/9.png").symlink_to(root / "gone.png")
    return "train/class0/9.png cannot be read"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_unknown_class, spoil_one_class, spoil_empty_class, spoil_empty_image,
        spoil_truncated_image, spoil_no_image, spoil_dangling_link,
    ],
)  # fmt: skip
def test_bad_data_is_one_clear_error_before_work(own_data, tmp_path, spoil):
    message = spoil(own_data)
    assert message in fails("--data", own_data, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_deep_and_turned_images_reach_both_tools_alike(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (40, 32)).astype(np.uint16)
    for name, pixels in (("deep.tif", values), ("plain.png", (values >> 4).astype(np.uint8))):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    folder = common.list_images(tmp_path, (0, 4095))
    rows = common.RowImages(folder, 32)
    crops = Examples(find_images(tmp_path), 32, flip=False, value_range=(0, 4095))
    numbers = [0, 1]
    batch = [crops.crop(n).numpy() for n in numbers]
    upright = np.rot90(values, -1)
    for pixels, index in zip(batch, map(crops.index, numbers)):
        levels = 256 if folder.listing.paths[index] == "plain.png" else 4096
        expected = upright // (4096 // levels) / (levels - 1) * 2 - 1  # 32 x 40
        left = int(np.abs(expected[0, :, None] - float(pixels[0, 0, 0])).argmin())
        np.testing.assert_allclose(pixels[1], expected[:, left : left + 32], atol=1e-6)
        np.testing.assert_allclose(rows[0, index][2], expected[:, 4:36], atol=1e-6)


def test_preprocessing_crops_centre_or_the_same_place_again():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    assert common.prepare_image(pixels, 40).min() == 255
    once, again = (common.prepare_image(pixels, 32, (1, 2)) for _ in range(2))
    assert (once == again).all()
    assert (once != common.prepare_image(pixels, 32, (1, 3))).any()
    assert common.prepare_image(pixels, 64, (1, 2)).shape == (64, 64, 3)


def test_rows_beyond_the_last_image_are_mirrored(data):
    folder = common.list_folder(data / "train")
    images = common.RowImages(folder, SIZE)
    plain, mirrored = images[0, 3], images[0, 3 + len(folder.listing)]
    assert plain.shape == (3, SIZE, SIZE)
    assert -1 <= float(plain.min()) < float(plain.max()) <= 1
    assert torch.equal(mirrored, plain.flip(-1))
    assert not torch.equal(mirrored, plain)


# -------------------------------------------------------------------------------------- subsets


def make_folder(counts) -> common.ImageFolder:
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    paths = [f"class{c}/{i}.png" for i, c in enumerate(labels)]
    zeros = (0,) * len(labels)
    names = tuple(f"class{c}" for c in range(len(counts)))
    return common.ImageFolder(
        Path("root"), Listing(tuple(paths), tuple(labels), zeros, zeros, names)
    )


def test_subset_is_balanced_and_seeded():
    folder = make_folder([100, 300, 3, 200])
    chosen = common.choose_subset(folder, "10%", seed=0)
    assert np.bincount(chosen.labels).tolist() in ([19, 19, 3, 19], [19, 19, 3, 19])
    assert chosen == common.choose_subset(folder, "0.1", seed=0)
    assert chosen != common.choose_subset(folder, "0.1", seed=1)
    even = common.choose_subset(make_folder([50, 50, 50]), "11%", seed=0)
    assert sorted(np.bincount(even.labels)) == [5, 5, 6]  # 16.5 rounds to 16
    assert len(common.choose_subset(folder, "1", seed=0).listing) == 603


def test_subset_from_a_list(tmp_path):
    folder = make_folder([2, 2])
    path = tmp_path / "list.txt"
    path.write_text("class0/1.png\n\n3.png\n")
    assert common.choose_subset(folder, str(path), 0).listing.paths == (
        "class0/1.png",
        "class1/3.png",
    )
    path.write_text("class0/1.png\nclass0/7.png\n8.png\n")
    with pytest.raises(ToolError, match=r"line 2, class0/7.png: no such image, and 1 more"):
        common.choose_subset(folder, str(path), 0)
    path.write_text("class0/1.png\n")
    with pytest.raises(ToolError, match="leaves 1 classes without an image, such as class1"):
        common.choose_subset(folder, str(path), 0)
    for subset, message in (
        ("0", "share"),
        ("120%", "share"),
        ("nolist.txt", "neither"),
        ("1%", "fewer"),
    ):
        with pytest.raises(ToolError, match=message):
            common.choose_subset(folder, subset, 0)


def test_holdout_divides_every_class():
    labels = np.repeat([0, 1, 2], [40, 2, 10])
    learn, held = common.split_holdout(labels, 0.1, seed=0)
    assert sorted([*learn, *held]) == list(range(52))
    assert np.bincount(labels[held]).tolist() == [4, 1, 1]
    with pytest.raises(ToolError, match="one training image only"):
        common.split_holdout(np.array([0, 0, 1]), 0.1, 0)


# --------------------------------------------------------------------------------------- scores


def test_ranks_give_nothing_away():
    scores = torch.tensor(
        [[1.0, 2, 3], [0, 0, 0], [0, 0, 0], [float("nan")] * 3, [0, float("inf"), 0]]
    )
    labels = torch.tensor([1, 0, 2, 0, 1])
    assert common.true_ranks(scores, labels).tolist() == [1, 0, 2, 3, 3]


# -------------------------------------------------------------------------------------- recipes


def parse(*options):
    return train_classifier.parse(["--data", "x", *options])


def test_recipes_are_the_papers_protocols():
    args = parse()
    assert (args.optimizer, args.epochs, args.step, args.gamma) == ("adam", 28, 7, 0.1)
    assert (args.batch_size, args.augment, args.freeze) == (128, "flip", True)
    assert (args.unet, args.image_size, args.timesteps, args.blocks) == (
        "gd256_uncond",
        256,
        [150],
        [24],
    )
    assert (args.head, args.pool, args.select_on) == ("linear", 2, "none")
    args = parse("--recipe", "probe-sgd")
    assert (args.optimizer, args.lr, args.batch_size, args.momentum) == ("sgd", [1e-2], 128, 0)
    assert parse("--recipe", "probe-sgd", "--head", "attention").lr == [5e-2]
    args = parse("--recipe", "probe-sgd", "--feedback", "bottleneck")
    assert (args.head, args.lr, args.batch_size) == ("attention", [1e-2], 16)
    args = parse("--head", "difformer")
    assert (args.timesteps, args.blocks, args.pool) == ([90, 150, 300], [19, 24, 30], 16)
    args = parse("--recipe", "semi-1")
    assert (args.subset, args.freeze, args.lr) == ("1%", False, [1e-3])
    assert parse("--recipe", "semi-10", "--freeze", "--epochs", "5").subset == "10%"
    assert parse("--recipe", "semi-10", "--freeze", "--epochs", "5").epochs == 5
    assert parse("--recipe", "semi-10", "--freeze").freeze is True
    assert parse("--recipe", "ablation").epochs == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "19", "24"], "linear takes one map, but 2 blocks at 1 timesteps make 2"),
        (["--head", "attention", "--timesteps", "1", "2"], "difformer takes several"),
        (["--blocks", "38"], "blocks must be block numbers from 1 to 37"),
        (["--timesteps", "1000"], "timestep must be an integer from 0 to 999"),
        (["--head", "difformer", "--timesteps", "90", "1000"], "timestep must be an integer"),
        (["--head", "difformer", "--blocks", "24", "24"], "one comes twice"),
        (["--unet", "huge"], "choose from gd64"),
        (["--image-size", "16"], "at least 32"),
        (["--head", "attention", "--width", "33", "--num-heads", "2"], "does not fit"),
        (["--head", "cnn", "--pool", "1"], "--head cnn does not fit"),
        (["--hidden", "3"], "--hidden is for"),
        (["--lr", "0.1", "0.2", "--finetune"], "several learning rates"),
        (["--lr", "0.1", "0.2", "--select-on", "none"], "need --select-on"),
        (["--lr", "-1"], "above 0"),
        (["--lr", "0.1", "0.1"], "different"),
        (["--cache", "c", "--feedback", "windowed"], "--feedback is trained"),
        (["--cache", "c", "--finetune"], "--finetune changes"),
        (["--cache", "c", "--noise", "random"], "--noise random"),
        (["--cache", "c", "--augment", "crop-flip"], "random crops"),
        (["--checkpoint", "nowhere.pt"], "there is no checkpoint"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--backbone-lr", "0.1"], "is for --finetune"),
        (["--feedback", "windowed", "--blocks", "3"], "block"),
        (["--device", "cuda"], "finds no GPU"),
        (["--evaluate", "nowhere.pt"], "there is no checkpoint"),
    ],
)
def test_options_that_dont_go_together(data, tmp_path, options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in fails("--data", data, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "options",
    [
        ["--head", "linear", "--lr", "0.1"],
        ["--head", "mlp", "--hidden", "16", "--pool", "1"],
        ["--head", "cnn", "--hidden", "8", "--pool", "4"],
        ["--head", "attention"],
        ["--head", "difformer", "--timesteps", "90", "--blocks", "19", "24"],
        ["--head", "difformer", "--timesteps", "90", "300", "--blocks", "24"],
        ["--feedback", "windowed"],
        ["--head", "linear", "--finetune", "--noise", "random"],
    ],
    ids=lambda options: "-".join(options[:4]).replace("--", ""),
)
def test_every_head_trains(data, tmp_path, options):
    results = train(data, tmp_path / "out", "--epochs", 2, *options)
    assert results["val"]["images"] == CLASSES * VAL
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"last.pt", "best.pt", "metrics.jsonl", "results.json", "confusion.png"} <= files
    assert not [name for name in files if name.endswith(".writing")]
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert np.sum(saved["confusion"]) == CLASSES * VAL
    right = np.trace(saved["confusion"]) / (CLASSES * VAL)
    assert right == pytest.approx(saved["val"]["top1"])
    assert saved["val"]["top5"] == 1.0  # of three classes
    again = history(tmp_path / "out")[-1]["val"][0]
    assert again == saved["val"]
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = board.EventAccumulator(str(tmp_path / "out/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val_top1")] == [1, 2]


def test_a_probe_learns(data, tmp_path):
    options = ["--augment", "none", "--cache", tmp_path / "cache"]
    results = train(data, tmp_path / "out", "--lr", 0.1, "--epochs", 12, *options)
    assert results["val"]["top1"] > 0.9
    losses = [record["train_loss"][0] for record in history(tmp_path / "out")]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_cache_changes_no_digit(data, tmp_path, weights, augment):
    options = ["--head", "attention", "--checkpoint", weights, "--augment", augment]
    train(data, tmp_path / "plain", *options)
    train(data, tmp_path / "cached", *options, "--cache", tmp_path / "cache", "--shard-mib", 0.002)
    plain, cached = numbers(tmp_path / "plain"), numbers(tmp_path / "cached")
    assert len(list((tmp_path / "cache/train").glob("*.npy"))) > 2
    for before, after in zip(plain[0], cached[0]):
        assert before["train_top1"] == after["train_top1"]
        assert before["val"][0]["top1"] == after["val"][0]["top1"]
        assert before["train_loss"] == pytest.approx(after["train_loss"], rel=1e-6)
    assert plain[1]["confusion"] == cached[1]["confusion"]


def test_cached_flips_are_features_of_mirrored_images(data, tmp_path, weights):
    options = ["--checkpoint", weights, "--cache", tmp_path / "cache", "--epochs", 1]
    train(data, tmp_path / "out", *options)
    from diffbackbone.features import FeatureCache

    cache = FeatureCache(tmp_path / "cache/train")
    assert len(cache) == 2 * CLASSES * TRAIN
    folder = common.list_folder(data / "train")
    images = common.RowImages(folder, SIZE)
    backbone = DiffusionBackbone("tiny", weights, 150, (24,), None, None, None, freeze=True)
    row = len(folder.listing) + 5
    expected = backbone(images[0, 5].flip(-1)[None])[0]
    pooled = torch.nn.functional.adaptive_avg_pool2d(expected, (1, 1))
    found = cache.read([row])[150, 24].float().mean((2, 3), keepdim=True)
    assert torch.allclose(found, pooled, atol=2e-3)


def test_stale_cache_is_refused_and_named(data, tmp_path):
    options = ["--cache", tmp_path / "cache", "--epochs", 1]
    train(data, tmp_path / "one", *options)
    arguments = ["--data", data, "--out", tmp_path / "two", *options]
    message = fails(*arguments, "--timesteps", 151, "--noise", "none")
    assert "timesteps: the cache has [150], wanted is [151]" in message
    assert "noise: the cache has 'fixed', wanted is 'none'" in message
    assert "weights_sha256" in fails(*arguments, "--seed", 1)
    assert "preprocessing" in fails(*arguments, "--value-range", 0, 4095)
    assert not (tmp_path / "two").exists()
    train(data, tmp_path / "two", *options, "--timesteps", 151, "--overwrite-cache")


def test_changed_image_makes_a_cache_stale(own_data, tmp_path):
    options = ["--cache", tmp_path / "cache", "--epochs", 1]
    train(own_data, tmp_path / "one", *options)
    os.utime(own_data / "train/class1/0.png", ns=(1, 1))
    message = fails("--data", own_data, "--out", tmp_path / "two", *options)
    assert "image class1/0.png: has changed" in message


def test_several_rates_are_several_runs(data, tmp_path):
    rates = (0.01, 0.3)
    options = ["--select-on", "val", "--cache", tmp_path / "cache"]
    train(data, tmp_path / "both", "--lr", *rates, *options)
    both = history(tmp_path / "both")
    for index, lr in enumerate(rates):
        train(data, tmp_path / str(lr), "--lr", lr, *options)
        for record, alone in zip(both, history(tmp_path / str(lr))):
            assert record["train_loss"][index] == pytest.approx(alone["train_loss"][0], rel=1e-5)
            assert record["val"][index]["top1"] == alone["val"][0]["top1"]


def test_choice_is_made_on_held_out_training_images(data, tmp_path):
    rates = ["--lr", 1e-4, 0.01, 0.1, "--augment", "none", "--holdout", 0.33, "--epochs", 4]
    results = train(data, tmp_path / "out", *rates)
    records = history(tmp_path / "out")
    assert results["selected_on"] == "heldout"
    assert records[0]["heldout"][0]["images"] == CLASSES * TRAIN // 3
    scored = [
        (found["top1"], -found["loss"], -record["epoch"], -index)
        for record in records
        for index, found in enumerate(record["heldout"])
    ]
    best = max(scored)
    assert (results["epoch"], results["lr"]) == (-best[2], (1e-4, 0.01, 0.1)[-best[3]])
    chosen = records[results["epoch"] - 1]["val"][-best[3]]
    assert results["val"] == pytest.approx(chosen)
    assert [rate["lr"] for rate in results["learning_rates"]] == [1e-4, 0.01, 0.1]
    (rate,) = (rate for rate in results["learning_rates"] if rate["lr"] == results["lr"])
    assert (rate["epoch"], rate["val_top1"]) == (results["epoch"], results["val"]["top1"])


def test_epoch_takes_every_image_once_and_half_of_them_mirrored(data, tmp_path, monkeypatch):
    read = []
    original = common.FeatureCache.read

    def spy(self, rows, taps=None):
        read.append((self.folder.name, list(rows)))
        return original(self, rows, taps)

    monkeypatch.setattr(common.FeatureCache, "read", spy)
    options = ["--lr", 0.01, 0.1, "--holdout", 0.33, "--epochs", 8, "--cache", tmp_path / "cache"]
    train(data, tmp_path / "out", *options)
    count, held = CLASSES * TRAIN, CLASSES * TRAIN // 3
    rows = [row for name, rows in read if name == "train" for row in rows]
    assert len(rows) == 8 * count
    epochs = [rows[i : i + count] for i in range(0, len(rows), count)]
    for epoch in epochs:
        learnt, chosen_by = epoch[:-held], epoch[-held:]
        assert chosen_by == epochs[0][-held:]
        assert {row % count for row in learnt} | set(chosen_by) == set(range(count))
    assert len({tuple(epoch) for epoch in epochs}) == 8
    mirrored = np.mean([row >= count for epoch in epochs for row in epoch[:-held]])
    assert 0.3 < mirrored < 0.7
    seen = [row for name, rows in read if name == "val" for row in rows]
    assert seen == list(range(CLASSES * VAL)) * 9  # each epoch, and what was chosen


def test_learning_rate_drops_every_step(data, tmp_path):
    options = ["--lr", 0.08, "--step", 2, "--gamma", 0.5, "--cache", tmp_path / "cache"]
    rates = []
    for epochs in (1, 2, 3, 5):
        train(data, tmp_path / "out", "--epochs", epochs, "--resume", *options)
        saved = train_classifier.read_checkpoint(tmp_path / "out/last.pt")
        rates += [group["lr"] for group in saved["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.08, 0.08, 0.04, 0.02])


def test_one_diverging_rate_leaves_the_others_alone(data, tmp_path):
    options = ["--head", "mlp", "--hidden", "8", "--augment", "none", "--optimizer", "sgd"]
    results = train(data, tmp_path / "out", "--lr", 0.1, 1e25, *options)
    assert results["lr"] == 0.1
    train(data, tmp_path / "alone", "--lr", 0.1, "--select-on", "heldout", *options)
    mixed, alone = history(tmp_path / "out"), history(tmp_path / "alone")
    assert mixed[-1]["train_loss"][0] == pytest.approx(alone[-1]["train_loss"][0])
    assert "NaN" not in (tmp_path / "out/metrics.jsonl").read_text()
    message = fails("--data", data, "--out", tmp_path / "bad", "--lr", 1e25, *options)
    assert "diverged in epoch" in message


def test_frozen_weights_stay_and_fine_tuned_ones_move(data, tmp_path, weights):
    original = torch.load(weights, weights_only=True)
    options = ["--checkpoint", weights, "--epochs", 1, "--lr", 0.01]
    train(data, tmp_path / "frozen", *options, "--feedback", "windowed")
    train(data, tmp_path / "tuned", *options, "--finetune")
    frozen = train_classifier.read_checkpoint(tmp_path / "frozen/best.pt")
    assert not [key for key in frozen["backbone"] if key.startswith("unet.")]
    assert [key for key in frozen["backbone"] if key.startswith("feedback.")]
    assert (tmp_path / "frozen/best.pt").stat().st_size < weights.stat().st_size / 4
    tuned = train_classifier.read_checkpoint(tmp_path / "tuned/best.pt")
    moved = [
        key
        for key, x in tuned["backbone"].items()
        if not torch.equal(x, original[key[len("unet.") :]])
    ]
    assert "unet.input_blocks.0.0.weight" in moved


def test_saved_head_is_evaluated_on_its_own(data, tmp_path, weights):
    options = ["--feedback", "windowed", "--checkpoint", weights]
    trained = train(data, tmp_path / "out", *options, "--lr", 0.01)
    evaluated = train(
        data, tmp_path / "eval", "--checkpoint", weights, "--evaluate", tmp_path / "out/best.pt"
    )
    assert evaluated["val"] == trained["val"]
    assert (tmp_path / "eval/confusion.png").is_file()
    message = fails("--data", data, "--out", tmp_path / "x", "--evaluate", tmp_path / "out/best.pt")
    assert "trained on a frozen U-Net" in message
    (tmp_path / "junk.pt").write_bytes(b"junk")
    assert "is damaged" in fails("--data", data, "--evaluate", tmp_path / "junk.pt")
    torch.save({"path": Path("x")}, tmp_path / "code.pt")
    assert "more than weights" in fails("--data", data, "--evaluate", tmp_path / "code.pt")


def test_evaluation_leaves_the_run_alone(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data", str(data), *SMALL]
    train_classifier.main(options)
    run = Path("work_dirs/classifier")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    options += ["--evaluate", str(run / "best.pt")]
    train_classifier.main(options)
    own = json.loads((run / "evaluation/best/results.json").read_text())
    assert own["val"] == json.loads(before["results.json"])["val"]
    fails(*options, "--out", run)
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    fails("--data", data, "--out", run / "evaluation/best")  # nor does training an evaluation


def test_subset_trains_on_its_images(data, tmp_path):
    train(data, tmp_path / "out", "--subset", "50%", "--epochs", 1)
    saved = train_classifier.read_checkpoint(tmp_path / "out/last.pt")
    assert saved["settings"]["train_images"] == CLASSES * TRAIN // 2


# --------------------------------------------------------------------------------- interruptions


def test_run_is_not_overwritten_nor_mixed(data, tmp_path):
    train(data, tmp_path / "out", "--epochs", 1)
    content = (tmp_path / "out/last.pt").read_bytes()
    arguments = ["--data", data, "--out", tmp_path / "out"]
    assert "already holds a run: --resume" in fails(*arguments)
    message = fails(*arguments, "--resume", "--lr", 0.5, "--head", "attention")
    assert "head: 'linear' before, 'attention' now" in message
    assert "lr: [0.001] before, [0.5] now" in message
    assert (tmp_path / "out/last.pt").read_bytes() == content


@pytest.mark.parametrize(
    "options",
    [
        ["--feedback", "windowed", "--noise", "random", "--augment", "crop-flip"],
        ["--lr", 0.01, 0.1, "--optimizer", "sgd", "--momentum", 0.9],
    ],
    ids=["difffeed", "rates"],
)
def test_resumed_run_equals_an_unbroken_one(data, tmp_path, weights, options):
    options = ["--checkpoint", weights, *options]
    train(data, tmp_path / "whole", "--epochs", 3, *options)
    train(data, tmp_path / "parts", "--epochs", 1, *options)
    train(data, tmp_path / "parts", "--epochs", 3, "--resume", *options)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_resumed_run_keeps_its_own_frozen_weights(data, tmp_path, weights):
    train(data, tmp_path / "whole")
    train(data, tmp_path / "parts", "--epochs", 1)
    other = ["--checkpoint", weights, "--cache", tmp_path / "cache"]
    train(data, tmp_path / "parts", "--resume", *other)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    best = ["--evaluate", tmp_path / "parts/best.pt"]
    evaluated = [train(data, tmp_path / "eval", *best, *options) for options in ([], other)]
    _, results = numbers(tmp_path / "whole")
    assert evaluated[0]["val"] == evaluated[1]["val"] == results["val"]


def test_sigkill_costs_an_epoch_at_most(data, tmp_path, weights):
    out = tmp_path / "killed"
    options = ["--head", "attention", "--epochs", "5", "--step", "2", "--lr", "0.003"]
    options += ["--checkpoint", str(weights)]
    train(data, tmp_path / "whole", *options)
    command = [sys.executable, TOOLS / "train_classifier.py", "--data", data, "--out", out]
    command += [*SMALL, *options, "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = 0
    for delay in (0.0, 0.15):
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        saved = out / "last.pt"
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if saved.exists() and saved.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = len(train_classifier.read_checkpoint(saved)["history"])
        assert done >= lines + 1  # nothing that was finished is lost
        lines = done
    train(data, out, *options, "--resume")
    assert numbers(out) == numbers(tmp_path / "whole")


def test_full_disk_keeps_what_was_saved(data, tmp_path):
    out = tmp_path / "out"
    train(data, out, "--epochs", 1)
    content = (out / "last.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, hard))
    try:
        message = fails("--data", data, "--out", out, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in message
    assert (out / "last.pt").read_bytes() == content
    assert not list(out.glob(".*.writing"))
    train(data, out, "--resume")
    train(data, tmp_path / "whole")
    assert numbers(out) == numbers(tmp_path / "whole")


# -------------------------------------------------------------------------------- two processes


def test_two_processes_equal_one(data, tmp_path, weights):
    options = [
        "--head", "attention", "--checkpoint", weights, "--optimizer", "sgd", "--lr", 0.05,
        "--batch-size", 7, "--epochs", 2,
    ]  # fmt: skip
    train(data, tmp_path / "one", *options)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone",
        TOOLS / "train_classifier.py", "--data", data, "--out", tmp_path / "two", *SMALL, *options,
        "--cache", tmp_path / "cache", "--shard-mib", 0.003,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert np.sum(two[1]["confusion"]) == CLASSES * VAL  # odd, and every image counted once
    assert two[1]["confusion"] == one[1]["confusion"]
    for before, after in zip(one[0], two[0]):
        assert after["val"][0]["images"] == CLASSES * VAL
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-3)
        assert after["train_top1"] == before["train_top1"]


# ------------------------------------------------------------------------------------ neighbours


def brute_force(queries, bank, labels, truth, k, classes, temperature):
    """Neighbours in float64, one query after the other."""
    unit = [
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, bank)
    ]
    right = np.zeros(2)
    for query, label in zip(unit[0], truth):
        similarity = unit[1] @ query
        order = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
        votes = np.zeros(classes)
        for i in order:
            votes[labels[i]] += np.exp(similarity[i] / temperature)
        ranking = [c for c in sorted(range(classes), key=lambda c: (-votes[c], c)) if votes[c] > 0]
        right += [label in ranking[:1], label in ranking[:5]]
    return tuple(right / len(truth))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_neighbours_equal_brute_force(chunk):
    random = np.random.default_rng(0)
    centres = random.normal(size=(9, 12))
    labels, truth = random.integers(0, 9, 83), random.integers(0, 9, 41)
    bank = centres[labels] + 1.5 * random.normal(size=(83, 12))
    queries = centres[truth] + 1.5 * random.normal(size=(41, 12))
    ks = (1, 5, 20, 83)
    found = knn.knn_accuracy(
        lambda a, b: torch.tensor(bank[a:b]), labels,
        lambda a, b: torch.tensor(queries[a:b]), truth, ks, 9, chunk=chunk,
    )  # fmt: skip
    scores = set()
    for k in ks:
        expected = brute_force(queries, bank, labels, truth, k, 9, 0.07)
        assert (found[k]["top1"], found[k]["top5"]) == pytest.approx(expected)
        scores.add(expected)
    assert len(scores) > 2  # the protocols differ here


@pytest.mark.parametrize("chunk", [2, 3, 5, 100])
def test_ties_go_to_the_first_rows(chunk):
    bank = torch.tensor([[0.0, 1], [1, 0], [-1, 0], [1, 0], [1, 0], [0, -1], [1, 0]])
    queries = torch.tensor([[1.0, 0], [-1, 0]])
    similarities, rows = knn.nearest(queries, lambda a, b: bank[a:b], len(bank), 6, chunk)
    assert rows.tolist() == [[1, 3, 4, 6, 0, 5], [2, 0, 5, 1, 3, 4]]
    assert similarities.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, -1, -1, -1]]


def test_similarities_survive_the_keys():
    values = torch.tensor([[1.0, -1.0, 0.0, -0.0, 1e-38, -1e-38, 0.3, -0.3, 1 + 1e-7]])
    order = knn._to_keys(values, 5).sort(dim=1, descending=True).values
    found, rows = knn._from_keys(order)
    assert found.tolist() == values.sort(dim=1, descending=True).values.tolist()
    assert rows.tolist() == [[13, 5, 11, 9, 7, 8, 10, 12, 6]]


def test_votes_are_weighted_by_temperature():
    similarities, labels = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[2, 1, 1]])
    assert knn.vote(similarities, labels, 4, 0.07).argmax() == 2
    assert knn.vote(similarities, labels, 4, 1.0).argmax() == 1
    scores = knn.vote(similarities, labels, 4, 0.07)[0]
    assert scores[1] == pytest.approx(2 * np.exp(-0.1 / 0.07))
    assert scores[[0, 3]].tolist() == [0, 0]
    assert (knn.vote(torch.tensor([[1.0, -1]]), torch.tensor([[0, 1]]), 2, 1e-4) > 0).all()


def test_classes_without_a_vote_are_never_right():
    bank = torch.tensor([[1.0, 0], [0, 1]])
    found = knn.knn_accuracy(
        lambda a, b: bank[a:b], [3, 4], lambda a, b: bank[a:b], [0, 4], [1], 5, chunk=10
    )
    assert found[1] == {"top1": 0.5, "top5": 0.5}


def test_knn_command(data, tmp_path, weights, capsys):
    arguments = [
        "--data", data, "--unet", "tiny", "--image-size", 32, "--checkpoint", weights, "--k", 3, 10,
        "--timesteps", 90, 150, "--blocks", 19, 24, "--workers", 0, "--device", "cpu", "--chunk", 4,
        "--batch-size", 6, "--cache", tmp_path / "cache", "--out", tmp_path / "knn.json",
    ]  # fmt: skip
    knn.main(list(map(str, arguments)))
    printed = capsys.readouterr().out
    assert "| b | t | pool | Top1@3 | Top5@3 | Top1@10 | Top5@10 |" in printed
    rows = json.loads((tmp_path / "knn.json").read_text())["rows"]
    assert [(row["b"], row["t"], row["k"]) for row in rows] == [
        (b, t, k) for b in (19, 24) for t in (90, 150) for k in (3, 10)
    ]
    folders = [common.list_folder(data / split) for split in ("train", "val")]
    backbone = DiffusionBackbone("tiny", weights, 90, (24,), None, None, None, freeze=True)
    vectors = []
    for folder in folders:
        images = common.RowImages(folder, 32)
        batch = torch.stack([images[0, i] for i in range(len(folder.listing))])
        vectors.append(backbone(batch)[0].mean((2, 3)).detach().half().double().numpy())
    expected = brute_force(
        vectors[1], vectors[0], folders[0].labels, folders[1].labels, 3, CLASSES, 0.07
    )
    row = next(row for row in rows if (row["b"], row["t"], row["k"]) == (24, 90, 3))
    assert (row["top1"], row["top5"]) == pytest.approx(expected)
    with pytest.raises(SystemExit, match="error: --k 99: there are 18 training images only"):
        knn.main([*map(str, arguments), "--k", "99"])
    with pytest.raises(SystemExit, match="temperature"):
        knn.main([*map(str, arguments), "--temperature", "0"])


def test_mirrored_copies_are_no_neighbours(data, tmp_path):
    train(data, tmp_path / "out", "--cache", tmp_path / "cache", "--epochs", 1)
    from diffbackbone.features import FeatureCache

    caches = [FeatureCache(tmp_path / "cache" / split) for split in ("train", "val")]
    assert len(caches[0]) == 2 * CLASSES * TRAIN
    rows = knn.evaluate_caches(*caches, [(150, 24)], [CLASSES * TRAIN])
    assert rows[0]["top5"] == 1.0
    with pytest.raises(ToolError, match="18 training images only"):
        knn.evaluate_caches(*caches, [(150, 24)], [CLASSES * TRAIN + 1])


# ------------------------------------------------------------------------------- sample, pictures


def test_heads_are_compared_in_one_table(data, tmp_path, weights, monkeypatch):
    quick = {
        name: [*options, "--epochs", "1", "--batch-size", "8"]
        for name, options in copy.deepcopy(compare_heads.METHODS).items()
    }
    monkeypatch.setattr(compare_heads, "METHODS", quick)
    compare_heads.main(
        ["--data", str(data), "--out", str(tmp_path), "--image-size", "32", "--checkpoint",
         str(weights), "--device", "cpu"]
    )  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    names = [row["method"] for row in rows]
    assert names[-4:] == ["Linear", "Attention", "DifFormer", "DifFeed"]
    assert all(name.startswith("kNN") for name in names[:-4])
    text = (tmp_path / "table.md").read_text()
    assert text.count("\n| ") == len(rows) + 1
    assert "9 held-out images of 3 classes, 18 training images" in text
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.size[0] > 400


def test_confusion_picture_shows_rows_as_truth():
    counts = np.array([[4, 0], [3, 1]])
    picture = np.asarray(common.draw_confusion(counts, ["cat", "dog"]))
    many = common.draw_confusion(np.eye(200, dtype=np.int64), [f"c{i}" for i in range(200)])
    assert picture.ndim == 3
    assert min(many.size) >= 800
    side = 2 * 34
    margin = picture.shape[1] - 16 - side
    centre = [margin + 4, margin + 34 + 4]
    darkness = [[int(picture[y, x].sum()) for x in centre] for y in centre]
    assert darkness[0][0] < darkness[1][0] < darkness[1][1] < darkness[0][1]


def test_unwritable_cache_folder(data, tmp_path):
    (tmp_path / "file").write_text("")
    message = fails("--data", data, "--out", tmp_path / "o", "--cache", tmp_path / "file")
    assert "cannot make the folder" in message
    with pytest.raises(CacheError):
        train(data, tmp_path / "o", "--cache", tmp_path / "file")
