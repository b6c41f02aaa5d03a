"""Data: registered sample data, checks before training, and a resumable stream of batches."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import torch
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
from detectron2.data.datasets import load_coco_json, load_sem_seg
from detectron2.data.datasets.coco_panoptic import merge_to_panoptic
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Dataset, Sampler

from diffbackbone.sources import first_line
from diffbackbone.utils import UserError, seed_everything

SAMPLE_ROOT = "DIFFBACKBONE_SAMPLE_DATA"
"""Environment variable: folder of ``tools/make_sample_data.py``; ``data/sample`` if unset."""
SAMPLE_CLASSES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
)  # fmt: skip
SAMPLE_DATASETS = (
    "diffbackbone_sample_train",
    "diffbackbone_sample_val",
    "diffbackbone_sample_train_panoptic_separated",
    "diffbackbone_sample_val_panoptic_separated",
)
"""Names of the sample data in Detectron2's catalogs."""


def register_sample_data(root: str | os.PathLike[str] | None = None) -> None:
    """Register the sample data in ``root`` (by default :data:`SAMPLE_ROOT`), replacing older."""
    coco = Path(root or os.environ.get(SAMPLE_ROOT, "data/sample")) / "coco"
    for name in SAMPLE_DATASETS:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    for split in ("train", "val"):
        _register_sample_split(f"diffbackbone_sample_{split}", coco, f"{split}2017")


def _register_sample_split(name: str, coco: Path, split: str) -> None:
    panoptic = f"{name}_panoptic_separated"
    images = str(coco / split)
    instances = str(coco / "annotations" / f"instances_{split}.json")
    stuff = str(coco / f"panoptic_stuff_{split}")
    things = {
        "json_file": instances,
        "image_root": images,
        "thing_classes": list(SAMPLE_CLASSES),
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(SAMPLE_CLASSES))},
    }
    DatasetCatalog.register(name, lambda: load_coco_json(instances, images, name))
    MetadataCatalog.get(name).set(evaluator_type="coco", **things)
    DatasetCatalog.register(
        panoptic,
        lambda: merge_to_panoptic(
            load_coco_json(instances, images, panoptic), load_sem_seg(stuff, images)
        ),
    )
    MetadataCatalog.get(panoptic).set(
        evaluator_type="coco_panoptic_seg",
        panoptic_root=str(coco / f"panoptic_{split}"),
        panoptic_json=str(coco / "annotations" / f"panoptic_{split}.json"),
        sem_seg_root=stuff,
        ignore_label=255,
        stuff_classes=["things", "background"],
        stuff_dataset_id_to_contiguous_id={0: 0, 11: 1},
        **things,
    )


def check_datasets(names: Sequence[str]) -> None:
    """Check that datasets are registered and that their files exist."""
    missing = []
    for name in names:
        if name not in DatasetCatalog:
            missing.append(f"\n  {name}: not registered")
            continue
        meta = MetadataCatalog.get(name)
        keys = ["json_file", "image_root"]
        if meta.get("evaluator_type") in ("coco_panoptic_seg", "sem_seg"):
            keys.append("sem_seg_root")
        for path in map(meta.get, keys):
            if isinstance(path, str) and "://" not in path and not os.path.exists(path):
                missing.append(f"\n  {name}: {path}")
    if missing:
        raise UserError(
            f"data do not exist:{''.join(missing)}\nSet the environment variable "
            "DETECTRON2_DATASETS to the folder of Detectron2's datasets (now "
            f"{os.environ.get('DETECTRON2_DATASETS', 'datasets')}), {SAMPLE_ROOT} to that of the "
            "sample data (tools/make_sample_data.py)"
        )


