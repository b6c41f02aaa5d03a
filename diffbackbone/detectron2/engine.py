"""Training with Detectron2: what its default trainer lacks, on top of it.

:class:`Trainer` is Detectron2's ``DefaultTrainer`` with AdamW, layer-wise learning-rate decay,
bfloat16, large-scale jitter, clipping by the norm of all gradients, training on CPUs, and resuming
that goes on exactly where the checkpoint was written: the stream of images, their augmentation and
the draws of the model depend on the seed and the iteration alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import pickle
import random
import re
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import detectron2.data.transforms as T
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_batch_data_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import _train_loader_from_config
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
    build_model,
)
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Sampler

from diffbackbone._unpickle import NUMPY_GLOBALS
from diffbackbone.checkpoint import (
    WEIGHT_DTYPES,
    CheckpointError,
    check_finite,
    first_line,
    read_checkpoint,
    some_keys,
)
from diffbackbone.detectron2.backbone import get_optimizer_params
from diffbackbone.runs import seed_everything, write_whole

logger = logging.getLogger(__name__)

OPTIMIZERS = ("SGD", "ADAMW")
AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PANOPTIC_API = "https://github.com/cocodataset/panopticapi"


# --------------------------------------------------------------------------------------------------
# optimizer


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``SOLVER`` describes; see ``add_diffusion_config``.

    Raises:
        ValueError: ``SOLVER.OPTIMIZER`` or ``SOLVER.LAYER_DECAY_RATE`` can't be used.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise ValueError(
            f"SOLVER.OPTIMIZER must be one of {', '.join(OPTIMIZERS)}, got {solver.OPTIMIZER!r}"
        )
    clip = solver.CLIP_GRADIENTS
    whole = clip.ENABLED and clip.CLIP_TYPE == "full_model"
    if clip.ENABLED and clip.CLIP_TYPE not in ("full_model", "norm", "value"):
        raise ValueError(
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be 'full_model' (all gradients together), "
            f"'norm' or 'value' (each parameter by itself), got {clip.CLIP_TYPE!r}"
        )
    if solver.OPTIMIZER == "SGD" and solver.LAYER_DECAY_RATE == 1.0 and not whole:
        return build_detectron2_optimizer(cfg, model)
    params = get_optimizer_params(
        model,
        solver.LAYER_DECAY_RATE,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "foreach": True}
    if solver.OPTIMIZER == "SGD":
        kind = torch.optim.SGD
        common.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    else:
        kind = torch.optim.AdamW
        common.update(betas=tuple(solver.BETAS))
    if clip.ENABLED and not whole:
        from detectron2.solver.build import maybe_add_gradient_clipping

        kind = maybe_add_gradient_clipping(cfg, kind)
    optimizer = kind(params, **common)
    if whole:
        clip_whole_model(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def clip_whole_model(
    optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0
) -> None:
    """Clip the norm of all gradients together before each step, after any unscaling."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)


# --------------------------------------------------------------------------------------------------
# data


def large_scale_jitter(
    size: int = 1024, min_scale: float = 0.1, max_scale: float = 2.0, flip: str = "horizontal"
) -> list[T.Augmentation]:
    """ViTDet's augmentation: flip, resize by a random scale, crop to a square.

    Images smaller than the square stay so: there is nothing to gain from padding them.

    Args:
        size: Side of the square in pixels.
        min_scale: Smallest scale, relative to the image fitted into the square.
        max_scale: Largest scale.
        flip: ``"horizontal"``, ``"vertical"`` or ``"none"``.

    Raises:
        ValueError: A number is out of range.
    """
    if not 0 < min_scale <= max_scale or size < 32:
        raise ValueError(
            "large-scale jitter needs 0 < MIN_SCALE <= MAX_SCALE and SIZE of at least 32 px, got "
            f"{min_scale}, {max_scale} and {size}"
        )
    kinds = {"horizontal": {}, "vertical": {"horizontal": False, "vertical": True}}
    if flip not in (*kinds, "none"):
        raise ValueError(f"flip must be horizontal, vertical or none, got {flip!r}")
    return [
        *([T.RandomFlip(**kinds[flip])] if flip != "none" else []),
        T.ResizeScale(min_scale, max_scale, size, size),
        T.FixedSizeCrop((size, size), pad=False),
    ]


