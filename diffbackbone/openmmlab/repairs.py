"""What the oldest torch lacks, and what stock frameworks need to run on today's.

:func:`is_compiling` and :func:`is_autocast_enabled` are torch's own where it has them.

:func:`check_mmseg_stack`, :func:`check_mmpretrain_stack`, :func:`check_mmdet_stack` and
:func:`check_detectron2_stack` say in one error what is missing or too new;
:func:`apply_mmengine_repairs` applies what is left to repair (Detectron2 needs none). Each repair
looks first whether it is needed, changes as little as it can, and does nothing the second time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import re
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any, Callable

import torch

from diffbackbone._unpickle import checkpoint_globals

logger = logging.getLogger(__name__)

DETECTRON2_GUIDE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"

# module, the distributions that may provide it, and the half-open range of versions that serve
_VERSIONS = (
    ("mmengine", ("mmengine",), (0, 10), (1, 0)),
    ("mmcv", ("mmcv", "mmcv-lite", "mmcv-full"), (2, 0), (2, 2)),
    ("mmseg", ("mmsegmentation",), (1, 0), (2, 0)),
    ("mmpretrain", ("mmpretrain",), (1, 2), (2, 0)),
    ("mmdet", ("mmdet",), (3, 3), (4, 0)),
)
_COMPILE_MMCV = (
    "pip uninstall -y mmcv mmcv-lite; pip install 'setuptools<82' ninja && MMCV_WITH_OPS=1 "
    "pip install --no-build-isolation mmcv==2.1.0"
)


def _major_minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


TORCH = _major_minor(torch.__version__)
"""The running version, two numbers of it."""
# Before 2.6 the scalars beside MMEngine's weights can't be allowed one by one.
OPENMMLAB_TORCH = (2, 6)
# torch 2.1 and 2.2 have it under another name, which their compiler knows as well
is_compiling: Callable[[], bool] = (
    getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling
)
"""Whether ``torch.compile`` or ``torch.export`` traces this code."""


def _autocast_takes_a_device() -> bool:
    try:
        torch.is_autocast_enabled("cpu")
    except TypeError:
        return False
    return True


if _autocast_takes_a_device():
    is_autocast_enabled: Callable[[str], bool] = torch.is_autocast_enabled
else:

    def is_autocast_enabled(device_type: str) -> bool:
        """Whether autocast is on for such devices; before torch 2.4 each type has its function."""
        if device_type == "cpu":
            return torch.is_autocast_cpu_enabled()
        return device_type == "cuda" and torch.is_autocast_enabled()


def check_mmseg_stack() -> None:
    """Check that what MMSegmentation needs is installed, without importing any of it.

    Raises:
        ImportError: Names everything that is missing or has the wrong version, and the command
            that installs it.
    """
    _check_openmmlab("MMSegmentation", ("mmengine", "mmcv", "mmseg"), ("ftfy", "regex"))


def check_mmpretrain_stack() -> None:
    """Check that what MMPretrain needs is installed, without importing any of it.

    Raises:
        ImportError: See :func:`check_mmseg_stack`.
    """
    _check_openmmlab("MMPretrain", ("mmengine", "mmcv", "mmpretrain"), ())


def check_mmdet_stack() -> None:
    """Check that what MMDetection needs is installed, without importing any of it.

    Raises:
        ImportError: See :func:`check_mmseg_stack`; or mmcv has no compiled operators, which every
            part of mmdet imports.
    """
    problems = []
    if _is_installed("mmcv") and not _has_compiled_ops():
        problems.append(
            "mmcv has no compiled operators (mmcv-lite has none), and all of mmdet imports them. "
            f"Compiling takes some 20 minutes: {_COMPILE_MMCV}"
        )
    _check_openmmlab("MMDetection", ("mmengine", "mmcv", "mmdet"), (), problems)


def _has_compiled_ops() -> bool:
    """Whether the mmcv that is installed was built with its operators."""
    spec = importlib.util.find_spec("mmcv")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return importlib.machinery.PathFinder.find_spec("mmcv._ext", folders) is not None


def _check_openmmlab(
    what: str, modules: tuple[str, ...], undeclared: tuple[str, ...], known: Sequence[str] = ()
) -> None:
    problems = list(known)
    if sys.version_info >= (3, 14):
        problems.append(
            f"Python {sys.version_info[0]}.{sys.version_info[1]} is running, and MMEngine uses "
            "pkgutil.find_loader, which Python 3.14 removed: take Python 3.9 to 3.13"
        )
    if TORCH < OPENMMLAB_TORCH:
        wanted = ".".join(map(str, OPENMMLAB_TORCH))
        problems.append(
            f"torch {torch.__version__} is installed, >={wanted} is needed: an older one can't "
            "read MMEngine's training checkpoints without running what is in them"
        )
    for module, distributions, lowest, limit in _VERSIONS:
        if module not in modules:
            continue
        if not _is_installed(module):
            problems.append(f"{module} is not installed")
            continue
        for name, version in _installed_versions(distributions):
            if not lowest <= _major_minor(version) < limit:
                wanted = f">={lowest[0]}.{lowest[1]},<{limit[0]}.{limit[1]}"
                command = f"pip install '{name}{wanted}'"
                if module == "mmcv":  # several distributions, one folder
                    command = f"pip uninstall -y {name} && pip install 'mmcv-lite{wanted}'"
                problems.append(f"{name} {version} is installed, {wanted} is needed: {command}")
    problems += [
        f"{module} is not installed; mmseg imports it without declaring it"
        for module in undeclared
        if not _is_installed(module)
    ]
    if not _is_installed("pkg_resources"):
        found = dict(_installed_versions(("setuptools",))).get("setuptools")
        found = f"setuptools {found} has none" if found else "setuptools is not installed"
        problems.append(
            "pkg_resources, which MMEngine imports and setuptools 82 dropped, is missing "
            f"({found}): pip install 'setuptools<82'"
        )
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        tested = f"come with: pip install 'diffbackbone[{modules[-1]}]'"
        if modules[-1] == "mmdet":  # no extra can bring a compiled mmcv
            tested = "are mmengine 0.10.7, mmcv 2.1.0 and mmdet 3.3.0"
        raise ImportError(
            f"{what} cannot run in this environment:{lines}\nThe tested versions {tested}"
        )


def check_detectron2_stack() -> None:
    """Check that what Detectron2 needs is installed, without importing any of it.

    Raises:
        ImportError: Names everything that is missing, and Detectron2's install guide.
    """
    problems = []
    if not _is_installed("detectron2"):
        problems.append(
            "detectron2 is not installed, and it is not on PyPI: its own guide tells how to "
            f"install it, {DETECTRON2_GUIDE}"
        )
    needed = ("fvcore", "iopath", "omegaconf", "pkg_resources", "pycocotools", "shapely", "yacs")
    missing = [module for module in needed if not _is_installed(module)]
    if missing:
        problems.append(
            f"{', '.join(missing)} not installed; what PyPI has comes with "
            "pip install 'diffbackbone[detectron2]'"
        )
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ImportError(f"Detectron2 cannot run in this environment:{lines}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # already imported, by something that left no __spec__
        return True


def _installed_versions(distributions: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def apply_mmengine_repairs() -> tuple[str, ...]:
    """Apply the repairs that this environment needs and has not had yet.

    Returns:
        The names of the repairs that this call applied, in the order of :data:`REPAIRS`.
    """
    applied = tuple(name for name, repair in REPAIRS.items() if repair())
    for name in applied:
        logger.info("repair %s: %s", name, (REPAIRS[name].__doc__ or "").partition("\n")[0])
    return applied


# --------------------------------------------------------------------------------------------------
# mmcv_ops


def repair_mmcv_ops() -> bool:
    """Let ``mmcv.ops`` be imported where mmcv has no compiled operators (mmcv-lite).

    mmseg imports operators at the top of modules that most models never call. The stand-in has
    every public name, each a class that raises an ImportError when it is called. ``mmcv._ext``
    stays missing, so MMEngine still knows that there are no operators.

    Returns:
        Whether the stand-in was needed.
    """
    if "mmcv.ops" in sys.modules or not _is_installed("mmcv"):
        return False
    import mmcv

    if importlib.machinery.PathFinder.find_spec("mmcv._ext", list(mmcv.__path__)) is not None:
        return False
    mmcv.ops = sys.modules["mmcv.ops"] = _stand_in_module("mmcv.ops")
    return True


def _stand_in_module(module_name: str) -> types.ModuleType:
    module = types.ModuleType(module_name, "Stand-in for operators that are not compiled.")
    module.__spec__ = importlib.machinery.ModuleSpec(module_name, loader=None)

    def make_op(name: str) -> type:
        # __path__, __file__ and other names that Python and its tools ask modules for
        if name.startswith("_"):
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")

        def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
            raise ImportError(
                f"{module_name}.{name} is a compiled operator, and the installed mmcv has none "
                "(mmcv-lite, or an mmcv built without them). Where a model needs it, replace "
                "mmcv-lite with mmcv 2.1 built with its operators: "
                "pip uninstall mmcv-lite && pip install mmcv==2.1.0"
            )

        op = type(name, (), {"__module__": module_name, "__new__": refuse})
        setattr(module, name, op)  # the same class the next time
        return op

    module.__getattr__ = make_op
    return module


# --------------------------------------------------------------------------------------------------
# resume_safe_globals


def repair_resume_safe_globals() -> bool:
    """Let ``torch.load`` read MMEngine's training checkpoints with ``weights_only=True``.

    Since torch 2.6 that is the default, and refuses what MMEngine stores beside the weights: the
    history of the logged scalars (``HistoryBuffer`` over numpy arrays) and numpy scores.

    Returns:
        Whether anything was not allowed yet.
    """
    import mmengine.logging  # noqa: F401 - its own HistoryBuffer, not a stand-in for it

    missing = checkpoint_globals().difference(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(list(missing))
    return bool(missing)


# --------------------------------------------------------------------------------------------------
# cpu_distributed


def repair_cpu_distributed() -> bool:
    """Let MMEngine's launchers start several CPU processes on a machine without accelerator.

    MMEngine selects a CUDA device and the backend of the config (``nccl``) whatever the machine
    has, and hands a device index to DistributedDataParallel, which refuses it for CPU modules.
    Here the process group is ``gloo``, there are no device indices, and synchronized batch norm,
    for which torch has no CPU kernel, computes with each process's own statistics.

    Returns:
        Whether this machine has no accelerator and MMEngine was not repaired before.
    """
    from mmengine.device import get_device
    from mmengine.dist import utils as dist_utils
    from mmengine.model import MMDistributedDataParallel

    if get_device() != "cpu" or _is_patched(MMDistributedDataParallel.__init__):
        return False
    for launcher in ("pytorch", "slurm", "mpi"):
        name = f"_init_dist_{launcher}"
        setattr(dist_utils, name, _init_dist_on_cpu(getattr(dist_utils, name)))
    MMDistributedDataParallel.__init__ = _init_ddp_on_cpu(MMDistributedDataParallel.__init__)
    return True


def _is_patched(function: Callable[..., Any]) -> bool:
    return getattr(function, "__module__", None) == __name__


def _patch(original: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Take over name and docstring of ``original``, but not its module (see `_is_patched`)."""
    return functools.wraps(original, assigned=("__name__", "__qualname__", "__doc__"))


