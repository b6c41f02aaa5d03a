"""Checkpoints of Detectron2 models: written atomically, read as weights only."""

from __future__ import annotations

import codecs
import collections
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine.hooks import PeriodicCheckpointer
from torch import nn

from diffbackbone._unpickle import NUMPY_GLOBALS
from diffbackbone.checkpoint import WEIGHT_DTYPES, CheckpointError, check_finite, read_checkpoint
from diffbackbone.sources import first_line, some_keys
from diffbackbone.utils import atomic_write, write_text


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic files that can't run code.

    Args:
        model: The model.
        save_dir: Folder of the checkpoints.
        strict: Whether a checkpoint must fit the model, each key and each shape. If none is given,
            ``model_final.pth`` in ``save_dir`` is loaded.
        **checkpointables: Objects saved beside the model.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, strict: bool = False, **checkpointables: Any
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.strict = strict

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last checkpoint, which must fit; without one, load ``path``."""
        self.strict |= resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint, and the state of the run in it."""
        self._parsed_url_during_load = None  # Detectron2 leaves it after an error
        if self.strict and not path:
            path = str(Path(self.save_dir, "model_final.pth"))
        try:
            return super().load(path, checkpointables)
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # a damaged or foreign file can fail in any way
            raise CheckpointError(
                f"{path} can't be loaded into this model: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pyth"):  # pycls
            weights = self._torch_load(filename)["model_state"].items()
            weights = {key: x for key, x in weights if not key.endswith("num_batches_tracked")}
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        with open(filename, "rb") as file:
            content = _NumbersUnpickler(file, encoding="latin1").load()
        if "model" in content and "__author__" in content:
            return content
        blobs = content.get("blobs", content)
        blobs = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
        return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}

    def _torch_load(self, f: str) -> Any:
        return read_checkpoint(f, mapped=False)

    def _load_model(self, checkpoint: Any) -> Any:
        own = self.model.state_dict()
        for key, value in checkpoint["model"].items():
            dtype = torch.as_tensor(value).dtype
            if key in own and own[key].is_floating_point() and dtype not in WEIGHT_DTYPES:
                raise CheckpointError(f"type of {key}: {dtype}, expected a floating-point type")
        incompatible = super()._load_model(checkpoint)
        problems = {
            key: f"shape of {key}: {tuple(given)}, expected {tuple(wanted)}"
            for key, given, wanted in incompatible.incorrect_shapes
        }
        problems = {key: f"missing: {key}" for key in incompatible.missing_keys} | problems
        nothing_fits = len(problems) >= len(own)
        for key in incompatible.unexpected_keys:
            problems[key] = f"unexpected: {some_keys([key])}"
        if nothing_fits or (self.strict and problems):
            lines = "".join(f"\n  {line}" for line in list(problems.values())[:8])
            raise CheckpointError(
                f"the checkpoint does not fit the model in {len(problems)} weights:{lines}"
            )
        check_finite("the checkpoint", self.model.state_dict())
        return incompatible

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth``, then ``last_checkpoint``, each atomically."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        content.update(kwargs)
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        atomic_write(path, lambda partial: torch.save(content, partial))
        write_text(Path(self.save_dir, "last_checkpoint"), path.name)


class _NumbersUnpickler(pickle._Unpickler):
    """Reads arrays of numbers only, the format of Detectron2's model zoo.

    Python's unpickler, because C's allocates as many memos as a file declares. BYTEARRAY8, which
    allocates a declared size too, is not supported.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]
    allowed: ClassVar[dict[str, Any]] = {
        **NUMPY_GLOBALS,
        "collections.OrderedDict": collections.OrderedDict,
        "_codecs.encode": codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        return self.allowed[f"{module}.{name}"]


class CheckpointHook(PeriodicCheckpointer):
    """Detectron2's hook that writes checkpoints; a resumed run counts old ones as kept, too."""

    def before_train(self) -> None:
        """Find the latest checkpoints of the resumed run."""
        super().before_train()
        found = sorted(Path(self.checkpointer.save_dir).glob("model_[0-9]*.pth"))
        next_name = f"model_{self.trainer.start_iter:07d}.pth"
        kept = [str(path) for path in found if path.name < next_name]
        self.recent_checkpoints = kept[-self.max_to_keep :] if self.max_to_keep else []
