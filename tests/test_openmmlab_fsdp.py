"""MMEngine's FlexibleRunner with FSDP, by MMSegmentation's own scripts (gloo)."""

from __future__ import annotations

from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg", reason="mmseg is not installed")

from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import distributed, nn

import diffbackbone.mmseg  # noqa: F401  registers

# isort: split
from mmseg.registry import MODELS

from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.openmmlab.fsdp import WholeFSDPStrategy, wrap_blocks

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "mmseg"

# Group norm and no dropout, so that two processes can be compared with one. A large eps, as Adam's
# first steps have the size of the learning rate even where a gradient is nothing but rounding.
SMALL = """
norm_cfg = dict(_delete_=True, type="GN", num_groups=4)
unet = dict(_delete_=True, preset="tiny", channel_mult=(1, 1, 1, 1, 2), num_res_blocks=1)
unet["attention_strides"] = (8, 16)
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(
        unet=unet, blocks=[20, 18, 15, 12], init_cfg=None, out_channels=8,
        activation_checkpointing=True,
    ),
    decode_head=dict(in_channels=[8] * 4, channels=8, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=8, channels=8, norm_cfg=norm_cfg),
)
train_dataloader = dict(
    batch_size={batch}, num_workers=0, persistent_workers=False, dataset=dict(data_root="{folder}")
)
train_dataloader["dataset"]["data_prefix"] = dict(img_path="images", seg_map_path="labels")
train_dataloader["dataset"]["pipeline"] = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomCrop", crop_size=(32, 32)),
    dict(type="PackSegInputs"),
]
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, eps=1e-3),
    clip_grad=dict(max_norm=0.5),
    paramwise_cfg=dict(layer_decay_rate=0.9, custom_keys={{"input_blocks.2.0": dict(lr_mult=3)}}),
)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, by_epoch=False, begin=0, end=9)]
train_cfg = dict(max_iters=2, val_interval=100)
val_cfg = val_evaluator = val_dataloader = None
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=-1))
load_from = "{folder}/init.pth"
"""
STRATEGY = "strategy = dict(model_wrapper=dict(auto_wrap_policy=dict(min_params=500)))\n"

# one start of the processes for several runs: importing takes longer than they do
WORKER = """
import runpy, sys
for arguments in {jobs}:
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
"""


def write_config(path, bases, batch, extra=""):
    names = [str(CONFIGS / base) for base in bases]
    settings = SMALL.format(batch=batch, folder=path.parent)
    path.write_text(f"_base_ = {names}\n{settings}{extra}")


def write_data(folder):
    rng = np.random.default_rng(0)
    for name, suffix, shape in (("images", "jpg", (40, 40, 3)), ("labels", "png", (40, 40))):
        (folder / name).mkdir()
        for i in range(6):
            values = rng.integers(1, 12, shape).astype(np.uint8) * (20 if suffix == "jpg" else 1)
            Image.fromarray(values).save(folder / name / f"{i}.{suffix}")


def write_weights(config, path):
    """Write weights for a config's model that are not zero anywhere; returns them."""
    with DefaultScope.overwrite_default_scope("mmseg"):
        state = MODELS.build(Config.fromfile(config).model).state_dict()
    generator = torch.Generator().manual_seed(0)
    for value in state.values():
        if value.is_floating_point():
            value += 0.05 * torch.randn(value.shape, generator=generator)
    torch.save({"state_dict": state, "meta": {}}, path)
    return state


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available())
    or torch.cuda.is_available(),
    reason="needs gloo, and no GPU",
)
def test_two_sharded_processes_train_as_one(tmp_path):
    sample, script = "upernet_gd_sample.py", str(ROOT / "tools" / "mmseg_train.py")
    write_data(tmp_path)
    write_config(tmp_path / "sharded.py", [sample, "_base_/fsdp.py"], 2, STRATEGY)
    write_config(tmp_path / "plain.py", [sample], 4)
    start = write_weights(tmp_path / "plain.py", tmp_path / "init.pth")

    # a run, and another that goes on from its last checkpoint but one
    train = [script, str(tmp_path / "sharded.py"), "--launcher", "pytorch", "--work-dir"]
    resumed = ["--resume", "--cfg-options", f"load_from={tmp_path}/whole/iter_1.pth"]
    resumed += ["experiment_name=resumed"]
    jobs = [[*train, str(tmp_path / "whole")], [*train, str(tmp_path / "resumed"), *resumed]]
    (tmp_path / "worker.py").write_text(WORKER.format(jobs=jobs))
    plain = [script, tmp_path / "plain.py", "--work-dir", tmp_path / "plain"]
    processes = [
        forked.Script([tmp_path / "worker.py"], tmp_path / f"log{i}", rank)
        for i, rank in enumerate(forked.ranks(2))
    ]
    processes.append(forked.Script(plain, tmp_path / "log", {}))
    try:
        output = "".join(process.finish(400) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert "the checkpoint lacks" not in output

    whole, alone, again = (
        torch.load(tmp_path / run / "iter_2.pth", weights_only=True)
        for run in ("whole", "plain", "resumed")
    )
    assert whole["state_dict"].keys() == alone["state_dict"].keys() == again["state_dict"].keys()
    moved = 0.0
    for name, value in alone["state_dict"].items():
        ours = whole["state_dict"][name]
        assert ours.shape == value.shape, name
        assert (ours - value).abs().max() < 1e-5, name
        assert (ours - again["state_dict"][name]).abs().max() < 1e-6, name
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3
    assert not list((tmp_path / "resumed").glob("iter_1.pth"))  # only the last step was done
    for name, state in whole["optimizer"]["state"].items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            other = again["optimizer"]["state"][name][key]
            assert torch.allclose(other, state[key], rtol=0, atol=1e-6), name


# --------------------------------------------------------------------------------------------------
# configs and units


def test_units_are_blocks_and_large_layers():
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_preset("tiny"))
        head = nn.Sequential(nn.Conv2d(1024, 1024, 3), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))
        attention = nn.MultiheadAttention(2048, 8)
    for index in range(1, 38):
        assert wrap_blocks(unet.module(index), False, 1)
        assert not wrap_blocks(unet.module(index), True, 1)  # one unit, whatever is inside
    for module in (unet, attention, attention.out_proj, head, *head[1:]):
        size = sum(p.numel() for p in module.parameters())
        assert wrap_blocks(module, True, size)
        assert not wrap_blocks(module, False, size)
    assert wrap_blocks(head[0], False, 1024 * 1024 * 9)


@pytest.mark.parametrize("sharding", [{}, {"sharding_strategy": "HYBRID_SHARD"}])
def test_sliding_windows_need_whole_weights(sharding):
    model = nn.Identity()
    model.test_cfg = dict(mode="slide")
    strategy = WholeFSDPStrategy(model_wrapper=sharding)
    with pytest.raises(ValueError, match="use SHARD_GRAD_OP"):
        strategy._wrap_model(model)
