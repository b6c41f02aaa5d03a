"""Data: registered sample data, checks before training, and a resumable stream of batches."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_batch_data_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.data.build import _train_loader_from_config
from detectron2.data.datasets import register_coco_instances, register_coco_panoptic_separated
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch import nn
from torch.utils.data import Dataset, Sampler

from diffbackbone.images import read_image
from diffbackbone.sources import first_line
from diffbackbone.utils import UserError, seed_everything

SAMPLE_ROOT = "DIFFBACKBONE_SAMPLE_DATA"
"""Environment variable: folder of ``tools/make_sample_data.py``; ``data/sample`` if unset."""


def register_sample_data(root: str | os.PathLike[str] | None = None) -> None:
    """Register the sample data in ``root`` (by default :data:`SAMPLE_ROOT`), replacing older.

    Their names are ``diffbackbone_sample_train`` and ``diffbackbone_sample_val``, with
    ``_panoptic_separated`` at the end those for panoptic segmentation.
    """
    coco = os.path.join(root or os.environ.get(SAMPLE_ROOT, "data/sample"), "coco")
    for name in DatasetCatalog.list():
        if name.startswith("diffbackbone_sample_"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    stuff = {
        "stuff_classes": ["things", "background"],
        "stuff_dataset_id_to_contiguous_id": {0: 0, 11: 1},
    }
    for part in ("train", "val"):
        name, split = f"diffbackbone_sample_{part}", f"{part}2017"
        images, instances = f"{coco}/{split}", f"{coco}/annotations/instances_{split}.json"
        register_coco_instances(name, {}, instances, images)
        register_coco_panoptic_separated(
            f"{name}_panoptic",
            stuff,
            images,
            f"{coco}/panoptic_{split}",
            f"{coco}/annotations/panoptic_{split}.json",
            f"{coco}/panoptic_stuff_{split}",
            instances,
        )


@contextlib.contextmanager
def naming_datasets(names: Sequence[str]) -> Iterator[None]:
    """Name the datasets and their files where reading them fails."""
    try:
        yield
    except Exception as error:  # a damaged file can fail in its reader in any way
        files = [f"{name} ({MetadataCatalog.get(name).get('json_file')})" for name in names]
        raise UserError(
            f"can't read {', '.join(files)}: {type(error).__name__}: {first_line(error)}\n"
            f"DETECTRON2_DATASETS names the folder of Detectron2's datasets, {SAMPLE_ROOT} that of "
            "tools/make_sample_data.py"
        ) from error


def load_dicts(name: str) -> list[dict[str, Any]]:
    """Return the records of a dataset's images."""
    with naming_datasets([name]):
        return get_detection_dataset_dicts([name], filter_empty=False)


def check_classes(model: nn.Module, names: Sequence[str]) -> None:
    """Check the number of a detector's classes against datasets that were read."""
    count = getattr(getattr(model, "roi_heads", model), "num_classes", None)
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if None not in (count, classes) and len(classes) != count:
            raise UserError(
                f"the model has num_classes {count}, dataset {name!r} has {len(classes)} classes"
            )


def large_scale_jitter(
    size: int = 1024, min_scale: float = 0.1, max_scale: float = 2.0, flip: str = "horizontal"
) -> list[T.Augmentation]:
    """ViTDet's augmentation: flip, resize by a random scale, crop to a square.

    Images smaller than the square are not padded.

    Args:
        size: Side of the square in pixels.
        min_scale: Smallest scale, relative to the image fitted into the square.
        max_scale: Largest scale.
        flip: ``"horizontal"``, ``"vertical"`` or ``"none"``.
    """
    sides = {"horizontal": flip == "horizontal", "vertical": flip == "vertical"}
    return [
        *([] if flip == "none" else [T.RandomFlip(**sides)]),
        T.ResizeScale(min_scale, max_scale, size, size),
        T.FixedSizeCrop((size, size), pad=False),
    ]


