"""`tools/mmseg_train.py`, `tools/mmseg_test.py` and the configs for the paper's comparisons."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed")
pytest.importorskip("mmcv", reason="mmcv is not installed")
if importlib.util.find_spec("mmseg") is None:
    pytest.skip("mmseg is not installed", allow_module_level=True)

import cv2
from mmengine.config import Config
from mmengine.registry import DefaultScope

from diffbackbone.openmmlab import repairs as compat
from diffbackbone.openmmlab.engine import SeededDataset

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "mmseg"
TRAIN = ("train_dataloader", "val_dataloader")

compat.apply_mmengine_repairs()


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))  # for what it imports there
    spec = importlib.util.spec_from_file_location("_mmseg", ROOT / "tools" / "_mmseg.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return module


@pytest.fixture
def command(tool, monkeypatch):
    """Run a tool in this process, up to where it would start upstream's script."""

    def run(*arguments, script="train.py", dataloaders=TRAIN):
        started = []
        run_path = tool.runpy.run_path

        def record(path, run_name=None):
            if run_name != "__main__":
                return run_path(path)
            started.append((path, sys.argv))
            return {}

        monkeypatch.setattr(tool.runpy, "run_path", record)
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(ROOT)])
        monkeypatch.setattr(sys, "argv", ["tools/tool.py", *map(str, arguments)])
        monkeypatch.setenv("LOCAL_RANK", "0")  # upstream sets it
        tool.run(script, dataloaders)
        ((path, argv),) = started
        return path, argv[1:]

    return run


def write_ade(root: Path, images: int = 4) -> Path:
    random = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind, suffix, shape in (
            ("images", ".jpg", (72, 80, 3)),
            ("annotations", ".png", (72, 80)),
        ):
            folder = root / kind / split
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = random.integers(0, 151, shape, dtype=np.uint8)
                cv2.imwrite(str(folder / f"{index}{suffix}"), pixels)
    return root


def data_options(root: Path, *dataloaders: str) -> list[str]:
    return ["--cfg-options", *(f"{name}.dataset.data_root={root}" for name in dataloaders)]


# --------------------------------------------------------------------------------------------------
# command line


@pytest.mark.parametrize("name", ["upernet_r50_ade20k", "upernet_r50_ade20k.py"])
def test_bare_name_is_found_in_the_checkout(command, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    root = write_ade(tmp_path / "data", images=1)
    options = data_options(root, *TRAIN)
    # the same word may be the value of an option
    path, argv = command("--work-dir", name, name, *options)
    assert argv == ["--work-dir", name, str(CONFIGS / "upernet_r50_ade20k.py"), *options]
    assert path.endswith(os.path.join("mmseg", ".mim", "tools", "train.py"))
    assert sys.path.index(str(ROOT)) == len(sys.path) - 1  # shadows nothing


def test_existing_path_wins_over_the_checkout(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("upernet_r50_ade20k.py").write_text("train_dataloader = None\n")
    _, argv = command("upernet_r50_ade20k.py", "--local-rank", "1", "--amp")
    assert argv == ["upernet_r50_ade20k.py", "--local-rank", "1", "--amp"]


@pytest.mark.parametrize("name", ["upernet_r51_ade20k", "configs/mmseg/upernet_r51_ade20k.py"])
def test_unknown_config_lists_the_configs(command, name):
    with pytest.raises(SystemExit) as exit_:
        command(name)
    message = str(exit_.value)
    assert message.startswith(f"error: there is no config '{name}'")
    assert "\n  upernet_mae-b_ade20k.py\n" in message
    assert "_base_" not in message


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "--cfg-options"),
        ([], 2, "the following arguments are required: config"),
        (["nowhere.py", "--bogus"], 2, "unrecognized arguments: --bogus"),
        (["nowhere.py", "--launcher", "ray"], 2, "invalid choice: 'ray'"),
    ],
)
def test_help_and_usage_errors_are_upstreams(command, capsys, arguments, code, text):
    with pytest.raises(SystemExit) as exit_:
        command(*arguments)
    assert exit_.value.code == code
    printed = capsys.readouterr()
    printed = printed.err if code else printed.out
    assert printed.startswith("usage: tool.py ")
    assert text in printed


def test_stack_is_checked_first(command, monkeypatch):
    def fail():
        raise ImportError("what is missing")

    monkeypatch.setattr(compat, "check_mmseg_stack", fail)
    with pytest.raises(SystemExit, match=r"^error: what is missing$"):
        command("--help")


