"""The sample data: scenes, their files, and folders that appear whole or not at all."""

# ruff: noqa: E402

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

cv2 = pytest.importorskip("cv2")
pytest.importorskip("sklearn")

import forked
from sklearn.datasets import load_digits, load_sample_images

from diffbackbone.sample_data import dataset, digits, make_digits, make_sample_data, scenes, writers
from diffbackbone.sample_data.scenes import PastedDigit, Scene, SceneConfig, make_scene
from diffbackbone.utils import UserError

COUNTS = {"train": 12, "val": 6, "unlabelled": 4}
SMALL = {"train": 2, "val": 1, "unlabelled": 1}
BOTH = pytest.mark.parametrize("split", ["train", "val"])
DIGESTS = {".jpg": "9bbfe7956ae3f158", ".json": "b29365eb3ec141ff"}
DIGESTS |= {".png": "22e17b4d1fc8315c", ".txt": "0d6e541a53f7e17e"}


@pytest.fixture(scope="module")
def pools():
    return scenes.load_pools(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "data"
    make_sample_data(out, **COUNTS)
    return out


def files(root: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def read_labels(made: Path, split: str, number: int) -> np.ndarray:
    folder = made / "ADEChallengeData2016/annotations" / writers.ADE_FOLDERS[split]
    return np.asarray(Image.open(folder / f"ADE_{split}_{number:08d}.png"))


def read_coco(made: Path, split: str, kind: str) -> dict:
    return json.loads((made / "coco/annotations" / f"{kind}_{split}2017.json").read_text())


def rasterize(polygons: list[list[float]], height: int, width: int, zoom: int = 8) -> np.ndarray:
    """Fill COCO polygons at `zoom` times the size and take the center of each pixel."""
    canvas = np.zeros((height * zoom, width * zoom), np.uint8)
    for polygon in polygons:
        points = np.rint(np.array(polygon).reshape(-1, 2) * zoom).astype(np.int32)
        cv2.fillPoly(canvas, [points], 1)
    return canvas[zoom // 2 :: zoom, zoom // 2 :: zoom].astype(bool)


def same_scene(one: Scene, other: Scene) -> bool:
    same = np.array_equal(one.image, other.image) and np.array_equal(one.labels, other.labels)
    return same and [d.scan for d in one.digits] == [d.scan for d in other.digits]


# -------------------------------------------------------------------------------- reproducibility


def test_content_is_the_same_to_the_bit(made):
    """Published results and demo figures depend on it."""
    digests = {suffix: hashlib.sha256() for suffix in DIGESTS}
    for path in sorted(made.rglob("*")):
        if not path.is_file() or path.name == "contact_sheet.png":
            continue
        digest = digests[path.suffix]
        digest.update(path.relative_to(made).as_posix().encode())
        if path.suffix == ".json":
            digest.update(json.dumps(json.loads(path.read_text()), sort_keys=True).encode())
        elif path.suffix == ".txt":
            digest.update(path.read_bytes())
        else:
            pixels = np.asarray(Image.open(path))
            digest.update(str((pixels.shape, pixels.dtype)).encode() + pixels.tobytes())
    assert {suffix: digest.hexdigest()[:16] for suffix, digest in digests.items()} == DIGESTS


def test_larger_set_starts_with_the_smaller(made, tmp_path):
    make_sample_data(tmp_path, train=0, val=7, unlabelled=5)
    small, large = files(made), files(tmp_path)
    same = [name for name in small if name.endswith((".jpg", ".png")) and name in large]
    same.remove("contact_sheet.png")
    assert len(same) == 5 * 6 + 4
    assert all(small[name] == large[name] for name in same)
    for kind in ("instances", "panoptic"):
        before, after = (read_coco(root, "val", kind) for root in (made, tmp_path))
        for key in ("images", "annotations"):
            assert after[key][: len(before[key])] == before[key]
    assert read_coco(tmp_path, "train", "instances")["annotations"] == []


def test_seed_split_and_index_each_change_the_scene(pools):
    scene = make_scene(pools["train"], SceneConfig(), 0, "train", 3)
    assert same_scene(scene, make_scene(pools["train"], SceneConfig(), 0, "train", 3))
    for key in ((1, "train", 3), (0, "unlabelled", 3), (0, "train", 4)):
        assert not same_scene(scene, make_scene(pools["train"], SceneConfig(), *key))
    assert not np.array_equal(pools["train"].indices, scenes.load_pools(1)["train"].indices)


# ----------------------------------------------------------------------------------- disjointness


def test_scans_are_divided_class_by_class(pools):
    train, val = pools["train"], pools["val"]
    assert sorted([*train.indices, *val.indices]) == list(range(1797))
    for digit in range(10):
        count = (train.classes == digit).sum()
        share = count / (count + (val.classes == digit).sum())
        assert share == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("poisoned", ["train", "val"])
def test_a_split_never_sees_the_sources_of_the_other(pools, poisoned):
    scans = load_digits()
    images = (scans.images / 16).astype(np.float32)
    positions = pools[poisoned].indices
    images[positions] = images[positions][:, ::-1]
    photos = [photo.copy() for photo in load_sample_images().images]
    for photo in photos:
        half = photo[:, :448] if poisoned == "train" else photo[:, 448:]
        half[:] = 255 - half
    changed = scenes.build_pools(images, scans.target, photos, 0)
    for split in scenes.SPLITS:
        for index in range(6):
            key = (SceneConfig(), 0, split, index)
            same = same_scene(make_scene(pools[split], *key), make_scene(changed[split], *key))
            assert same == ((split == "val") != (poisoned == "val"))


# ----------------------------------------------------------------------------------------- scenes


@BOTH
def test_scenes_keep_to_their_config(pools, split):
    config = SceneConfig(min_size=60, max_size=100, min_digits=2, max_digits=4)
    shapes, numbers = set(), set()
    for index in range(40):
        scene = make_scene(pools[split], config, 0, split, index)
        height, width = scene.labels.shape
        assert scene.image.shape == (height, width, 3)
        assert scene.image.dtype == scene.labels.dtype == np.uint8
        assert 60 <= min(height, width) < max(height, width) <= 100
        assert height % 32 and width % 32  # noqa: PT018
        shapes.add((height, width))
        numbers.add(len(scene.digits))
        pasted = np.zeros(scene.labels.shape, int)
        for digit in scene.digits:
            pasted += digit.mask
            assert (scene.labels[digit.mask] == digit.digit + 2).all()
            left, top, wide, tall = cv2.boundingRect(digit.mask.astype(np.uint8))
            box = scene.labels[top : top + tall, left : left + wide]
            assert set(np.unique(box)) <= {0, 1, digit.digit + 2}
            assert 0.2 * min(height, width) <= max(tall, wide) <= 0.6 * min(height, width)
        assert np.array_equal(pasted, scene.labels >= 2)
    assert len(shapes) > 20
    assert {2, 3} <= numbers <= {1, 2, 3, 4}


def test_crowded_scenes_keep_a_digit_and_huge_ones_find_a_photo(pools):
    crowded = SceneConfig(32, 32, 9, 9, digit_size=(0.8, 0.8), max_tries=1)
    for index in range(20):
        scene = make_scene(pools["train"], crowded, 0, "train", index)
        assert (scene.labels.shape, len(scene.digits)) == ((32, 32), 1)
    assert min(make_scene(pools["val"], SceneConfig(500, 520), 0, "val", 0).labels.shape) >= 500


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_labels_follow_the_paint_and_the_paint_stands_out(pools, grey):
    pool = replace(pools["train"], photos=(np.full((300, 300, 3), grey, np.uint8),))
    config = SceneConfig(min_digits=1, max_digits=1)
    behind = round(grey * 0.6)
    for index in range(10):
        scene = make_scene(pool, config, 0, "train", index)
        difference = np.abs(scene.image.astype(int) - behind)
        paint = difference[..., difference.max(axis=(0, 1)).argmax()]
        alpha, slack = paint / paint.max(), 1.5 / paint.max()  # of rounding to bytes
        assert alpha[scene.labels >= 2].min() > 0.5 - slack
        assert alpha[scene.labels == 1].max() < 0.2 + slack
        rim = alpha[scene.labels == 0]
        assert 0.2 - slack < rim.min() <= rim.max() < 0.5 + slack
        brightest = scene.image[np.unravel_index(paint.argmax(), paint.shape)]
        colors = np.float32([[brightest, [behind] * 3]]) / 255
        lab = cv2.cvtColor(colors, cv2.COLOR_RGB2LAB)[0]
        assert np.linalg.norm((lab[0] - lab[1]) * (1, 0.25, 0.25)) > config.min_contrast - 1


def test_backgrounds_keep_their_proportions_and_flip(pools):
    ramps = np.zeros((60, 200, 3), np.uint8)
    ramps[..., 0], ramps[..., 1] = np.arange(200), np.arange(60)[:, None]
    pool = replace(pools["train"], photos=(ramps,))
    directions = set()
    for index in range(10):
        scene = make_scene(pool, SceneConfig(60, 90, 1, 1), 0, "train", index)
        y, x = np.nonzero(scene.labels == 1)
        grid = np.stack([x, y, np.ones_like(x)], axis=1)
        slopes = np.linalg.lstsq(grid, scene.image[y, x, :2].astype(float), rcond=None)[0]
        across, down = abs(slopes[0, 0]), abs(slopes[1, 1])
        assert 0.3 < across <= 200 / scene.labels.shape[1]
        assert across == pytest.approx(down, rel=0.1)
        directions.add(slopes[0, 0] > 0)
    assert directions == {False, True}


# ------------------------------------------------------------------------------------------ files


def test_object_info_holds_what_is_measured(made):
    text = (made / "ADEChallengeData2016/objectInfo150.txt").read_text()
    header, *rows = [line.split("\t") for line in text.splitlines()]
    assert header == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    assert [row[5] for row in rows] == ["background", *scenes.DIGIT_NAMES]
    train, val = (
        [read_labels(made, split, number + 1) for number in range(COUNTS[split])]
        for split in ("train", "val")
    )
    pixels = np.concatenate([labels.ravel() for labels in train + val])
    for label, row in enumerate(rows, 1):
        share = (pixels == label).sum() / (pixels > 0).sum()
        counts = [sum((labels == label).any() for labels in part) for part in (train, val)]
        assert [int(value) for value in (row[0], *row[2:5])] == [label, *counts, label == 1]
        assert float(row[1]) == pytest.approx(share, abs=1e-4)


@BOTH
def test_coco_agrees_with_the_label_maps(made, split):
    coco, panoptic = (read_coco(made, split, kind) for kind in ("instances", "panoptic"))
    digits = list(enumerate(scenes.DIGIT_NAMES, 1))
    assert [(entry["id"], entry["name"]) for entry in coco["categories"]] == digits
    assert [(e["id"], e["isthing"]) for e in panoptic["categories"]] == [
        *((number, 1) for number, _ in digits),
        (11, 0),
    ]
    colors = [tuple(entry["color"]) for entry in panoptic["categories"]]
    assert colors == [*writers.PALETTE[2:], writers.PALETTE[1]]
    assert panoptic["images"] == coco["images"]
    assert [image["id"] for image in coco["images"]] == list(range(1, COUNTS[split] + 1))
    ids = [annotation["id"] for annotation in coco["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    for image, annotation in zip(coco["images"], panoptic["annotations"]):
        labels, number = read_labels(made, split, image["id"]), image["id"]
        assert labels.shape == (image["height"], image["width"])
        assert 0 < (labels == 0).mean() < 0.12
        assert annotation["image_id"] == number
        segment_map, stuff_map = (
            np.asarray(Image.open(made / f"coco/{kind}_{split}2017" / annotation["file_name"]))
            for kind in ("panoptic", "panoptic_stuff")
        )
        assert np.array_equal(stuff_map, np.select([labels == 0, labels == 1], [255, 1], 0))
        segment_ids = segment_map.astype(int) @ (1, 256, 65536)
        *things, background = annotation["segments_info"]
        assert np.array_equal(segment_ids == 0, labels == 0)
        assert np.array_equal(segment_ids == background["id"], labels == 1)
        instances = [entry for entry in coco["annotations"] if entry["image_id"] == number]
        assert len({segment["id"] for segment in things}) == len(things) == len(instances) > 0
        for segment, instance in zip(things, instances):
            for key in ("category_id", "bbox", "area", "iscrowd"):
                assert segment[key] == instance[key]
            mask = segment_ids == segment["id"]
            assert (labels[mask] == instance["category_id"] + 1).all()
            # The polygons cover the mask exactly, with the holes left open.
            assert np.array_equal(rasterize(instance["segmentation"], *labels.shape), mask)
            points = np.concatenate(instance["segmentation"]).reshape(-1, 2)
            assert [*points.min(0), *np.ptp(points, 0)] == instance["bbox"]
            assert (instance["area"], instance["iscrowd"]) == (mask.sum(), 0)


def drawn(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])


def test_segment_ids_are_unique_however_many_there_are():
    pasted = (PastedDigit(3, 0, drawn("#")),) * 20_000
    scene = Scene(np.zeros((1, 1, 3)), np.ones((1, 1), np.uint8), pasted)
    ids = {segment["id"] for segment in writers.draw_segments(scene)[1]}
    assert len(ids) == 20_001
    assert 0 < min(ids) <= max(ids) < 1 << 24


@pytest.mark.parametrize(
    "mask",
    [
        drawn("#"),
        drawn("###", "#.#", "###"),
        drawn("####", "#..#", "####", "#.##", "#..#", "####"),
        drawn("#####", "#...#", "#.#.#", "#...#", "#####"),
        drawn(".#.", "#.#", ".#."),
        drawn("##..#", "##..#"),
        drawn("...", "..."),
        *(cv2.blur(np.random.default_rng(i).random((60, 60)), (3, 3)) > 0.45 for i in range(4)),
    ],
)
def test_polygons_cover_shapes_exactly(mask):
    assert np.array_equal(rasterize(writers.mask_to_polygons(mask), *mask.shape), mask)


def test_polygons_have_no_needless_points():
    (square,) = writers.mask_to_polygons(np.pad(np.ones((3, 5), bool), 2))
    assert sorted(np.reshape(square, (-1, 2)).tolist()) == [[2, 2], [2, 5], [7, 2], [7, 5]]


def test_contact_sheet_shows_the_label_colors(made):
    sheet = np.asarray(Image.open(made / "contact_sheet.png").convert("RGB"))
    assert min(sheet.shape[:2]) > 600
    above_legend = {tuple(color) for color in sheet[:-80].reshape(-1, 3).tolist()}
    shown = [read_labels(made, "train", number) for number in range(1, 9)]
    labels = np.unique(np.concatenate([labels.ravel() for labels in shown]))
    assert above_legend >= {writers.PALETTE[label] for label in labels}


def test_detectron2_reads_the_panoptic_files(made):
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetCatalog, DatasetMapper
    from detectron2.data.datasets import register_coco_panoptic_separated

    metadata = {
        "thing_dataset_id_to_contiguous_id": {number + 1: number for number in range(10)},
        "stuff_dataset_id_to_contiguous_id": {0: 0, 11: 1},
        "thing_classes": list(scenes.DIGIT_NAMES),
        "stuff_classes": ["things", "background"],
    }
    folders = ("val2017", "panoptic_val2017", "annotations/panoptic_val2017.json")
    folders += ("panoptic_stuff_val2017", "annotations/instances_val2017.json")
    paths = [str(made / "coco" / folder) for folder in folders]
    register_coco_panoptic_separated("test_sample_data", metadata, *paths)
    records = DatasetCatalog.get("test_sample_data_separated")
    assert len(records) == COUNTS["val"]
    masks = {"use_instance_mask": True, "instance_mask_format": "bitmask"}
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB", **masks)
    for record in records:
        labels, mapped = read_labels(made, "val", record["image_id"]), mapper(record)
        expected = np.select([labels == 0, labels == 1], [255, 1], 0)
        assert np.array_equal(mapped["sem_seg"].numpy(), expected)
        masks = mapped["instances"].gt_masks.tensor.numpy()
        assert np.array_equal(masks.sum(axis=0), labels >= 2)
        for mask, digit in zip(masks, mapped["instances"].gt_classes.numpy()):
            assert (labels[mask] == digit + 2).all()


# ---------------------------------------------------------------------------------------- folders


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.delattr(scenes, "load_pools")
    monkeypatch.delattr(digits, "load_digits")


def test_same_parameters_do_nothing_and_others_need_force(made, no_work):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert "nothing to do" in make_sample_data(made, **COUNTS)
    for changed in ({"seed": 1}, {"train": 15}, {"digits": (1, 2)}):
        with pytest.raises(UserError, match="--force"):
            make_sample_data(made, **{**COUNTS, **changed})
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_force_replaces_other_parameters_and_versions(tmp_path):
    out = tmp_path / "data"
    make_sample_data(out, **SMALL)
    fresh, manifest = files(out), out / "sample_data.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 1}))
    with pytest.raises(UserError, match="version: 1, now 2"):
        make_sample_data(out, **SMALL)
    for _ in range(2):  # the second time with the same parameters
        (out / "unlabelled/more.txt").touch()
        make_sample_data(out, **SMALL, force=True)
        assert files(out) == fresh
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("make", [make_sample_data, make_digits])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"seed": 0}'])
def test_foreign_folders_are_never_replaced(tmp_path, no_work, make, force, manifest):
    (tmp_path / "thesis.txt").write_text("years of work")
    for name in ("sample_data.json", "sample_digits.json") if manifest else ():
        (tmp_path / name).write_text(manifest)
    before = files(tmp_path)
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UserError, match="never replaced"):
            make(out, force=force)
    assert files(tmp_path) == before


@pytest.mark.parametrize("call", [1, 3, 4])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch, call, there):
    out, calls = tmp_path / "data", []
    if there:
        make_sample_data(out, **SMALL)

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return make_scene(*arguments)

    before = files(tmp_path)
    monkeypatch.setattr(scenes, "make_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_sample_data(out, **SMALL, seed=1, force=True)
    assert files(tmp_path) == before
    assert list(tmp_path.iterdir()) == [out] * there


def test_a_failed_move_puts_the_old_back(tmp_path, monkeypatch):
    make_digits(tmp_path / "data", limit=1)
    before, rename = files(tmp_path), Path.rename

    def fail(path, target):
        if path.name == "new":
            raise OSError("disk full")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        make_digits(tmp_path / "data", limit=2, force=True)
    assert files(tmp_path) == before


def test_data_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "data"

    def save_figure(*_):
        out.mkdir()
        (out / "theirs").touch()

    monkeypatch.setattr(dataset, "save_figure", save_figure)
    with pytest.raises(UserError, match="never replaced"):
        make_sample_data(out, **SMALL)
    assert list(tmp_path.rglob("*")) == [out, out / "theirs"]


# ------------------------------------------------------------------------------- options, scripts


BAD = [{"train": -1}, {"unlabelled": -1}, {"seed": -1}, {"min_size": 31}]
BAD += [{"min_size": 80, "max_size": 70}, {"digits": (0, 3)}, {"digits": (3, 2)}]


@pytest.mark.parametrize("options", BAD)
def test_options_out_of_range(tmp_path, no_work, options):
    with pytest.raises(UserError, match="got"):
        make_sample_data(tmp_path / "data", **options)
    assert not list(tmp_path.iterdir())


def test_digits_are_real_and_divided(tmp_path):
    out, scans = tmp_path / "digits", load_digits()
    assert "40 training and 40 validation images" in make_digits(out, size=32, limit=4)
    for split, indices in scenes.split_scans(scans.target, 0).items():
        paths = list(out.glob(f"{split}/*/*.png"))
        assert len(paths) == 40
        for path in paths:
            index = int(path.stem)
            digit = scans.target[index]
            assert index in indices
            assert path.parent.name == f"{digit}_{scenes.DIGIT_NAMES[digit]}"
            picture = Image.open(path)
            assert (picture.size, picture.mode) == ((32, 32), "RGB")
            gray = np.asarray(picture.convert("L").resize((10, 10)))[1:-1, 1:-1]
            assert np.abs(gray / 255 * 16 - scans.images[index]).mean() < 2
    assert "nothing to do" in make_digits(out, size=32, limit=4)
    for options in ({"size": 8}, {"seed": -1}, {"limit": 0}):
        with pytest.raises(UserError, match="at least"):
            make_digits(tmp_path / "x", **options)


def test_scripts(tmp_path):
    out, log = tmp_path / "new/data", tmp_path / "log"
    options = "--train 2 --val 1 --unlabelled 0 --seed 7 --min-size 40 --max-size 50 --digits 2 3"
    command = ["tools/make_sample_data.py", *options.split(), "--out", out]
    assert "2 train, 1 val, 0 unlabelled scenes" in forked.run(*command, log=log)
    manifest = json.loads((out / "sample_data.json").read_text())
    assert (manifest["seed"], manifest["counts"]["train"]) == (7, 2)
    assert list(manifest["scene"].values())[:4] == [40, 50, 2, 3]
    assert "nothing to do" in forked.run(*command, log=log)
    command = ["tools/make_sample_digits.py", "--limit", "1", "--out", tmp_path / "digits"]
    assert "10 training and 10 validation" in forked.run(*command, log=log)


def test_a_missing_package_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("diffbackbone.sample_data")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"sklearn.*pip install 'diffbackbone\[tools\]'"):
        importlib.import_module("diffbackbone.sample_data")