def build_train_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's mapper, with large-scale jitter where ``INPUT.LSJ`` asks for it."""
    lsj = cfg.INPUT.LSJ
    if not lsj.ENABLED:
        return DatasetMapper(cfg, is_train=True)
    augmentations = large_scale_jitter(
        lsj.SIZE, lsj.MIN_SCALE, lsj.MAX_SCALE, cfg.INPUT.RANDOM_FLIP
    )
    return DatasetMapper(
        cfg, is_train=True, augmentations=augmentations, recompute_boxes=cfg.MODEL.MASK_ON
    )


def check_datasets(names: Sequence[str]) -> None:
    """Check that datasets are registered and that their files are there.

    Raises:
        ValueError: No such dataset.
        FileNotFoundError: Names each file and folder that is missing, and where it is looked for.
    """
    problems = []
    for name in names:
        if name not in DatasetCatalog:
            first = name.split("_")[0]
            similar = [n for n in DatasetCatalog.list() if n.startswith(first)]
            raise ValueError(
                f"there is no dataset {name!r}; registered are, among others, "
                f"{', '.join(similar[:12] or DatasetCatalog.list()[:12])}"
            )
        meta = MetadataCatalog.get(name).as_dict()
        kind = meta.get("evaluator_type")
        wanted = ["json_file", "image_root"]
        if kind in ("coco_panoptic_seg", "sem_seg"):
            wanted.append("sem_seg_root")
        for key in wanted:
            path = meta.get(key)
            if isinstance(path, str) and "://" not in path and not os.path.exists(path):
                problems.append(f"\n  {name}: no {path}")
    if problems:
        raise FileNotFoundError(
            f"there are no data to read:{''.join(problems)}\nDetectron2 looks for its datasets "
            "under the folder that the environment variable DETECTRON2_DATASETS names "
            f"({os.environ.get('DETECTRON2_DATASETS', 'datasets, as it is not set')}). The sample "
            "data are made by tools/make_sample_data.py and looked for under "
            "DIFFBACKBONE_SAMPLE_DATA, else data/sample"
        )


