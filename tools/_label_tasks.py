"""What `label_efficiency.py` measures: its data, its weights and one runner for each task.

Every number comes from the project's own tools: the solver and the neighbours of ``sweep.py`` and
``knn.py``, the heads of ``train_classifier.py``, and ``mmseg_train.py`` and ``train_net.py`` as
processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _classification as common
import _common
import _detectron2
import numpy as np
import sweep
import torch
import train_classifier
from _classification import FeatureOptions, ImageFolder, Processes, ToolError
from PIL import Image
from torch import Tensor, nn

from diffbackbone import UNet, UNetConfig, load_checkpoint, sample_data
from diffbackbone.features import FeatureCache, Tap, weights_digest
from diffbackbone.saving import save_safetensors

TOOLS = Path(__file__).resolve().parent
WEIGHTS = {
    "pretrained": "of --checkpoint",
    "random": "drawn by the seed, the layers that start at zero filled",
    "initial": "drawn by the seed, as before training: residual branches end in zeros",
}
PRETRAINED = Path("weights") / "pretrained.safetensors"
"""Copy of the checkpoint, beside the results."""
_SCENES = 7  # of the subset of scenes, beside the seeds of _classification


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        task: One of :data:`TASKS`.
        weights: One of :data:`WEIGHTS`.
        labels: Share of the labels, above 0 and up to 1.
        seed: Draws the labels, random weights, heads and the order of the images.
    """

    task: str
    weights: str
    labels: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.task}-{self.weights}-{self.labels:g}-{self.seed}"


# ------------------------------------------------------------------------------------------ recipes


@dataclass(frozen=True)
class Recipe:
    """How much is done for a cell; the same for all weights.

    Attributes:
        scenes: Labelled training scenes of many digits.
        val_scenes: Validation scenes of many digits.
        digits: Training scenes of one digit.
        val_digits: Validation scenes of one digit.
        image_size: Height and width of the scenes of one digit.
        tap: (t, b) of linear probe, kNN, attention head and DifFeed; t of the dense tasks.
        random_tap: The same for weights that are not pretrained, so that each is judged where it
            is best.
        pool: Grid that linear probe and kNN pool the map to.
        l2: Strengths of the linear probe; held-out training images choose.
        k: Neighbours of kNN; fewer where there are fewer images.
        timesteps: Of the DifFormer head.
        blocks: Of the DifFormer head.
        cache_pool: Grid that features are cached at, and that heads pool to.
        steps: Steps of the heads at least, by name; the epochs follow from the images there are.
        heads: Options of ``train_classifier.py`` for each head.
        upernet: Config of the UperNet.
        upernet_options: Changes in it.
        maskrcnn: Config of the Mask R-CNN.
        maskrcnn_options: Changes in it, keys and values.
    """

    scenes: int = 4000
    val_scenes: int = 200
    digits: int = 10_000
    val_digits: int = 1000
    image_size: int = 32
    tap: Tap = (300, 33)
    random_tap: Tap = (150, 30)
    pool: int = 4
    l2: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)
    k: int = 5
    timesteps: tuple[int, ...] = (150, 300, 450)
    blocks: tuple[int, ...] = (12, 30, 33)
    cache_pool: int = 8
    steps: Mapping[str, int] = field(
        default_factory=lambda: {"attention": 400, "difformer": 300, "difffeed": 120}
    )
    heads: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "attention": ("--lr", "1e-3", "--batch-size", "64"),
            "difformer": ("--lr", "1e-3", "--batch-size", "32"),
            "difffeed": ("--lr", "1e-3", "--batch-size", "16"),
        }
    )
    upernet: str = "upernet_gd_probe_sample.py"
    upernet_options: Mapping[str, Any] = field(default_factory=dict)
    maskrcnn: str = "mask_rcnn_gd_probe_sample.yaml"
    maskrcnn_options: tuple[str, ...] = ()

    def tap_of(self, weights: str) -> Tap:
        """(t, b) that one of :data:`WEIGHTS` is judged at."""
        return self.tap if weights == "pretrained" else self.random_tap


