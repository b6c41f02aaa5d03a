"""The measurement of a cell of the label-efficiency grid, for each task."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffbackbone import UNet, UNetConfig, load_checkpoint
from diffbackbone.eval import classify
from diffbackbone.eval.data import ImageFolder, choose_subset, list_folder
from diffbackbone.eval.features import FeatureCache, FeatureSpec, open_features
from diffbackbone.eval.label_config import Cell, LabelEfficiencyConfig
from diffbackbone.eval.options import BackboneOptions, build_backbone
from diffbackbone.eval.probe import Labels, ProbeEvaluator
from diffbackbone.eval.recipes import RECIPES
from diffbackbone.sample_data import (
    DIGIT_NAMES,
    SceneConfig,
    load_pools,
    make_digits,
    make_sample_data,
    make_scene,
)
from diffbackbone.saving import save_safetensors
from diffbackbone.utils import RandomStream, UserError, atomic_write, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
DIGIT_SIZE = (0.6, 0.8)
"""Size of the digit in a scene of one digit, as a share of the scene's side."""
_FIRST_DIGIT_SCENE = 1_000_000  # scenes of several digits count from 0


# ---------------------------------------------------------------------------------- data, weights


def make_digit_scenes(out: Path, counts: Mapping[str, int], size: int) -> None:
    """Write scenes of one digit, ``SPLIT/CLASS/*.png``, unless the folder exists.

    Training and validation share neither a scan nor a part of a photograph.
    """
    if out.is_dir():
        return
    look = SceneConfig(size, size, min_digits=1, max_digits=1, digit_size=DIGIT_SIZE)
    pools = load_pools(0)
    partial = out.with_name(f".{out.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    for split, count in counts.items():
        for index in range(count):
            scene = make_scene(pools[split], look, 0, split, _FIRST_DIGIT_SCENE + index)
            digit = scene.digits[0].digit
            folder = partial / split / f"{digit}_{DIGIT_NAMES[digit]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.image).save(folder / f"{index:06d}.png")
    partial.replace(out)


def write_weights(path: Path, kind: str, config: UNetConfig, source: str | None, seed: int) -> None:
    """Write a U-Net's weights as safetensors, unless the file exists.

    Args:
        path: The file.
        kind: pretrained (read from ``source``), random (drawn, also the layers that start at zero)
            or initial (drawn as before training: residual branches end in zeros).
        config: The architecture.
        source: The checkpoint of pretrained weights.
        seed: Seed of random weights.
    """
    if path.is_file():
        return
    torch.manual_seed(seed)
    unet = UNet(config)
    if kind == "pretrained":
        load_checkpoint(unet, str(source))
    for module in unet.modules() if kind == "random" else ():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) and not module.weight.any():
            module.reset_parameters()
    atomic_write(path, lambda partial: save_safetensors(partial, unet.state_dict(), config))


def choose_scenes(count: int, share: float, seed: int) -> list[int]:
    """Return the numbers of the scenes that keep their labels, at least one, ascending from 0."""
    order = RandomStream.SCENES.generator(seed).permutation(count)
    return sorted(order[: max(1, round(share * count))].tolist())


def write_coco_subset(source: Path, target: Path, chosen: Sequence[int]) -> None:
    """Write COCO data with the chosen training scenes; images and validation are linked."""
    (target / "annotations").mkdir(parents=True)
    for name in ("train2017", "val2017", "annotations/instances_val2017.json"):
        (target / name).symlink_to((source / name).resolve())
    name = "annotations/instances_train2017.json"
    content = json.loads((source / name).read_text(encoding="utf-8"))
    images = sorted(content["images"], key=lambda image: image["id"])
    content["images"] = [images[number] for number in chosen]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    write_json(target / name, content, indent=None)


# ------------------------------------------------------------------------------------- the runner


