"""MMSegmentation's scripts behind our commands, and the configs for the paper's comparisons."""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed")
pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

from mmengine.config import Config
from mmengine.registry import DefaultScope

from diffbackbone.openmmlab import commands
from diffbackbone.openmmlab.engine import SeededDataset
from diffbackbone.utils import MissingPackageError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "mmseg"
R50 = "upernet_r50_ade20k"

# --------------------------------------------------------------------------------------------------
# commands


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
    monkeypatch.chdir(tmp_path)
    assert refused(commands.train, "--help") == 0
    assert "--cfg-options" in capsys.readouterr().out
    assert refused(commands.train, R50, "--bogus") == 2
    assert "upernet_mae-b_ade20k.py" in refused(commands.train, "upernet_r51_ade20k")
    shrink = [f"{k}={v}".replace(" ", "") for k, v in {**SHRINK[R50], **SMALL_HEADS}.items()]
    assert "data/ade/ADEChallengeData2016/images/training" in refused(
        commands.train, R50, "--cfg-options", *shrink
    )
    (tmp_path / "iter_10.pth").touch()
    assert "iter_10.pth" in refused(commands.evaluate, R50, tmp_path / "iter_20.pth")

    def missing(package):
        raise MissingPackageError("what is missing")

    monkeypatch.setattr(commands, "prepare", missing)
    assert refused(commands.train, "--help") == "error: what is missing"


class Damaged(torch.utils.data.Dataset):
    def get_data_info(self, index):
        return {"img_path": f"{index}.jpg", "seg_map_path": f"{index}.png"}

    def __getitem__(self, index):
        if index == 4:
            raise OSError("image file is truncated\n(3 bytes left)")
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_end_a_run_with_their_names(workers, monkeypatch, refused, tmp_path):
    keys = [(1, 0, 3), (1, 1, 4)]
    loader = torch.utils.data.DataLoader(
        SeededDataset(Damaged()), sampler=keys, num_workers=workers
    )
    (tmp_path / "config.py").write_text("train_dataloader = None\n")
    monkeypatch.setattr("mmengine.runner.Runner.from_cfg", lambda cfg: list(loader))
    message = "error: training image 4 can't be read (4.jpg, 4.png): image file is truncated"
    assert refused(commands.train, tmp_path / "config.py", "--work-dir", tmp_path) == message


# --------------------------------------------------------------------------------------------------
# configs


@functools.cache
def load(name: str) -> Config:
    return Config.fromfile(str(CONFIGS / f"{name}.py"), import_custom_modules=False)


def test_configs_need_no_installed_bases():
    """MMEngine finds ``mmseg::`` by the name of a distribution, which forks do not have."""
    assert not [path for path in CONFIGS.rglob("*.py") if "mmseg::" in path.read_text()]


@pytest.mark.parametrize("model", ["mae-b", "mae-l", "r50"])
@pytest.mark.parametrize(("suffix", "iterations"), [("", 16_000), ("_160k", 160_000)])
def test_settings_shared_by_all(model, suffix, iterations):
    cfg = load(f"upernet_{model}_ade20k{suffix}")
    assert cfg.custom_imports == {"imports": ["diffbackbone.mmseg"], "allow_failed_imports": False}
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.train_dataloader.dataset.type == "ADE20KDataset"
    crop = next(t for t in cfg.train_dataloader.dataset.pipeline if t.type == "RandomCrop")
    assert crop.crop_size == cfg.model.data_preprocessor["size"] == (512, 512)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 150
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == iterations
    for earlier, later in zip(cfg.param_scheduler, cfg.param_scheduler[1:]):
        assert earlier.end == later.begin
    assert not any(schedule.by_epoch for schedule in cfg.param_scheduler)
    assert iterations % cfg.train_cfg.val_interval == 0
    assert iterations % cfg.default_hooks.checkpoint.interval == 0
    assert cfg.default_hooks.checkpoint.by_epoch is False
    assert cfg.default_hooks.checkpoint.save_best == "mIoU"


@pytest.mark.parametrize(
    ("model", "channels", "layers", "decay", "drop_path"),
    [("mae-b", 768, 12, 0.65, 0.1), ("mae-l", 1024, 24, 0.8, 0.4)],
)
def test_mae_settings(model, channels, layers, decay, drop_path):
    cfg = load(f"upernet_{model}_ade20k")
    model, optim = cfg.model, cfg.optim_wrapper
    assert model.decode_head.channels == model.neck.embed_dim == channels
    assert model.decode_head.in_channels == [channels] * 4
    assert model.auxiliary_head.in_channels == model.backbone.embed_dims == channels
    assert model.backbone.num_layers == optim.paramwise_cfg.num_layers == layers
    assert (model.backbone.num_heads * 64, model.backbone.drop_path_rate) == (channels, drop_path)
    assert (optim.optimizer.lr, optim.paramwise_cfg.decay_rate) == (1e-4, decay)


SHRINK = {
    "upernet_mae-b_ade20k": {
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
        "model.backbone.stem_channels": 4,
        "model.backbone.base_channels": 2,
        "model.decode_head.in_channels": [8, 16, 32, 64],
        "model.auxiliary_head.in_channels": 32,
    },
}
SMALL_HEADS = {
    "model.pretrained": None,
    "model.decode_head.channels": 8,
    "model.auxiliary_head.channels": 8,
    "model.data_preprocessor.size": (32, 32),
}


@pytest.mark.parametrize("name", list(SHRINK))
def test_shrunken_model_trains(name):
    from mmengine.optim import build_optim_wrapper
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    cfg = copy.deepcopy(load(name))
    cfg.merge_from_dict({**SHRINK[name], **SMALL_HEADS})
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(cfg.model).train()
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    data = {
        "inputs": [torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8) for _ in range(2)],
        "data_samples": [SegDataSample(metainfo={"img_shape": (32, 32)}) for _ in range(2)],
    }
    for sample in data["data_samples"]:
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, 32, 32)))
    losses = model.train_step(data, optimizer)
    assert torch.isfinite(losses["decode.loss_ce"] + losses["aux.loss_ce"])
    rates = sorted({group["lr"] for group in optimizer.optimizer.param_groups}, reverse=True)
    powers = range(6 if "mae" in name else 1)  # heads, four layers, patch embedding
    base, decay = (1e-4, 0.65) if "mae" in name else (0.01, 1.0)
    assert rates == pytest.approx([base * decay**power for power in powers])
