"""Images of one channel of 16 bits and of five channels, from pretraining to segmentation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {
    "model_channels": 32, "channel_mult": (1, 1, 2, 2), "num_res_blocks": 1,
    "attention_strides": (8,), "num_head_channels": 32, "image_size": 32,
}  # fmt: skip


def write_data(root: Path, channels: int) -> None:
    """Scenes for segmentation (classes 1 and 2) and the same images in a folder for each class."""
    random = np.random.default_rng(channels)
    for split, count in (("train", 6), ("val", 4)):
        for i in range(count):
            image = random.integers(0, 30_000, (48, 56, channels), dtype=np.uint16)
            label = np.ones((48, 56), np.uint8)
            label[:, 28:] = 2
            image[:, 28:] += 30_000
            folders = (root / "scenes" / "images" / split, root / "folders" / split / f"c{i % 2}")
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                if channels == 1:
                    Image.fromarray(image[..., 0]).save(folder / f"{i}.tif")
                else:
                    np.save(folder / f"{i}.npy", image)
            labels = root / "scenes" / "labels" / split
            labels.mkdir(parents=True, exist_ok=True)
            Image.fromarray(label).save(labels / f"{i}.png")


def config(root: Path, channels: int) -> str:
    """A config for such scenes, as a user would write it."""
    return f"""
_base_ = {str(ROOT / "configs" / "mmseg" / "upernet_gd_sample.py")!r}
load = dict(type="LoadDeepImage", channels={channels})
labels = dict(type="LoadAnnotations", reduce_zero_label=True)
crop = dict(type="RandomCrop", crop_size=(32, 32))
pack = dict(type="PackSegInputs")
data = dict(
    data_root={str(root / "scenes")!r},
    img_suffix={(".tif" if channels == 1 else ".npy")!r},
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
        mean=[127.5] * {channels}, std=[127.5] * {channels}, bgr_to_rgb=False, size=(32, 32)
    ),
    backbone=dict(
        unet=dict(_delete_=True, **{dict(FIELDS, in_channels=channels)!r}),
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


@pytest.mark.parametrize("channels", [1, 5])
def test_pretraining_sweep_and_segmentation(tmp_path, channels):
    write_data(tmp_path, channels)
    log = tmp_path / "log"
    forked.run(
        "tools/pretrain.py", "--data", tmp_path / "folders", "--out", tmp_path / "pretrained",
        "--unet", json.dumps({**FIELDS, "in_channels": channels}), "--iterations", 2,
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
    path.write_text(config(tmp_path, channels))
    text = forked.run("tools/mmseg_train.py", path, "--work-dir", tmp_path / "work", log=log)
    assert len(re.findall(r"mIoU: (\S+)", text)) == 1
