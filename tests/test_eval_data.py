"""Image folders, subsets, splits, loading, and the options that name them."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tyro")

import tyro
from image_folders import CLASSES, write_folder

from diffbackbone.eval import options as module
from diffbackbone.eval.data import (
    ImageFolder,
    RowImages,
    choose_subset,
    list_folder,
    list_images,
    load_batches,
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
    assert folder.labels.tolist() == [0] * TRAIN + [1] * TRAIN + [2] * TRAIN
    assert folder.paths[0] == "class0/0.png"
    part = folder.subset([7, 2])
    assert part.paths == (folder.paths[7], folder.paths[2])
    assert part.labels.tolist() == [1, 0]
    assert part.digest() != folder.subset([2, 7]).digest()
    deep = list_images(data)
    assert len(deep) == CLASSES * (TRAIN + 2)
    assert set(deep.labels) == {0}
    assert "train/class1/3.png" in deep.paths


def test_some_classes_only(data, tmp_path):
    (tmp_path / "names.txt").write_text("class2\nclass0\n\n")
    options = module.DataOptions(data=data, only_classes=tmp_path / "names.txt")
    for folder, count in zip(options.list_folders(), (TRAIN, 2)):
        assert folder.classes == ("class0", "class2")
        assert folder.labels.tolist() == [0] * count + [1] * count
        assert {path.split("/")[0] for path in folder.paths} == {"class0", "class2"}
    (tmp_path / "names.txt").write_text("class0\nclass7")
    with pytest.raises(FileNotFoundError, match="class7"):
        options.list_folders()


def test_digest_notices_changed_files(data):
    digests = {list_folder(data / "train").digest()}
    path = data / "train/class1/2.png"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 5))
    digests.add(list_folder(data / "train").digest())
    path.write_bytes(path.read_bytes() + b" ")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    digests.add(list_folder(data / "train").digest())
    path.rename(data / "train/class2/new.png")
    digests.add(list_folder(data / "train").digest())
    assert len(digests) == 4


def test_labels_of_validation_follow_training(data):
    shutil.rmtree(data / "val/class0")
    val = DataOptions(data=data).list_folders()[1]
    assert val.labels.tolist() == [1, 1, 2, 2]
    assert len(val.classes) == 3


def test_bad_data_is_an_error_before_work(data):
    path = data / "train/class2/1.png"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="train/class2/1.png: "):
        list_folder(data / "train").check()
    for path in (data / "train/class1").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(FileNotFoundError, match="class1"):
        list_folder(data / "train")
    (data / "val/class1").rename(data / "val/classX")
    with pytest.raises(UserError, match="lacks: classX"):
        list_folder(data / "val", ("class0", "class1", "class2"))
    with pytest.raises(UserError, match="at least two classes"):
        list_folder(data / "..")
    with pytest.raises(UserError, match="nowhere has no images"):
        list_images(data / "nowhere")


def make_folder(counts) -> ImageFolder:
    labels = np.repeat(np.arange(len(counts)), counts)
    paths = tuple(f"class{c}/{i}.png" for i, c in enumerate(labels))
    return ImageFolder(Path("root"), paths, labels, tuple(f"class{c}" for c in range(len(counts))))


def test_subset_is_balanced_and_seeded():
    folder = make_folder([100, 300, 3, 200])
    chosen = choose_subset(folder, "10%", seed=0)
    assert np.bincount(folder.labels[chosen]).tolist() == [19, 19, 3, 19]
    assert chosen.tolist() == choose_subset(folder, "0.1", seed=0).tolist()
    assert chosen.tolist() != choose_subset(folder, "0.1", seed=1).tolist()
    assert set(chosen) < set(choose_subset(folder, "20%", seed=0))
    even = make_folder([50, 50, 50])
    counts = np.bincount(even.labels[choose_subset(even, "11%", seed=0)])
    assert sorted(counts) == [5, 5, 6]  # 16 of 16.5
    assert len(choose_subset(folder, "1", seed=0)) == 603
    labels = np.arange(1_281_167) % 1000
    imagenet = ImageFolder(Path("root"), (), labels, tuple(map(str, range(1000))))
    imagenet = replace(imagenet, paths=range(len(labels)))
    assert len(choose_subset(imagenet, "10%", 0)) == 128_116  # as published
    # draws are part of published results
    assert choose_subset(make_folder([5, 5, 5]), "34%", seed=0).tolist() == [0, 6, 9, 11, 12]


def test_subset_from_a_list(tmp_path):
    folder = make_folder([2, 2])
    path = tmp_path / "list.txt"
    path.write_text("class0/1.png\n\n3.png\n")
    assert choose_subset(folder, str(path), 0).tolist() == [1, 3]
    for text, message in (("class0/1.png\nclass0/7.png\n", "7.png"), ("1.png\n", "class1")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            choose_subset(folder, str(path), 0)


@pytest.mark.parametrize("subset", ["0", "120%", "nolist.txt", "1%", "nan"])
def test_bad_subsets(subset):
    with pytest.raises((UserError, FileNotFoundError), match=subset):
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
    few = np.array([0, 0, 1, 1])
    for learn, held in (*split_folds(few, 5, 0), split_holdout(few, 0.1, 0)):
        assert len(learn) == len(held) == 2


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
    plain, mirrored, other = load_batches(
        RowImages(folder, SIZE), [[3], [3 + len(folder)], [4]], workers=0
    )
    assert plain.shape == (1, 3, SIZE, SIZE)
    assert -1 <= float(plain.min()) < float(plain.max()) <= 1
    assert torch.equal(mirrored, plain.flip(-1))
    assert not torch.equal(mirrored, plain)
    assert not torch.equal(other, plain)
    crops = [RowImages(folder, SIZE, 0)[epoch, 3] for epoch in (1, 1, 2)]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])


def test_options_are_flat(data):
    argv = ["--data", str(data), "--value-range", "0", "4095", "--val-dir", str(data / "train")]
    train, val = tyro.cli(DataOptions, args=argv).list_folders()
    assert train.value_range == (0, 4095)
    assert val.paths == train.paths
    argv = ["--unet", "tiny", "--timesteps", "90", "150", "--blocks", "19", "--noise", "none"]
    options = tyro.cli(BackboneOptions, args=argv)
    with pytest.warns(UserWarning, match="RANDOM"):
        backbone, again = build_backbone(options), build_backbone(options)
    assert (backbone.blocks, backbone.noise, backbone.frozen) == ((19,), "none", True)
    assert all(map(torch.equal, backbone.state_dict().values(), again.state_dict().values()))
    assert options.compute_dtype(torch.device("cpu")) is None


@pytest.mark.filterwarnings("ignore:DiffusionBackbone. no checkpoint")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": (90, 90)}, "once"),
        ({"unet": "huge"}, "choose from"),
    ],
)
def test_bad_options(options, message):
    options = {"unet": "tiny", "timesteps": (90,), "blocks": (19,), **options}
    with pytest.raises(UserError, match=message):
        build_backbone(BackboneOptions(**options))


def test_a_missing_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU"):
        BackboneOptions(device="cuda").start()
