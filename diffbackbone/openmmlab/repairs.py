"""Check that OpenMMLab's packages are installed, and repair what stops them on today's torch."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import nn

from diffbackbone._unpickle import checkpoint_globals
from diffbackbone.utils import atomic_write, require

COMPILE_MMCV = (  # about 20 minutes
    "pip uninstall -y mmcv mmcv-lite; pip install 'setuptools<82' ninja; MMCV_WITH_OPS=1 "
    "pip install --no-build-isolation mmcv==2.1.0"
)


def prepare(package: str) -> None:
    """Check what ``"mmseg"``, ``"mmpretrain"`` or ``"mmdet"`` needs, and apply all repairs.

    Raises:
        MissingPackageError: Names what is missing, and the command that installs it.
    """
    modules = ["mmengine", "mmcv", package]
    if package == "mmseg":
        modules += ["ftfy", "regex"]  # imported, but not declared
    if any(importlib.metadata.distributions(name="mmengine")):  # its forks don't import it
        modules.append("pkg_resources")  # setuptools 82 dropped it
    install = f"pip install 'setuptools<82' 'diffbackbone[{package}]'"
    if package == "mmdet":  # no extra can bring a compiled mmcv
        install = f"pip install mmengine==0.10.7 mmdet==3.3.0; {COMPILE_MMCV}"
    require(package, modules, install)
    if package == "mmdet":
        require("mmdet", ["mmcv._ext"], COMPILE_MMCV)  # can't be found without mmcv
    apply_repairs()
    if package == "mmpretrain":  # its multimodal models import what transformers 5 dropped
        from mmpretrain.utils import dependency

        dependency.WITH_MULTIMODAL &= not dependency.satisfy_requirement("transformers>=5")


@functools.cache  # once per process
def apply_repairs() -> None:
    """Apply the repairs that this environment needs."""
    from mmengine.device import get_device

    if importlib.util.find_spec("mmcv._ext") is None:
        replace_mmcv_ops()
    allow_checkpoint_globals()
    read_weights_only()
    write_atomically()
    if get_device() == "cpu":
        distribute_on_cpu()


def allow_checkpoint_globals() -> None:
    """Let ``torch.load(weights_only=True)`` read the logged scalars in MMEngine's checkpoints."""
    import mmengine.logging  # noqa: F401 - its own HistoryBuffer, not a stand-in for it

    torch.serialization.add_safe_globals(list(checkpoint_globals()))


def replace_mmcv_ops() -> None:
    """Let ``mmcv.ops`` be imported without compiled operators (mmcv-lite), as mmseg does.

    Every public name is a class that raises an ImportError when it is called.
    """
    import mmcv

    module = types.ModuleType("mmcv.ops", "Stand-in for operators that are not compiled.")
    module.__spec__ = importlib.machinery.ModuleSpec("mmcv.ops", loader=None)

    def make_op(name: str) -> type:
        if name.startswith("_"):  # __path__ and others that Python asks modules for
            raise AttributeError(f"module 'mmcv.ops' has no attribute {name!r}")

        def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
            raise ImportError(f"mmcv.ops.{name} is not compiled in this mmcv: {COMPILE_MMCV}")

        op = type(name, (), {"__module__": "mmcv.ops", "__new__": refuse})
        setattr(module, name, op)  # the same class the next time
        return op

    module.__getattr__ = make_op
    mmcv.ops = sys.modules["mmcv.ops"] = module


def read_weights_only() -> None:
    """Keep onedl-mmengine, a fork, from unpickling what ``weights_only=True`` rejects."""
    from mmengine.runner import checkpoint

    def load(file: Any, map_location: Any = None, weights_only: bool = True) -> Any:
        return torch.load(file, map_location=map_location, weights_only=True)

    if hasattr(checkpoint, "_safe_torch_load"):
        checkpoint._safe_torch_load = load


def write_atomically() -> None:
    """Let MMEngine's local storage write to a temporary file and rename it.

    By itself it writes in place: a killed process or a full disk leaves half a checkpoint.
    """
    from mmengine.fileio import LocalBackend, register_backend

    class AtomicLocalBackend(LocalBackend):
        name = LocalBackend.__name__

        def put(self, obj: bytes, filepath: Any) -> None:
            atomic_write(filepath, lambda partial: partial.write_bytes(obj))

        def put_text(self, obj: str, filepath: Any, encoding: str = "utf-8") -> None:
            self.put(obj.encode(encoding), filepath)

    register_backend("local", AtomicLocalBackend, force=True, prefixes="")


def distribute_on_cpu() -> None:
    """Let torchrun start several MMEngine processes on a machine without a GPU.

    MMEngine takes the config's backend (``nccl``) and a CUDA device on any machine. SyncBN has no
    CPU kernel: each process normalizes by its own batches.
    """
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm

    def init_dist(backend: str, init_backend: str = "torch", **kwargs: Any) -> None:
        torch.distributed.init_process_group("gloo", **kwargs)

    utils._init_dist_pytorch = init_dist
    original = MMDistributedDataParallel.__init__

    def init(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        kwargs.update(device_ids=None, output_device=None)
        original(self, revert_sync_batchnorm(module), *args, **kwargs)

    MMDistributedDataParallel.__init__ = init
