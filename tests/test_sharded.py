"""MMEngine's FlexibleRunner with FSDP and DeepSpeed, by MMSegmentation's own scripts (gloo)."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg", reason="mmseg is not installed")

from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import distributed, nn
from torch.distributed.fsdp import ShardingStrategy

import diffbackbone.mmseg  # noqa: F401  registers
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.openmmlab_sharding import (
    WholeDeepSpeedStrategy,
    WholeFSDPStrategy,
    _check_evaluation,
    _only_weights,
    wrap_blocks,
)

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
sys.path.insert(0, {tools!r})
for arguments in json.loads({jobs!r}):
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
"""


STRATEGY = {
    "": "",
    "fsdp": "strategy = dict(model_wrapper=dict(auto_wrap_policy=dict(min_params=500)))\n",
    "deepspeed": """
optim_wrapper["type"] = "DeepSpeedOptimWrapper"
strategy = dict(gradient_clipping=optim_wrapper.pop("clip_grad")["max_norm"])
""",
}


def write_config(path, sharding="", **values):
    bases = ["upernet_gd_sample.py", *([f"_base_/{sharding}.py"] if sharding else [])]
    names = [str(CONFIGS / base) for base in bases]
    path.write_text(f"_base_ = {names}\n{SMALL.format(steps=STEPS, **values)}{STRATEGY[sharding]}")
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
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr("mmengine.runner.runner.collect_env", dict)  # asks compilers, slowly
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    runpy.run_path(str(arguments[0]), run_name="__main__")


def compare_states(states, model):
    """Of the optimizer: as if there had been no interruption."""
    assert len(states[0]) == sum(p.requires_grad for p in model.parameters())
    for name, state in states[0].items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.allclose(states[1][name][key], state[key], rtol=0, atol=1e-6), name


needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"
)


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="torch.distributed has no gloo backend",
)
@pytest.mark.parametrize("sharding", ["fsdp", pytest.param("deepspeed", marks=needs_deepspeed)])
def test_two_sharded_processes_train_as_one(tmp_path, monkeypatch, small_model, capfd, sharding):
    tools = ROOT / "tools"
    data = tmp_path / "data"
    make = [tools / "make_sample_data.py", "--out", data, "--train", 6, "--val", 2]
    in_this_process(monkeypatch, tmp_path, *make, "--unlabelled", 1)
    values = dict(data=data / "ADEChallengeData2016", init=tmp_path / "init.pth")
    sharded = write_config(tmp_path / "sharded.py", sharding, batch=2, **values)
    plain = write_config(tmp_path / "plain.py", batch=4, **values)
    model = small_model(plain)
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "init.pth")

    def checkpoint(run):
        path = tmp_path / run / f"iter_{STEPS}.pth"
        return path / "weights.pth" if path.is_dir() else path

    # a run, and another that goes on from its last checkpoint but one
    train = [str(tools / "mmseg_train.py"), str(sharded), "--launcher", "pytorch", "--work-dir"]
    resumed = ["--resume", "--cfg-options", f"load_from={tmp_path}/whole/iter_{STEPS - 1}.pth"]
    jobs = [[*train, str(tmp_path / "whole")], [*train, str(tmp_path / "resumed"), *resumed]]
    jobs[1] += ["experiment_name=resumed"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    on_a_cpu = {"DS_ACCELERATOR": "cpu"}  # DeepSpeed's; else it asks the compiler
    # one process takes DeepSpeed's optimizers only once
    for started in [jobs] if sharding == "fsdp" else [[job] for job in jobs]:
        worker = WORKER.format(tools=str(tools), jobs=json.dumps(started))
        (tmp_path / "worker.py").write_text(worker)
        result = subprocess.run(
            [*torchrun, "--nproc_per_node=2", str(tmp_path / "worker.py")],
            cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1", **on_a_cpu},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "the checkpoint lacks" not in result.stdout + result.stderr

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
    states = [run["optimizer"]["state"] for run in (whole, again) if sharding == "fsdp"]
    if states:
        compare_states(states, model)

    capfd.readouterr()
    test = [tools / "mmseg_test.py", sharded, checkpoint("whole"), "--work-dir", tmp_path / "test"]
    in_this_process(monkeypatch, tmp_path, *test)
    output = "".join(capfd.readouterr())
    assert "mIoU" in output
    assert "missing keys" not in output
    assert "unexpected key" not in output


# --------------------------------------------------------------------------------------------------
# configs and units


@pytest.mark.parametrize(
    ("suffix", "kind"), [("fsdp", "WholeFSDPStrategy"), ("deepspeed", "WholeDeepSpeedStrategy")]
)
def test_configs_change_nothing_but_the_strategy(suffix, kind):
    plain = Config.fromfile(CONFIGS / f"{NAME}.py", import_custom_modules=False).to_dict()
    sharded = Config.fromfile(CONFIGS / f"{NAME}_{suffix}.py", import_custom_modules=False)
    assert sharded.runner_type == "FlexibleRunner"
    assert sharded.strategy.type == kind
    sharded = sharded.to_dict()
    changed = {key for key in sharded if sharded[key] != plain.get(key)} | plain.keys() - sharded
    assert changed - {"optim_wrapper"} == {"runner_type", "strategy"}
    assert {**sharded["optim_wrapper"], "type": "OptimWrapper"} == plain["optim_wrapper"]


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


# --------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize("strategy", [WholeFSDPStrategy, WholeDeepSpeedStrategy])
@pytest.mark.parametrize("launcher", [None, "none"])
def test_a_launcher_is_needed(strategy, launcher, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"needs a launcher.*torchrun .* without one, take"):
        strategy(env_kwargs=dict(launcher=launcher))


def test_deepspeed_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'deepspeed<0\.19'"):
        WholeDeepSpeedStrategy(env_kwargs=dict(launcher="pytorch"))


def test_a_deepspeed_too_new_for_mmengine_is_named(monkeypatch):
    missing = "deepspeed.runtime.fp16.onebit"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != missing or None)
    with pytest.raises(ImportError, match=rf"{missing}, .*install an older one"):
        WholeDeepSpeedStrategy(env_kwargs=dict(launcher="pytorch"))


@needs_deepspeed
def test_deepspeed_s_files_run_nothing(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"module": Harmful()}, tmp_path / "mp_rank_00_model_states.pt")
    with _only_weights(), pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        torch.load(tmp_path / "mp_rank_00_model_states.pt", weights_only=False)  # as DeepSpeed asks
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "mp_rank_00_model_states.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # so the file is what it seems


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "iter_7.pth").mkdir()
    with pytest.raises(ValueError, match=r"iter_7\.pth has no weights\.pth"):
        WholeDeepSpeedStrategy.load_checkpoint(None, str(tmp_path / "iter_7.pth"))


def test_stage_3_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"0, 1 or 2, got 3"):
        WholeDeepSpeedStrategy(zero_optimization=dict(stage=3))


@pytest.mark.parametrize(
    ("mode", "sharding", "fits"),
    [
        ("slide", None, False),  # FSDP's default
        ("slide", "FULL_SHARD", False),
        ("slide", ShardingStrategy.HYBRID_SHARD, False),
        ("slide", "SHARD_GRAD_OP", True),
        ("whole", "FULL_SHARD", True),
    ],
)
def test_sliding_windows_need_whole_weights(mode, sharding, fits):
    model = nn.Identity()
    model.test_cfg = dict(mode=mode)
    if fits:
        _check_evaluation(model, sharding)
    else:
        with pytest.raises(ValueError, match=r"SHARD_GRAD_OP, or model\.test_cfg\.mode=whole"):
            _check_evaluation(model, sharding)


def test_state_without_names_is_refused():
    with pytest.raises(ValueError, match="a run without FSDP"):
        WholeFSDPStrategy.load_optim_state_dict(
            None, {"state": {}, "param_groups": [{"params": [0, 1]}]}
        )