# ----------------------------------------------------------------------------------------- material


def make_digit_scenes(out: Path, train: int, val: int, size: int, seed: int = 0) -> None:
    """Write scenes of one digit each, in a folder for each class, ``train`` and ``val``.

    They are scenes of ``make_sample_data.py``, so that training and validation share neither a
    scan nor a piece of a photograph. `out` appears whole or not at all.

    Args:
        out: Folder to make; left as it is where it is there.
        train: Training scenes.
        val: Validation scenes.
        size: Height and width.
        seed: Of everything drawn.
    """
    if out.is_dir():
        return
    config = sample_data.SceneConfig(
        min_size=size, max_size=size, min_digits=1, max_digits=1, digit_size=DIGIT_SIZE
    )
    pools = sample_data.load_pools(seed)
    partial = out.with_name(f".{out.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            # other scenes than those of many digits, which count from 0
            scene = sample_data.make_scene(
                pools[split], config, seed, split, _FIRST_DIGIT_SCENE + index
            )
            digit = scene.digits[0].digit
            folder = partial / split / f"{digit}_{sample_data.DIGIT_NAMES[digit]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.image).save(folder / f"{index:06d}.png")
    partial.replace(out)


DIGIT_SIZE = (0.6, 0.8)
"""Smallest and largest digit in a scene of one, as a share of the scene's side."""
_FIRST_DIGIT_SCENE = 1_000_000


def write_weights(path: Path, kind: str, config: UNetConfig, source: str | None, seed: int) -> None:
    """Write a U-Net's weights as safetensors; left as they are where they are there.

    Args:
        path: The file.
        kind: One of :data:`WEIGHTS`.
        config: The architecture.
        source: The checkpoint of pretrained weights.
        seed: Of random weights.

    Raises:
        CheckpointError: The checkpoint does not fit.
    """
    if path.is_file():
        return
    torch.manual_seed(seed)
    unet = UNet(config)
    if kind == "pretrained":
        load_checkpoint(unet, str(source))
    elif kind == "random":
        fill_zeros(unet)
    common.write_whole(path, lambda partial: save_safetensors(partial, unet.state_dict(), config))


def fill_zeros(unet: nn.Module) -> int:
    """Draw the layers that guided-diffusion starts at zero like all others.

    The last layer of each residual branch starts at zero, so that an untrained U-Net is little
    more than its skips; features of random weights are better where the branches do something.

    Returns:
        How many layers were drawn.
    """
    zero = [
        module
        for module in unet.modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) and not module.weight.any()
    ]
    for module in zero:
        module.reset_parameters()
    return len(zero)


def checkpoint_digest(config: UNetConfig, source: str) -> str:
    """Digest of the weights in a file, whatever the file's format.

    Raises:
        CheckpointError: The checkpoint does not fit.
    """
    unet = UNet(config)
    load_checkpoint(unet, source)
    return weights_digest(unet)


def choose_scenes(count: int, share: float, seed: int) -> list[int]:
    """Scenes that keep their labels, at least one; a smaller share is part of a larger one.

    Args:
        count: Scenes there are.
        share: Above 0 and up to 1.
        seed: Of the draw.

    Returns:
        Ascending numbers from 0.
    """
    order = np.random.default_rng([seed, _SCENES]).permutation(count)
    return sorted(order[: max(1, round(share * count))].tolist())


class CacheRows:
    """Some rows of a feature cache, as a cache of their own.

    Args:
        cache: The cache, without mirrored copies.
        rows: The rows, ascending.

    Attributes:
        listing: Their images.
        labels: Class index of each (N,).
    """

    def __init__(self, cache: FeatureCache, rows: Sequence[int] | np.ndarray) -> None:
        self.cache = cache
        self.rows = np.asarray(rows, dtype=np.int64)
        self.listing = cache.listing.subset(self.rows)
        self.labels = cache.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(
        self, rows: Sequence[int] | np.ndarray, taps: Iterable[Tap] | None = None
    ) -> dict[Tap, Tensor]:
        """See :meth:`FeatureCache.read`."""
        return self.cache.read(self.rows[np.asarray(rows, dtype=np.int64)], taps)