class LabelEfficiencyRunner:
    """Makes what the cells need, once, and measures them.

    Args:
        config: Options of the grid; with ``checkpoint`` where a cell has pretrained weights.
        unet: Architecture of the U-Net.
    """

    def __init__(self, config: LabelEfficiencyConfig, unet: UNetConfig) -> None:
        self.config = config
        self.unet = unet

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell from its beginning.

        Returns:
            ``score`` in %, ``metrics``, ``train_images`` and ``val_images``.

        Raises:
            UserError: It failed; the message says where its log is.
        """
        folder = self.folder(cell)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
        result = TASKS[cell.task].run(self, cell)
        for path in (*folder.rglob("*.pt"), *folder.rglob("*.pth")):
            path.unlink()
        return result

    def folder(self, cell: Cell) -> Path:
        """Return the folder of a cell's files."""
        return self.config.out / "cells" / cell.name

    def weights(self, cell: Cell) -> Path:
        """Return the file of a cell's weights."""
        name = cell.weights if cell.weights == "pretrained" else f"{cell.weights}-{cell.seed}"
        path = self.config.out / "weights" / f"{name}.safetensors"
        write_weights(path, cell.weights, self.unet, self.config.checkpoint, cell.seed)
        return path

    def taps(self, cell: Cell) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the timesteps and blocks of a cell's features."""
        if cell.task == "difformer":
            return self.config.timesteps, self.config.blocks
        t, b = self.config.tap if cell.weights == "pretrained" else self.config.random_tap
        return (t,), (b,)

    # -- classification

    def digits(self) -> tuple[ImageFolder, ImageFolder]:
        """Return training and validation images of one digit."""
        config, root = self.config, self.config.out / "digits"
        if config.images == "scans":
            make_digits(root, size=config.image_size)
        else:
            counts = {"train": config.digits, "val": config.val_digits}
            make_digit_scenes(root, counts, config.image_size)
        train = list_folder(root / "train")
        return train, list_folder(root / "val", train.classes)

    def labeled(self, cell: Cell) -> np.ndarray:
        """Return the training digits that keep their labels, balanced over the classes."""
        train, _ = self.digits()
        paths = set(choose_subset(train, f"{cell.labels:g}", cell.seed).listing.paths)
        return np.flatnonzero([path in paths for path in train.listing.paths])

    def features(self, cell: Cell) -> tuple[FeatureCache, FeatureCache]:
        """Return the features of the training and validation digits at the cell's taps."""
        config, weights = self.config, self.weights(cell)
        timesteps, blocks = self.taps(cell)
        options = BackboneOptions(
            unet=str(weights), checkpoint=str(weights), timesteps=timesteps, blocks=blocks,
            device=config.device,
        )  # fmt: skip
        state, backbone = options.start(), build_backbone(options)
        compute = options.compute_dtype(state.device)
        spec = FeatureSpec(
            timesteps, blocks, config.image_size, config.cache_pool, compute=compute, batch=50
        )
        name = "difformer" if cell.task == "difformer" else "tap"
        train, val = (
            open_features(
                config.out / "cache" / weights.stem / name / images.root.name, images, backbone,
                spec, state,
            )
            for images in self.digits()
        )  # fmt: skip
        return train, val

    def probe(self, cell: Cell) -> dict[str, Any]:
        """Fit a linear probe, or find nearest neighbors."""
        config, rows, (train, val) = self.config, self.labeled(cell), self.features(cell)
        draw = Labels.draw(cell.seed, rows, train.labels[rows], share=0.2)
        k = min(config.k, len(rows))
        evaluator = ProbeEvaluator(train, val, [draw], [cell.task], config.l2, k)
        (tap,) = train.shapes
        (record,) = evaluator.measure(tap, [(config.pool, cell.seed)])
        metrics = {name: record[name] for name in ("features", "l2", "loss") if name in record}
        return _result(record[cell.task], metrics, len(rows), len(val.listing))

    def head(self, cell: Cell) -> dict[str, Any]:
        """Train a head; DifFeed runs the U-Net, the others read cached features."""
        config, weights, count = self.config, self.weights(cell), len(self.labeled(cell))
        batch = {"attention": 64, "difformer": 32, "difffeed": 16}[cell.task]
        epochs = math.ceil(config.steps[cell.task] / math.ceil(count / batch))
        timesteps, blocks = self.taps(cell)
        options = dataclasses.replace(
            RECIPES["digits"],
            data=config.out / "digits",
            out=self.folder(cell),
            unet=str(weights),
            checkpoint=str(weights),
            head="difformer" if cell.task == "difformer" else "attention",
            feedback="bottleneck" if cell.task == "difffeed" else "none",
            timesteps=timesteps,
            blocks=blocks,
            image_size=config.image_size,
            pool=config.cache_pool,
            width=config.width,
            lr=(1e-3,),
            batch_size=batch,
            epochs=epochs,
            step=math.ceil(epochs / 2),
            eval_every=epochs,
            subset=f"{cell.labels:g}",
            seed=cell.seed,
            device=config.device,
            workers=0,
            log_with="none",
        )
        caches = None if cell.task == "difffeed" else self.features(cell)
        with _log(self.folder(cell) / "log.txt"):
            found = classify.run(options, caches)
        metrics = {
            "top5": 100 * found["val"]["top5"],
            "epochs": epochs,
            "trained_parameters": found["trained_parameters"],
        }
        return _result(found["val"]["top1"], metrics, count, found["val"]["images"])

    # -- dense tasks

    def scenes(self) -> Path:
        """Return the folder of the scenes of several digits."""
        config, root = self.config, self.config.out / "scenes"
        make_sample_data(root, train=config.scenes, val=config.val_scenes, unlabelled=0)
        return root

    def upernet(self, cell: Cell) -> dict[str, Any]:
        """Train a UperNet by ``tools/mmseg_train.py``."""
        config, folder = self.config, self.folder(cell)
        data = (self.scenes() / "ADEChallengeData2016").resolve()
        names = sorted(path.stem for path in (data / "images" / "training").glob("*.jpg"))
        chosen = [names[i] for i in choose_scenes(len(names), cell.labels, cell.seed)]
        write_text(folder / "labeled.txt", "".join(f"{name}\n" for name in chosen))
        cfg = read_mmseg_config(config.upernet)
        changes = {
            "model.backbone.unet": {"_delete_": True, **dataclasses.asdict(self.unet)},
            "model.backbone.timestep": self.taps(cell)[0][0],
            "model.backbone.init_cfg": {
                "type": "Pretrained", "checkpoint": str(self.weights(cell).resolve())
            },
            "train_dataloader.dataset.ann_file": str((folder / "labeled.txt").resolve()),
            "randomness": {"seed": cell.seed},
            "work_dir": str(folder / "run"),
        }  # fmt: skip
        for split in ("train", "val", "test"):
            changes[f"{split}_dataloader.dataset.data_root"] = str(data)
            changes[f"{split}_dataloader.num_workers"] = 0
            changes[f"{split}_dataloader.persistent_workers"] = False
        words = config.upernet_options
        changes.update(zip(words[::2], map(json.loads, words[1::2])))
        cfg.merge_from_dict(changes)
        cfg.dump(str(folder / "config.py"))
        self._start(cell, "mmseg_train.py", folder / "config.py")
        (path,) = (folder / "run").glob("*/vis_data/scalars.json")
        found = _last(path, "mIoU")
        metrics = {name: found[name] for name in ("mAcc", "aAcc") if name in found}
        return _result(found["mIoU"] / 100, metrics, len(chosen), config.val_scenes)

    def maskrcnn(self, cell: Cell) -> dict[str, Any]:
        """Train a Mask R-CNN by ``tools/train_net.py``."""
        config, folder = self.config, self.folder(cell)
        chosen = choose_scenes(config.scenes, cell.labels, cell.seed)
        write_coco_subset(self.scenes() / "coco", folder / "data" / "coco", chosen)
        changes = {
            "MODEL.DIFFUSION.CHECKPOINT": self.weights(cell).resolve(),
            "MODEL.DIFFUSION.TIMESTEP": self.taps(cell)[0][0],
            "SEED": cell.seed + 1,  # 0 would be drawn anew
            "OUTPUT_DIR": folder / "run",
        }
        for name, value in dataclasses.asdict(self.unet).items():
            if value is not None:
                changes[f"MODEL.DIFFUSION.UNET_OPTIONS.{name}"] = value
        words = [word for pair in changes.items() for word in pair] + [*config.maskrcnn_options]
        data = {"DIFFBACKBONE_SAMPLE_DATA": str((folder / "data").resolve())}
        self._start(cell, "train_net.py", "--config", config.maskrcnn, *words, **data)
        found = _last(folder / "run" / "metrics.json", "bbox/AP")
        names = {"box AP": "bbox/AP", "box AP50": "bbox/AP50", "mask AP": "segm/AP"}
        names["mask AP50"] = "segm/AP50"
        metrics = {k: found[v] if math.isfinite(found[v]) else 0.0 for k, v in names.items()}
        return _result(metrics.pop("box AP") / 100, metrics, len(chosen), config.val_scenes)

    def _start(self, cell: Cell, script: str, *words: Any, **environment: str) -> None:
        """Run a script of ``tools`` to its end; it ends when this process does."""
        log = self.folder(cell) / "log.txt"
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, str(ROOT / "tools" / script), *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        if done.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            end = "\n  ".join(last)
            raise UserError(f"{script} failed ({done.returncode}); {log} ends with\n  {end}")


