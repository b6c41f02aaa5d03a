"""Check that OpenMMLab's packages are installed, and repair what stops them on today's torch."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffbackbone._unpickle import checkpoint_globals
from diffbackbone.utils import MissingPackageError, atomic_write, require

COMPILE_MMCV = (  # about 20 minutes
    "pip uninstall -y mmcv mmcv-lite; pip install 'setuptools<82' ninja; MMCV_WITH_OPS=1 "
    "pip install --no-build-isolation mmcv==2.1.0"
)


def prepare(package: str) -> None:
    """Check what an OpenMMLab package needs, without importing it, and apply all repairs.

    Args:
        package: ``"mmseg"``, ``"mmpretrain"`` or ``"mmdet"``.

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
    if package == "mmdet" and not has_compiled_ops():
        raise MissingPackageError(f"mmdet needs mmcv with compiled operators: {COMPILE_MMCV}")
    apply_repairs()


def has_compiled_ops() -> bool:
    """Return whether the installed mmcv was built with its operators, without importing it."""
    spec = importlib.util.find_spec("mmcv")
    folders = spec.submodule_search_locations if spec else None
    return bool(folders) and bool(importlib.machinery.PathFinder.find_spec("mmcv._ext", folders))


@functools.cache  # once per process
def apply_repairs() -> None:
    """Apply the repairs that this environment needs."""
    from mmengine.device import get_device

    if importlib.util.find_spec("mmcv") and not has_compiled_ops():
        replace_mmcv_ops()
    allow_checkpoint_globals()
    write_atomically()
    if get_device() == "cpu":
        distribute_on_cpu()


def replace_mmcv_ops() -> types.ModuleType:
    """Let ``mmcv.ops`` be imported without compiled operators (mmcv-lite).

    mmseg imports operators at the top of modules that most models never call. In the stand-in every
    public name is a class that raises an ImportError when it is called. ``mmcv._ext`` stays
    missing, so MMEngine still knows that there are no operators.
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
    return module


def allow_checkpoint_globals() -> None:
    """Let ``torch.load(weights_only=True)`` read MMEngine's training checkpoints.

    They hold the history of the logged scalars (``HistoryBuffer`` of numpy arrays) and numpy scores
    beside the weights.
    """
    import mmengine.logging  # noqa: F401 - its own HistoryBuffer, not a stand-in for it

    torch.serialization.add_safe_globals(list(checkpoint_globals()))


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
    """Let MMEngine's launchers start several CPU processes on a machine without accelerator.

    MMEngine selects a CUDA device and the config's backend (``nccl``) whatever the machine has, and
    hands a device index to DistributedDataParallel, which refuses it for CPU modules.
    """
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel

    for launcher in ("pytorch", "slurm", "mpi"):
        name = f"_init_dist_{launcher}"
        setattr(utils, name, init_dist_with_gloo(getattr(utils, name)))
    original = MMDistributedDataParallel.__init__

    def init(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        kwargs.update(device_ids=None, output_device=None)
        original(self, without_sync_batchnorm(module), *args, **kwargs)

    MMDistributedDataParallel.__init__ = init


def init_dist_with_gloo(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap one of MMEngine's launchers: gloo in place of nccl, and no CUDA device."""

    def init_dist(backend: str, *args: Any, **kwargs: Any) -> None:
        set_device = torch.cuda.set_device
        torch.cuda.set_device = lambda device: None
        try:
            original("gloo" if backend == "nccl" else backend, *args, **kwargs)
        finally:
            torch.cuda.set_device = set_device

    return init_dist


def without_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace synchronized batch norm, which has no CPU kernel, by each process's own; warn."""
    from mmengine.logging import print_log
    from mmengine.model import revert_sync_batchnorm

    if not any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
        return module
    print_log(  # on the first rank, and only once: MMEngine drops repeated warnings
        "SyncBN has no CPU kernel: in this distributed run without GPU, each process normalizes "
        "by its own batches, and results will differ from a GPU run",
        logger="current",
        level=logging.WARNING,
    )
    return revert_sync_batchnorm(module)
