"""The repairs of OpenMMLab's packages, on the MMEngine and mmcv that are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pickle
import sys

import forked
import pytest
import torch
from torch import nn

pytest.importorskip("mmengine", reason="mmengine is not installed")
pytest.importorskip("mmcv", reason="mmcv is not installed")

import mmcv
from mmengine.model import BaseModel, MMDistributedDataParallel

from diffbackbone.openmmlab import repairs
from diffbackbone.utils import MissingPackageError


@pytest.fixture
def installed(monkeypatch):
    """A function that makes modules and distributions look installed, or missing."""

    def make(*modules, distributions=("mmengine",)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in modules or None)
        found = {name: [object()] for name in distributions}
        monkeypatch.setattr(
            importlib.metadata, "distributions", lambda name: iter(found.get(name, []))
        )
        monkeypatch.setattr(repairs, "apply_repairs", lambda: None)

    return make


MMSEG = ("mmengine", "mmcv", "mmseg", "ftfy", "regex", "pkg_resources")


def test_everything_that_is_missing_is_named_at_once(installed):
    installed(*MMSEG)
    repairs.prepare("mmseg")
    for missing in MMSEG:
        installed(*(name for name in MMSEG if name != missing))
        with pytest.raises(MissingPackageError, match=missing):
            repairs.prepare("mmseg")
    installed(*MMSEG[:-1], distributions=["onedl-mmengine"])  # needs no pkg_resources
    repairs.prepare("mmseg")


def test_mmdet_needs_compiled_operators(installed):
    packages = ("mmengine", "mmcv", "mmdet", "pkg_resources")
    installed(*packages)
    with pytest.raises(MissingPackageError, match="mmcv._ext.*MMCV_WITH_OPS=1"):
        repairs.prepare("mmdet")
    installed(*packages, "mmcv._ext")
    repairs.prepare("mmdet")


def test_a_fork_reads_weights_only(tmp_path, monkeypatch):
    """onedl-mmengine's own falls back to unpickling anything."""
    from mmengine.runner import checkpoint

    monkeypatch.setattr(checkpoint, "_safe_torch_load", torch.load, raising=False)
    repairs.read_weights_only()
    torch.save({"weights": torch.ones(2)}, tmp_path / "weights.pth")
    assert checkpoint._safe_torch_load(str(tmp_path / "weights.pth"), "cpu")["weights"].sum() == 2
    torch.save(forked.Script, tmp_path / "code.pth")
    with pytest.raises(pickle.UnpicklingError):
        checkpoint._safe_torch_load(str(tmp_path / "code.pth"), weights_only=False)


def test_the_stand_in_for_operators(monkeypatch):
    if importlib.util.find_spec("mmcv._ext"):
        pytest.skip("the installed mmcv has compiled operators")
    monkeypatch.setitem(sys.modules, "mmcv.ops", None)
    monkeypatch.setattr(mmcv, "ops", None, raising=False)
    repairs.replace_mmcv_ops()
    from mmcv.ops import DeformConv2d, point_sample
    from mmengine.utils.dl_utils import mmcv_full_available

    assert not isinstance(nn.Conv2d(1, 1, 1), (DeformConv2d, point_sample))
    assert pickle.loads(pickle.dumps(point_sample)) is point_sample

    with pytest.raises(ImportError, match=r"mmcv\.ops\.point_sample.*pip install"):
        point_sample(torch.zeros(1), 2)
    assert not mmcv_full_available()
    assert not hasattr(mmcv.ops, "__path__")
    assert importlib.util.find_spec("mmcv.ops").name == "mmcv.ops"


class Model(BaseModel):
    """A model that runs on batches of one channel."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 1), nn.SyncBatchNorm(2))

    def forward(self, inputs, mode):
        return {"loss": self.layers(inputs).square().mean()}


@pytest.mark.skipif(
    not torch.distributed.is_available() or torch.cuda.is_available(),
    reason="needs torch.distributed and no GPU",
)
def test_processes_on_a_cpu_train_with_sync_batch_norm(tmp_path):
    from mmengine.dist import utils

    repairs.apply_repairs()
    where = {"init_method": f"file://{tmp_path}/store", "rank": 0, "world_size": 1}
    utils._init_dist_pytorch("nccl", **where)
    try:
        assert torch.distributed.get_backend() == "gloo"
        model = MMDistributedDataParallel(Model(), device_ids=[0])
        model(torch.randn(2, 1, 4, 4), mode="loss")["loss"].backward()
    finally:
        torch.distributed.destroy_process_group()
    assert model.module.layers[0].weight.grad is not None


def test_nothing_is_distributed_on_cpu_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(repairs, "distribute_on_cpu", lambda: pytest.fail("called"))
    monkeypatch.setattr("mmengine.device.get_device", lambda: "cuda")
    repairs.apply_repairs.__wrapped__()
