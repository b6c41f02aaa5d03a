"""The sample data: scenes, their files, and folders that appear whole or not at all."""

# ruff: noqa: E402

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

cv2 = pytest.importorskip("cv2")
pytest.importorskip("sklearn")

from sklearn.datasets import load_digits, load_sample_images

from diffbackbone.sample_data import (
    dataset,
    digits,
    make_digits,
    make_sample_data,
    scenes,
    writers,
)
from diffbackbone.sample_data.scenes import Scene, SceneConfig, make_scene
from diffbackbone.utils import UserError

COUNTS = {"train": 12, "val": 6, "unlabelled": 4}
DIGESTS = {".jpg": "9bbfe7956ae3f158", ".json": "0726bacc5c278381"}
DIGESTS |= {".png": "22e17b4d1fc8315c"}


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
    return np.array_equal(one.image, other.image) and np.array_equal(one.labels, other.labels)


def test_content_is_the_same_to_the_bit(made):
    """Published results and demo figures depend on it."""
    digests = {suffix: hashlib.sha256() for suffix in DIGESTS}
    for path in sorted(made.rglob("*")):
        if path.suffix not in digests:
            continue
        digest = digests[path.suffix]
        digest.update(path.relative_to(made).as_posix().encode())
        if path.suffix == ".json":
            digest.update(json.dumps(json.loads(path.read_text()), sort_keys=True).encode())
        else:
            pixels = np.asarray(Image.open(path))
            digest.update(str((pixels.shape, pixels.dtype)).encode() + pixels.tobytes())
    assert {suffix: digest.hexdigest()[:16] for suffix, digest in digests.items()} == DIGESTS


def test_larger_set_starts_with_the_smaller(made, tmp_path):
    make_sample_data(tmp_path, train=0, val=7, unlabelled=5)
    small, large = files(made), files(tmp_path)
    same = [name for name in small if name.endswith((".jpg", ".png")) and name in large]
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
    assert not np.array_equal(pools["train"].scans, scenes.load_pools(1)["train"].scans)


@pytest.mark.parametrize("poisoned", ["train", "val"])
def test_a_split_never_sees_the_sources_of_the_other(pools, monkeypatch, poisoned):
    scans, photos = load_digits(), load_sample_images()
    indices = scenes.split_scans(scans.target, 0)
    assert sorted([*indices["train"], *indices["val"]]) == list(range(1797))
    shares = np.bincount(scans.target[indices["train"]]) / np.bincount(scans.target)
    assert shares == pytest.approx(0.75, abs=0.01)  # of each class
    scans.images[indices[poisoned]] = scans.images[indices[poisoned]][:, ::-1]
    photos.images = [photo.copy() for photo in photos.images]
    for photo in photos.images:
        half = photo[:, :448] if poisoned == "train" else photo[:, 448:]
        half[:] = 255 - half
    monkeypatch.setattr(scenes, "load_digits", lambda: scans)
    monkeypatch.setattr(scenes, "load_sample_images", lambda: photos)
    changed = scenes.load_pools(0)
    for split in scenes.SPLITS:
        for index in range(6):
            key = (SceneConfig(), 0, split, index)
            same = same_scene(make_scene(pools[split], *key), make_scene(changed[split], *key))
            assert same == ((split == "val") != (poisoned == "val"))


def test_scenes_keep_to_their_config(pools):
    config = SceneConfig(min_size=60, max_size=100, min_digits=2, max_digits=4)
    shapes, numbers = set(), set()
    for index in range(30):
        scene = make_scene(pools["train"], config, 0, "train", index)
        height, width = scene.labels.shape
        assert scene.image.shape == (height, width, 3)
        assert 60 <= min(height, width) < max(height, width) <= 100
        assert height % 32 and width % 32  # noqa: PT018
        shapes.add((height, width))
        numbers.add(len(scene.digits))
        pasted = sum(digit.mask.astype(int) for digit in scene.digits)
        assert np.array_equal(pasted, scene.labels >= 2)
        for digit in scene.digits:
            assert (scene.labels[digit.mask] == digit.digit + 2).all()
            _, _, *sides = cv2.boundingRect(digit.mask.astype(np.uint8))
            assert 0.2 * min(height, width) <= max(sides) <= 0.6 * min(height, width)
    assert len(shapes) > 20
    assert {2, 3} <= numbers <= {1, 2, 3, 4}


def test_crowded_scenes_keep_a_digit_and_huge_ones_find_a_photo(pools):
    crowded = SceneConfig(32, 32, 9, 9, digit_size=(0.8, 0.8), max_tries=1)
    for index in range(20):
        scene = make_scene(pools["train"], crowded, 0, "train", index)
        assert (scene.labels.shape, len(scene.digits)) == ((32, 32), 1)
    assert min(make_scene(pools["val"], SceneConfig(500, 520), 0, "val", 0).labels.shape) >= 500


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_agrees_with_the_label_maps(made, split):
    coco, panoptic = (read_coco(made, split, kind) for kind in ("instances", "panoptic"))
    digits = list(enumerate(scenes.DIGIT_NAMES, 1))
    assert [(entry["id"], entry["name"]) for entry in coco["categories"]] == digits
    assert [(e["id"], e["isthing"]) for e in panoptic["categories"]] == [
        *((number, 1) for number, _ in digits),
        (11, 0),
    ]
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
        cv2.blur(np.random.default_rng(0).random((60, 60)), (3, 3)) > 0.45,
    ],
)
def test_polygons_cover_shapes_exactly(mask):
    assert np.array_equal(rasterize(writers.mask_to_polygons(mask), *mask.shape), mask)


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.delattr(scenes, "load_pools")
    monkeypatch.delattr(digits, "load_digits")


def test_same_parameters_do_nothing_and_others_are_refused(made, no_work):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert "nothing to do" in make_sample_data(made, **COUNTS)
    for changed in ({"seed": 1}, {"train": 15}, {"digits": (1, 2)}):
        with pytest.raises(UserError, match="now.*remove it"):
            make_sample_data(made, **{**COUNTS, **changed})
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize("make", [make_sample_data, make_digits])
@pytest.mark.parametrize("manifest", [None, '{"seed": 0}'])
def test_foreign_folders_are_never_replaced(tmp_path, no_work, make, manifest):
    (tmp_path / "thesis.txt").write_text("years of work")
    for name in ("sample_data.json", "sample_digits.json") if manifest else ():
        (tmp_path / name).write_text(manifest)
    before = files(tmp_path)
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UserError, match="another folder with --out"):
            make(out)
    assert files(tmp_path) == before


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make_scene(*arguments)

    monkeypatch.setattr(scenes, "make_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_sample_data(tmp_path / "new/data", train=2, val=1, unlabelled=1)
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


BAD = [{"min_size": 31}, {"min_size": 80, "max_size": 70}, {"digits": (0, 3)}, {"digits": (3, 2)}]


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


def test_command_lines(tmp_path, capsys):
    out = tmp_path / "new/data"
    options = "--train 2 --val 1 --unlabelled 0 --seed 7 --min-size 40 --max-size 50 --digits 2 3"
    dataset.main([*options.split(), "--out", str(out)])
    manifest = json.loads((out / "sample_data.json").read_text())
    assert (manifest["seed"], manifest["counts"]["train"]) == (7, 2)
    assert list(manifest["scene"].values())[:4] == [40, 50, 2, 3]
    digits.main(["--limit", "1", "--out", str(tmp_path / "digits")])
    said = capsys.readouterr().out
    assert "2 train, 1 val, 0 unlabelled scenes" in said
    assert "10 training and 10 validation" in said
