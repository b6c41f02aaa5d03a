"""MMSegmentation's scripts behind our commands, and the configs for the paper's comparisons."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed")
pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

from mmengine.config import Config

from diffbackbone.openmmlab import commands
from diffbackbone.openmmlab.engine import SeededDataset
from diffbackbone.utils import MissingPackageError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "mmseg"
R50 = "upernet_r50_ade20k"


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
    small = ["--cfg-options", "model.pretrained=None", "model.decode_head.channels=8"]
    assert "data/ade/ADEChallengeData2016/images/training" in refused(commands.train, R50, *small)
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


def test_configs_need_no_installed_bases():
    """MMEngine finds ``mmseg::`` by the name of a distribution, which forks do not have."""
    assert not [path for path in CONFIGS.rglob("*.py") if "mmseg::" in path.read_text()]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_ade20k*.py")), ids=lambda path: path.stem)
def test_settings_shared_by_all(path):
    cfg = Config.fromfile(str(path), import_custom_modules=False)
    crop = next(t for t in cfg.train_dataloader.dataset.pipeline if t.type == "RandomCrop")
    assert crop.crop_size == cfg.model.data_preprocessor["size"] == (512, 512)
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 150
    iterations = 160_000 if "160k" in path.stem else 16_000
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == iterations
    assert iterations % cfg.train_cfg.val_interval == 0
    assert iterations % cfg.default_hooks.checkpoint.interval == 0
