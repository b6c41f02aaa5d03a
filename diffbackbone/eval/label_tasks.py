"""Options of the label-efficiency grid, and the measurement of a cell for each task."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffbackbone import UNet, UNetConfig, load_checkpoint, sample_data
from diffbackbone.cli import CONFIGS, end_with_parent, find_config
from diffbackbone.eval import classify
from diffbackbone.eval.data import ImageFolder, choose_subset
from diffbackbone.eval.features import FeatureCache, FeatureSpec, open_caches
from diffbackbone.eval.knn import KnnConfig
from diffbackbone.eval.options import DataOptions, build_backbone
from diffbackbone.eval.probe import Labels, measure_tap
from diffbackbone.eval.recipes import RECIPES
from diffbackbone.sample_data.folder import write_folder
from diffbackbone.saving import save_safetensors
from diffbackbone.utils import RandomStream, UserError, atomic_write, write_json, write_text

DIGIT_SIZE = (0.6, 0.8)
"""Size of the digit in a scene of one digit, as a share of the scene's side."""
HEAD_POOL = 8
"""Height and width that maps are pooled to at most."""
NEIGHBORS, WIDTH = 5, 128
"""Neighbors of kNN, and width of the heads' tokens."""
_FIRST_DIGIT_SCENE = 1_000_000  # scenes of several digits count from 0

TaskName = Literal["knn", "linear", "attention", "difformer", "difffeed", "upernet", "maskrcnn"]
WeightsName = Literal["pretrained", "random", "initial"]


@dataclasses.dataclass(kw_only=True)
class LabelEfficiencyConfig:
    """Compare pretrained and random features of a frozen network with few labels, over many tasks.

    With --data the classification tasks are on your own images, and any network serves. --preset
    heads compares kNN and all heads on plain handwritten digits. OUT gets results.jsonl (one line
    per finished cell), summary.md (means, standard deviations and differences paired by seed) and a
    picture for each task. Run the same command again to continue a run that was stopped.
    """

    out: Path = Path("work_dirs/label_efficiency")
    """Folder of the grid."""
    preset: Literal["grid", "heads"] = "grid"
    """Sets the defaults of the other options."""
    data: Path | None = None
    """Folder with train/<class>/ and val/<class>/; default: made images of digits. UperNet and Mask
    R-CNN are always on made scenes."""
    checkpoint: str | None = None
    """Pretrained weights; networks such as timm:resnet50 bring their own."""
    unet: str | None = None
    """Network; default: that of a .safetensors checkpoint, else tiny. DifFeed, UperNet, Mask R-CNN
    and --weights initial need one of guided-diffusion."""
    tasks: tuple[TaskName, ...] = (
        "knn", "linear", "attention", "difformer", "difffeed", "upernet", "maskrcnn"
    )  # fmt: skip
    """The last two are on scenes of several digits, the others on images of one digit, or on DATA.
    """
    weights: tuple[WeightsName, ...] = ("pretrained", "random")
    """random: drawn, also where guided-diffusion starts at zero; of timm, as before training.
    initial: as before training."""
    labels: tuple[float, ...] = (1.0, 0.1, 0.01)
    """Shares of the labels; a smaller share is part of a larger one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the labels, random weights, heads and the order of the images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where classification tasks compute."""
    images: Literal["scenes", "scans"] = "scenes"
    """Images of one digit: on photographs, or scans on black."""
    scenes: int = 4000
    """Training scenes of several digits; there are a twentieth as many for validation."""
    digits: int = 10_000
    """Training scenes of one digit; there are a tenth as many for validation."""
    image_size: int = 32
    """Height and width of the images that are classified."""
    tap: tuple[int, int] = (300, 33)
    """Timestep and block of kNN, linear probe, attention and DifFeed; tools/sweep.py finds the
    best. The timestep is that of the scenes too."""
    random_tap: tuple[int, int] = (150, 30)
    """The same for weights that are not pretrained."""
    pool: int = 4
    """Height and width that linear probe and kNN pool the map to."""
    timesteps: tuple[int, ...] = (150, 300, 450)
    """Timesteps of the DifFormer head."""
    blocks: tuple[int, ...] = (12, 30, 33)
    """Blocks of the DifFormer head."""
    steps: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"attention": 400, "difformer": 300, "difffeed": 120}
    )
    """Least number of training steps of each head."""
    upernet: str = "upernet_gd_probe_sample.py"
    """Config of the UperNet."""
    upernet_options: tuple[str, ...] = ()
    """Changes in it: KEY=VALUE."""
    maskrcnn: str = "mask_rcnn_gd_probe_sample.yaml"
    """Config of the Mask R-CNN."""
    maskrcnn_options: tuple[str, ...] = ()
    """Changes in it: KEY VALUE."""


