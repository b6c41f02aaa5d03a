"""Tests of diffbackbone.sample_data."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from PIL import Image  # noqa: E402

TOOL_PATH = Path(__file__).parents[1] / "diffbackbone" / "sample_data" / "scenes.py"
COUNTS = {"train": 14, "val": 6, "unlabelled": 4}
ADE_FOLDERS = {"train": "training", "val": "validation"}


def load_tool(name: str = "make_sample_data"):
    spec = importlib.util.spec_from_file_location(name, TOOL_PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture(scope="module")
def pools():
    return tool.load_pools(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "data"
    tool.make_sample_data(out, **COUNTS)
    return out


def files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def read_labels(made: Path, split: str, number: int) -> np.ndarray:
    folder = made / "ADEChallengeData2016" / "annotations" / ADE_FOLDERS[split]
    return np.asarray(Image.open(folder / f"ADE_{split}_{number:08d}.png"))


def read_coco(made: Path, split: str, kind: str = "instances") -> dict:
    path = made / "coco" / "annotations" / f"{kind}_{split}2017.json"
    return json.loads(path.read_text(encoding="utf-8"))


def read_segment_ids(path: Path) -> np.ndarray:
    picture = Image.open(path)
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    return np.asarray(picture).astype(int) @ (1, 256, 65536)


def rasterise(polygons: list[list[float]], height: int, width: int, zoom: int = 8) -> np.ndarray:
    """Fill COCO polygons at `zoom` times the size and take the centre of each pixel."""
    canvas = np.zeros((height * zoom, width * zoom), np.uint8)
    for polygon in polygons:
        points = np.rint(np.array(polygon).reshape(-1, 2) * zoom).astype(np.int32)
        cv2.fillPoly(canvas, [points], 1)
    return canvas[zoom // 2 :: zoom, zoom // 2 :: zoom].astype(bool)


def count_holes(mask: np.ndarray) -> int:
    empty = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
    return cv2.connectedComponents(empty, connectivity=4)[0] - 2


def same_scene(one, other) -> bool:
    return (
        np.array_equal(one.image, other.image)
        and np.array_equal(one.labels, other.labels)
        and [pasted.scan for pasted in one.digits] == [pasted.scan for pasted in other.digits]
    )


# ------------------------------------------------------------------------------ reproducibility


def test_same_arguments_give_the_same_bytes(made, tmp_path):
    tool.make_sample_data(tmp_path / "again", **COUNTS)
    assert files(tmp_path / "again") == files(made)


def test_larger_set_starts_with_the_smaller(made, tmp_path):
    larger = tmp_path / "larger"
    tool.make_sample_data(larger, train=20, val=9, unlabelled=5)
    small, large = files(made), files(larger)
    pictures = [name for name in small if name.endswith((".jpg", ".png")) and "sheet" not in name]
    assert len(pictures) == 5 * 14 + 5 * 6 + 4
    assert all(large[name] == small[name] for name in pictures)
    for split, kind in itertools.product(("train", "val"), ("instances", "panoptic")):
        before, after = read_coco(made, split, kind), read_coco(larger, split, kind)
        for key in ("images", "annotations"):
            assert after[key][: len(before[key])] == before[key]
            assert len(after[key]) > len(before[key])


def test_seed_split_and_index_each_change_the_scene(pools):
    config = tool.SceneConfig()
    scene = tool.make_scene(pools["train"], config, 0, "train", 3)
    assert same_scene(scene, tool.make_scene(pools["train"], config, 0, "train", 3))
    for seed, split, index in ((1, "train", 3), (0, "unlabelled", 3), (0, "train", 4)):
        assert not same_scene(scene, tool.make_scene(pools["train"], config, seed, split, index))
    assert not np.array_equal(pools["train"].indices, tool.load_pools(1)["train"].indices)


# ---------------------------------------------------------------------------------- disjointness


def test_scans_are_divided_class_by_class(pools):
    train, val = pools["train"], pools["val"]
    assert not set(train.indices) & set(val.indices)
    assert sorted([*train.indices, *val.indices]) == list(range(1797))
    for digit in range(10):
        count = int((train.classes == digit).sum())
        share = count / (count + int((val.classes == digit).sum()))
        assert share == pytest.approx(0.75, abs=0.01)


def numbered_photo(height: int = 300, width: int = 400) -> np.ndarray:
    return np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3)


def test_photo_regions_are_disjoint_and_left_to_right(pools):
    photo = numbered_photo()
    scans = np.ones((10, 8, 8), np.float32)
    made_pools = tool.build_pools(np.repeat(scans, 4, 0), np.repeat(range(10), 4), [photo], 0)
    train, val = (made_pools[split].photos[0] for split in ("train", "val"))
    assert not np.intersect1d(train, val).size
    assert train.shape == (300, 280, 3)
    assert val.shape == (300, 120, 3)
    assert np.array_equal(np.concatenate([train, val], axis=1), photo)


def poison(split: str):
    """Return pools whose sources are changed wherever they belong to `split`."""
    digits, photos = tool.load_digits(), tool.load_sample_images().images
    scans = (digits.images / 16).astype(np.float32)
    positions = tool.split_scans(digits.target, 0)[split]
    scans[positions] = scans[positions][:, ::-1]
    photos = [photo.copy() for photo in photos]
    for photo in photos:
        columns = slice(0, 448) if split == "train" else slice(448, None)
        photo[:, columns] = 255 - photo[:, columns]
    return tool.build_pools(scans, digits.target, photos, 0)


@pytest.mark.parametrize("poisoned", ["train", "val"])
def test_a_split_never_sees_the_sources_of_the_other(pools, poisoned):
    changed = poison(poisoned)
    config = tool.SceneConfig()
    for split in tool.SPLITS:
        affected = (split == "val") == (poisoned == "val")
        for index in range(12):
            before = tool.make_scene(pools[split], config, 0, split, index)
            after = tool.make_scene(changed[split], config, 0, split, index)
            assert same_scene(before, after) is not affected


def test_files_are_made_from_the_pool_of_their_split(monkeypatch, tmp_path, pools):
    seen = {split: [] for split in tool.SPLITS}
    make_scene = tool.make_scene

    def spy(pool, config, seed, split, index):
        scene = make_scene(pool, config, seed, split, index)
        seen[split] += [pasted.scan for pasted in scene.digits]
        return scene

    monkeypatch.setattr(tool, "make_scene", spy)
    out = tmp_path / "data"
    tool.make_sample_data(out, train=3, val=3, unlabelled=3)
    recorded = json.loads((out / "sample_data.json").read_text(encoding="utf-8"))["scans"]
    assert all(seen.values())
    for split, scans in seen.items():
        assert set(scans) <= set(recorded["val" if split == "val" else "train"])
    assert recorded["train"] == pools["train"].indices.tolist()


# ---------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes_keep_to_their_config(pools, split):
    config = tool.SceneConfig(min_size=60, max_size=100, min_digits=2, max_digits=4)
    shapes, numbers = set(), set()
    for index in range(40):
        scene = tool.make_scene(pools[split], config, 0, split, index)
        height, width = scene.labels.shape
        assert scene.image.shape == (height, width, 3)
        assert scene.image.dtype == scene.labels.dtype == np.uint8
        assert 60 <= min(height, width) <= max(height, width) <= 100
        assert height != width
        assert height % 32
        assert width % 32
        shapes.add((height, width))
        numbers.add(len(scene.digits))
        assert 1 <= len(scene.digits) <= 4
        pasted = np.zeros(scene.labels.shape, int)
        for digit in scene.digits:
            pasted[digit.mask] += 1
            assert (scene.labels[digit.mask] == digit.digit + 2).all()
            left, top, wide, tall = digit.bbox
            pasted_box = scene.labels[top : top + tall, left : left + wide]
            assert set(np.unique(pasted_box)) <= {0, 1, digit.digit + 2}
            assert 0.2 * min(height, width) <= max(tall, wide) <= 0.85 * min(height, width)
        assert pasted.max() == 1
        assert np.array_equal(pasted == 1, scene.labels >= 2)
    assert len(shapes) > 20
    assert {2, 3} <= numbers


def test_crowded_small_scenes_keep_a_digit(pools):
    config = tool.SceneConfig(
        min_size=32, max_size=32, min_digits=9, max_digits=9, digit_size=(0.8, 0.8), max_tries=1
    )
    for index in range(20):
        scene = tool.make_scene(pools["train"], config, 0, "train", index)
        assert scene.labels.shape == (32, 32)
        assert len(scene.digits) == 1


def test_scenes_larger_than_the_photos(pools):
    config = tool.SceneConfig(min_size=500, max_size=520)
    scene = tool.make_scene(pools["val"], config, 0, "val", 0)
    assert min(scene.labels.shape) >= 500
    assert scene.digits


@pytest.mark.parametrize("grey", [0, 60, 128, 200, 255])
def test_labels_follow_the_paint_and_the_paint_stands_out(pools, grey):
    pool = replace(pools["train"], photos=(np.full((300, 300, 3), grey, np.uint8),))
    config = tool.SceneConfig(min_digits=1, max_digits=1)
    behind = round(grey * config.background_brightness)
    for index in range(10):
        scene = tool.make_scene(pool, config, 0, "train", index)
        difference = scene.image.astype(int) - behind
        channel = np.abs(difference).max(axis=(0, 1)).argmax()
        paint = np.abs(difference[..., channel])
        alpha = paint / paint.max()
        slack = 1.5 / paint.max()  # of rounding to bytes
        assert alpha[scene.labels >= 2].min() > 0.5 - slack
        assert alpha[scene.labels == 1].max() < 0.2 + slack
        rim = alpha[scene.labels == 0]
        assert 0.2 - slack < rim.min()
        assert rim.max() < 0.5 + slack
        brightest = scene.image[np.unravel_index(paint.argmax(), paint.shape)]
        colours = np.stack([brightest, [behind] * 3])
        lab = cv2.cvtColor(colours[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
        distance = np.linalg.norm((lab[0] - lab[1]) * (1, 0.25, 0.25))
        assert distance > config.min_contrast - 1


def test_backgrounds_keep_their_proportions(pools):
    ramps = np.zeros((60, 200, 3), np.uint8)
    ramps[..., 0] = np.arange(200)
    ramps[..., 1] = np.arange(60)[:, None]
    pool = replace(pools["train"], photos=(ramps,))
    config = tool.SceneConfig(min_size=60, max_size=90, min_digits=1, max_digits=1)
    directions = set()
    for index in range(10):
        scene = tool.make_scene(pool, config, 0, "train", index)
        columns, rows = (scene.labels.shape[axis] for axis in (1, 0))
        y, x = np.nonzero(scene.labels == 1)
        grid = np.stack([x, y, np.ones_like(x)], axis=1)
        slopes = np.linalg.lstsq(grid, scene.image[y, x, :2].astype(float), rcond=None)[0]
        across, down = abs(slopes[0, 0]), abs(slopes[1, 1])
        assert 0.3 < across <= 200 / columns
        assert 0.3 < down <= 1.05 * 60 / rows
        assert across == pytest.approx(down, rel=0.1)
        directions.add(slopes[0, 0] > 0)
    assert directions == {False, True}, "no crop was flipped"


def test_backgrounds_vary(pools):
    scenes = [
        tool.make_scene(pools["train"], tool.SceneConfig(), 0, "train", index)
        for index in range(16)
    ]
    means = {tuple(scene.image[scene.labels == 1].mean(axis=0).round()) for scene in scenes}
    assert len(means) == 16


# ----------------------------------------------------------------------------------------- files


def test_file_names(made):
    expected = {"contact_sheet.png", "sample_data.json", "ADEChallengeData2016/objectInfo150.txt"}
    for split, folder in ADE_FOLDERS.items():
        expected.add(f"coco/annotations/instances_{split}2017.json")
        expected.add(f"coco/annotations/panoptic_{split}2017.json")
        for number in range(1, COUNTS[split] + 1):
            name = f"{folder}/ADE_{split}_{number:08d}"
            expected.add(f"ADEChallengeData2016/images/{name}.jpg")
            expected.add(f"ADEChallengeData2016/annotations/{name}.png")
            expected.add(f"coco/{split}2017/{number:012d}.jpg")
            expected.add(f"coco/panoptic_{split}2017/{number:012d}.png")
            expected.add(f"coco/panoptic_stuff_{split}2017/{number:012d}.png")
    expected |= {f"unlabelled/{number:08d}.jpg" for number in range(1, 5)}
    assert set(files(made)) == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_ade_labels_and_images_match(made, pools, split):
    for number in range(1, COUNTS[split] + 1):
        folder = made / "ADEChallengeData2016"
        stem = f"{ADE_FOLDERS[split]}/ADE_{split}_{number:08d}"
        image = Image.open(folder / "images" / f"{stem}.jpg")
        labels = Image.open(folder / "annotations" / f"{stem}.png")
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert (labels.format, labels.mode) == ("PNG", "L")
        assert image.size == labels.size
        values = np.asarray(labels)
        assert values.max() <= 11
        assert (values >= 2).any()
        assert 0 < (values == 0).mean() < 0.12
        scene = tool.make_scene(pools[split], tool.SceneConfig(), 0, split, number - 1)
        assert np.array_equal(values, scene.labels)
        assert np.abs(np.asarray(image).astype(int) - scene.image).mean() < 6
        coco_image = made / "coco" / f"{split}2017" / f"{number:012d}.jpg"
        assert coco_image.read_bytes() == Path(image.filename).read_bytes()


def test_object_info_holds_what_is_measured(made):
    text = (made / "ADEChallengeData2016" / "objectInfo150.txt").read_text(encoding="utf-8")
    header, *rows = [line.split("\t") for line in text.splitlines()]
    assert header == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    assert [int(row[0]) for row in rows] == list(range(1, 12))
    assert [row[5] for row in rows] == ["background", *tool.DIGIT_NAMES]
    maps = {
        split: [read_labels(made, split, number + 1) for number in range(COUNTS[split])]
        for split in ("train", "val")
    }
    pixels = np.concatenate([labels.ravel() for part in maps.values() for labels in part])
    for label, row in enumerate(rows, 1):
        assert float(row[1]) == pytest.approx(
            (pixels == label).sum() / (pixels > 0).sum(), abs=1e-4
        )
        assert int(row[2]) == sum((labels == label).any() for labels in maps["train"])
        assert int(row[3]) == sum((labels == label).any() for labels in maps["val"])
        assert int(row[4]) == (label == 1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_agrees_with_the_label_maps(made, split):
    coco = read_coco(made, split)
    assert set(coco) == {"info", "licenses", "images", "annotations", "categories"}
    assert [(entry["id"], entry["name"]) for entry in coco["categories"]] == list(
        enumerate(tool.DIGIT_NAMES, 1)
    )
    images = {image["id"]: image for image in coco["images"]}
    assert len(images) == len(coco["images"]) == COUNTS[split]
    for image in images.values():
        picture = Image.open(made / "coco" / f"{split}2017" / image["file_name"])
        assert picture.size == (image["width"], image["height"])
    annotations = coco["annotations"]
    assert len({annotation["id"] for annotation in annotations}) == len(annotations)
    assert {annotation["image_id"] for annotation in annotations} == set(images)
    covered = {
        number: np.zeros((image["height"], image["width"]), bool)
        for number, image in images.items()
    }
    holes = 0
    for annotation in annotations:
        labels = read_labels(made, split, annotation["image_id"])
        left, top, wide, tall = (int(value) for value in annotation["bbox"])
        assert annotation["bbox"] == [left, top, wide, tall]
        mask = np.zeros(labels.shape, bool)
        box = np.s_[top : top + tall, left : left + wide]
        mask[box] = labels[box] == annotation["category_id"] + 1
        inside = mask[box]
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        assert annotation["area"] == mask.sum()
        assert annotation["iscrowd"] == 0
        polygons = annotation["segmentation"]
        assert all(len(polygon) >= 8 and len(polygon) % 2 == 0 for polygon in polygons)
        # Exactly the mask: an IoU of 1, holes left open.
        assert np.array_equal(rasterise(polygons, *labels.shape), mask)
        points = np.concatenate(polygons).reshape(-1, 2)
        assert [*points.min(0), *np.ptp(points, 0)] == annotation["bbox"]
        holes += count_holes(mask)
        covered[annotation["image_id"]] |= mask
    assert holes > 0
    for number, mask in covered.items():
        assert np.array_equal(mask, read_labels(made, split, number) >= 2)


def test_panoptic_categories(made):
    things = [(number, name, 1) for number, name in enumerate(tool.DIGIT_NAMES, 1)]
    for split in ("train", "val"):
        coco = read_coco(made, split, "panoptic")
        assert set(coco) == {"info", "licenses", "images", "annotations", "categories"}
        categories = coco["categories"]
        assert [(entry["id"], entry["name"], entry["isthing"]) for entry in categories] == [
            *things,
            (11, "background", 0),
        ]
        # As on the contact sheet, where the colours are those of the labels of ADE20K.
        assert [tuple(entry["color"]) for entry in categories] == [
            *tool.PALETTE[2:],
            tool.PALETTE[1],
        ]
        for one, other in zip(categories, read_coco(made, split)["categories"]):
            assert {key: one[key] for key in other} == other


@pytest.mark.parametrize("split", ["train", "val"])
def test_panoptic_agrees_with_the_other_files(made, split):
    coco, instances = read_coco(made, split, "panoptic"), read_coco(made, split)
    assert coco["images"] == instances["images"]
    annotations = {annotation["image_id"]: annotation for annotation in coco["annotations"]}
    assert len(annotations) == len(coco["annotations"]) == COUNTS[split]
    channels = np.zeros(3, int)
    for number, annotation in annotations.items():
        assert annotation["file_name"] == f"{number:012d}.png"
        ids = read_segment_ids(made / "coco" / f"panoptic_{split}2017" / annotation["file_name"])
        labels = read_labels(made, split, number)
        assert ids.shape == labels.shape
        segments = annotation["segments_info"]
        listed = [segment["id"] for segment in segments]
        assert len(set(listed)) == len(listed)
        assert sorted({0, *listed}) == np.unique(ids).tolist()
        assert np.array_equal(ids == 0, labels == 0)
        for segment in segments:
            mask = ids == segment["id"]
            rows, columns = np.nonzero(mask)
            top, left = int(rows.min()), int(columns.min())
            tall, wide = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
            assert segment["bbox"] == [left, top, wide, tall]
            assert all(type(value) is int for value in (*segment["bbox"], segment["area"]))
            assert segment["area"] == mask.sum()
            assert segment["iscrowd"] == 0
            label = 1 if segment["category_id"] == 11 else segment["category_id"] + 1
            assert (labels[mask] == label).all()
        stuff = [segment for segment in segments if segment["category_id"] == 11]
        assert len(stuff) == 1
        assert np.array_equal(ids == stuff[0]["id"], labels == 1)
        # The same things in the same order as in the instances, and the same pixels.
        things = [segment for segment in segments if segment["category_id"] != 11]
        pasted = [entry for entry in instances["annotations"] if entry["image_id"] == number]
        keys = ("category_id", "bbox", "area", "iscrowd")
        assert [[segment[key] for key in keys] for segment in things] == [
            [entry[key] for key in keys] for entry in pasted
        ]
        for segment, entry in zip(things, pasted):
            drawn_mask = rasterise(entry["segmentation"], *labels.shape)
            assert np.array_equal(ids == segment["id"], drawn_mask)
        channels |= [np.bitwise_or.reduce(ids.ravel()) >> shift & 255 for shift in (0, 8, 16)]
    assert channels.all(), "no id needs all three channels"


@pytest.mark.parametrize("split", ["train", "val"])
def test_stuff_maps_agree_with_the_label_maps(made, split):
    seen = set()
    for number in range(1, COUNTS[split] + 1):
        folder = made / "coco" / f"panoptic_stuff_{split}2017"
        picture = Image.open(folder / f"{number:012d}.png")
        assert (picture.format, picture.mode) == ("PNG", "L")
        stuff, labels = np.asarray(picture), read_labels(made, split, number)
        assert np.array_equal(stuff == 0, labels >= 2)
        assert np.array_equal(stuff == 1, labels == 1)
        assert np.array_equal(stuff == 255, labels == 0)
        seen |= set(np.unique(stuff))
    assert seen == {0, 1, 255}


def test_segment_ids_are_unique_however_many_there_are():
    digits = []
    for place in range(70_000):
        mask = np.zeros((1, 1), bool)
        mask[0, 0] = True
        digits.append(tool.PastedDigit(place % 10, 0, mask))
    scene = tool.Scene(np.zeros((1, 1, 3), np.uint8), np.ones((1, 1), np.uint8), tuple(digits))
    ids = {segment["id"] for segment in tool.draw_segments(scene)[1]}
    assert len(ids) == 70_001
    assert 0 < min(ids) <= max(ids) < 1 << 24


def test_two_digits_of_a_class_are_two_segments():
    masks = [drawn("##....", "#....."), drawn("...#..", "...##.")]
    digits = tuple(tool.PastedDigit(7, 0, mask) for mask in masks)
    labels = np.where(masks[0] | masks[1], 9, 1).astype(np.uint8)
    labels[:, 2] = 0
    picture, segments = tool.draw_segments(
        tool.Scene(np.zeros((2, 6, 3), np.uint8), labels, digits)
    )
    ids = picture.astype(int) @ (1, 256, 65536)
    assert [(entry["category_id"], entry["area"], entry["bbox"]) for entry in segments] == [
        (8, 3, [0, 0, 2, 2]),
        (8, 3, [3, 0, 2, 2]),
        (11, 4, [1, 0, 5, 2]),
    ]
    first, second, background = (entry["id"] for entry in segments)
    assert ids.tolist() == [
        [first, first, 0, second, background, background],
        [first, background, 0, second, second, background],
    ]


def test_contact_sheet_shows_the_label_colours(made):
    sheet = np.asarray(Image.open(made / "contact_sheet.png"))
    assert min(sheet.shape[:2]) > 600
    colours = {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()}
    assert colours >= set(tool.PALETTE)
    assert len(set(tool.PALETTE)) == 12
    above_legend = {tuple(colour) for colour in sheet[:-52].reshape(-1, 3).tolist()}
    shown = [read_labels(made, "train", number) for number in range(1, 9)]
    shown += [read_labels(made, "val", number) for number in range(1, 5)]
    labels = np.unique(np.concatenate([labels.ravel() for labels in shown]))
    assert above_legend >= {tool.PALETTE[label] for label in labels}


def test_counts_may_be_zero(tmp_path):
    tool.make_sample_data(tmp_path / "data", train=0, val=1, unlabelled=0)
    assert len(read_coco(tmp_path / "data", "val")["images"]) == 1
    for kind in ("instances", "panoptic"):
        coco = read_coco(tmp_path / "data", "train", kind)
        assert coco["images"] == coco["annotations"] == []
    assert not list((tmp_path / "data" / "unlabelled").iterdir())


# ------------------------------------------------------------------------------------- detectron2


def panoptic_metadata(categories: list[dict]) -> dict:
    """Return what `register_coco_panoptic_separated` wants to know, as for its own COCO."""
    things = [entry for entry in categories if entry["isthing"]]
    stuff = [entry for entry in categories if not entry["isthing"]]
    return {
        "thing_dataset_id_to_contiguous_id": {
            entry["id"]: place for place, entry in enumerate(things)
        },
        "thing_classes": [entry["name"] for entry in things],
        "thing_colors": [entry["color"] for entry in things],
        "stuff_dataset_id_to_contiguous_id": {
            0: 0,
            **{entry["id"]: place for place, entry in enumerate(stuff, 1)},
        },
        "stuff_classes": ["things", *(entry["name"] for entry in stuff)],
        "stuff_colors": [[82, 18, 128], *(entry["color"] for entry in stuff)],
    }


@pytest.fixture(params=["train", "val"])
def registered(made, request):
    """Register a split with Detectron2 and return the split and the name it is registered by."""
    reason = "Detectron2 is not installed, so its reader of the panoptic files is not tested"
    pytest.importorskip("detectron2", reason=reason)
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_panoptic_separated

    split, root = request.param, made / "coco"
    name = f"test_sample_data_panoptic_{split}"
    register_coco_panoptic_separated(
        name,
        panoptic_metadata(read_coco(made, split, "panoptic")["categories"]),
        str(root / f"{split}2017"),
        str(root / f"panoptic_{split}2017"),
        str(root / "annotations" / f"panoptic_{split}2017.json"),
        str(root / f"panoptic_stuff_{split}2017"),
        str(root / "annotations" / f"instances_{split}2017.json"),
    )
    yield split, name
    for suffix in ("_separated", "_stuffonly"):
        DatasetCatalog.remove(name + suffix)
        MetadataCatalog.remove(name + suffix)


def test_detectron2_reads_the_panoptic_files(made, registered):
    from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog

    split, name = registered
    records = DatasetCatalog.get(f"{name}_separated")
    assert [record["image_id"] for record in records] == list(range(1, COUNTS[split] + 1))
    metadata = MetadataCatalog.get(f"{name}_separated")
    assert metadata.thing_classes == list(tool.DIGIT_NAMES)
    assert metadata.stuff_classes == ["things", "background"]
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[],
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
    )
    for record in records:
        labels = read_labels(made, split, record["image_id"])
        mapped = mapper(record)
        assert mapped["image"].shape == (3, *labels.shape)
        expected = np.select([labels == 0, labels == 1], [255, 1], 0)
        assert np.array_equal(mapped["sem_seg"].numpy(), expected)
        instances = mapped["instances"]
        masks = instances.gt_masks.tensor.numpy()
        assert len(instances) == len(record["annotations"]) >= 1
        classes = instances.gt_classes.numpy()
        assert all((labels[mask] == digit + 2).all() for mask, digit in zip(masks, classes))
        assert np.array_equal(masks.sum(axis=0), labels >= 2)
        for mask, box in zip(masks, instances.gt_boxes.tensor.numpy()):
            rows, columns = np.nonzero(mask)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == edges


def test_detectron2_reads_the_panoptic_json(made, registered):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json

    split, name = registered
    metadata = MetadataCatalog.get(f"{name}_separated")
    records = load_coco_panoptic_json(
        metadata.panoptic_json, metadata.image_root, metadata.panoptic_root, metadata.as_dict()
    )
    separated = DatasetCatalog.get(f"{name}_separated")
    stuff_only = DatasetCatalog.get(f"{name}_stuffonly")
    assert len(records) == len(separated) == len(stuff_only) == COUNTS[split]
    for record, other, stuff in zip(records, separated, stuff_only):
        for key in ("file_name", "image_id"):
            assert record[key] == other[key]
        assert stuff["file_name"] == other["file_name"]
        assert stuff["sem_seg_file_name"] == other["sem_seg_file_name"]
        *things, background = record["segments_info"]
        assert (background["isthing"], background["category_id"]) == (False, 1)
        assert all(segment["isthing"] for segment in things)
        assert [segment["category_id"] for segment in things] == [
            annotation["category_id"] for annotation in other["annotations"]
        ]


# -------------------------------------------------------------------------------------- polygons


def drawn(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])


SHAPES = {
    "pixel": drawn("#"),
    "ring": drawn("###", "#.#", "###"),
    "eight": drawn("####", "#..#", "####", "#.##", "#..#", "####"),
    "crescent": drawn("######", "#....#", "#.##.#", "#.##.#", "######"),
    "island": drawn("#####", "#...#", "#.#.#", "#...#", "#####"),
    "diagonal ring": drawn(".#.", "#.#", ".#."),
    "two pieces": drawn("##..#", "##..#"),
    "nothing": drawn("...", "..."),
}


@pytest.mark.parametrize("name", SHAPES)
def test_polygons_cover_shapes_exactly(name):
    mask = SHAPES[name]
    assert np.array_equal(rasterise(tool.mask_to_polygons(mask), *mask.shape), mask)


def test_polygons_have_no_needless_points():
    (square,) = tool.mask_to_polygons(np.pad(np.ones((3, 5), bool), 2))
    corners = np.array(square).reshape(-1, 2).tolist()
    assert sorted(corners) == [[2, 2], [2, 5], [7, 2], [7, 5]]


def test_polygons_cover_random_masks_exactly():
    rng = np.random.default_rng(0)
    holes = 0
    for _ in range(60):
        mask = cv2.blur(rng.random((24, 20)), (3, 3)) > 0.45
        polygons = tool.mask_to_polygons(mask)
        assert np.array_equal(rasterise(polygons, *mask.shape), mask)
        holes += count_holes(mask)
    assert holes > 60


# ------------------------------------------------------------------- what is there, what is made


def forbid_work(monkeypatch):
    def fail(*_arguments, **_keywords):
        raise AssertionError("work was begun")

    monkeypatch.setattr(tool, "load_pools", fail)
    monkeypatch.setattr(tool, "make_scene", fail)


def test_same_parameters_do_nothing(made, monkeypatch):
    forbid_work(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert "nothing to do" in tool.make_sample_data(made, **COUNTS)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"train": 15}, {"config": tool.SceneConfig(min_digits=1, max_digits=2)}],
)
def test_other_parameters_need_force(made, monkeypatch, changed):
    forbid_work(monkeypatch)
    before = files(made)
    with pytest.raises(tool.SampleDataError, match="other parameters.*--force"):
        tool.make_sample_data(made, **{**COUNTS, **changed})
    assert files(made) == before


def test_data_of_an_older_version_needs_force(tmp_path, monkeypatch):
    out, small = tmp_path / "data", {"train": 1, "val": 1, "unlabelled": 0}
    tool.make_sample_data(out, **small)
    fresh = files(out)
    manifest = json.loads((out / "sample_data.json").read_text(encoding="utf-8"))
    assert manifest["version"] == tool.FORMAT_VERSION == 2
    manifest["version"] = 1
    (out / "sample_data.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.rmtree(out / "coco" / "panoptic_train2017")
    before = files(out)
    with monkeypatch.context() as patch:
        forbid_work(patch)
        with pytest.raises(tool.SampleDataError, match="version 1.*version 2.*--force") as raised:
            tool.make_sample_data(out, **small)
    assert str(out) in str(raised.value)
    assert "parameters" not in str(raised.value)
    assert files(out) == before
    tool.make_sample_data(out, **small, force=True)
    assert files(out) == fresh


def test_force_replaces_our_data(tmp_path):
    out = tmp_path / "data"
    tool.make_sample_data(out, train=2, val=1, unlabelled=2)
    (out / "unlabelled" / "more.txt").write_text("x", encoding="utf-8")
    tool.make_sample_data(out, train=1, val=1, unlabelled=1, seed=5, force=True)
    manifest = json.loads((out / "sample_data.json").read_text(encoding="utf-8"))
    assert manifest["seed"] == 5
    assert [path.name for path in (out / "unlabelled").iterdir()] == ["00000001.jpg"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"seed": 0}'])
def test_foreign_folders_are_never_replaced(tmp_path, monkeypatch, force, manifest):
    forbid_work(monkeypatch)
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work", encoding="utf-8")
    if manifest is not None:
        (out / "sample_data.json").write_text(manifest, encoding="utf-8")
    before = files(out)
    with pytest.raises(tool.SampleDataError, match="was not made by this tool"):
        tool.make_sample_data(out, force=force)
    assert files(out) == before


def test_a_file_is_never_replaced(tmp_path, monkeypatch):
    forbid_work(monkeypatch)
    out = tmp_path / "file"
    out.write_text("x", encoding="utf-8")
    with pytest.raises(tool.SampleDataError, match="was not made by this tool"):
        tool.make_sample_data(out, force=True)
    assert out.read_text(encoding="utf-8") == "x"


def test_an_empty_folder_is_used(tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    tool.make_sample_data(out, train=1, val=0, unlabelled=0)
    assert (out / "sample_data.json").is_file()
    assert list(tmp_path.iterdir()) == [out]


def interrupt_at(monkeypatch, call: int):
    make_scene, calls = tool.make_scene, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return make_scene(*arguments)

    monkeypatch.setattr(tool, "make_scene", interrupted)


@pytest.mark.parametrize("call", [1, 4, 6])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, call):
    interrupt_at(monkeypatch, call)
    with pytest.raises(KeyboardInterrupt):
        tool.make_sample_data(tmp_path / "data", train=3, val=2, unlabelled=2)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_replacement_leaves_the_old(tmp_path, monkeypatch):
    out = tmp_path / "data"
    tool.make_sample_data(out, train=1, val=1, unlabelled=0)
    before = files(out)
    interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        tool.make_sample_data(out, train=3, val=2, unlabelled=2, force=True)
    assert files(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_move_puts_the_old_back(tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(FileNotFoundError):
        tool._publish(tmp_path / "never built", out, tmp_path / "aside")
    assert list(tmp_path.rglob("*")) == [out, out / "old"]


def test_data_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "data"
    build = tool._build

    def build_while_another_writes(*arguments):
        tally = build(*arguments)
        out.mkdir()
        (out / "theirs").touch()
        return tally

    monkeypatch.setattr(tool, "_build", build_while_another_writes)
    with pytest.raises(tool.SampleDataError, match="was not made by this tool"):
        tool.make_sample_data(out, train=1, val=0, unlabelled=0)
    assert list(tmp_path.rglob("*")) == [out, out / "theirs"]


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--train", "-1"], ["train", "at least 0", "-1"]),
        (["--val", "-2"], ["val", "at least 0", "-2"]),
        (["--unlabelled", "-3"], ["unlabelled", "at least 0", "-3"]),
        (["--seed", "-4"], ["seed", "at least 0", "-4"]),
        (["--min-size", "31"], ["min-size", "at least 32", "31"]),
        (["--min-size", "80", "--max-size", "70"], ["max-size", "min-size (80)", "70"]),
        (["--digits", "0", "3"], ["digits", "1 <= MIN <= MAX", "0 3"]),
        (["--digits", "3", "2"], ["digits", "1 <= MIN <= MAX", "3 2"]),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, monkeypatch, arguments, parts):
    forbid_work(monkeypatch)
    with pytest.raises(SystemExit) as raised:
        tool.main(["--out", str(tmp_path / "data"), *arguments])
    message = str(raised.value.code)
    assert all(part in message for part in parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changed",
    [
        {"digit_size": (0.3, 0.9)},
        {"digit_size": (0.6, 0.5)},
        {"background_scale": (0.0, 1.0)},
        {"ink": (0.5, 0.5)},
        {"mask_threshold": 0.1},
        {"rim_threshold": 0.0},
        {"gap": -1},
        {"max_tries": 0},
    ],
)
def test_bad_configs_are_refused(changed):
    with pytest.raises(tool.SampleDataError, match=next(iter(changed))):
        tool.SceneConfig(**changed)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "new" / "data"
    arguments = ["--train", "2", "--val", "1", "--unlabelled", "0", "--seed", "7"]
    arguments += ["--min-size", "40", "--max-size", "50", "--digits", "2", "2", "--out", str(out)]
    tool.main(arguments)
    summary = capsys.readouterr().out
    assert len(summary.splitlines()) == 1
    assert "2 training, 1 validation" in summary
    manifest = json.loads((out / "sample_data.json").read_text(encoding="utf-8"))
    assert manifest["seed"] == 7
    assert manifest["counts"] == {"train": 2, "val": 1, "unlabelled": 0}
    assert {key: manifest["scene"][key] for key in ("min_size", "max_size")} == {
        "min_size": 40,
        "max_size": 50,
    }
    assert (manifest["scene"]["min_digits"], manifest["scene"]["max_digits"]) == (2, 2)
    tool.main(arguments)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["cv2", "sklearn.datasets", "tqdm", "PIL"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    crippled = load_tool("make_sample_data_crippled")
    monkeypatch.delitem(sys.modules, "make_sample_data_crippled")
    with pytest.raises(crippled.SampleDataError) as raised:
        crippled.make_sample_data(tmp_path / "new" / "data")
    assert "pip install diffbackbone[sample]" in str(raised.value)
    assert package in str(raised.value)
    assert not list(tmp_path.iterdir())