# ------------------------------------------------------------------------------------------ the lab


class Lab:
    """Makes what cells need, once, and measures them.

    Args:
        out: Folder of the grid.
        config: Architecture of the U-Net.
        checkpoint: Pretrained weights; None where no cell asks for them.
        recipe: How much is done.
        processes: One.
    """

    def __init__(
        self,
        out: Path,
        config: UNetConfig,
        checkpoint: str | None,
        recipe: Recipe,
        processes: Processes,
    ) -> None:
        self.out = out
        self.config = config
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.processes = processes

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell from its beginning.

        Returns:
            ``score`` in %, ``metrics``, ``train_images`` and ``val_images``.

        Raises:
            ToolError: It failed; the message says where its log is.
        """
        folder = self.folder(cell)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
        result = TASKS[cell.task].run(self, cell)
        for pattern in ("*.pt", "*.pth"):
            for path in folder.rglob(pattern):
                path.unlink()
        return result

    def folder(self, cell: Cell) -> Path:
        """Where a cell's files lie."""
        return self.out / "cells" / cell.name

    def weights(self, cell: Cell) -> Path:
        """File of the weights of a cell."""
        name = cell.weights if cell.weights == "pretrained" else f"{cell.weights}-{cell.seed}"
        path = self.out / "weights" / f"{name}.safetensors"
        write_weights(path, cell.weights, self.config, self.checkpoint, cell.seed)
        return path

    def scenes(self) -> Path:
        """Folder of the scenes of many digits."""
        root = self.out / "scenes"
        sample_data.make_sample_data(
            root, train=self.recipe.scenes, val=self.recipe.val_scenes, unlabelled=0
        )
        return root

    def clear(self) -> None:
        """Remove everything made with other settings."""
        (self.out / "results.jsonl").unlink(missing_ok=True)
        for name in ("cells", "weights", "cache", "digits", "scenes"):
            # weights may hold the checkpoint that was given
            if (
                name == "weights"
                and self.checkpoint
                and Path(self.checkpoint).is_relative_to(self.out / name)
            ):
                continue
            shutil.rmtree(self.out / name, ignore_errors=True)

    def caption(self) -> str:
        """What is measured, for the summary."""
        recipe = self.recipe
        taps = [f"t = {t}, b = {b}" for t, b in (recipe.tap, recipe.random_tap)]
        return (
            f"The U-Net stays frozen. Tasks on single digits: {recipe.digits:,} training and "
            f"{recipe.val_digits:,} validation images of 10 classes, {recipe.image_size} px; "
            f"linear probe, kNN, attention and DifFeed at {taps[0]} (pretrained) and {taps[1]} "
            f"(random), where each is best, DifFormer at t = "
            f"{_words(recipe.timesteps)} and b = {_words(recipe.blocks)}; linear probe and kNN on "
            f"maps pooled to {recipe.pool}x{recipe.pool}. Tasks on scenes: {recipe.scenes:,} "
            f"training and {recipe.val_scenes:,} validation scenes, `{recipe.upernet}` and "
            f"`{recipe.maskrcnn}`. Mean ± standard deviation over the seeds; in brackets how many "
            "where these are fewer than three. Differences are taken seed by seed. Random weights: "
            "the layers that guided-diffusion starts at zero are drawn like all others."
        )

    # -- classification

    def digits(self) -> tuple[ImageFolder, ImageFolder]:
        """Training and validation scenes of one digit."""
        recipe, root = self.recipe, self.out / "digits"
        make_digit_scenes(root, recipe.digits, recipe.val_digits, recipe.image_size)
        train = common.list_folder(root / "train")
        return train, common.list_folder(root / "val", train.listing.classes)

    def caches(self, cell: Cell) -> tuple[FeatureCache, FeatureCache]:
        """Features of the digits: DifFormer's taps, or the one of the other tasks."""
        recipe, weights = self.recipe, self.weights(cell)
        timesteps, blocks = recipe.timesteps, recipe.blocks
        if cell.task != "difformer":
            timesteps, blocks = ([value] for value in recipe.tap_of(cell.weights))
        name = "difformer" if cell.task == "difformer" else "tap"
        args = argparse.Namespace(
            unet=str(weights), checkpoint=str(weights), timesteps=list(timesteps),
            blocks=list(blocks), noise="fixed", seed=0,
        )  # fmt: skip
        options = FeatureOptions(
            tuple(timesteps), tuple(blocks), recipe.cache_pool, "float16", recipe.image_size,
            common.compute_dtype("auto", self.processes.device), batch=50,
        )  # fmt: skip
        backbone = common.build_backbone(args)
        folder = self.out / "cache" / weights.stem / name
        train, val = (
            common.open_cache(folder / images.root.name, images, backbone, options, self.processes)
            for images in self.digits()
        )
        return train, val

    def labelled(self, cell: Cell) -> np.ndarray:
        """Rows of the training digits that keep their labels, class by class alike."""
        train, _ = self.digits()
        if cell.labels == 1:
            return np.arange(len(train.listing))
        paths = set(common.choose_subset(train, f"{cell.labels:g}", cell.seed).listing.paths)
        return np.flatnonzero([path in paths for path in train.listing.paths])

    def probe(self, cell: Cell) -> dict[str, Any]:
        """Linear probe or kNN."""
        recipe, caches, rows = self.recipe, self.caches(cell), self.labelled(cell)
        draw = sweep.Labels.draw(cell.seed, rows, caches[0].labels[rows], share=0.2)
        args = argparse.Namespace(
            measures=[cell.task], l2=list(recipe.l2), k=min(recipe.k, len(rows)), temperature=0.07
        )
        judge = sweep.Judge(caches, [draw], args, self.processes.device)
        (record,) = judge.measure(recipe.tap_of(cell.weights), [(recipe.pool, cell.seed)])
        metrics = {name: record[name] for name in ("features", "l2", "loss") if name in record}
        if cell.task == "knn":
            metrics["k"] = args.k
        return _result(record[cell.task], metrics, len(rows), len(caches[1].listing))

    def head(self, cell: Cell) -> dict[str, Any]:
        """A head of ``train_classifier.py``; DifFeed runs the U-Net, the others read its cache."""
        recipe, weights, rows = self.recipe, self.weights(cell), self.labelled(cell)
        options = [*recipe.heads[cell.task]]
        batch = int(options[options.index("--batch-size") + 1])
        epochs = math.ceil(recipe.steps[cell.task] / math.ceil(len(rows) / batch))
        if cell.task == "difformer":
            options += ["--head", "difformer", "--timesteps", *map(str, recipe.timesteps)]
            options += ["--blocks", *map(str, recipe.blocks)]
        else:
            t, b = recipe.tap_of(cell.weights)
            options += ["--timesteps", str(t), "--blocks", str(b)]
            options += ["--head", "attention"]
        if cell.task == "difffeed":
            options += ["--feedback", "bottleneck"]
        args = train_classifier.parse(
            [
                "--recipe", "digits", "--data", str(self.out / "digits"),
                "--out", str(self.folder(cell)), "--unet", str(weights),
                "--checkpoint", str(weights), "--image-size", str(recipe.image_size),
                "--pool", str(recipe.cache_pool), "--seed", str(cell.seed), "--workers", "0",
                "--device", str(self.processes.device), "--epochs", str(epochs),
                "--step", str(math.ceil(epochs / 2)), "--eval-every", str(epochs),
                "--subset", f"{cell.labels:g}", *options,
            ]
        )  # fmt: skip
        caches = None
        if cell.task != "difffeed":
            train, val = self.caches(cell)
            caches = CacheRows(train, rows), val
        with _log(self.folder(cell) / "log.txt"):
            found = train_classifier.run(args, self.processes, caches)
        metrics = {
            "top5": 100 * found["val"]["top5"],
            "epochs": epochs,
            "trained_parameters": found["trained_parameters"],
        }
        return _result(found["val"]["top1"], metrics, len(rows), found["val"]["images"])

    # -- dense tasks

    def upernet(self, cell: Cell) -> dict[str, Any]:
        """UperNet by ``mmseg_train.py``."""
        from mmengine.config import Config

        scenes, folder, weights = self.scenes(), self.folder(cell), self.weights(cell)
        cfg = Config(read_upernet_config(self.recipe))
        names = sorted(
            p.stem for p in (scenes / "ADEChallengeData2016" / "images" / "training").glob("*.jpg")
        )
        chosen = [names[i] for i in choose_scenes(len(names), cell.labels, cell.seed)]
        _common.write_text(folder / "labelled.txt", "".join(f"{name}\n" for name in chosen))
        cfg.model.backbone.unet = dataclasses.asdict(self.config)
        cfg.model.backbone.timestep = self.recipe.tap_of(cell.weights)[0]
        cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(weights))
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.data_root = str(scenes / "ADEChallengeData2016")
            loader.num_workers, loader.persistent_workers = 0, False
        cfg.train_dataloader.dataset.ann_file = str((folder / "labelled.txt").resolve())
        cfg.randomness = dict(seed=cell.seed)
        cfg.work_dir = str(folder / "run")
        cfg.dump(str(folder / "config.py"))
        self._start(cell, [TOOLS / "mmseg_train.py", folder / "config.py"], {})
        (path,) = (folder / "run").glob("*/vis_data/scalars.json")
        found = _last(path, "mIoU")
        metrics = {name: found[name] for name in ("mAcc", "aAcc") if name in found}
        return _result(found["mIoU"] / 100, metrics, len(chosen), self.recipe.val_scenes)

    def maskrcnn(self, cell: Cell) -> dict[str, Any]:
        """Mask R-CNN by ``train_net.py``."""
        scenes, folder, weights = self.scenes(), self.folder(cell), self.weights(cell)
        chosen = write_coco_subset(scenes / "coco", folder / "data" / "coco", cell)
        options = [
            "MODEL.DIFFUSION.CHECKPOINT", str(weights.resolve()), "SEED", str(cell.seed + 1),
            "OUTPUT_DIR", str(folder / "run"), "MODEL.DIFFUSION.TIMESTEP",
            str(self.recipe.tap_of(cell.weights)[0]), *self.recipe.maskrcnn_options,
        ]  # fmt: skip
        for name, value in dataclasses.asdict(self.config).items():
            if value is not None:
                options += [f"MODEL.DIFFUSION.UNET_OPTIONS.{name}", str(value)]
        config = ["--config", self.recipe.maskrcnn]
        self._start(
            cell,
            [TOOLS / "train_net.py", *config, *options],
            {"DIFFBACKBONE_SAMPLE_DATA": str((folder / "data").resolve())},
        )
        found = _last(folder / "run" / "metrics.json", "bbox/AP")
        metrics = {
            name: found[key] if math.isfinite(found[key]) else 0.0
            for name, key in (
                ("box AP50", "bbox/AP50"), ("mask AP", "segm/AP"), ("mask AP50", "segm/AP50")
            )
        }  # fmt: skip
        score = found["bbox/AP"] if math.isfinite(found["bbox/AP"]) else 0.0
        return _result(score / 100, metrics, chosen, self.recipe.val_scenes)

    def _start(self, cell: Cell, command: Sequence[Any], environment: Mapping[str, str]) -> None:
        """Run one of the tools to its end; it ends when this process does."""
        log = self.folder(cell) / "log.txt"
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                preexec_fn=_detectron2.end_with_parent,
            )
        if done.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise ToolError(
                f"{Path(command[0]).name} ended with status {done.returncode}; {log} ends with\n  "
                + "\n  ".join(last)
            )


