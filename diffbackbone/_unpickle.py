"""Safe reading of training checkpoints: names allowed in a pickle, and harmless stand-ins.

MMEngine's checkpoints hold the history of its logged scalars and numpy's arrays, which
``torch.load(weights_only=True)`` refuses unless it is told their names.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import os
import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch


class HistoryBuffer:
    """Stands for MMEngine's class of that name where MMEngine is not imported."""

    min = max = mean = current = None


class _Dtype:
    """Stands for ``np.dtype``: numbers only, and of its state the byte order only.

    The rest of the state could declare numbers to be structures or Python objects.
    """

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufc][0-9]{1,2}", code):
            raise pickle.UnpicklingError(f"it asks for numpy's {code!r}, which is no number")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that only its state gives a size, and that is saved as numpy's own."""

    def __new__(cls, *_: Any, **__: Any) -> _Array:
        raise pickle.UnpicklingError("it calls numpy.ndarray, which is not allowed")

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, is_fortran, content = state
        super().__setstate__((version, shape, dtype.value, is_fortran, content))

    def __reduce__(self) -> Any:
        return self.view(np.ndarray).__reduce__()


def _empty_array(*_: Any) -> np.ndarray:
    return np.ndarray.__new__(_Array, 0)


def _empty_bytes() -> bytes:
    return b""


def _scalar(dtype: _Dtype, content: Any) -> Any:
    return _MAKE_SCALAR(dtype.value, content)


_MAKE_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_GLOBALS: dict[str, Any] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "builtins.bytes": _empty_bytes,  # which protocol 2 calls for the values of an empty array
    **{
        f"{core}.multiarray.{name}": stand_in
        for core in ("numpy._core", "numpy.core")  # as numpy 2 and numpy 1 write it
        for name, stand_in in (("_reconstruct", _empty_array), ("scalar", _scalar))
    },
}
"""Objects for the names in a pickle of numeric arrays."""


def checkpoint_globals() -> frozenset[tuple[Any, str]]:
    """Return the objects for the names in a training checkpoint, for ``torch.serialization``."""
    module = sys.modules.get("mmengine.logging.history_buffer")
    return _globals_with(getattr(module, "HistoryBuffer", HistoryBuffer))


@functools.cache
def _globals_with(history_buffer: type) -> frozenset[tuple[Any, str]]:
    def get_statistics_method(owner: Any, name: Any) -> Any:
        """Stands for ``getattr``, by which a ``HistoryBuffer`` refers to its methods."""
        if owner is not history_buffer or name not in ("min", "max", "mean", "current"):
            raise pickle.UnpicklingError(f"it asks for attribute {name!r} of {owner!r}")
        return getattr(owner, name)

    names = {
        **NUMPY_GLOBALS,
        "mmengine.logging.history_buffer.HistoryBuffer": history_buffer,
        "builtins.getattr": get_statistics_method,
    }
    return frozenset((value, name) for name, value in names.items())


@contextlib.contextmanager
def allow_globals() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` read training checkpoints."""
    # torch forgets on leaving what it was told here, also what it knew before
    missing = checkpoint_globals().difference(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals(list(missing)):
        yield


def check_weights(path: str | os.PathLike[str]) -> None:
    """Reject what ``torch.load(weights_only=True)`` accepts before torch 2.10.

    A pickle can set items of a storage beyond its end (CVE-2026-24747), and a tensor may be longer
    than its values in the file. So the pickles are gone through first on stand-ins: only containers
    take items.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] == b"PK\x03\x04":  # torch's own reader, so that both see the same archive
            archive = torch._C.PyTorchFileReader(os.fspath(path))
            _StandInUnpickler(io.BytesIO(archive.get_record("data.pkl")), archive).load()
        else:
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

    It is Python's without BYTEARRAY8: C's allocates as many memos, and BYTEARRAY8 as many bytes, as
    a file names.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: Any, archive: Any = None) -> None:
        super().__init__(file, encoding="utf-8")
        self._archive = archive
        self._size = functools.cache(lambda key: len(archive.get_record(f"data/{key}")))

    def find_class(self, module: str, name: str) -> Any:
        module = IMPORT_MAPPING.get(module, module)  # protocol 2 has the names of Python 2
        module, name = NAME_MAPPING.get((module, name), (module, name))
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        reader = torch._weights_only_unpickler
        if full not in {**reader._get_allowed_globals(), **reader._get_user_allowed_globals()}:
            raise pickle.UnpicklingError(f"it asks for {full}")
        return type(name, (_StandIn,), {})

    def persistent_load(self, pid: Any) -> Any:
        if self._archive is not None:
            _, kind, key, _, count = pid
            size = count
            if kind.__name__ != "UntypedStorage":
                dtype = torch.storage._get_dtype_from_pickle_storage_type(kind.__name__)
                size = count * torch._utils._element_size(dtype)
            if not 0 <= size <= self._size(key):
                raise pickle.UnpicklingError(f"storage {key} is shorter than its {count} values")
        return _StandIn()
