"""Segmentation by transformers: the data, a run from the command line, resuming."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate")

from diffbackbone import hf_segmentation  # noqa: E402
from diffbackbone.hf_data import VOID, Scenes, find_data, random_crop, read_mask  # noqa: E402
from diffbackbone.sample_data.dataset import make_sample_data  # noqa: E402
from diffbackbone.transformers import DiffusionImageProcessor  # noqa: E402
from diffbackbone.utils import UserError  # noqa: E402

SMALL = ["--out-channels", "16", "--hidden-size", "16", "--batch-size", "2", "--crop", "32"]
SMALL += ["--blocks", "30", "24", "--out-strides", "4", "16"]


@pytest.fixture(scope="module", autouse=True)
def own_safe_globals():
    """Without the globals that an OpenMMLab test in the same process has allowed torch.load."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    make_sample_data(folder, train=6, val=3, unlabelled=0)
    return folder


@pytest.fixture(scope="module")
def finished(sample, tmp_path_factory):
    """A run of four steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(sample, out, trainer=["save_total_limit=9", "logging_steps=1"])
    return out


def run(data, out, *options, steps=4, trainer=()):
    folders = ["--data", str(data), "--out", str(out), "--steps", str(steps)]
    trainer = ["--trainer", "dataloader_num_workers=0", *trainer]
    hf_segmentation.main([*folders, *SMALL, *options, *trainer])


def write_folder(folder, count=5, split="", labels=3):
    """Images of several sizes, whose red left half is class 1 and whose first row is void."""
    for kind in ("images", "masks"):
        (folder / kind / split).mkdir(parents=True)
    for index in range(count):
        pixels = np.full((40 + 4 * index, 48, 3), 40 * index, np.uint8)
        pixels[:, :24, 0] = 255
        mask = np.zeros(pixels.shape[:2], np.uint8)
        mask[:, :24] = 1
        mask[-1] = labels - 1
        mask[0] = VOID
        Image.fromarray(pixels).save(folder / "images" / split / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / split / f"{index}.png")


class TestData:
    def test_a_folder_without_splits(self, tmp_path):
        write_folder(tmp_path)
        training, validation, classes, ignore_zero = find_data(tmp_path)
        assert [image.name for image, _ in training] == [f"{i}.png" for i in range(4)]
        assert [image.name for image, _ in validation] == ["4.png"]
        assert (classes, ignore_zero) == (["0", "1", "2"], False)
        (tmp_path / "classes.txt").write_text("wall\nsky\nroad\n")
        assert find_data(tmp_path)[2] == ["wall", "sky", "road"]

    def test_ade20k(self, sample):
        training, validation, classes, ignore_zero = find_data(sample)
        assert (len(training), len(validation), ignore_zero) == (6, 3, True)
        assert classes[:3] == ["background", "zero", "one"]
        labels = Scenes(validation, len(classes), ignore_zero)[0]["labels"]
        with Image.open(validation[0][1]) as image:
            raw = torch.from_numpy(np.array(image)).long()
        assert torch.equal(labels, torch.where(raw == 0, VOID, raw - 1))

    def test_void_stays_void(self, tmp_path):
        Image.fromarray(np.array([[0, 1, 5, VOID]], np.uint8)).save(tmp_path / "mask.png")
        for ignore_zero, expected in ((True, [VOID, 0, 4, VOID]), (False, [0, 1, 5, VOID])):
            assert read_mask(tmp_path / "mask.png", ignore_zero).tolist() == [expected]

    def test_whole_images_are_as_the_image_processor_makes_them(self, tmp_path):
        write_folder(tmp_path)
        scene = Scenes(find_data(tmp_path)[0], 3, False)[3]
        with Image.open(tmp_path / "images" / "3.png") as image:
            pixels = DiffusionImageProcessor(do_resize=False)(image, return_tensors="pt")
        assert torch.allclose(scene["pixel_values"], pixels["pixel_values"][0])
        assert scene["labels"].shape == (52, 48)
        assert scene["labels"].dtype == torch.int64

    @pytest.mark.parametrize("augment", [False, True])
    def test_crops_depend_on_seed_and_index_alone(self, tmp_path, augment):
        write_folder(tmp_path)
        pairs = find_data(tmp_path)[0]
        scenes = Scenes(pairs, 3, False, random_crop(50, augment), count=12, seed=1)
        items = [scenes[i] for i in range(12)]
        torch.manual_seed(5)
        again = Scenes(pairs, 3, False, random_crop(50, augment), count=12, seed=1)
        for i in (7, 2):
            assert all(torch.equal(again[i][name], x) for name, x in items[i].items())
        assert {x.shape for item in items for x in item.values()} == {(3, 50, 50), (50, 50)}
        valid = [item["labels"] != VOID for item in items]
        shades = [
            round(float(item["pixel_values"][1][mask].mean()), 2)
            for item, mask in zip(items, valid)
        ]
        for epoch in range(3):  # each image once
            assert len(set(shades[4 * epoch : 4 * epoch + 4])) == 4
        assert shades[:4] != shades[4:8] or shades[4:8] != shades[8:]
        assert augment or not all(mask.all() for mask in valid)  # padded to the crop

    def test_errors(self, tmp_path):
        write_folder(tmp_path)
        pairs = find_data(tmp_path)[0]
        with pytest.raises(UserError, match=r"masks/0.png has labels beyond the 2 classes"):
            Scenes(pairs, 2, False)[0]
        Image.new("RGB", (48, 40)).save(tmp_path / "masks" / "0.png")
        with pytest.raises(UserError, match="has 3 channels"):
            Scenes(pairs, 3, False)[0]
        (tmp_path / "masks" / "2.png").unlink()
        with pytest.raises(UserError, match="1 images have no mask"):
            find_data(tmp_path)


def test_run(finished, sample):
    metrics = json.loads((finished / "metrics.json").read_text())
    with Image.open(finished / "predictions.png") as picture:
        assert picture.width > 500
    folder = finished / "model"
    assert not [path for path in folder.iterdir() if str(finished).encode() in path.read_bytes()]
    model = transformers.UperNetForSemanticSegmentation.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert model.config.id2label[10] == "nine"
    # the mean IoU by plain counting, on images as a user would read them
    _, validation, classes, _ = find_data(sample)
    shared, union = np.zeros(len(classes)), np.zeros(len(classes))
    for image_path, mask_path in validation:
        with Image.open(image_path) as image, Image.open(mask_path) as mask:
            pixels, labels = processor(image, return_tensors="pt"), np.array(mask).astype(int) - 1
        with torch.no_grad():
            output = model(**pixels)
        (found,) = processor.post_process_semantic_segmentation(output, [labels.shape])
        for index in range(len(classes)):
            right, guess = labels == index, (found.numpy() == index) & (labels >= 0)
            shared[index] += (right & guess).sum()
            union[index] += (right | guess).sum()
    with np.errstate(invalid="ignore"):  # classes that there are not
        expected = 100 * shared / union
    assert metrics["eval_miou"] == pytest.approx(np.nanmean(expected), rel=1e-3)
    found = [metrics[f"eval_iou_{name}"] for name in classes]
    found = [np.nan if value is None else value for value in found]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert max(found) > 0


def test_resuming_goes_on_to_the_bit(finished, sample, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-2", out / "checkpoint-2")
    (out / "checkpoint-3").mkdir()  # killed while it was being written
    shutil.copy(finished / "checkpoint-3" / "model.safetensors", out / "checkpoint-3")
    with pytest.raises(SystemExit, match="holds a run: go on with --resume"):
        run(sample, out)
    run(sample, out, "--resume", trainer=["save_total_limit=9"])
    assert not (out / "checkpoint-1").exists()  # it did not start anew
    weights = [
        transformers.UperNetForSemanticSegmentation.from_pretrained(folder / "model").state_dict()
        for folder in (finished, out)
    ]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (finished, out)]
    assert metrics[0] == metrics[1]


def test_training_lowers_the_loss(tmp_path):
    """Frozen, on a folder of one's own: the rest is trained."""
    write_folder(tmp_path / "data")
    out = tmp_path / "run"
    options = ["--freeze", "--feedback", "None", "--lr", "0.01", "--augment"]
    trainer = ["logging_steps=6", "gradient_accumulation_steps=2"]
    run(tmp_path / "data", out, *options, steps=24, trainer=trainer)
    state = json.loads((out / "checkpoint-24" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < 0.85 * losses[0]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["eval_iou_1"] > 50
