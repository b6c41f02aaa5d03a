"""The repairs of `diffbackbone.compat`, on the MMEngine, mmcv and mmseg that are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from diffbackbone.openmmlab import repairs as compat

ROOT = Path(__file__).resolve().parents[1]

needs_mmengine = pytest.mark.skipif(
    importlib.util.find_spec("mmengine") is None, reason="mmengine is not installed"
)


def run_python(code: str, *launcher: str, **env: str) -> subprocess.CompletedProcess:
    # no GPU, so that this is the same everywhere
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, *(launcher or ("-c",)), textwrap.dedent(code)]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )


# --------------------------------------------------------------------------------------------------
# what older torch lacks


def test_autocast_is_known_by_device():
    assert compat.is_autocast_enabled("cpu") is False
    with torch.autocast("cpu", torch.bfloat16):
        assert compat.is_autocast_enabled("cpu") is True
        assert compat.is_autocast_enabled("cuda") is False
    assert compat.is_compiling() is False


# --------------------------------------------------------------------------------------------------
# mmcv_ops


@pytest.fixture
def ops(monkeypatch):
    """The freshly installed stand-in; whatever was there before comes back."""
    mmcv = pytest.importorskip("mmcv", reason="mmcv is not installed")
    if any(True for path in mmcv.__path__ for _ in Path(path).glob("_ext*")):
        pytest.skip("the installed mmcv has compiled operators")
    monkeypatch.setitem(sys.modules, "mmcv.ops", None)  # what is there now, monkeypatch remembers
    del sys.modules["mmcv.ops"]
    monkeypatch.setattr(mmcv, "ops", None, raising=False)
    assert compat.repair_mmcv_ops() is True
    return sys.modules["mmcv.ops"]


def test_mmcv_ops_are_classes_that_refuse_to_be_called(ops):
    from mmcv.ops import DeformConv2d, point_sample

    assert not isinstance(nn.Conv2d(1, 1, 1), (DeformConv2d, point_sample))
    assert not issubclass(nn.Conv2d, DeformConv2d)
    assert ops.point_sample is point_sample
    assert pickle.loads(pickle.dumps(point_sample)) is point_sample

    with pytest.raises(ImportError, match=r"mmcv\.ops\.point_sample .*pip install mmcv==2\.1\.0"):
        point_sample(torch.zeros(1), 2, key="value")

    class Head(nn.Module, DeformConv2d):
        def __init__(self, channels):
            super().__init__()

    with pytest.raises(ImportError, match=r"mmcv\.ops\.DeformConv2d"):
        Head(3)


def test_mmcv_ops_does_not_pretend_to_be_compiled(ops):
    import mmcv
    from mmengine.utils.dl_utils import mmcv_full_available

    assert mmcv.ops is ops
    assert not mmcv_full_available()
    with pytest.raises(ImportError):
        importlib.import_module("mmcv._ext")
    for name in ("__path__", "__file__", "__wrapped__", "_ext"):
        assert not hasattr(ops, name), name
    with pytest.raises(ImportError):
        importlib.import_module("mmcv.ops.nms")
    # what walks through all modules
    assert importlib.util.find_spec("mmcv.ops").name == "mmcv.ops"
    assert inspect.getmodule(ops.nms) is ops
    assert dict(inspect.getmembers(ops))["nms"] is ops.nms
    repr(ops)


def test_mmcv_ops_is_installed_once(ops):
    assert compat.repair_mmcv_ops() is False
    assert sys.modules["mmcv.ops"] is ops


@needs_mmengine
def test_mmseg_imports_with_the_stand_in(ops):
    pytest.importorskip("mmseg", reason="mmseg is not installed")
    from mmseg.models.decode_heads import UPerHead
    from mmseg.models.losses.focal_loss import sigmoid_focal_loss

    assert issubclass(UPerHead, nn.Module)
    assert callable(sigmoid_focal_loss)


def test_real_mmcv_wins(tmp_path):
    for name, text in {
        "__init__.py": "__version__ = '2.1.0'",
        "_ext.py": "",
        "ops/__init__.py": "point_sample = 'real'",
    }.items():
        (tmp_path / "mmcv" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mmcv" / name).write_text(text)
    code = """
        from diffbackbone.openmmlab import repairs as compat
        print(compat.repair_mmcv_ops())
        from mmcv.ops import point_sample
        print(point_sample)
    """
    result = run_python(code, PYTHONPATH=str(tmp_path))
    assert result.stdout.split() == ["False", "real"], result.stderr


# --------------------------------------------------------------------------------------------------
# cpu_distributed

DISTRIBUTED = """
import os
import torch
from torch import nn, distributed as dist
from diffbackbone.openmmlab import repairs as compat

