"""MMSegmentation's scripts behind our commands, and the configs for the paper's comparisons."""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed")
pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

from mmengine.config import Config
from mmengine.registry import DefaultScope

from diffbackbone.openmmlab import commands, visualize
from diffbackbone.openmmlab.checks import check_folders
from diffbackbone.openmmlab.engine import SeededDataset
from diffbackbone.utils import MissingPackageError, UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "mmseg"
TRAIN = ("train_dataloader", "val_dataloader")
R50 = "upernet_r50_ade20k"


def write_ade(root: Path) -> Path:
    """Folders that hold files; nothing reads them."""
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            (root / kind / split).mkdir(parents=True)
            (root / kind / split / "0.png").touch()
    return root


def data_options(root: Path, *dataloaders: str) -> dict[str, str]:
    return {f"{name}.dataset.data_root": str(root) for name in dataloaders}


# --------------------------------------------------------------------------------------------------
# what is checked before a run


@pytest.mark.parametrize("name", [R50, f"{R50}.py"])
def test_a_config_is_found_by_its_name_or_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert commands.read_config(name, {"a.b": 3}).filename == str(CONFIGS / f"{R50}.py")
    assert commands.read_config(name, {"train_cfg.max_iters": 3}).train_cfg.max_iters == 3
    Path(name).write_text("here = True\n")
    if name.endswith(".py"):
        assert commands.read_config(name, None).here
    with pytest.raises(UserError, match="upernet_mae-b_ade20k.py"):
        commands.read_config("upernet_r51_ade20k", None)


@pytest.fixture
def refused(monkeypatch):
    """Run a command that ends with a message; returns that."""

    def run(command, *arguments):
        monkeypatch.setattr(sys, "argv", ["tools/tool.py", *map(str, arguments)])
        monkeypatch.setenv("LOCAL_RANK", "0")  # upstream sets it
        with pytest.raises(SystemExit) as exit_:
            command()
        return exit_.value.code

    return run


def test_upstreams_options_and_our_errors(refused, capsys, tmp_path, monkeypatch):
    assert refused(commands.train, "--help") == 0
    assert "--cfg-options" in capsys.readouterr().out
    assert refused(commands.train, R50, "--bogus") == 2
    assert "there are no data" in refused(commands.train, R50)
    (tmp_path / "iter_10.pth").touch()
    assert "iter_10.pth" in refused(commands.evaluate, R50, tmp_path / "iter_20.pth")

    def missing(package):
        raise MissingPackageError("what is missing")

    monkeypatch.setattr(commands, "prepare", missing)
    assert refused(commands.train, "--help") == "error: what is missing"


def test_missing_and_empty_folders_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        commands.read_config(R50, None, TRAIN)
    for part in (
        "train_dataloader.dataset: no folder data/ade/ADEChallengeData2016/images/training",
        "no folder data/ade/ADEChallengeData2016/annotations/validation",
        "--cfg-options train_dataloader.dataset.data_root=DIR val_dataloader.dataset.data_root=DIR",
    ):
        assert part in str(error.value)
    root = write_ade(tmp_path / "data")
    commands.read_config(R50, data_options(root, *TRAIN), TRAIN)
    (root / "annotations" / "training" / "0.png").unlink()
    with pytest.raises(UserError) as error:
        commands.read_config(R50, data_options(root, *TRAIN), TRAIN)
    assert f"no files in {root}/annotations/training" in str(error.value)
    assert "val_dataloader" not in str(error.value)
    commands.read_config(R50, data_options(root, *TRAIN), TRAIN[1:])  # only what is read


def test_wrapped_datasets(tmp_path):
    leaf = dict(data_root=str(tmp_path), data_prefix=dict(img_path="img", seg_map_path="ann"))
    remote = dict(leaf, data_root="petrel://bucket")
    parts = dict(type="ConcatDataset", datasets=[remote, leaf, dict(leaf, backend_args={"a": 1})])
    cfg = Config(dict(
        train=dict(dataset=dict(type="RepeatDataset", dataset=parts)),
        test=dict(dataset=dict(leaf, data_prefix=dict(img_path="img"))),
    ))  # fmt: skip
    (tmp_path / "img" / "town").mkdir(parents=True)
    (tmp_path / "img" / "town" / "a.png").touch()
    check_folders(cfg, ["test", "val"])
    with pytest.raises(UserError) as error:
        check_folders(cfg, ["train"])
    lines = [line.strip() for line in str(error.value).splitlines()[1:] if "no f" in line]
    assert lines == [f"train.dataset.dataset.datasets.1: no folder {tmp_path}/ann"]


class Damaged(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def get_data_info(self, index):
        return {"img_path": f"{index}.jpg"}

    def __getitem__(self, index):
        if index == 1:
            raise OSError("image file is truncated\n(3 bytes left)")
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_end_a_run_with_their_names(workers, monkeypatch, tmp_path):
    loader = torch.utils.data.DataLoader(SeededDataset(Damaged()), num_workers=workers)
    (tmp_path / "config.py").write_text("train_dataloader = None\n")
    args = argparse.Namespace(config=str(tmp_path / "config.py"), cfg_options=None)
    script = SimpleNamespace(parse_args=lambda: args, main=lambda: list(loader))
    monkeypatch.setattr(commands, "_load_script", lambda name: script)
    message = "error: training image 1 can't be read .1.jpg.: image file is truncated"
    with pytest.raises(SystemExit, match=f"^{message}$"):
        commands.train()


def test_options_are_parsed_as_upstreams():
    options = visualize.parse_options(["a.b=3", "c=[1,2]", "d=True", "e=x"])
    assert options == {"a.b": 3, "c": [1, 2], "d": True, "e": "x"}
    assert visualize.parse_options([]) == {}


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
