"""The MMPretrain adapter: registry, maps and heads, its official scripts."""

from __future__ import annotations

import re
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")

import diffbackbone.mmpretrain  # noqa: F401  registers

# isort: split
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from diffbackbone import heads

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "mmpretrain" / "attention_gd_t150_b24_in1k.py"
BACKBONE = {"type": "DiffusionTaps", "unet": "tiny", "freeze": True}
HEADS = {"mlp": {"hidden": (8,)}, "attention": {"size": 4, "width": 32}}


@pytest.fixture(autouse=True)
def in_mmpretrain_s_scope():
    """Whatever other tests left as MMEngine's default scope."""
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


def tiny_channels(block):
    return MODELS.build(BACKBONE).unet.blocks[block].channels


def classifier(head, **backbone):
    torch.manual_seed(0)
    model = {
        "type": "ImageClassifier",
        "data_preprocessor": {"mean": [127.5] * 3, "std": [127.5] * 3, "to_rgb": True},
        "backbone": {**BACKBONE, **backbone},
        "head": {
            "type": "DiffusionHead",
            "num_classes": 3,
            "topk": (1, 2),
            "cal_acc": True,
            **head,
        },
    }
    return MODELS.build(model)


def batch(model, count=2):
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(count)]
    samples = [DataSample().set_gt_label(i % 3) for i in range(count)]
    return model.data_preprocessor({"inputs": images, "data_samples": samples}, training=True)


@pytest.mark.parametrize("name", HEADS)
def test_heads_train_and_predict(name):
    model = classifier({"head": name, "in_channels": tiny_channels(24), **HEADS[name]})
    losses = model(**batch(model), mode="loss")
    losses["loss"].backward()
    assert {"accuracy_top-1", "accuracy_top-2"} <= set(losses)
    assert all(p.grad is not None for p in model.head.parameters())
    assert all(p.grad is None for p in model.backbone.unet.parameters())
    with torch.no_grad():
        (prediction, _) = model.eval()(**batch(model), mode="predict")
    assert prediction.pred_score.shape == (3,)
    torch.testing.assert_close(prediction.pred_score.sum(), torch.tensor(1.0))


def test_difformer_takes_all_timesteps_and_blocks():
    blocks, steps = (24, 27), (50, 150)
    channels = [tiny_channels(b) for b in blocks]
    options = {"sizes": [4, 8], "blocks": blocks, "timesteps": steps, "width": 32}
    head = {"head": "difformer", "in_channels": channels, **options}
    model = classifier(head, blocks=blocks, timesteps=steps).eval()
    inputs = batch(model)
    images = inputs["inputs"]
    with torch.no_grad():
        scores = model(images)
        taps = model.backbone.forward_taps(images, steps, blocks)
        torch.testing.assert_close(scores, model.head.layers(taps))
    assert [x.shape for x in model.backbone(images)] == [taps[t, b].shape for t, b in taps]
    assert list(taps) == [(50, 24), (50, 27), (150, 24), (150, 27)]
    single = classifier({"head": "linear", "in_channels": channels[0]}, timesteps=steps)
    with pytest.raises(ValueError, match="too many values"):
        single(images)


def test_the_config_has_the_papers_head():
    cfg = Config.fromfile(str(CONFIG))
    head = MODELS.build(cfg.model.head)
    assert sum(p.numel() for p in head.parameters()) == 27_786_216  # Table 2: 27.8M
    assert isinstance(head.layers, heads.AttentionHead)
    assert cfg.model.backbone.timesteps == [150]