def load_dicts(name: str) -> list[dict[str, Any]]:
    """Return the records of a dataset's images."""
    source = MetadataCatalog.get(name).get("json_file", "its files")
    try:
        dicts = DatasetCatalog.get(name)
    except Exception as error:  # a damaged file can fail in its reader in any way
        raise UserError(
            f"dataset {name!r}: {source} can't be read as annotations: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if not len(dicts):
        raise UserError(f"dataset {name!r} is empty: no images in {source}")
    return dicts


@contextlib.contextmanager
def naming_damaged(names: Sequence[str]) -> Iterator[None]:
    """Name the damaged dataset when reading several fails, by reading each alone."""
    try:
        yield
    except Exception:
        for name in names:
            load_dicts(name)
        raise


def check_classes(names: Sequence[str], key: str, count: int, kind: str) -> None:
    """Check the number of ``"thing_classes"`` or ``"stuff_classes"`` of datasets."""
    for name in names:
        classes = MetadataCatalog.get(name).get(kind)
        if classes is not None and len(classes) != count:
            raise UserError(f"{key} is {count}, but dataset {name!r} has {len(classes)} {kind}")


def load_train_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """Return the training images' records, filtered as the config says."""
    names = list(cfg.DATASETS.TRAIN)
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    with naming_damaged(names):
        return get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
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
    flips = {
        "horizontal": [T.RandomFlip()],
        "vertical": [T.RandomFlip(horizontal=False, vertical=True)],
        "none": [],
    }
    return [
        *flips[flip],
        T.ResizeScale(min_scale, max_scale, size, size),
        T.FixedSizeCrop((size, size), pad=False),
    ]


def build_train_mapper(cfg: CfgNode) -> DatasetMapper:
    """Build Detectron2's mapper, with large-scale jitter if ``INPUT.LSJ`` is enabled."""
    lsj = cfg.INPUT.LSJ
    if not lsj.ENABLED:
        return DatasetMapper(cfg, is_train=True)
    augmentations = large_scale_jitter(
        lsj.SIZE, lsj.MIN_SCALE, lsj.MAX_SCALE, cfg.INPUT.RANDOM_FLIP
    )
    return DatasetMapper(
        cfg, is_train=True, augmentations=augmentations, recompute_boxes=cfg.MODEL.MASK_ON
    )


class SeededStream(Dataset):
    """A training set whose random augmentation depends on the seed and the position alone.

    ``mapper`` makes the model's input from a record, or returns None to pick another image.
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
        """Return the input at ``position`` of the training run, made from image ``index``."""
        position, index = key
        seed_everything(self.seed, position, 0)
        for _ in range(100):
            record = self.records[index]
            name = record.get("file_name")
            try:
                sample = self.mapper(record)
            except Exception as error:  # decoders and augmentation fail in any way
                raise UserError(
                    f"training image {name} can't be read or used: {first_line(error)}"
                ) from error
            if sample is not None:
                return sample
            index = random.randrange(len(self.records))
        raise UserError(f"the mapper returned None for 100 images in a row, the last one {name}")


class PositionedSampler(Sampler):
    """Pairs of position in the training run and index, from one of Detectron2's endless samplers.

    ``start`` is the number of this process's indices that were used before.
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
    """Build the loader of training batches, the same from any iteration on in every run.

    In place of Detectron2's ``build_detection_train_loader``, without aspect-ratio grouping: the
    backbones run images of unequal size without waste.

    Args:
        dataset: Detectron2's dataset dicts.
        mapper: Makes the model's input from a record.
        total_batch_size: Over all processes, a multiple of their number.
        sampler: Endless and seeded; None shuffles by ``seed``.
        num_workers: Worker processes of each process.
        seed: From 0.
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


def loader_settings(cfg: CfgNode, records: Sequence[dict], seed: int) -> dict[str, Any]:
    """Return the arguments of :func:`build_train_loader` that a YAML config describes."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    settings = _train_loader_from_config(cfg, build_train_mapper(cfg), dataset=list(records))
    names = ("dataset", "mapper", "sampler", "total_batch_size", "num_workers")
    return {**{name: settings[name] for name in names}, "seed": seed}


register_sample_data()