assert "cpu_distributed" in compat.apply_mmengine_repairs()
assert compat.apply_mmengine_repairs() == ()
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
assert isinstance(model, nn.parallel.DistributedDataParallel)
dist.destroy_process_group()
os.write(1, b"done ")
"""


@needs_mmengine
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_two_cpu_processes_train_with_sync_batch_norm(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = run_python(str(script), *launcher)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert result.stdout.count("done") == 2, output
    assert output.count("SyncBN has no CPU kernel") == 1, output


@needs_mmengine
@pytest.mark.parametrize(
    ("launcher", "env"),
    [
        ("pytorch", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}),
        (
            "slurm",
            {
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_NODELIST": "a",
                "SLURM_LOCALID": "1",
                "MASTER_ADDR": "localhost",
            },
        ),
        (
            "mpi",
            {
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
                "MASTER_ADDR": "localhost",
            },
        ),
    ],
)
def test_launchers_start_gloo(launcher, env, monkeypatch):
    from mmengine.dist import utils

    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(key, "")  # the launcher sets them; this brings them back
        monkeypatch.delenv(key)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    started = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda **kwargs: started.append(kwargs)
    )
    original = getattr(utils, f"_init_dist_{launcher}")
    original = getattr(original, "__wrapped__", original)
    set_device = torch.cuda.set_device
    compat._init_dist_on_cpu(original)(backend="nccl", timeout="kept")
    compat._init_dist_on_cpu(original)("mpi")
    assert started == [{"backend": "gloo", "timeout": "kept"}, {"backend": "mpi"}]
    assert torch.cuda.set_device is set_device


@needs_mmengine
def test_nothing_changes_where_there_is_a_gpu(monkeypatch):
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel as Wrapper

    original = getattr(Wrapper.__init__, "__wrapped__", Wrapper.__init__)
    init_dist = utils._init_dist_pytorch
    monkeypatch.setattr(Wrapper, "__init__", original)
    monkeypatch.setattr("mmengine.device.get_device", lambda: "cuda")
    assert compat.repair_cpu_distributed() is False
    assert Wrapper.__init__ is original
    assert utils._init_dist_pytorch is init_dist


# --------------------------------------------------------------------------------------------------
# check_mmseg_stack


def test_check_and_import_are_light():
    code = """
        import sys
        from diffbackbone.openmmlab import repairs as compat
        try:
            compat.check_mmseg_stack()
        except ImportError:
            pass
        print({"mmengine", "mmcv", "mmseg", "cv2", "pkg_resources"} & set(sys.modules))
    """
    result = run_python(code)
    assert result.stdout.strip() == "set()", result.stdout + result.stderr


@pytest.fixture
def stack(monkeypatch):
    """A function that makes an environment of modules and distributions, complete by default."""
    modules = {"mmengine", "mmcv", "mmseg", "ftfy", "regex", "pkg_resources"}
    versions = {
        "mmengine": "0.10.7",
        "mmcv-lite": "2.1.0",
        "mmsegmentation": "1.2.2",
        "setuptools": "81.0.0",
    }

    def make(missing=(), **changed):
        present = modules - set(missing)
        versions.update({name.replace("_", "-"): version for name, version in changed.items()})

        def version(name):
            if versions.get(name) is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(compat.importlib.metadata, "version", version)
        monkeypatch.setattr(
            compat.importlib.util, "find_spec", lambda name: object() if name in present else None
        )
        monkeypatch.setattr(compat.sys, "version_info", (3, 13, 1))
        monkeypatch.setattr(compat, "TORCH", (2, 6))

    return make


@pytest.mark.parametrize(
    "versions",
    [{}, {"mmcv_lite": None, "mmcv": "2.1.0"}, {"mmcv_lite": None}, {"mmengine": "0.11.0rc1"}],
)
def test_check_accepts(stack, versions):
    stack(**versions)
    compat.check_mmseg_stack()


@pytest.mark.parametrize(
    ("missing", "versions", "message"),
    [
        (["mmengine"], {}, "mmengine is not installed"),
        (["mmcv"], {}, "mmcv is not installed"),
        (["mmseg"], {}, "mmseg is not installed"),
        (["ftfy"], {}, "ftfy is not installed; mmseg imports it"),
        (["regex"], {}, "regex is not installed; mmseg imports it"),
        (
            [],
            {"mmcv_lite": None, "mmcv": "2.2.0"},
            "mmcv 2.2.0 is installed, >=2.0,<2.2 is needed: pip uninstall -y mmcv && pip install "
            "'mmcv-lite>=2.0,<2.2'",
        ),
        ([], {"mmcv_full": "1.7.2"}, "mmcv-full 1.7.2 is installed, >=2.0,<2.2 is needed"),
        ([], {"mmsegmentation": "0.30.0"}, "pip install 'mmsegmentation>=1.0,<2.0'"),
        (
            ["pkg_resources"],
            {"setuptools": "82.0.1"},
            "(setuptools 82.0.1 has none): pip install 'setuptools<82'",
        ),
        (["pkg_resources"], {"setuptools": None}, "(setuptools is not installed)"),
    ],
)
def test_check_names_what_is_wrong(stack, missing, versions, message):
    stack(missing, **versions)
    with pytest.raises(ImportError) as error:
        compat.check_mmseg_stack()
    lines = str(error.value).splitlines()
    assert len(lines) == 3, lines  # one problem
    assert message in lines[1]
    assert lines[2].endswith("pip install 'diffbackbone[mmseg]'")


def test_check_names_everything_at_once(stack, monkeypatch):
    stack(["mmseg", "ftfy"], mmcv_lite="2.2.0")
    monkeypatch.setattr(compat.sys, "version_info", (3, 14, 0))
    monkeypatch.setattr(compat, "TORCH", (2, 5))
    with pytest.raises(ImportError) as error:
        compat.check_mmseg_stack()
    found = f"torch {torch.__version__} is installed, >=2.6 is needed"
    for part in (
        found,
        "Python 3.14 is running",
        "mmseg is not",
        "ftfy is not",
        "mmcv-lite 2.2.0 is",
    ):
        assert part in str(error.value)