def read_mmseg_config(name: str) -> Any:
    """Return a config of ``configs/mmseg``."""
    from mmengine.config import Config

    return Config.fromfile(ROOT / "configs" / "mmseg" / name, import_custom_modules=False)


def read_detectron2_config(name: str) -> Any:
    """Return a config of ``configs/detectron2`` with its bases, without Detectron2's defaults."""
    from detectron2.config import CfgNode

    return CfgNode.load_yaml_with_base(str(ROOT / "configs" / "detectron2" / name))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _result(score: float, metrics: Mapping[str, Any], train: int, val: int) -> dict[str, Any]:
    return {"score": 100 * score, "metrics": metrics, "train_images": train, "val_images": val}


def _last(path: Path, key: str) -> dict[str, Any]:
    """Return the last record of a file of JSON lines that has a key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for record in map(json.loads, reversed(lines)):
        if key in record:
            return record
    raise UserError(f"{path} has no {key}: the run was not evaluated")


@contextlib.contextmanager
def _log(path: Path) -> Iterator[None]:
    """Write what is printed to a file."""
    with open(path, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


@dataclass(frozen=True)
class Task:
    """A kind of measurement.

    Attributes:
        title: Its name in reports.
        score: What is measured.
        run: Measures a cell.
        read: Reads the config of the script that it starts, if any.
        metrics: Further metrics in reports.
    """

    title: str
    score: str
    run: Callable[[LabelEfficiencyRunner, Cell], dict[str, Any]]
    read: Callable[[str], Any] | None = None
    metrics: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    "knn": Task("kNN", "top-1", LabelEfficiencyRunner.probe),
    "linear": Task("linear probe", "top-1", LabelEfficiencyRunner.probe),
    "attention": Task("attention head", "top-1", LabelEfficiencyRunner.head),
    "difformer": Task("DifFormer head", "top-1", LabelEfficiencyRunner.head),
    "difffeed": Task("DifFeed, attention head", "top-1", LabelEfficiencyRunner.head),
    "upernet": Task(
        "UperNet", "mIoU", LabelEfficiencyRunner.upernet, read_mmseg_config, ("mAcc",)
    ),
    "maskrcnn": Task(
        "Mask R-CNN", "box AP", LabelEfficiencyRunner.maskrcnn, read_detectron2_config,
        ("box AP50", "mask AP", "mask AP50"),
    ),
}  # fmt: skip