def read_upernet_config(recipe: Recipe) -> dict[str, Any]:
    """MMSegmentation's config with the recipe's changes.

    Raises:
        SystemExit: MMSegmentation is missing.
    """
    import _mmseg

    _mmseg.prepare()
    from mmengine.config import Config

    cfg = Config.fromfile(_mmseg.find_config(recipe.upernet), import_custom_modules=False)
    cfg.merge_from_dict(dict(recipe.upernet_options))
    return cfg.to_dict()


def read_maskrcnn_config(recipe: Recipe) -> dict[str, Any]:
    """Detectron2's config with the recipe's changes.

    Raises:
        SystemExit: Detectron2 is missing.
        ValueError: The config is wrong.
    """
    _detectron2.prepare()
    path = _common.find_config(
        recipe.maskrcnn, _detectron2.CONFIG_DIR, _detectron2.SUFFIXES[".yaml"]
    )
    cfg = _detectron2.load_yaml(path, recipe.maskrcnn_options)
    return {**cfg, "MODEL": {**cfg.MODEL, "DEVICE": None}}  # the machine's, not the config's


def write_coco_subset(source: Path, target: Path, cell: Cell) -> int:
    """Lay out COCO data with some of the training scenes; images and validation are linked.

    Args:
        source: ``coco`` folder of ``make_sample_data.py``.
        target: Folder to make.
        cell: Which scenes.

    Returns:
        How many training scenes there are.
    """
    (target / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (target / f"{split}2017").symlink_to((source / f"{split}2017").resolve())
    name = Path("annotations") / "instances_val2017.json"
    (target / name).symlink_to((source / name).resolve())
    name = Path("annotations") / "instances_train2017.json"
    content = json.loads((source / name).read_text(encoding="utf-8"))
    images = sorted(content["images"], key=lambda image: image["id"])
    content["images"] = [images[i] for i in choose_scenes(len(images), cell.labels, cell.seed)]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    _common.write_text(target / name, json.dumps(content))
    return len(kept)


def _words(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _result(score: float, metrics: Mapping[str, Any], train: int, val: int) -> dict[str, Any]:
    return {
        "score": 100 * score,
        "metrics": dict(metrics),
        "train_images": train,
        "val_images": val,
    }


def _last(path: Path, key: str) -> dict[str, Any]:
    """The last record of a file of JSON lines that has a key."""
    if path.is_file():
        for line in reversed(path.read_text(encoding="utf-8").splitlines()):
            record = json.loads(line)
            if key in record:
                return record
    raise ToolError(f"{path} has no {key}: the run was not evaluated")


@contextlib.contextmanager
def _log(path: Path) -> Any:
    """Write what a tool prints into a file."""
    with open(path, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


@dataclass(frozen=True)
class Task:
    """A kind of measurement.

    Attributes:
        title: What it is.
        score: What is measured.
        run: The runner.
        images: What is labelled.
        config: Reads the config of the tool that it starts; None where it starts none.
    """

    title: str
    score: str
    run: Callable[[Lab, Cell], dict[str, Any]]
    images: str
    config: Callable[[Recipe], dict[str, Any]] | None = None


TASKS: dict[str, Task] = {
    "knn": Task("kNN", "top-1", Lab.probe, "digits"),
    "linear": Task("linear probe", "top-1", Lab.probe, "digits"),
    "attention": Task("attention head", "top-1", Lab.head, "digits"),
    "difformer": Task("DifFormer head", "top-1", Lab.head, "digits"),
    "difffeed": Task("DifFeed, attention head", "top-1", Lab.head, "digits"),
    "upernet": Task("UperNet", "mIoU", Lab.upernet, "scenes", read_upernet_config),
    "maskrcnn": Task("Mask R-CNN", "box AP", Lab.maskrcnn, "scenes", read_maskrcnn_config),
}


def config_digests(tasks: Iterable[str], recipe: Recipe) -> dict[str, str]:
    """Digests of what the tasks' configs say, whatever their comments and layout.

    Raises:
        ToolError: A task's framework is missing, or its config can't be read.
    """
    digests = {}
    for name in tasks:
        read = TASKS[name].config
        if read is None:
            continue
        try:
            text = json.dumps(read(recipe), sort_keys=True, default=str)
        except (SystemExit, OSError, ValueError) as error:
            reason = str(error).removeprefix("error: ")
            raise ToolError(f"{reason}\n--tasks goes without {name}") from error
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    return digests