def _init_dist_on_cpu(original: Callable[..., None]) -> Callable[..., None]:
    @_patch(original)
    def init_dist(backend: str, *args: Any, **kwargs: Any) -> None:
        with _no_cuda_device():
            original("gloo" if backend == "nccl" else backend, *args, **kwargs)

    return init_dist


@contextlib.contextmanager
def _no_cuda_device() -> Iterator[None]:
    set_device = torch.cuda.set_device
    torch.cuda.set_device = lambda device: None
    try:
        yield
    finally:
        torch.cuda.set_device = set_device


def _init_ddp_on_cpu(original: Callable[..., None]) -> Callable[..., None]:
    @_patch(original)
    def init(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        kwargs.update(device_ids=None, output_device=None)
        original(self, without_sync_batchnorm(module), *args, **kwargs)

    return init


def without_sync_batchnorm(module: torch.nn.Module) -> torch.nn.Module:
    """Have a module compute on CPUs without synchronized batch norm, and say so."""
    from mmengine.logging import print_log
    from mmengine.model import revert_sync_batchnorm

    if not any(isinstance(m, torch.nn.SyncBatchNorm) for m in module.modules()):
        return module
    print_log(  # on the first rank, and only once: MMEngine drops repeated warnings
        "SyncBN has no CPU kernel: in this distributed run without GPU, each process "
        "normalizes its training batches with its own statistics. Results will differ "
        "from a GPU run.",
        logger="current",
        level=logging.WARNING,
    )
    return revert_sync_batchnorm(module)  # what MMEngine itself does when it trains in one process


# --------------------------------------------------------------------------------------------------
# whole_files


def repair_whole_files() -> bool:
    """Let MMEngine write files whole or not at all.

    It opens a file in place and writes: a process killed meanwhile, or a full disk, leaves half a
    checkpoint under the name of a whole one. The repaired backend writes beside it and renames.

    Returns:
        Whether MMEngine's own backend was in use.
    """
    from mmengine.fileio import LocalBackend, get_file_backend, register_backend

    from diffbackbone.runs import write_whole

    if type(get_file_backend(backend_args={"backend": "local"})) is not LocalBackend:
        return False

    class WholeLocalBackend(LocalBackend):
        """MMEngine's local storage, in which no file is ever half written."""

        name = LocalBackend.__name__

        def put(self, obj: bytes, filepath: Any) -> None:
            write_whole(filepath, lambda partial: partial.write_bytes(obj))

        def put_text(self, obj: str, filepath: Any, encoding: str = "utf-8") -> None:
            write_whole(filepath, lambda partial: partial.write_bytes(obj.encode(encoding)))

    register_backend("local", WholeLocalBackend, force=True, prefixes="")
    return True


REPAIRS: dict[str, Callable[[], bool]] = {
    "mmcv_ops": repair_mmcv_ops,
    "resume_safe_globals": repair_resume_safe_globals,
    "cpu_distributed": repair_cpu_distributed,
    "whole_files": repair_whole_files,
}