class DeepDatasetMapper(DatasetMapper):
    """Detectron2's mapper for 16-bit and float images, grey ones, and arrays of numpy.

    Images become float32 (channels, H, W) in 0..255 that keeps all levels; mean and std of 127.5
    bring them to [-1, 1]. Augmentations of color take three channels only.

    Args:
        is_train: Whether to return annotations.
        channels: 3 for RGB, 1 for grey; other numbers are those of .npy files (H, W, channels).
        value_range: Values of images deeper than 8 bits that become 0 and 255; None takes 0 and
            65535 for integers, 0 and 1 for floats, and the range of an array's integer type.
        **options: See Detectron2's ``DatasetMapper``.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        channels: int = 3,
        value_range: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(is_train, **options)
        self.channels, self.value_range = channels, value_range

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read ``INPUT.VALUE_RANGE`` and the number of values of ``MODEL.PIXEL_MEAN``, too."""
        options = super().from_config(cfg, is_train)
        value_range = cfg.INPUT.VALUE_RANGE or None
        return {**options, "channels": len(cfg.MODEL.PIXEL_MEAN), "value_range": value_range}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the model's input for a record of a dataset."""
        record = copy.deepcopy(dataset_dict)
        pixels = read_image(record["file_name"], self.value_range, self.channels)
        detection_utils.check_image_size(record, pixels)
        inputs = T.AugInput(pixels * np.float32(1 if pixels.dtype == np.uint8 else 255))
        if "sem_seg_file_name" in record:
            labels = detection_utils.read_image(record.pop("sem_seg_file_name"), "L")
            inputs.sem_seg = labels.squeeze(2)
        transforms = self.augmentations(inputs)
        pixels = np.where(inputs.image == 127.5, np.float32(127.501), inputs.image)  # 0 is padding
        record["image"] = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if inputs.sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(inputs.sem_seg.astype("int64"))
        if self.is_train and "annotations" in record:
            self._transform_annotations(record, transforms, pixels.shape[:2])
        record.pop("annotations", None)
        return record


def build_mapper(cfg: CfgNode, is_train: bool) -> DatasetMapper:
    """Build the mapper for ``INPUT.DEEP``; in training with ``INPUT.LSJ``."""
    kind = DeepDatasetMapper if cfg.INPUT.DEEP else DatasetMapper
    lsj, flip = cfg.INPUT.LSJ, cfg.INPUT.RANDOM_FLIP
    if not (is_train and lsj.ENABLED):
        return kind(cfg, is_train)
    jitter = large_scale_jitter(lsj.SIZE, lsj.MIN_SCALE, lsj.MAX_SCALE, flip)
    return kind(cfg, is_train=True, augmentations=jitter, recompute_boxes=cfg.MODEL.MASK_ON)


class SeededStream(Dataset):
    """A training set whose random augmentation depends on the seed and the position alone."""

    def __init__(
        self, records: Sequence[dict], mapper: Callable[[dict], dict | None], seed: int
    ) -> None:
        self.records = DatasetFromList(list(records), copy=False)  # serialized: always new copies
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Return the input at ``position`` of the run, made from image ``index``.

        Where the mapper returns None, another image is drawn, as in Detectron2.
        """
        position, index = key
        seed_everything(self.seed, position, 0)
        sample = None
        while sample is None:
            record = self.records[index]
            try:
                sample = self.mapper(record)
            except Exception as error:  # decoders and augmentation fail in any way
                raise UserError(
                    f"training image {record.get('file_name')} can't be read or used: "
                    f"{first_line(error)}"
                ) from error
            index = random.randrange(len(self.records))
        return sample


class PositionedSampler(Sampler):
    """Pairs of position in the training run and index, from one of Detectron2's endless samplers.

    ``start`` is the number of this process's indices that were used before.
    """

    def __init__(self, sampler: Sampler, start: int) -> None:
        self.sampler, self.start = sampler, start
        self.rank, self.world = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for local, index in itertools.islice(enumerate(self.sampler), self.start, None):
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
    """Build the loader of training batches, the same from any iteration on in every run.

    In place of Detectron2's ``build_detection_train_loader``, without aspect-ratio grouping: the
    backbones run images of unequal size without waste.

    Args:
        dataset: Detectron2's dataset dicts.
        mapper: Makes the model's input from a record.
        total_batch_size: Over all processes, a multiple of their number.
        sampler: Endless and seeded; None shuffles by ``seed``.
        num_workers: Worker processes of each process.
        seed: Of the order and of augmentation, from 0.
        start_iter: Iterations that were trained before.
    """
    world = comm.get_world_size()
    sampler = sampler or TrainingSampler(len(dataset), seed=seed)
    return build_batch_data_loader(
        SeededStream(dataset, mapper, seed),
        PositionedSampler(sampler, start_iter * total_batch_size // world),
        total_batch_size,
        num_workers=num_workers,
        seed=seed,  # else starting the workers draws from the generator, once per run
    )


def loader_settings(
    cfg: CfgNode, seed: int, records: Sequence[dict] | None = None
) -> dict[str, Any]:
    """Return the arguments of :func:`build_train_loader` that a YAML config describes.

    ``records`` are those of the training images; None reads them.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    mapper = build_mapper(cfg, is_train=True)
    with naming_datasets(cfg.DATASETS.TRAIN):
        settings = _train_loader_from_config(cfg, mapper, dataset=records)
    del settings["aspect_ratio_grouping"]
    return {**settings, "seed": seed}


register_sample_data()
