"""Image folders, subsets, splits, loading, and the options that name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tyro")

import tyro
from image_folders import CLASSES, write_folder
from PIL import Image

from diffbackbone.eval.data import (
    ImageFolder,
    Listing,
    RowImages,
    check_images,
    choose_subset,
    image_batches,
    list_folder,
    list_images,
    prepare_image,
    split_folds,
    split_holdout,
)
from diffbackbone.eval.options import BackboneOptions, DataOptions, build_backbone
from diffbackbone.utils import UserError

TRAIN, SIZE = 6, 32


@pytest.fixture
def data(tmp_path):
    write_folder(tmp_path / "data/train", TRAIN, seed=0)
    write_folder(tmp_path / "data/val", 2, seed=1)
    return tmp_path / "data"


def test_folder_is_listed_class_by_class(data):
    (data / "train/class0/.hidden.png").write_bytes(b"x")
    (data / "train/.cache").mkdir()
    folder = list_folder(data / "train")
    assert folder.classes == ("class0", "class1", "class2")
    assert len(folder) == CLASSES * TRAIN
    assert folder.labels.tolist() == sorted(folder.labels.tolist())
    assert folder.listing.paths[0] == "class0/0.png"
    assert folder.listing.sizes[0] == folder.path(0).stat().st_size
    part = folder.subset([7, 2])
    assert part.listing.paths == (folder.listing.paths[7], folder.listing.paths[2])
    assert part.listing.digest() != folder.subset([2, 7]).listing.digest()


def test_labels_of_validation_follow_training(data):
    for path in (data / "val/class0").iterdir():
        path.unlink()
    (data / "val/class0").rmdir()
    val = DataOptions(data=data).list_folders()[1]
    assert val.labels.tolist() == [1, 1, 2, 2]
    assert len(val.classes) == 3


def test_images_are_found_however_deep(data):
    folder = list_images(data)
    assert len(folder) == CLASSES * (TRAIN + 2)
    assert set(folder.labels) == {0}
    assert "train/class1/3.png" in folder.listing.paths


def spoil_unknown_class(root):
    (root / "val/class1").rename(root / "val/classX")
    return "lacks: classX"


def spoil_empty_class(root):
    for path in (root / "train/class1").iterdir():
        path.rename(path.with_suffix(".txt"))
    return "class1"


def spoil_empty_image(root):
    (root / "val/class2/0.png").write_bytes(b"")
    return "val/class2/0.png is empty"


def spoil_truncated_image(root):
    path = root / "train/class2/1.png"
    path.write_bytes(path.read_bytes()[:-500])
    return "train/class2/1.png is broken"


def spoil_val(root):
    (root / "val").rename(root / "test")
    return "val of val images"


@pytest.mark.parametrize(
    "spoil",
    [spoil_unknown_class, spoil_empty_class, spoil_empty_image, spoil_truncated_image, spoil_val],
)
def test_bad_data_is_an_error_before_work(data, spoil):
    message = spoil(data)
    with pytest.raises(UserError, match=message):
        list(map(check_images, DataOptions(data=data).list_folders()))


def test_two_classes_are_needed(data):
    (data / "train").rename(data / "val/class9")
    for folder in (data, data / "val/class0"):
        with pytest.raises(UserError, match=r"one class|no class folders"):
            list_folder(folder)


# -------------------------------------------------------------------------------------- subsets


def make_folder(counts) -> ImageFolder:
    labels = tuple(c for c, n in enumerate(counts) for _ in range(n))
    paths = tuple(f"class{c}/{i}.png" for i, c in enumerate(labels))
    zeros = (0,) * len(labels)
    names = tuple(f"class{c}" for c in range(len(counts)))
    return ImageFolder(Path("root"), Listing(paths, labels, zeros, zeros, names))


def test_subset_is_balanced_and_seeded():
    folder = make_folder([100, 300, 3, 200])
    chosen = choose_subset(folder, "10%", seed=0)
    assert np.bincount(chosen.labels).tolist() == [19, 19, 3, 19]
    assert chosen == choose_subset(folder, "0.1", seed=0)
    assert chosen != choose_subset(folder, "0.1", seed=1)
    assert set(chosen.listing.paths) < set(choose_subset(folder, "20%", seed=0).listing.paths)
    even = choose_subset(make_folder([50, 50, 50]), "11%", seed=0)
    assert sorted(np.bincount(even.labels)) == [5, 5, 6]  # 16.5 rounds to 16
    assert len(choose_subset(folder, "1", seed=0)) == 603
    # draws are part of published results
    drawn = choose_subset(make_folder([5, 5, 5]), "34%", seed=0).listing.paths
    assert [int(p.split("/")[1].split(".")[0]) for p in drawn] == [0, 6, 9, 11, 12]


def test_subset_from_a_list(tmp_path):
    folder = make_folder([2, 2])
    path = tmp_path / "list.txt"
    path.write_text("class0/1.png\n\n3.png\n")
    chosen = choose_subset(folder, str(path), 0)
    assert chosen.listing.paths == ("class0/1.png", "class1/3.png")
    for text, message in (("class0/1.png\nclass0/7.png\n", "7.png"), ("1.png\n", "class1")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            choose_subset(folder, str(path), 0)


@pytest.mark.parametrize("subset", ["0", "120%", "nolist.txt", "1%", "nan"])
def test_bad_subsets(subset):
    with pytest.raises(UserError, match="subset"):
        choose_subset(make_folder([20, 20]), subset, 0)


def test_holdout_and_folds_are_stratified():
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    learn, held = split_holdout(labels, 0.1, seed=0)
    assert sorted([*learn, *held]) == list(range(70))
    assert np.bincount(labels[held]).tolist() == [4, 2, 1]
    assert held.tolist() == split_holdout(labels, 0.1, seed=0)[1].tolist()
    assert held.tolist() != split_holdout(labels, 0.1, seed=1)[1].tolist()
    folds = split_folds(labels, 5, seed=0)
    assert sorted(np.concatenate([held for _, held in folds])) == list(range(70))
    for learn, held in folds:
        assert not set(learn) & set(held)
        assert np.bincount(labels[held]).tolist() == [8, 4, 2]
    assert len(split_folds(np.array([0, 0, 0, 1, 1]), 5, 0)) == 2
    for split in (
        split_folds(np.array([0, 0, 1, 1]), 5, 0)[0],
        split_holdout([0, 0, 1, 1], 0.1, 0),
    ):
        assert len(split[0]) == len(split[1]) == 2
    for split in (split_holdout, split_folds):
        with pytest.raises(UserError, match="single training image"):
            split(np.array([0, 0, 1]), 0.1, 0)


# -------------------------------------------------------------------------------------- loading


def test_crops_are_central_or_seeded():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    assert prepare_image(pixels, 40).min() == 255
    once, again, other = (
        prepare_image(pixels, 32, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert (once == again).all()
    assert (once != other).any()
    ramp = np.tile(np.arange(100, dtype=np.uint8)[:, None], (100, 1, 3))
    spans = [
        int(np.ptp(prepare_image(ramp, 80, np.random.default_rng(seed)))) for seed in range(50)
    ]
    assert min(spans) == 79  # 80 of 100 px, not resized
    assert max(spans) > 97  # nearly all of the image, resized


def test_rows_beyond_the_last_image_are_mirrored(data):
    folder = list_folder(data / "train")
    plain, mirrored, other = image_batches(
        RowImages(folder, SIZE), [[3], [3 + len(folder)], [4]], workers=0
    )
    assert plain.shape == (1, 3, SIZE, SIZE)
    assert -1 <= float(plain.min()) < float(plain.max()) <= 1
    assert torch.equal(mirrored, plain.flip(-1))
    assert not torch.equal(mirrored, plain)
    assert not torch.equal(other, plain)


def test_random_crops_follow_from_seed_epoch_and_row(data):
    folder = list_folder(data / "train")
    crops = [RowImages(folder, SIZE, seed)[epoch, 3] for seed, epoch in ((0, 1), (0, 1), (0, 2))]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])


def test_deep_and_turned_images_keep_their_values(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (40, 32)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "deep.tif", exif=exif)
    rows = RowImages(list_images(tmp_path, (0, 4095)), 32)
    expected = np.rot90(values, -1)[:, 4:36] / 4095 * 2 - 1
    np.testing.assert_allclose(rows[0, 0][2], expected, atol=1e-6)


# -------------------------------------------------------------------------------------- options


def test_options_are_flat(data):
    argv = ["--data", str(data), "--value-range", "0", "4095", "--image-size", "64"]
    options = tyro.cli(DataOptions, args=argv)
    assert (options.folder("val"), options.image_size) == (data / "val", 64)
    assert options.list_folders()[0].value_range == (0, 4095)
    argv = ["--unet", "tiny", "--timesteps", "90", "150", "--blocks", "19", "--noise", "none"]
    options = tyro.cli(BackboneOptions, args=argv)
    with pytest.warns(UserWarning, match="RANDOM"):
        backbone, again = build_backbone(options), build_backbone(options)
    assert (backbone.blocks, backbone.noise, backbone.frozen) == ((19,), "none", True)
    assert all(map(torch.equal, backbone.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (38,)}, "1 to 37"),
        ({"blocks": (19, 19)}, "differ"),
        ({"timesteps": (90, 1000)}, "0 to 999"),
        ({"timesteps": (90, 90)}, "once"),
        ({"unet": "huge"}, "choose from"),
    ],
)
def test_bad_options(options, message):
    options = {"unet": "tiny", "timesteps": (90,), "blocks": (19,), **options}
    with pytest.raises(UserError, match=message):
        build_backbone(BackboneOptions(**options))


def test_devices():
    assert BackboneOptions(device="cpu").compute_dtype(torch.device("cpu")) is None
    with pytest.raises(UserError, match="GPU"):
        BackboneOptions(precision="bfloat16").compute_dtype(torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            BackboneOptions(device="cuda").start()
