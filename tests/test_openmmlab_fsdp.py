"""MMEngine's FlexibleRunner with FSDP, by MMSegmentation's own scripts (gloo)."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import forked
import pytest
import torch

pytest.importorskip("mmseg", reason="mmseg is not installed")

from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import distributed, nn

import diffbackbone.mmseg  # noqa: F401  registers
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.openmmlab.fsdp import WholeFSDPStrategy, wrap_blocks

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "mmseg"
NAME = "upernet_gd_t90_b33-30-27-24_ade20k"
STEPS = 2

# Group norm and no dropout, so that two processes can be compared with one. A large eps, as Adam's
# first steps have the size of the learning rate even where a gradient is nothing but rounding.
SMALL = """
norm_cfg = dict(_delete_=True, type="GN", num_groups=4)
size = (32, 32)
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(init_cfg=None, out_channels=8, activation_checkpointing=True),
    decode_head=dict(in_channels=[8] * 4, channels=8, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=8, channels=8, norm_cfg=norm_cfg),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomCrop", crop_size=size),
    dict(type="PackSegInputs"),
]
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    batch_size={batch}, dataset=dict(data_root="{data}", pipeline=train_pipeline), **loader
)
val_dataloader = dict(dataset=dict(data_root="{data}"), **loader)
test_dataloader = val_dataloader
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, eps=1e-3),
    clip_grad=dict(max_norm=0.5),
    paramwise_cfg=dict(layer_decay_rate=0.9, custom_keys={{"input_blocks.2.0": dict(lr_mult=3)}}),
)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, by_epoch=False, begin=0, end=9)]
train_cfg = dict(max_iters={steps}, val_interval=100)
val_cfg = val_evaluator = val_dataloader = None
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=-1))
load_from = "{init}"
"""

# one start of the processes for several runs: importing takes longer than they do
WORKER = """
import json, runpy, sys
for arguments in json.loads({jobs!r}):
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
"""


STRATEGY = "strategy = dict(model_wrapper=dict(auto_wrap_policy=dict(min_params=500)))\n"


def write_config(path, sharded=False, **values):
    bases = ["upernet_gd_sample.py", *(["_base_/fsdp.py"] if sharded else [])]
    names = [str(CONFIGS / base) for base in bases]
    text = f"_base_ = {names}\n{SMALL.format(steps=STEPS, **values)}"
    path.write_text(text + (STRATEGY if sharded else ""))
    return path


def weights(path):
    import mmengine.runner.checkpoint

    return mmengine.runner.checkpoint._load_checkpoint(str(path), map_location="cpu")


@pytest.fixture
def small_model():
    """Builds the model of a config, with numbers other than zero all over."""

    def build(config):
        from mmseg.registry import MODELS

        with torch.random.fork_rng(), DefaultScope.overwrite_default_scope("mmseg"):
            torch.manual_seed(0)
            model = MODELS.build(Config.fromfile(config).model)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.05 * noise)
        return model

    return build


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_this_process(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("mmengine.runner.runner.collect_env", dict)  # asks compilers, slowly
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    runpy.run_path(str(arguments[0]), run_name="__main__")


def compare_states(states, model):
    """Of the optimizer: as if there had been no interruption."""
    assert len(states[0]) == sum(p.requires_grad for p in model.parameters())
    for name, state in states[0].items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.allclose(states[1][name][key], state[key], rtol=0, atol=1e-6), name


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available())
    or torch.cuda.is_available(),
    reason="needs gloo, and no GPU",
)
def test_two_sharded_processes_train_as_one(tmp_path, monkeypatch, small_model, capfd):
    tools = ROOT / "tools"
    data = tmp_path / "data"
    make = [tools / "make_sample_data.py", "--out", data, "--train", 6, "--val", 2]
    in_this_process(monkeypatch, tmp_path, *make, "--unlabelled", 1)
    values = dict(data=data / "ADEChallengeData2016", init=tmp_path / "init.pth")
    sharded = write_config(tmp_path / "sharded.py", sharded=True, batch=2, **values)
    plain = write_config(tmp_path / "plain.py", batch=4, **values)
    model = small_model(plain)
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "init.pth")

    def checkpoint(run):
        return tmp_path / run / f"iter_{STEPS}.pth"

    # a run, and another that goes on from its last checkpoint but one
    train = [str(tools / "mmseg_train.py"), str(sharded), "--launcher", "pytorch", "--work-dir"]
    resumed = ["--resume", "--cfg-options", f"load_from={tmp_path}/whole/iter_{STEPS - 1}.pth"]
    jobs = [[*train, str(tmp_path / "whole")], [*train, str(tmp_path / "resumed"), *resumed]]
    jobs[1] += ["experiment_name=resumed"]
    (tmp_path / "worker.py").write_text(WORKER.format(jobs=json.dumps(jobs)))
    processes = [
        forked.Script([tmp_path / "worker.py"], tmp_path / f"log{i}", rank)
        for i, rank in enumerate(forked.ranks(2))
    ]
    try:
        output = "".join(process.finish(400) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert "the checkpoint lacks" not in output

    in_this_process(
        monkeypatch, tmp_path, tools / "mmseg_train.py", plain, "--work-dir", tmp_path / "plain"
    )
    whole, alone, again = (weights(checkpoint(run)) for run in ("whole", "plain", "resumed"))
    assert whole["state_dict"].keys() == alone["state_dict"].keys() == again["state_dict"].keys()
    moved = 0.0
    for name, value in alone["state_dict"].items():
        ours = whole["state_dict"][name]
        assert ours.shape == value.shape, name
        assert (ours - value).abs().max() < 1e-5, name
        assert (ours - again["state_dict"][name]).abs().max() < 1e-6, name
        moved = max(moved, float((value - model.state_dict()[name]).abs().max()))
    assert moved > 1e-3
    assert not list((tmp_path / "resumed").glob("iter_1.pth"))  # only the last step was done
    compare_states([run["optimizer"]["state"] for run in (whole, again)], model)

    capfd.readouterr()
    test = [tools / "mmseg_test.py", sharded, checkpoint("whole"), "--work-dir", tmp_path / "test"]
    in_this_process(monkeypatch, tmp_path, *test)
    output = "".join(capfd.readouterr())
    assert "mIoU" in output
    assert "missing keys" not in output
    assert "unexpected key" not in output


# --------------------------------------------------------------------------------------------------
# configs and units


def test_config_changes_nothing_but_the_strategy():
    plain = Config.fromfile(CONFIGS / f"{NAME}.py", import_custom_modules=False).to_dict()
    sharded = Config.fromfile(CONFIGS / f"{NAME}_fsdp.py", import_custom_modules=False).to_dict()
    assert sharded["runner_type"] == "FlexibleRunner"
    assert sharded["strategy"]["type"] == "WholeFSDPStrategy"
    changed = {key for key in sharded if sharded[key] != plain.get(key)} | plain.keys() - sharded
    assert changed == {"runner_type", "strategy"}


def test_units_are_blocks_and_large_layers():
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_preset("tiny"))
        head = nn.Sequential(nn.Conv2d(1024, 1024, 3), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))
        attention = nn.MultiheadAttention(2048, 8)
    for index in range(1, 38):
        assert wrap_blocks(unet.module(index), False, 1)
        assert not wrap_blocks(unet.module(index), True, 1)  # one unit, whatever is inside
    for module in (unet, unet.input_blocks, attention, attention.out_proj, head, *head[1:]):
        size = sum(p.numel() for p in module.parameters())
        assert wrap_blocks(module, True, size)
        assert not wrap_blocks(module, False, size)
    assert wrap_blocks(head[0], False, 1024 * 1024 * 9)
    assert not wrap_blocks(head[0], False, 1024 * 1024 * 9, min_params=10_000_000)


@pytest.mark.parametrize("sharding", [{}, {"sharding_strategy": "HYBRID_SHARD"}])
def test_sliding_windows_need_whole_weights(sharding):
    model = nn.Identity()
    model.test_cfg = dict(mode="slide")
    strategy = WholeFSDPStrategy(model_wrapper=sharding)
    with pytest.raises(ValueError, match="use SHARD_GRAD_OP"):
        strategy._wrap_model(model)