def load_dicts(name: str) -> list[dict[str, Any]]:
    """The records of a dataset's images.

    Raises:
        ValueError: There are none, or the file of annotations is damaged.
    """
    source = MetadataCatalog.get(name).get("json_file", "its files")
    try:
        dicts = DatasetCatalog.get(name)
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _READERS:
            raise  # in a loader of the user's own
        raise ValueError(
            f"dataset {name!r}: {source} is damaged or no file of COCO annotations: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not len(dicts):
        raise ValueError(f"dataset {name!r} is empty: there are no images in {source}")
    return dicts


_READERS = ("codecs", "detectron2", "json", "pycocotools")


@contextlib.contextmanager
def naming_damaged(names: Sequence[str]) -> Iterator[None]:
    """Where something fails that reads datasets, read each of them alone, which says what is wrong.

    Raises:
        ValueError: See :func:`load_dicts`.
    """
    try:
        yield
    except Exception:
        for name in names:
            load_dicts(name)
        raise


def load_train_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """The training images' records.

    Raises:
        ValueError: There are no images, none is annotated, annotations can't be read, or the model
            has another number of classes than the dataset.
    """
    names = list(cfg.DATASETS.TRAIN)
    if not names:
        raise ValueError("DATASETS.TRAIN is empty: name a dataset to train on")
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    try:
        with naming_damaged(names):
            dicts = get_detection_dataset_dicts(
                names,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
            )
    except AssertionError as error:
        raise ValueError(
            f"datasets {names}: no image has an annotation that is no crowd, so there is nothing "
            f"to learn from ({error}). DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps such images"
        ) from error
    check_classes(cfg)
    return dicts


def check_classes(cfg: CfgNode) -> None:
    """Check the model's number of classes against the datasets'.

    Raises:
        ValueError: They differ.
    """
    heads = {
        "GeneralizedRCNN": (("ROI_HEADS", "thing_classes"),),
        "RetinaNet": (("RETINANET", "thing_classes"),),
        "PanopticFPN": (("ROI_HEADS", "thing_classes"), ("SEM_SEG_HEAD", "stuff_classes")),
        "SemanticSegmentor": (("SEM_SEG_HEAD", "stuff_classes"),),
    }.get(cfg.MODEL.META_ARCHITECTURE, ())
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        for head, kind in heads:
            classes = MetadataCatalog.get(name).get(kind)
            given = cfg.MODEL[head].NUM_CLASSES
            if classes is not None and len(classes) != given:
                raise ValueError(
                    f"MODEL.{head}.NUM_CLASSES is {given}, but dataset {name!r} has {len(classes)} "
                    f"{kind}"
                )


class SeededStream(Dataset):
    """A training set whose random augmentation depends on the seed and the position alone.

    Args:
        records: Detectron2's dataset dicts.
        mapper: Makes the model's input of one; None from it passes on to another image.
        seed: Any integer from 0.
    """

    def __init__(
        self, records: Sequence[dict], mapper: Callable[[dict], dict | None], seed: int
    ) -> None:
        self.records = DatasetFromList(list(records), copy=False)  # serialized: always new copies
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Input number ``position`` of the training run, made of image ``index``.

        Raises:
            ValueError: The image could not be read or used, and which it is; or the mapper refused
                100 images in a row.
        """
        position, index = key
        seed_everything(self.seed, position, 0)
        for attempt in range(100):
            try:
                sample = self.mapper(self.records[index])
            except Exception as error:  # decoders and augmentation fail in any way
                name = self.records[index].get("file_name", "of unknown name")
                raise ValueError(
                    f"training image {name} can't be read or used: {first_line(error)}"
                ) from error
            if sample is not None:
                return sample
            if attempt == 2:
                logger.warning("the mapper refused images, the last one %s", self.records[index])
            index = random.randrange(len(self.records))
        raise ValueError(
            "the mapper refused 100 images in a row, the last one "
            f"{self.records[index].get('file_name')}"
        )


class PositionedSampler(Sampler):
    """Positions in the training run beside the indices of one of Detectron2's samplers.

    Args:
        sampler: An endless sampler, already split by process.
        start: How many indices of this process were used before.
    """

    def __init__(self, sampler: Sampler, start: int = 0) -> None:
        self.sampler, self.start = sampler, start
        self.rank, self.world = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for local, index in enumerate(self.sampler):
            if local >= self.start:
                yield local * self.world + self.rank, index


def build_train_loader(
    dataset: Sequence[dict],
    *,
    mapper: Callable[[dict], dict | None],
    total_batch_size: int,
    sampler: Sampler | None = None,
    num_workers: int = 0,
    seed: int = 0,
    start_iter: int = 0,
) -> torch.utils.data.DataLoader:
    """Loader of training batches, the same from any iteration on in every run.

    What Detectron2's ``build_detection_train_loader`` is for, with aspect-ratio grouping left out:
    the backbones lose nothing to unequal images.

    Args:
        dataset: Detectron2's dataset dicts.
        mapper: Makes the model's input of one.
        total_batch_size: Over all processes.
        sampler: Endless and seeded; None shuffles by ``seed``.
        num_workers: Worker processes of each process.
        seed: From 0.
        start_iter: Iterations that were trained before.

    Raises:
        ValueError: The batch can't be split evenly over the processes.
    """
    world = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world:
        raise ValueError(
            "the batch over all processes (SOLVER.IMS_PER_BATCH, total_batch_size) must be a "
            f"positive multiple of their number, {world}; got {total_batch_size}"
        )
    sampler = sampler or TrainingSampler(len(dataset), seed=seed)
    return build_batch_data_loader(
        SeededStream(dataset, mapper, seed),
        PositionedSampler(sampler, start_iter * total_batch_size // world),
        total_batch_size,
        num_workers=num_workers,
        seed=seed,  # else the first batch of workers costs a draw that a resumed run has earlier
    )


def loader_settings(cfg: CfgNode, records: Sequence[dict], seed: int) -> dict[str, Any]:
    """What a YAML config says of :func:`build_train_loader`'s arguments."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    settings = _train_loader_from_config(cfg, build_train_mapper(cfg), dataset=list(records))
    names = ("dataset", "mapper", "sampler", "total_batch_size", "num_workers")
    return {**{name: settings[name] for name in names}, "seed": seed}


# --------------------------------------------------------------------------------------------------
# evaluation


EVALUATORS = {
    "cityscapes_instance": CityscapesInstanceEvaluator,
    "cityscapes_sem_seg": CityscapesSemSegEvaluator,
    "coco": COCOEvaluator,
    "coco_panoptic_seg": None,  # several
    "lvis": LVISEvaluator,
    "pascal_voc": PascalVOCDetectionEvaluator,
    "sem_seg": SemSegEvaluator,
}
"""Evaluators by the ``evaluator_type`` of datasets."""


def evaluator_type(name: str) -> str:
    """What kind of evaluation a dataset is for.

    Raises:
        ValueError: There is no evaluator for it.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise ValueError(
            f"dataset {name!r} has the evaluator_type {kind!r}; there are evaluators for "
            f"{', '.join(EVALUATORS)}"
        )
    return kind


def build_evaluator(cfg: CfgNode, name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluator that fits a dataset's ``evaluator_type``.

    Raises:
        ValueError: There is none.
    """
    output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = evaluator_type(name)
    if kind != "coco_panoptic_seg":
        writes = kind in ("coco", "lvis", "sem_seg")
        return EVALUATORS[kind](name, **({"output_dir": output_dir} if writes else {}))
    evaluators: list[DatasetEvaluator] = [
        SemSegEvaluator(name, output_dir=output_dir),
        COCOEvaluator(name, output_dir=output_dir),
    ]
    if importlib.util.find_spec("panopticapi") is None:
        logger.warning(
            "panopticapi is not installed (%s): boxes, masks and semantic segmentation are "
            "evaluated, panoptic quality is not",
            PANOPTIC_API,
        )
    else:
        evaluators.append(COCOPanopticEvaluator(name, output_dir))
    return DatasetEvaluators(evaluators)


def check_supported(cfg: CfgNode) -> None:
    """Check that the config asks for nothing that this package or Detectron2 lacks.

    Raises:
        ValueError: It does.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS True is not supported: files of proposals are pickles, which can "
            "run code; MODEL.PROPOSAL_GENERATOR.NAME RPN makes proposals"
        )
    diffusion = cfg.MODEL.DIFFUSION
    feedback = bool(diffusion.FEEDBACK or diffusion.FEEDBACK_MAP)
    if cfg.TEST.PRECISE_BN.ENABLED and feedback and diffusion.PADDING == "separate":
        raise ValueError(
            "TEST.PRECISE_BN.ENABLED True needs MODEL.DIFFUSION.PADDING reflect or keep, got "
            "separate, which runs batch norm once for each size of images"
        )
    if not cfg.TEST.AUG.ENABLED:
        return
    name = cfg.MODEL.META_ARCHITECTURE
    kind = META_ARCH_REGISTRY.get(name)
    takes_boxes = (  # PanopticFPN, an R-CNN too, does not
        issubclass(kind, GeneralizedRCNN)
        and "detected_instances" in inspect.signature(kind.inference).parameters
    )
    problems = [
        *([] if takes_boxes else [f"MODEL.META_ARCHITECTURE {name}"]),
        *(["MODEL.KEYPOINT_ON True"] if cfg.MODEL.KEYPOINT_ON else []),
        *([] if cfg.TEST.AUG.MIN_SIZES else ["TEST.AUG.MIN_SIZES ()"]),
    ]
    if problems:
        raise ValueError(
            f"TEST.AUG.ENABLED True is not possible with {' and '.join(problems)}: Detectron2's "
            "test-time augmentation is for the boxes and masks of a GeneralizedRCNN"
        )


# --------------------------------------------------------------------------------------------------
# checkpoints


class SeedIterations(HookBase):
    """Seed all generators before each iteration, so that a resumed run draws what it would have.

    Args:
        seed: From 0.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        """Seed by the iteration and the process."""
        seed_everything(self.seed, self.trainer.iter, 1, comm.get_rank())

    def state_dict(self) -> dict[str, int]:
        """The seed, for checkpoints."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Take a checkpoint's seed."""
        self.seed = state_dict["seed"]


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer: files are written whole or not at all, and nothing in them runs.

    Args:
        model: The model.
        save_dir: Where checkpoints are written to.
        strict: Whether a checkpoint must fit the model: each key and each shape.
        **checkpointables: What is saved beside the model.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, strict: bool = False, **checkpointables: Any
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.strict = strict

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last checkpoint, which has to fit; where there is none, what ``path`` names.

        Raises:
            CheckpointError: The checkpoint can't be read or doesn't fit.
        """
        strict = self.strict
        self.strict = strict or (resume and self.has_checkpoint())
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self.strict = strict

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint, and the state of the run that is in it.

        Raises:
            CheckpointError: It can't be read or doesn't fit.
        """
        try:
            return super().load(path, checkpointables)
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # what a file holds can be anything
            raise CheckpointError(
                f"{path} does not fit this model or this run: {first_line(error)}"
            ) from error
        finally:
            self._parsed_url_during_load = None  # else the next file can't be loaded

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            content = self._read(filename)
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # a damaged file can fail in the reader in any way
            raise CheckpointError(
                f"{filename} is truncated, damaged, no checkpoint, or holds more than weights "
                f"(nothing in it was run): {first_line(error)}"
            ) from error
        if not isinstance(content["model"], dict) or not content["model"]:
            raise CheckpointError(f"{filename} holds no weights by name")
        return content

    def _read(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pyth"):  # pycls
            weights = {
                key: value
                for key, value in self._torch_load(filename)["model_state"].items()
                if not key.endswith("num_batches_tracked")
            }
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        content = read_numbers(filename)
        if "model" in content and "__author__" in content:
            return content
        blobs = content.get("blobs", content)
        if isinstance(blobs, dict):
            blobs = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
        return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}

    def _torch_load(self, f: str) -> Any:
        return read_checkpoint(f, mapped=False)

    def _load_model(self, checkpoint: Any) -> Any:
        own = self.model.state_dict()
        wrong_types = [
            f"type of {key}: {value.dtype}, expected a floating-point type"
            for key, value in checkpoint["model"].items()
            if key in own
            and own[key].is_floating_point()
            and torch.as_tensor(value).dtype not in WEIGHT_DTYPES
        ]
        if wrong_types:
            raise CheckpointError(f"the checkpoint's weights are no weights:{_listed(wrong_types)}")
        incompatible = super()._load_model(checkpoint)
        problems = [
            f"shape of {key}: {tuple(given)}, expected {tuple(wanted)}"
            for key, given, wanted in incompatible.incorrect_shapes
        ]
        wrong = {key for key, *_ in incompatible.incorrect_shapes}
        problems += [f"missing: {key}" for key in incompatible.missing_keys if key not in wrong]
        nothing = len(problems) >= len(own)
        problems += [f"unexpected: {some_keys([key])}" for key in incompatible.unexpected_keys]
        if nothing or (self.strict and problems):
            raise CheckpointError(
                f"the checkpoint is of another model than the config's:{_listed(problems)}"
            )
        check_finite("the checkpoint", self.model.state_dict())
        return incompatible

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth``, then the note which checkpoint is the last.

        Raises:
            OSError: It could not be written, for instance on a full disk; what was there stays.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        content.update(kwargs)
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_whole(path, lambda partial: torch.save(content, partial))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which checkpoint is the last."""
        path = Path(self.save_dir, "last_checkpoint")
        write_whole(path, lambda partial: partial.write_text(last_filename_basename))


def _listed(problems: Sequence[str]) -> str:
    more = [f"... and {len(problems) - 8} more"] if len(problems) > 8 else []
    return "".join(f"\n  {line}" for line in [*problems[:8], *more])


def _refuse(*_: Any) -> Any:
    raise pickle.UnpicklingError("it asks for memory, not for numbers")


class _NumbersUnpickler(pickle._Unpickler):
    """Makes arrays of numbers, as large as the file's own bytes; python's, as C's obeys any size.

    C's unpickler makes room for as many memos as a file names, this one for those it gives.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _refuse,
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in NUMPY_GLOBALS:
            return NUMPY_GLOBALS[full]
        if full not in ("collections.OrderedDict", "_codecs.encode"):
            raise pickle.UnpicklingError(f"it asks for {full}")
        return super().find_class(module, name)


def read_numbers(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a pickle of numpy arrays, as Detectron2's model zoo has them, and nothing else.

    Raises:
        pickle.UnpicklingError: It holds something else. Other errors are possible in a damaged
            file, too.
    """
    with open(path, "rb") as file:
        content = _NumbersUnpickler(file, encoding="latin1").load()
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__}")
    return content


class CheckpointHook(PeriodicCheckpointer):
    """Detectron2's hook that writes checkpoints; in a resumed run, old ones count as kept, too."""

    def before_train(self) -> None:
        """Find the latest checkpoints of the run that is resumed."""
        super().before_train()
        start = self.trainer.start_iter
        if start and self.max_to_keep:
            found = {
                int(number[1]): str(path)
                for path in Path(self.checkpointer.save_dir).glob(f"{self.file_prefix}_*.pth")
                if (number := re.fullmatch(rf"{self.file_prefix}_(\d+)\.pth", path.name))
            }
            kept = [found[number] for number in sorted(found) if number < start]
            self.recent_checkpoints = kept[-self.max_to_keep :]


# --------------------------------------------------------------------------------------------------
# trainer


def make_step_trainer(
    model: nn.Module,
    data_loader: Any,
    optimizer: torch.optim.Optimizer,
    amp: bool = False,
    dtype: str = "auto",
) -> SimpleTrainer:
    """Detectron2's trainer of single steps, in mixed precision where that can be had.

    Args:
        model: In training mode, perhaps wrapped for several processes.
        data_loader: None where it comes later.
        optimizer: Of the model's parameters.
        amp: Whether to train in mixed precision; without a GPU, float32 it is.
        dtype: ``"auto"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: No such type.
    """
    if dtype != "auto" and dtype not in AMP_DTYPES:
        raise ValueError(f"AMP.DTYPE must be one of auto, {', '.join(AMP_DTYPES)}, got {dtype!r}")
    if not amp:
        return SimpleTrainer(model, data_loader, optimizer)
    if not torch.cuda.is_available():
        logger.warning("mixed precision needs a GPU; training in float32")
        return SimpleTrainer(model, data_loader, optimizer)
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    return AMPTrainer(
        model, data_loader, optimizer, grad_scaler=scaler, precision=AMP_DTYPES[dtype]
    )


def wrap_distributed(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Wrap a model for several processes, on GPUs or CPUs; on its own it stays as it is."""
    if comm.get_world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        kwargs.setdefault("device_ids", [comm.get_local_rank()])
    fp16_compression = kwargs.pop("fp16_compression", False)
    wrapped = DistributedDataParallel(model, **kwargs)
    if fp16_compression and next(model.parameters()).is_cuda:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        wrapped.register_comm_hook(state=None, hook=default_hooks.fp16_compress_hook)
    return wrapped


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with what the YAML configs of this package need.

    Args:
        cfg: With the keys of ``add_diffusion_config``.

    Raises:
        ValueError: A key has a value that can't be used, or there is nothing to train on.
        FileNotFoundError: Data or weights are missing.
    """

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_supported(cfg)
        check_datasets((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        self.records = load_train_dicts(cfg)
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        seed_everything(seed)
        self._seeding = SeedIterations(seed)

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        model = wrap_distributed(model, broadcast_buffers=False)
        self._trainer = make_step_trainer(
            model, None, optimizer, cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, the seeding first."""
        solver = self.cfg.SOLVER
        keep = solver.CHECKPOINT_KEEP or None
        writer = CheckpointHook(self.checkpointer, solver.CHECKPOINT_PERIOD, max_to_keep=keep)
        hooks = super().build_hooks()
        hooks = [writer if isinstance(hook, PeriodicCheckpointer) else hook for hook in hooks]
        if self.cfg.TEST.AUG.ENABLED:
            # after the plain evaluation, and before the results are written
            last = max(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
            hooks.insert(last + 1, EvalHook(0, self._test_augmented))
        return [self._seeding, *hooks]

    def _test_augmented(self) -> dict[str, Any]:
        results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results.update(results)
        return results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:  # noqa: N802
        """Evaluate with the test-time augmentation of ``TEST.AUG``.

        Args:
            cfg: The config.
            model: A ``GeneralizedRCNN``, perhaps wrapped for several processes.

        Returns:
            What ``test`` returns, each name with ``_TTA`` behind it.
        """
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": values for name, values in results.items()}

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model, and log its size in place of its hundreds of layers."""
        model = build_model(cfg)
        log_size(model)
        return model

    def train(self) -> Any:
        """Train from ``start_iter`` to the end."""
        settings = loader_settings(self.cfg, self.records, self._seeding.seed)
        self._trainer.reset_data_loader(
            lambda: build_train_loader(start_iter=self.start_iter, **settings)
        )
        return super().train()

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> torch.utils.data.DataLoader:
        """A loader from the start, for Detectron2's hooks."""
        return build_train_loader(**loader_settings(cfg, load_train_dicts(cfg), max(cfg.SEED, 0)))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :func:`build_evaluator`."""
        return build_evaluator(cfg, dataset_name, output_folder)


def log_size(model: nn.Module) -> None:
    """Log how many parameters there are, and how many are trained."""
    total = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    logger.info("%s: %.1fM parameters, %.1fM of them trained", type(model).__name__, total, trained)