@pytest.fixture
def folder(tmp_path):
    """Two classes that colors tell apart, as MMPretrain's CustomDataset reads them."""
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, level in (("dark", 40), ("light", 200)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(-30, 30, (64, 64, 3)) + level
                Image.fromarray(image.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def test_official_scripts(folder, tmp_path):
    """train.py and test.py of the mmpretrain package, unmodified."""
    channels = tiny_channels(24)
    config = tmp_path / "config.py"
    config.write_text(f"""
_base_ = [{str(CONFIG)!r}]
model = dict(
    data_preprocessor=dict(num_classes=2),
    backbone=dict(
        unet="tiny", init_cfg=dict(checkpoint="diffbackbone://tiny.safetensors"), save_frozen=False
    ),
    head=dict(in_channels={channels}, num_classes=2, size=4, width=64, topk=(1,)),
)
pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
loader = dict(batch_size=4, num_workers=0, persistent_workers=False)
dataset = dict(_delete_=True, type="CustomDataset", pipeline=pipeline)
train_dataloader = dict(**loader, dataset=dict(**dataset, data_prefix={str(folder / "train")!r}))
val_dataloader = dict(**loader, dataset=dict(**dataset, data_prefix={str(folder / "val")!r}))
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1,), _delete_=True)
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(max_epochs=2)
""")
    import mmpretrain

    tools, log = Path(mmpretrain.__file__).parent / ".mim" / "tools", tmp_path / "log"
    train = [tools / "train.py", config, "--work-dir", tmp_path / "run"]
    weights = tmp_path / "run" / "epoch_2.pth"
    test = [tools / "test.py", config, weights, "--work-dir", tmp_path / "test"]
    outputs = [forked.run(*command, log=log) for command in (train, test)]
    state = torch.load(weights, weights_only=True)["state_dict"]
    assert not any("unet." in key for key in state)  # the test found them all the same
    scores = [re.findall(r"accuracy/top1: (\d+\.\d+)", output)[-1] for output in outputs]
    assert scores == ["100.0000", "100.0000"]


@pytest.mark.parametrize("path", sorted(CONFIG.parent.glob("*.py")), ids=lambda path: path.stem)
def test_configs_train_on_small_data(path, folder, tmp_path, monkeypatch):
    """Each config for some iterations at a small size: its head, taps, feedback and pipelines."""
    cfg = Config.fromfile(str(path))
    MODELS.build(cfg.model.head)  # at full size
    backbone, head = cfg.model.backbone, cfg.model.head
    blocks = MODELS.build({**BACKBONE, "blocks": backbone.blocks}).unet.blocks
    channels = [blocks[b].channels for b in backbone.blocks]
    several = head.head == "difformer"
    backbone.update(unet="tiny", init_cfg={"checkpoint": "diffbackbone://tiny.safetensors"})
    cfg.model.data_preprocessor.num_classes = 2
    head.update(in_channels=channels if several else channels[0], num_classes=2, topk=(1,))
    if head.head != "linear":
        head.update(width=32, num_heads=2)
    if head.head == "attention":
        head.size = head.size // 2
    elif several:
        head.sizes = [4, 8, 16]
    for split in ("train", "val"):
        loader = cfg[f"{split}_dataloader"]
        pipeline = loader.dataset.pipeline
        pipeline[1].scale = pipeline[2].crop_size = 128
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        data = {"type": "CustomDataset", "data_prefix": str(folder / split), "indices": 4}
        loader.dataset = {**data, "pipeline": pipeline}
    cfg.val_evaluator.topk = (1,)
    cfg.update(test_dataloader=cfg.val_dataloader, test_evaluator=cfg.val_evaluator)
    cfg.train_cfg.max_epochs = 1
    cfg.work_dir, cfg.default_hooks.checkpoint.interval = str(tmp_path / "run"), -1
    monkeypatch.setattr("mmengine.runner.runner.collect_env", dict)  # takes seconds
    monkeypatch.setattr("mmengine.config.config.FormatCode", lambda text, **_: (text, True))
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.message_hub.get_scalar("val/accuracy/top1").current() >= 0


def test_cub_is_read_in_its_own_layout(tmp_path):
    from mmpretrain.registry import DATASETS

    root = tmp_path / "CUB_200_2011"
    paths = ["001.Albatross/a.jpg", "002.Wren/b.jpg", "002.Wren/c.jpg"]
    for path in paths:
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 280)).save(root / "images" / path)
    lists = {"images": paths, "image_class_labels": "122", "train_test_split": "101"}
    for name, values in lists.items():
        lines = "".join(f"{i} {value}\n" for i, value in enumerate(values, 1))
        (root / f"{name}.txt").write_text(lines)
    cfg = Config.fromfile(str(CONFIG.parent / "attention_gd_t150_b19_cub.py"))
    for loader, count in ((cfg.train_dataloader, 2), (cfg.val_dataloader, 1)):
        dataset = DATASETS.build({**loader.dataset, "data_root": str(root)})
        assert len(dataset) == count
        assert dataset[0]["inputs"].shape == (3, 256, 256)