PRESETS = {
    "grid": LabelEfficiencyConfig(),
    "heads": LabelEfficiencyConfig(
        preset="heads",
        out=Path("work_dirs/compare"),
        tasks=("knn", "linear", "attention", "difformer", "difffeed"),
        weights=("random",),
        labels=(1.0,),
        seeds=(0,),
        images="scans",
        image_size=64,
        tap=(150, 24),
        random_tap=(150, 24),
        timesteps=(90, 150, 300),
        blocks=(19, 24, 30),
        steps={"attention": 440, "difformer": 430, "difffeed": 425},
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement: a task with some weights, a share of the labels and a seed."""

    task: str
    weights: str
    labels: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        return f"{self.task}-{self.weights}-{self.labels:g}-{self.seed}"


def config_file(config: LabelEfficiencyConfig, task: str) -> Path:
    """Return the config of the UperNet or Mask R-CNN."""
    folder, suffix = {"upernet": ("mmseg", ".py"), "maskrcnn": ("detectron2", ".yaml")}[task]
    return Path(find_config(getattr(config, task), CONFIGS / folder, [suffix])).resolve()


def make_digit_scenes(out: Path, counts: Mapping[str, int], size: int) -> None:
    """Write scenes of one digit, ``SPLIT/CLASS/*.png``, unless the folder has them.

    Training and validation share neither a scan nor a part of a photograph.
    """
    look = sample_data.SceneConfig(size, size, min_digits=1, max_digits=1, digit_size=DIGIT_SIZE)
    pools = sample_data.load_pools(0)

    def write(folder: Path) -> None:
        for split, count in counts.items():
            for index in range(count):
                number = _FIRST_DIGIT_SCENE + index
                scene = sample_data.make_scene(pools[split], look, 0, split, number)
                digit = scene.digits[0].digit
                path = folder / split / f"{digit}_{sample_data.DIGIT_NAMES[digit]}/{index:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(scene.image).save(path)

    write_folder(out, "digits.json", {**counts, "size": size}, write)


def write_weights(path: Path, kind: str, config: UNetConfig, source: str | None, seed: int) -> None:
    """Write a U-Net's weights as safetensors, unless the file exists.

    The kind is ``"pretrained"``, from a checkpoint; ``"initial"``, as before training; or
    ``"random"``, which also draws the layers that guided-diffusion starts at zero.
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


class LabelEfficiencyRunner:
    """Makes what the cells of a grid need, once, and measures them."""

    def __init__(self, config: LabelEfficiencyConfig, unet: Any) -> None:
        self.config = config
        self.unet = unet
        self.root = config.data or config.out / "digits"
        self.ours = type(unet) is UNetConfig
        self.val_scenes = math.ceil(config.scenes / 20)
        needs = {"difffeed", "upernet", "maskrcnn"} & set(config.tasks)
        needs |= {"initial"} & set(config.weights)
        if not hasattr(unet, "pretrained"):  # as networks of timm have
            needs |= {"random"} & set(config.weights)
        if needs and not self.ours:
            raise UserError(
                f"--unet {config.unet}: {', '.join(sorted(needs))} can only be had with a U-Net of "
                "guided-diffusion (random also with a network of timm)"
            )
        if self.ours and config.checkpoint is None and "pretrained" in config.weights:
            raise UserError(
                "--weights pretrained needs --checkpoint; without it use --weights random"
            )

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return a cell's ``score`` in %, ``metrics``, ``train_images`` and ``val_images``."""
        folder = self.folder(cell)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
        result = getattr(self, TASKS[cell.task].method)(cell)
        for path in (*folder.rglob("*.pt"), *folder.rglob("*.pth")):
            path.unlink()
        return result

    def folder(self, cell: Cell) -> Path:
        """Return the folder of a cell's files."""
        return (self.config.out / "cells" / cell.name).resolve()

    def weights(self, cell: Cell) -> Path:
        """Return the file of a cell's weights, of a U-Net of guided-diffusion."""
        path = self.cache(cell).with_suffix(".safetensors")
        write_weights(path, cell.weights, self.unet, self.config.checkpoint, cell.seed)
        return path

    def cache(self, cell: Cell) -> Path:
        """Return the folder of the features that a cell's weights give."""
        name = cell.weights if cell.weights == "pretrained" else f"{cell.weights}-{cell.seed}"
        return (self.config.out / "cache" / name).resolve()

    def network(self, cell: Cell) -> dict[str, Any]:
        """Return the options that describe a cell's network, taps and images."""
        timesteps, blocks = self.taps(cell)
        found = {"unet": self.config.unet, "checkpoint": self.config.checkpoint}
        if self.ours:
            found = dict.fromkeys(found, str(self.weights(cell)))
        elif cell.weights == "random":
            name = self.config.unet
            fields = json.loads(name) if name.lstrip().startswith("{") else {"preset": name}
            found = {"unet": json.dumps({**fields, "pretrained": False}), "checkpoint": None}
        return {
            **found, "timesteps": timesteps, "blocks": blocks,
            "noise": "fixed" if getattr(self.unet, "timed", True) else "none",
            "data": self.root,
            "image_size": self.config.image_size, "device": self.config.device,
        }  # fmt: skip

    def taps(self, cell: Cell) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the timesteps and blocks of a cell's features."""
        if cell.task == "difformer":
            return self.config.timesteps, self.config.blocks
        t, b = self.config.tap if cell.weights == "pretrained" else self.config.random_tap
        return (t,), (b,)

    @functools.cached_property
    def images(self) -> dict[str, ImageFolder]:
        """The training and validation images that are classified."""
        config = self.config
        if config.data is None and config.images == "scans":
            sample_data.make_digits(self.root, size=config.image_size)
        elif config.data is None:
            counts = {"train": config.digits, "val": math.ceil(config.digits / 10)}
            make_digit_scenes(self.root, counts, config.image_size)
        train, val = DataOptions(data=self.root).list_folders(self.unet.in_channels)
        return {"train": train, "val": val}

    def labeled(self, cell: Cell) -> np.ndarray:
        """Return the training images that keep their labels, balanced over the classes."""
        return choose_subset(self.images["train"], f"{cell.labels:g}", cell.seed)

    def features(self, cell: Cell) -> list[FeatureCache]:
        """Return the features of the training and validation images at the cell's taps."""
        cache = self.cache(cell) / ("difformer" if cell.task == "difformer" else "tap")
        in_file = cell.weights == "pretrained" or self.ours
        seed = 0 if in_file else cell.seed  # of random weights
        options = KnnConfig(**self.network(cell), seed=seed, batch_size=50, cache=cache)
        state = options.start()
        spec = FeatureSpec.of(options, HEAD_POOL, state)
        return open_caches(options, self.images, build_backbone(options), spec, state)

    def probe(self, cell: Cell) -> dict[str, Any]:
        """Fit a linear probe, or find nearest neighbors."""
        rows, (train, val) = self.labeled(cell), self.features(cell)
        draw = Labels.draw(cell.seed, rows, train.labels[rows])
        (tap,) = train.taps
        record = measure_tap(train, val, tap, self.config.pool, draw, [cell.task], NEIGHBORS)
        metrics = {name: record[name] for name in ("features", "l2", "loss") if name in record}
        return _result(record[cell.task], metrics, len(rows), len(val))

    def head(self, cell: Cell) -> dict[str, Any]:
        """Train a head; DifFeed runs the U-Net, the others read cached features."""
        config, count = self.config, len(self.labeled(cell))
        batch = {"attention": 64, "difformer": 32, "difffeed": 16}[cell.task]
        epochs = math.ceil(config.steps[cell.task] / math.ceil(count / batch))
        options = dataclasses.replace(
            RECIPES["digits"],
            **self.network(cell),
            out=self.folder(cell),
            head="difformer" if cell.task == "difformer" else "attention",
            feedback="bottleneck" if cell.task == "difffeed" else "none",
            pool=HEAD_POOL,
            width=WIDTH,
            lr=(1e-3,),
            batch_size=batch,
            epochs=epochs,
            step=math.ceil(epochs / 2),
            eval_every=epochs,
            subset=f"{cell.labels:g}",
            seed=cell.seed,
            workers=0,
            log_with="none",
        )
        caches = None if cell.task == "difffeed" else self.features(cell)
        with (
            open(self.folder(cell) / "log.txt", "w", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
        ):
            found = classify.run(options, caches)
        metrics = {"epochs": epochs, "trained_parameters": found["trained_parameters"]}
        return _result(found["val"]["top1"], metrics, count, found["val"]["images"])

    def scenes(self) -> Path:
        """Return the folder of the scenes of several digits."""
        root = self.config.out / "scenes"
        sample_data.make_sample_data(
            root, train=self.config.scenes, val=self.val_scenes, unlabelled=0
        )
        return root.resolve()

    def upernet(self, cell: Cell) -> dict[str, Any]:
        """Train a UperNet by ``tools/mmseg_train.py``."""
        config, folder = self.config, self.folder(cell)
        data = self.scenes() / "ADEChallengeData2016"
        names = sorted(path.stem for path in (data / "images" / "training").glob("*.jpg"))
        chosen = [names[i] for i in choose_scenes(len(names), cell.labels, cell.seed)]
        write_text(folder / "labeled.txt", "".join(f"{name}\n" for name in chosen))
        dataset = {"data_root": str(data)}
        loader = {"dataset": dataset, "num_workers": 0, "persistent_workers": False}
        labeled = {"ann_file": str(folder / "labeled.txt"), **dataset}
        backbone = {
            "unet": {"_delete_": True, **dataclasses.asdict(self.unet)},
            "timestep": self.taps(cell)[0][0],
            "init_cfg": {"type": "Pretrained", "checkpoint": str(self.weights(cell))},
        }
        changes = {
            "_base_": str(config_file(config, "upernet")),
            "model": {"backbone": backbone},
            "train_dataloader": {**loader, "dataset": labeled},
            "val_dataloader": loader,
            "test_dataloader": loader,
            "randomness": {"seed": cell.seed},
            "work_dir": str(folder / "run"),
        }
        text = "".join(f"{name} = {value!r}\n" for name, value in changes.items())
        write_text(folder / "config.py", text)
        options = ("--cfg-options", *config.upernet_options) if config.upernet_options else ()
        self._start(cell, "mmseg-train", folder / "config.py", *options)
        (path,) = (folder / "run").glob("*/vis_data/scalars.json")
        found = _last(path, "mIoU")
        metrics = {name: found[name] for name in ("mAcc", "aAcc") if name in found}
        return _result(found["mIoU"] / 100, metrics, len(chosen), self.val_scenes)

    def maskrcnn(self, cell: Cell) -> dict[str, Any]:
        """Train a Mask R-CNN by ``tools/train_net.py``."""
        config, folder = self.config, self.folder(cell)
        chosen = choose_scenes(config.scenes, cell.labels, cell.seed)
        write_coco_subset(self.scenes() / "coco", folder / "data" / "coco", chosen)
        changes = {
            "MODEL.DIFFUSION.CHECKPOINT": self.weights(cell),
            "MODEL.DIFFUSION.TIMESTEP": self.taps(cell)[0][0],
            "SEED": cell.seed + 1,  # Detectron2 draws a random seed for 0
            "OUTPUT_DIR": folder / "run",
        }
        for name, value in dataclasses.asdict(self.unet).items():
            if value is not None:
                changes[f"MODEL.DIFFUSION.UNET_OPTIONS.{name}"] = value
        words = [word for pair in changes.items() for word in pair] + [*config.maskrcnn_options]
        path = config_file(config, "maskrcnn")
        data = {"DIFFBACKBONE_SAMPLE_DATA": str(folder / "data")}
        self._start(cell, "train-net", "--config", path, *words, **data)
        found = _last(folder / "run" / "metrics.json", "bbox/AP")
        metrics = {}
        for kind, name in (("box", "bbox"), ("mask", "segm")):
            for metric in ("AP", "AP50"):
                value = found[f"{name}/{metric}"]
                metrics[f"{kind} {metric}"] = value if math.isfinite(value) else 0.0
        return _result(metrics.pop("box AP") / 100, metrics, len(chosen), self.val_scenes)

    def _start(self, cell: Cell, command: str, *words: Any, **environment: str) -> None:
        """Run a ``diffbackbone`` command to its end; it ends when this process does."""
        log = self.folder(cell) / "log.txt"
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, "-m", "diffbackbone", command, *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                preexec_fn=end_with_parent,
            )
        if done.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            end = "\n  ".join(last)
            raise UserError(f"{command} failed ({done.returncode}); {log} ends with\n  {end}")


def _result(score: float, metrics: Mapping[str, Any], train: int, val: int) -> dict[str, Any]:
    return {"score": 100 * score, "metrics": metrics, "train_images": train, "val_images": val}


def _last(path: Path, key: str) -> dict[str, Any]:
    """Return the last record of a file of JSON lines that has a key."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [record for record in records if key in record][-1]


class Task(NamedTuple):
    """What measures a task, and how it is reported: title, score and further metrics."""

    method: str
    title: str
    score: str
    metrics: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    "knn": Task("probe", "kNN", "top-1"),
    "linear": Task("probe", "linear probe", "top-1"),
    "attention": Task("head", "attention head", "top-1"),
    "difformer": Task("head", "DifFormer head", "top-1"),
    "difffeed": Task("head", "DifFeed, attention head", "top-1"),
    "upernet": Task("upernet", "UperNet", "mIoU", ("mAcc",)),
    "maskrcnn": Task("maskrcnn", "Mask R-CNN", "box AP", ("box AP50", "mask AP", "mask AP50")),
}
