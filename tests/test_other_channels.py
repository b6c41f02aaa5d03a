"""Images of five channels from pretraining to segmentation, and grey ones of 16 bits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

from diffbackbone.openmmlab.loading import LoadDeepImage

ROOT = Path(__file__).resolve().parents[1]
CHANNELS = 5
FIELDS = {
    "model_channels": 32, "channel_mult": (1, 1, 2, 2), "num_res_blocks": 1,
    "attention_strides": (8,), "num_head_channels": 32, "image_size": 32, "in_channels": CHANNELS,
}  # fmt: skip


def write_data(root: Path) -> None:
    """Scenes for segmentation (classes 1 and 2) and the same images in a folder for each class."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        labels = root / "scenes" / "labels" / split
        labels.mkdir(parents=True)
        for i in range(count):
            image = random.integers(0, 30_000, (48, 56, CHANNELS), dtype=np.uint16)
            label = np.ones((48, 56), np.uint8)
            label[:, 28:] = 2
            image[:, 28:] += 30_000
            for folder in (f"scenes/images/{split}", f"folders/{split}/c{i % 2}"):
                (root / folder).mkdir(parents=True, exist_ok=True)
                np.save(root / folder / f"{i}.npy", image)
            Image.fromarray(label).save(labels / f"{i}.png")


def config(root: Path) -> str:
    """A config for such scenes, as a user would write it."""
    return f"""
_base_ = {str(ROOT / "configs" / "mmseg" / "upernet_gd_sample.py")!r}
load = dict(type="LoadDeepImage", channels={CHANNELS})
labels = dict(type="LoadAnnotations", reduce_zero_label=True)
crop = dict(type="RandomCrop", crop_size=(32, 32))
pack = dict(type="PackSegInputs")
data = dict(
    data_root={str(root / "scenes")!r},
    img_suffix=".npy",
    metainfo=dict(classes=("dark", "light"), palette=[[0, 0, 0], [255, 255, 255]]),
)
loader = dict(num_workers=0, persistent_workers=False)
prefix = dict(img_path="images/train", seg_map_path="labels/train")
train_dataloader = dict(
    **loader, batch_size=2,
    dataset=dict(**data, data_prefix=prefix, pipeline=[load, labels, crop, pack]),
)
prefix = dict(img_path="images/val", seg_map_path="labels/val")
val_dataloader = dict(
    **loader, dataset=dict(**data, data_prefix=prefix, pipeline=[load, labels, pack])
)
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(
        mean=[127.5] * {CHANNELS}, std=[127.5] * {CHANNELS}, bgr_to_rgb=False, size=(32, 32)
    ),
    backbone=dict(
        unet=dict(_delete_=True, **{FIELDS!r}),
        init_cfg=dict(checkpoint={str(root / "pretrained" / "unet.safetensors")!r}),
        blocks=[14, 12, 10, 8],
        out_strides=[1, 2, 4, 8],
    ),
    decode_head=dict(num_classes=2),
    auxiliary_head=dict(num_classes=2),
)
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
"""


def test_pretraining_sweep_and_segmentation(tmp_path):
    write_data(tmp_path)
    log = tmp_path / "log"
    forked.run(
        "tools/pretrain.py", "--data", tmp_path / "folders", "--out", tmp_path / "pretrained",
        "--unet", json.dumps(FIELDS), "--iterations", 2,
        "--batch-size", 2, "--workers", 0, "--samples", 0, log=log,
    )  # fmt: skip
    weights = tmp_path / "pretrained" / "unet.safetensors"
    forked.run(
        "tools/sweep.py", "--data", tmp_path / "folders", "--unet", weights, "--checkpoint",
        weights, "--timesteps", 90, "--blocks", 8, 12, "--pools", 1, "--seeds", 0, "--k", 1,
        "--workers", 0, "--out", tmp_path / "sweep", log=log,
    )  # fmt: skip
    assert "| 12 |" in (tmp_path / "sweep" / "summary.md").read_text()
    path = tmp_path / "config.py"
    path.write_text(config(tmp_path))
    text = forked.run("tools/mmseg_train.py", path, "--work-dir", tmp_path / "work", log=log)
    assert len(re.findall(r"mIoU: (\S+)", text)) == 1


def test_grey_images_keep_all_levels(tmp_path):
    levels = np.arange(32 * 40, dtype=np.uint16).reshape(32, 40) * 51
    Image.fromarray(levels).save(tmp_path / "grey.tif")
    loaded = LoadDeepImage(channels=1).transform({"img_path": str(tmp_path / "grey.tif")})
    assert loaded["img_shape"] == loaded["ori_shape"] == (32, 40)
    np.testing.assert_allclose(loaded["img"][..., 0], levels / 257, atol=1e-4)
