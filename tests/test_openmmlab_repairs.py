"""The repairs of OpenMMLab's packages, on the MMEngine and mmcv that are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine", reason="mmengine is not installed")
pytest.importorskip("mmcv", reason="mmcv is not installed")

import mmcv

from diffbackbone.openmmlab import repairs
from diffbackbone.utils import MissingPackageError

# --------------------------------------------------------------------------------------------------
# what is installed


@pytest.fixture
def installed(monkeypatch):
    """A function that makes modules and distributions look installed, or missing."""

    def make(*modules, distributions=("mmengine",), ops=True):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in modules or None)
        found = {name: [object()] for name in distributions}
        monkeypatch.setattr(
            importlib.metadata, "distributions", lambda name: iter(found.get(name, []))
        )
        monkeypatch.setattr(repairs, "has_compiled_ops", lambda: ops)
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
    installed("mmcv")
    with pytest.raises(MissingPackageError, match=r"mmengine, mmpretrain, .*\[mmpretrain\]"):
        repairs.prepare("mmpretrain")
    installed(*MMSEG[:-1], distributions=["onedl-mmengine"])  # needs no pkg_resources
    repairs.prepare("mmseg")


def test_mmdet_needs_compiled_operators(installed):
    installed("mmengine", "mmcv", "mmdet", "pkg_resources", ops=False)
    with pytest.raises(MissingPackageError, match="compiled operators.*MMCV_WITH_OPS=1"):
        repairs.prepare("mmdet")
    installed("mmengine", "mmcv", "mmdet", "pkg_resources")
    repairs.prepare("mmdet")


def test_compiled_operators_are_found_without_importing_them(tmp_path, monkeypatch):
    """mmcv-lite has the folder ``mmcv`` too, but not the compiled module inside."""
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mmcv", raising=False)
    assert not repairs.has_compiled_ops()
    (tmp_path / "mmcv" / "_ext.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    assert repairs.has_compiled_ops()


# --------------------------------------------------------------------------------------------------
# mmcv.ops


@pytest.fixture
def ops(monkeypatch):
    """A fresh stand-in; whatever was there before comes back."""
    if repairs.has_compiled_ops():
        pytest.skip("the installed mmcv has compiled operators")
    monkeypatch.setitem(sys.modules, "mmcv.ops", None)
    monkeypatch.setattr(mmcv, "ops", None, raising=False)
    return repairs.replace_mmcv_ops()


def test_operators_are_classes_that_refuse_to_be_called(ops):
    from mmcv.ops import DeformConv2d, point_sample

    assert not isinstance(nn.Conv2d(1, 1, 1), (DeformConv2d, point_sample))
    assert not issubclass(nn.Conv2d, DeformConv2d)
    assert ops.point_sample is point_sample
    assert pickle.loads(pickle.dumps(point_sample)) is point_sample

    class Head(nn.Module, DeformConv2d):
        def __init__(self, channels):
            super().__init__()

    for call, name in ((lambda: point_sample(torch.zeros(1), 2), "point_sample"),
                       (lambda: Head(3), "DeformConv2d")):  # fmt: skip
        with pytest.raises(ImportError, match=rf"mmcv\.ops\.{name}.*pip install"):
            call()


def test_the_stand_in_does_not_pretend_to_be_compiled(ops):
    from mmengine.utils.dl_utils import mmcv_full_available

    assert mmcv.ops is ops
    assert not mmcv_full_available()
    for name in ("__path__", "__file__", "__wrapped__", "_ext"):
        assert not hasattr(ops, name), name
    for name in ("mmcv._ext", "mmcv.ops.nms"):
        with pytest.raises(ImportError):
            importlib.import_module(name)
    # what walks through all modules
    assert importlib.util.find_spec("mmcv.ops").name == "mmcv.ops"
    assert inspect.getmodule(ops.nms) is ops
    assert dict(inspect.getmembers(ops))["nms"] is ops.nms


# --------------------------------------------------------------------------------------------------
# several processes on a CPU

DISTRIBUTED = """
import os
import torch
from torch import nn, distributed as dist
from diffbackbone.openmmlab.repairs import apply_repairs

apply_repairs()
apply_repairs()
from mmengine.dist import init_dist
from mmengine.model import BaseModel, MMDistributedDataParallel

class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 1), nn.SyncBatchNorm(2))
    def forward(self, inputs, mode):
        return {"loss": (self.layers(inputs) ** 3 * inputs).mean()}

init_dist("pytorch", backend="nccl")
assert dist.get_backend() == "gloo"
rank = dist.get_rank()
for _ in range(2):  # the warning comes once
    torch.manual_seed(0)
    model = MMDistributedDataParallel(Model(), device_ids=[int(os.environ["LOCAL_RANK"])])
torch.manual_seed(rank)
model(torch.randn(2, 1, 4, 4), mode="loss")["loss"].backward()
gradient = model.module.layers[0].weight.grad.flatten()
assert gradient.abs().sum() > 0
both = [torch.empty_like(gradient) for _ in range(2)]
dist.all_gather(both, gradient)
assert torch.equal(*both)
means = [torch.empty(2) for _ in range(2)]
dist.all_gather(means, model.module.layers[1].running_mean)
assert not torch.equal(*means)  # own statistics
dist.destroy_process_group()
os.write(1, b"done ")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_two_cpu_processes_train_with_sync_batch_norm(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *torchrun, str(script)],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert result.stdout.count("done") == 2, output
    assert output.count("SyncBN has no CPU kernel") == 1, output


def test_launchers_start_gloo(monkeypatch):
    started = []

    def launcher(backend, **kwargs):
        torch.cuda.set_device(0)  # as MMEngine's do
        started.append((backend, kwargs))

    set_device = torch.cuda.set_device
    repairs.init_dist_with_gloo(launcher)(backend="nccl", timeout="kept")
    repairs.init_dist_with_gloo(launcher)("mpi")
    assert started == [("gloo", {"timeout": "kept"}), ("mpi", {})]
    assert torch.cuda.set_device is set_device


def test_nothing_is_distributed_on_cpu_where_there_is_a_gpu(monkeypatch):
    called = []
    monkeypatch.setattr(repairs, "distribute_on_cpu", lambda: called.append(1))
    for device, calls in (("cuda", 0), ("cpu", 1)):
        monkeypatch.setattr("mmengine.device.get_device", lambda device=device: device)
        repairs.apply_repairs.__wrapped__()
        assert len(called) == calls
