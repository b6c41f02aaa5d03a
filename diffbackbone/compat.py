"""What the oldest torch lacks, and what stock frameworks need to run on today's.

:func:`is_compiling` and :func:`is_autocast_enabled` are torch's own where it has them;
:func:`check_weights` keeps out what the weights-only reader of older torch lets in.

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
import io
import logging
import mmap
import os
import pickle
import re
import sys
import tarfile
import types
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Callable, ClassVar

import torch

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
# weights of older torch

CHECKS_WEIGHTS = (2, 10)
"""From this torch on, :func:`check_weights` is of no use: it refuses all this itself."""


def check_weights(path: str | os.PathLike[str]) -> None:
    """Keep out what ``torch.load(weights_only=True)`` lets in before torch 2.10.

    Before 2.6 it unpacks tar archives and runs TorchScript (CVE-2025-32434). Before 2.10 a pickle
    can set items of a storage beyond its end (CVE-2026-24747), and a tensor may be longer than its
    values in the file. So the pickles are gone through first, as torch will, but on stand-ins:
    only containers take items.

    Raises:
        pickle.UnpicklingError: The file has such a thing in it. Other errors are possible, too.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] == b"PK\x03\x04":  # torch's own reader, so that both see the same archive
            archive = torch._C.PyTorchFileReader(os.fspath(path))
            if "constants.pkl" in archive.get_all_records():
                raise pickle.UnpicklingError("it is TorchScript: GLOBAL code, not weights")
            _StandInUnpickler(io.BytesIO(archive.get_record("data.pkl")), archive).load()
            return
        with contextlib.suppress(tarfile.TarError):
            tarfile.open(fileobj=file, mode="r:").close()
            raise pickle.UnpicklingError("it is a tar archive, as torch wrote before 0.2 (2017)")
        for _ in range(5):  # magic number, version, machine, content, storages
            _StandInUnpickler(content).load()


class _StandIn:
    """Stands for a tensor, storage or function: takes arguments and a state, and no items."""

    def __new__(cls, *_: Any) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _StandInUnpickler(pickle._Unpickler):
    """Goes through a pickle as torch's weights-only unpickler does.

    It is Python's, as C's makes room for as many memos as a file names, and knows no more
    operations than torch's, so that both take a pickle for the same.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (
            *(pickle.GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID),
            *(pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.MARK),
            *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.EMPTY_LIST, pickle.EMPTY_DICT),
            *(pickle.EMPTY_SET, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINFLOAT),
            *(pickle.LONG1, pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.BINGET),
            *(pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.PROTO, pickle.STOP),
        )
    }

    def __init__(self, file: Any, archive: Any = None) -> None:
        super().__init__(file, encoding="utf-8")
        self._archive = archive
        self._sizes: dict[str, int] = {}

    def load(self) -> Any:
        try:
            return super().load()
        except (KeyError, TypeError, AttributeError) as error:
            raise pickle.UnpicklingError(f"it asks for what no weights need: {error}") from error

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        reader = torch._weights_only_unpickler
        users = getattr(reader, "_get_user_allowed_globals", dict)()  # from torch 2.4 on
        if full not in reader._get_allowed_globals() and full not in users:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {full}")
        return type(name, (_StandIn,), {})

    def persistent_load(self, pid: Any) -> Any:
        if self._archive is not None:
            _, kind, key, _, count = pid
            size = count
            if kind.__name__ != "UntypedStorage":
                dtype = torch.storage._get_dtype_from_pickle_storage_type(kind.__name__)
                size = count * torch._utils._element_size(dtype)
            if key not in self._sizes:
                self._sizes[key] = len(self._archive.get_record(f"data/{key}"))
            if not 0 <= size <= self._sizes[key]:
                raise pickle.UnpicklingError(f"storage {key} is shorter than its {count} values")
        return _StandIn()


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
    missing = _checkpoint_globals().difference(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(list(missing))
    return bool(missing)


@functools.cache
def _checkpoint_globals() -> frozenset[Any]:
    """What a training checkpoint asks for by name, with what answers to each name.

    A few names stand for something harmless instead of the real thing. ``getattr`` is there for
    the statistics methods that a ``HistoryBuffer`` carries, and finds nothing else. ``np.ndarray``
    and ``np.dtype`` could make arrays of Python objects out of raw bytes; here, arrays start empty
    and data types are numbers.
    """
    import numpy as np
    from mmengine.logging import HistoryBuffer

    uncallable_array = type("ndarray", (np.ndarray,), {"__new__": _refuse_array})
    make_scalar = np.float64(0).__reduce__()[0]
    names: dict[str, Any] = {
        "mmengine.logging.history_buffer.HistoryBuffer": HistoryBuffer,
        "builtins.getattr": _history_buffer_method,
        "numpy.ndarray": uncallable_array,
        "numpy.dtype": number_dtype,
    }
    for core in ("numpy._core", "numpy.core"):  # as numpy 2 and numpy 1 write it
        names[f"{core}.multiarray._reconstruct"] = empty_array
        names[f"{core}.multiarray.scalar"] = make_scalar
    # Classes whose instances get their state from the file. A name in a file has a dot, so these
    # names are in reach of none, and the classes can't be called.
    codes = "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]
    for kind in (np.ndarray, *(type(np.dtype(code)) for code in codes)):
        names[kind.__name__] = kind
    return frozenset((value, name) for name, value in names.items())


def _history_buffer_method(owner: Any, name: Any) -> Callable[..., Any]:
    from mmengine.logging import HistoryBuffer

    allowed = ("min", "max", "mean", "current")
    if owner is not HistoryBuffer or name not in allowed:
        raise pickle.UnpicklingError(
            f"the checkpoint asks for attribute {name!r} of {owner!r}; only {', '.join(allowed)} "
            "of mmengine's HistoryBuffer are allowed"
        )
    return getattr(HistoryBuffer, name)


def number_dtype(code: Any, *_: Any) -> Any:
    """Stands for ``np.dtype`` in a pickle: numbers only.

    Raises:
        pickle.UnpicklingError: It is another type.
    """
    import numpy as np

    if not isinstance(code, str) or np.dtype(code).kind not in "biufc":
        raise pickle.UnpicklingError(f"the checkpoint asks for numpy's {code!r}, not for numbers")
    return np.dtype(code, False, True)  # a copy, which may take a byte order


def empty_array(*_: Any) -> Any:
    """Stands for numpy's ``_reconstruct`` in a pickle: an array that gets size and values next."""
    import numpy as np

    return np.empty(0)


def _refuse_array(*_: Any, **__: Any) -> Any:
    raise pickle.UnpicklingError("the checkpoint calls numpy.ndarray, which is not allowed")


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
