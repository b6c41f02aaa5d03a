"""Mask R-CNN on images of one channel of 16 bits and of five channels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2_runs import SAMPLE, SMALL, options, read_results
from PIL import Image

from diffbackbone.detectron2 import datasets, train_net, visualize

pytest_plugins = ["detectron2_runs"]
pytestmark = pytest.mark.usefixtures("as_it_was")


@pytest.fixture
def deep_data(data, tmp_path, request):
    """The sample scenes with other channels, registered as deep_train and deep_val."""
    channels = request.param
    for part in ("train", "val"):
        content = json.loads((data / f"coco/annotations/instances_{part}2017.json").read_text())
        (tmp_path / part).mkdir()
        for record in content["images"]:
            with Image.open(data / f"coco/{part}2017" / record["file_name"]) as image:
                grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
            record["file_name"] = f"{record['id']}.{'tif' if channels == 1 else 'npy'}"
            path = tmp_path / part / record["file_name"]
            if channels == 1:
                Image.fromarray(grey).save(path)
            else:
                np.save(path, np.stack([grey // (i + 1) for i in range(channels)], axis=-1))
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
        names = tmp_path / f"{part}.json", tmp_path / part
        register_coco_instances(f"deep_{part}", {}, *map(str, names))
    yield channels
    for name in ("deep_train", "deep_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def changes(channels: int) -> dict[str, object]:
    scale = str((127.5,) * channels)
    return {
        **SMALL,
        "MODEL.DIFFUSION.UNET_OPTIONS.in_channels": channels,
        "MODEL.PIXEL_MEAN": scale,
        "MODEL.PIXEL_STD": scale,
        "INPUT.DEEP": True,
        "DATASETS.TRAIN": "('deep_train',)",
        "DATASETS.TEST": "('deep_val',)",
    }


@pytest.mark.parametrize("deep_data", [1, 5], indirect=True)
def test_training_evaluation_and_picture(deep_data, tmp_path):
    opts = options(tmp_path / "work", **changes(deep_data))
    train_net.main(["--config", SAMPLE, *opts])
    assert 0 <= read_results(tmp_path / "work")["bbox/AP"] <= 100
    shown = visualize.predict(visualize.VisualizeConfig(SAMPLE, tuple(opts), images=1))
    assert shown[0][0].std() > 0


@pytest.mark.parametrize("deep_data", [5], indirect=True)
def test_mapper_keeps_all_levels_and_moves_boxes(deep_data, data):
    (mine, *_), (plain, *_) = map(datasets.load_dicts, ("deep_val", "diffbackbone_sample_val"))
    flips = [T.RandomFlip(prob=1.0)]
    options = dict(is_train=True, augmentations=flips, image_format="RGB", use_instance_mask=True)
    found = instantiate(LazyCall(datasets.DeepDatasetMapper)(channels=5, **options))(mine)
    expected = DatasetMapper(**options)(plain)
    assert found["instances"].gt_boxes.tensor.equal(expected["instances"].gt_boxes.tensor)
    levels = np.load(mine["file_name"])[:, ::-1].transpose(2, 0, 1) / 257
    torch.testing.assert_close(found["image"], torch.from_numpy(levels).float(), atol=2e-3, rtol=0)
    np.save(mine["file_name"], np.full((mine["height"], mine["width"], 5), 0.5))
    gray = datasets.DeepDatasetMapper(channels=5, **options)(mine)
    assert (gray["image"] != 127.5).all()  # zeros after normalization are padding


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"INPUT.DEEP": False}, "channels need INPUT.DEEP"),
        ({"MODEL.DIFFUSION.UNET_OPTIONS.in_channels": 3}, "images must be"),
    ],
)
@pytest.mark.parametrize("deep_data", [1], indirect=True)
def test_channels_that_disagree(deep_data, tmp_path, refused, wrong, text):
    opts = options(tmp_path / "work", **{**changes(1), **wrong})
    assert text in refused("--config", SAMPLE, *opts)