def test_missing_checkpoint(command, tmp_path):
    (tmp_path / "iter_10.pth").touch()
    for name, text in (
        ("iter_20.pth", f"{tmp_path} holds iter_10.pth"),
        ("other/iter_20.pth", f"there is no folder {tmp_path / 'other'} either"),
    ):
        with pytest.raises(SystemExit) as exit_:
            command("upernet_r50_ade20k", tmp_path / name, script="test.py", dataloaders=())
        assert str(exit_.value) == f"error: there is no checkpoint '{tmp_path / name}'; {text}"
    for checkpoint in (tmp_path / "iter_10.pth", "https://example.org/x.pth"):
        _, argv = command("upernet_r50_ade20k", checkpoint, script="test.py", dataloaders=())
        assert argv[1] == str(checkpoint)


# --------------------------------------------------------------------------------------------------
# data


def test_missing_data_root(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        command("upernet_r50_ade20k")
    message = str(exit_.value)
    assert message.startswith("error: there are no data to read:\n")
    assert (
        "train_dataloader.dataset: no folder data/ade/ADEChallengeData2016/images/training; "
        "ADE20KDataset expects *.jpg there (img_path)" in message
    )
    assert "no folder data/ade/ADEChallengeData2016/annotations/validation" in message
    assert (
        "--cfg-options train_dataloader.dataset.data_root=DIR val_dataloader.dataset.data_root=DIR"
        in message
    )
    assert "python tools/make_sample_data.py" in message


def test_only_what_the_script_reads_is_checked(command, tmp_path):
    root = write_ade(tmp_path / "data", images=1)
    command("upernet_r50_ade20k", *data_options(root, *TRAIN))
    with pytest.raises(SystemExit) as exit_:
        command("upernet_r50_ade20k", *data_options(root, "val_dataloader"))
    assert "train_dataloader.dataset:" in str(exit_.value)
    assert "val_dataloader" not in str(exit_.value)


def test_empty_folders(command, tmp_path):
    root = write_ade(tmp_path / "data", images=1)
    shutil.rmtree(root / "annotations" / "training")
    (root / "annotations" / "training").mkdir()
    image = root / "images" / "training" / "0.jpg"
    image.rename(image.with_suffix(".JPG"))
    (root / "images" / "training" / ".hidden.jpg").touch()
    with pytest.raises(SystemExit) as exit_:
        command("upernet_r50_ade20k", *data_options(root, *TRAIN))
    message = str(exit_.value)
    assert f"only other files, such as 0.JPG in the folder {root}/images/training" in message
    assert f"no files in the folder {root}/annotations/training; ADE20KDataset expects *.png" in (
        message
    )


CITYSCAPES = """
leaf = dict(
    type="CityscapesDataset",
    data_root="{root}",
    data_prefix=dict(img_path="img", seg_map_path="ann"),
)
train_dataloader = dict(
    dataset=dict(
        type="RepeatDataset",
        dataset=dict(type="ConcatDataset", datasets=[leaf, dict(leaf, img_suffix=".tif")]),
    )
)
test_dataloader = dict(dataset=dict(leaf, data_prefix=dict(img_path="img")))
"""


def test_wrapped_datasets_and_suffixes(tool, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CITYSCAPES.format(root=tmp_path))
    (tmp_path / "img" / "town").mkdir(parents=True)
    (tmp_path / "img" / "town" / "a_leftImg8bit.png").touch()
    tool.check_data(str(config), None, ["test_dataloader", "val_dataloader"])
    with pytest.raises(SystemExit) as exit_:
        tool.check_data(str(config), None, ["train_dataloader"])
    lines = str(exit_.value).splitlines()
    first, second = (f"  train_dataloader.dataset.dataset.datasets.{i}: " for i in range(2))
    assert lines[1] == (
        f"{first}no folder {tmp_path}/ann; CityscapesDataset expects *_gtFine_labelTrainIds.png "
        "there (seg_map_path)"
    )
    assert lines[2].startswith(f"{second}only other files, such as a_leftImg8bit.png in the folder")
    assert "CityscapesDataset expects *.tif there (img_path)" in lines[2]

    # the option that the message proposes
    elsewhere = {"train_dataloader.dataset.dataset.datasets.0.data_root": "petrel://bucket"}
    with pytest.raises(SystemExit) as exit_:
        tool.check_data(str(config), elsewhere, ["train_dataloader"])
    assert "datasets.0" not in str(exit_.value)


# --------------------------------------------------------------------------------------------------
# the whole way

TINY = """
_base_ = ["{configs}/_base_/ade20k.py", "{configs}/_base_/schedule_16k.py"]
norm_cfg = dict(type="SyncBN")
size = (32, 32)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", size=size, pad_val=0, seg_pad_val=255),
    backbone=dict(
        type="ResNet", depth=18, base_channels=4, stem_channels=4, norm_cfg=norm_cfg
    ),
    decode_head=dict(
        type="FCNHead", in_channels=32, in_index=3, channels=4, num_convs=1, num_classes=150,
        norm_cfg=norm_cfg,
    ),
    test_cfg=dict(mode="whole"),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=size),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")
]
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=dict(data_root="{data}", pipeline=train_pipeline), **loader)
val_dataloader = dict(dataset=dict(data_root="{data}", pipeline=test_pipeline), **loader)
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=1), visualization=dict(draw=True, interval=1))
"""


def start(*arguments, cwd):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_train_in_two_processes_and_evaluate(tmp_path):
    data = write_ade(tmp_path / "data")
    config = tmp_path / "tiny.py"
    config.write_text(TINY.format(configs=CONFIGS, data=data))
    train = [ROOT / "tools" / "mmseg_train.py", config, "--work-dir", tmp_path / "work"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--cfg-options", "train_cfg.max_iters=1"]
    output = start(*torchrun, *train, "--launcher", "pytorch", *options, cwd=tmp_path)
    assert "SyncBN has no CPU kernel" in output
    assert (tmp_path / "work" / "iter_1.pth").is_file()
    assert list((tmp_path / "work").glob("best_mIoU_*.pth"))

    checkpoint = tmp_path / "work" / "iter_1.pth"  # torch.load refuses it without the repair
    test = [ROOT / "tools" / "mmseg_test.py", config, checkpoint, "--show-dir", tmp_path / "shown"]
    output = start(*test, "--work-dir", tmp_path / "test", cwd=tmp_path)
    assert "mIoU" in output
    assert list((tmp_path / "shown").rglob("*.png"))


class Damaged(torch.utils.data.Dataset):
    """A dataset whose second image is damaged, or whose reader is killed there."""

    def __init__(self, killed=False):
        self.killed = killed

    def __len__(self):
        return 4

    def get_data_info(self, index):
        return {"img_path": f"{index}.jpg"}

    def __getitem__(self, index):
        if index == 1 and self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 1:
            raise OSError("image file is truncated\n(3 bytes left)")
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_end_a_run_with_their_names(tool, workers, monkeypatch):
    loader = torch.utils.data.DataLoader(SeededDataset(Damaged()), num_workers=workers)
    with pytest.raises(SystemExit) as exit_, tool.clear_errors():
        list(loader)
    first, second = exit_.value.code.split("\n")
    assert first == "error: training image 1 can't be read (1.jpg): image file is truncated"
    assert "DIFFBACKBONE_TRACEBACK=1" in second
    monkeypatch.setenv("DIFFBACKBONE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="training image 1"), tool.clear_errors():
        list(loader)


def test_lost_workers_and_other_errors(tool):
    loader = torch.utils.data.DataLoader(SeededDataset(Damaged(killed=True)), num_workers=1)
    with pytest.raises(SystemExit) as exit_, tool.clear_errors():
        list(loader)
    assert "DataLoader worker" in exit_.value.code
    assert "/dev/shm" in exit_.value.code
    assert "--resume" in exit_.value.code
    with pytest.raises(RuntimeError, match="of our own"), tool.clear_errors():
        raise RuntimeError("a mistake of our own")


# --------------------------------------------------------------------------------------------------
# configs


@pytest.fixture
def mmseg_scope():
    with DefaultScope.overwrite_default_scope("mmseg"):
        yield


@functools.cache
def load(name: str) -> Config:
    return Config.fromfile(str(CONFIGS / f"{name}.py"), import_custom_modules=False)


@pytest.mark.parametrize("model", ["mae-b", "mae-l", "r50"])
@pytest.mark.parametrize(("suffix", "iterations"), [("", 16_000), ("_160k", 160_000)])
def test_schedules(model, suffix, iterations):
    cfg = load(f"upernet_{model}_ade20k{suffix}")
    assert cfg.train_cfg.max_iters == iterations
    assert cfg.param_scheduler[-1].end == iterations
    for earlier, later in zip(cfg.param_scheduler, cfg.param_scheduler[1:]):
        assert earlier.end == later.begin
    assert not any(schedule.by_epoch for schedule in cfg.param_scheduler)
    assert iterations % cfg.train_cfg.val_interval == 0
    assert iterations % cfg.default_hooks.checkpoint.interval == 0
    assert cfg.default_hooks.checkpoint.by_epoch is False
    assert cfg.default_hooks.checkpoint.save_best == "mIoU"


@pytest.mark.parametrize("model", ["mae-b", "mae-l", "r50"])
def test_settings_shared_by_all(model):
    cfg = load(f"upernet_{model}_ade20k")
    assert cfg.custom_imports == {"imports": ["diffbackbone.mmseg"], "allow_failed_imports": False}
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.train_dataloader.dataset.type == "ADE20KDataset"
    crop = next(t for t in cfg.train_dataloader.dataset.pipeline if t.type == "RandomCrop")
    assert crop.crop_size == cfg.model.data_preprocessor["size"] == (512, 512)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 150


@pytest.mark.parametrize(
    ("model", "channels", "layers", "decay", "weight_decay", "drop_path", "out_indices"),
    [
        ("mae-b", 768, 12, 0.65, 0.05, 0.1, [3, 5, 7, 11]),
        ("mae-l", 1024, 24, 0.8, 0.1, 0.4, [7, 11, 15, 23]),
    ],
)
def test_mae_settings(model, channels, layers, decay, weight_decay, drop_path, out_indices):
    cfg = load(f"upernet_{model}_ade20k")
    model, optim = cfg.model, cfg.optim_wrapper
    assert model.decode_head.channels == model.neck.embed_dim == channels
    assert model.decode_head.in_channels == [channels] * 4
    assert model.auxiliary_head.in_channels == model.backbone.embed_dims == channels
    assert model.backbone.num_layers == optim.paramwise_cfg.num_layers == layers
    assert model.backbone.num_heads * 64 == channels
    assert (model.backbone.drop_path_rate, model.backbone.out_indices) == (drop_path, out_indices)
    assert model.test_cfg == {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)}
    assert (optim.optimizer.type, optim.optimizer.lr) == ("AdamW", 1e-4)
    assert (optim.optimizer.weight_decay, optim.paramwise_cfg.decay_rate) == (weight_decay, decay)


SHRINK = {
    "upernet_mae-b_ade20k": {
        "model.pretrained": None,
        "model.backbone.img_size": (32, 32),
        "model.backbone.embed_dims": 16,
        "model.backbone.num_layers": 4,
        "model.backbone.num_heads": 2,
        "model.backbone.out_indices": [0, 1, 2, 3],
        "model.neck.embed_dim": 16,
        "model.decode_head.in_channels": [16, 16, 16, 16],
        "model.auxiliary_head.in_channels": 16,
        "optim_wrapper.paramwise_cfg.num_layers": 4,
    },
    "upernet_r50_ade20k": {
        "model.pretrained": None,
        "model.backbone.stem_channels": 4,
        "model.backbone.base_channels": 2,
        "model.decode_head.in_channels": [8, 16, 32, 64],
        "model.auxiliary_head.in_channels": 32,
    },
}


@pytest.mark.parametrize("name", list(SHRINK))
def test_shrunken_model_trains(name, mmseg_scope):
    from mmengine.optim import build_optim_wrapper
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    cfg = copy.deepcopy(load(name))
    cfg.merge_from_dict(SHRINK[name])
    cfg.merge_from_dict(
        {
            "model.decode_head.channels": 8,
            "model.auxiliary_head.channels": 8,
            "model.data_preprocessor.size": (32, 32),
        }
    )
    model = MODELS.build(cfg.model).train()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    data = {
        "inputs": [torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8) for _ in range(2)],
        "data_samples": [SegDataSample(metainfo={"img_shape": (32, 32)}) for _ in range(2)],
    }
    for sample in data["data_samples"]:
        sample.set_data({"gt_sem_seg": _labels(32)})
    losses = model.train_step(data, optimizer)
    assert torch.isfinite(losses["decode.loss_ce"])
    assert torch.isfinite(losses["aux.loss_ce"])
    rates = sorted({group["lr"] for group in optimizer.optimizer.param_groups}, reverse=True)
    powers = range(6 if "mae" in name else 1)  # heads, four layers, patch embedding
    base, decay = (1e-4, 0.65) if "mae" in name else (0.01, 1.0)
    assert rates == pytest.approx([base * decay**power for power in powers])


def _labels(size: int):
    from mmengine.structures import PixelData

    return PixelData(data=torch.randint(0, 150, (1, size, size)))
