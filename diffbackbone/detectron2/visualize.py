"""Draw a detector's predictions beside the truth, with Detectron2's Visualizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from tqdm import tqdm

from diffbackbone import images
from diffbackbone.cli import find_config, run_command
from diffbackbone.detectron2.checkpoint import Checkpointer
from diffbackbone.detectron2.config import load_yaml
from diffbackbone.detectron2.datasets import DeepDatasetMapper, build_mapper, load_dicts
from diffbackbone.detectron2.engine import Trainer
from diffbackbone.detectron2.launch import CONFIG_DIR, user_errors
from diffbackbone.detectron2.lazyconfig_train_net import dataset_names, load_lazy
from diffbackbone.utils import save_figure, seed_everything

PANEL = 320
"""Longest side of a panel in pixels."""
COLUMNS = 2
"""Images side by side, each as truth and prediction."""


@dataclasses.dataclass
class VisualizeConfig:
    """Draw a detector's predictions beside the truth.

    For instance: --config mask_rcnn_gd_t75_b24.yaml --images 12 --score 0.6 OUTPUT_DIR my/run
    """

    config: Annotated[str, tyro.conf.arg(aliases=["--config-file"])]
    """YAML or Python config: a path, or a name in configs/detectron2."""
    opts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Changes to the config: KEY VALUE pairs for YAML, key=value for Python configs."""
    weights: str | None = None
    """Checkpoint; by default the last one in the config's output folder."""
    out: Path = Path("predictions.png")
    """Picture to write."""
    images: int = 8
    """Number of images, spread evenly over the test set."""
    score: float = 0.5
    """Smallest score to draw, 0 to 1."""


def load_detector(config: VisualizeConfig) -> tuple[torch.nn.Module, Any, str]:
    """Return the trained model, the mapper of its inputs, and the name of the test set."""
    path = find_config(config.config, CONFIG_DIR, (".yaml", ".py"))
    if path.endswith(".py"):
        cfg = load_lazy(path, config.opts)
        model = instantiate(cfg.model).to(cfg.train.device)
        mapper = instantiate(cfg.dataloader.test.mapper)
        dataset = dataset_names(cfg, "test")[0]
        folder, weights = cfg.train.output_dir, cfg.train.init_checkpoint
    else:
        cfg = load_yaml(path, config.opts)
        model, mapper = Trainer.build_model(cfg), build_mapper(cfg, is_train=False)
        dataset, folder, weights = cfg.DATASETS.TEST[0], cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS
    checkpointer = Checkpointer(model, folder, strict=True)
    given = any(o.startswith(("MODEL.WEIGHTS", "train.init_checkpoint")) for o in config.opts)
    last = checkpointer.get_checkpoint_file()
    checkpointer.load(config.weights or (weights if given else last or weights))
    return model.eval(), mapper, dataset


def _read_shown(path: str, mapper: Any) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB; of two or of many channels the first ones."""
    if not isinstance(mapper, DeepDatasetMapper):
        return read_image(path, format="RGB")
    pixels = images.to_uint8(images.read_image(path, mapper.value_range, mapper.channels))
    return pixels[..., :3] if mapper.channels >= 3 else pixels[..., :1].repeat(3, axis=-1)


@torch.no_grad()
def predict(config: VisualizeConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw truth and predictions of images of the test set, (H, W, 3) uint8 RGB."""
    model, mapper, dataset = load_detector(config)
    records, metadata = load_dicts(dataset), MetadataCatalog.get(dataset)
    count = min(config.images, len(records))
    rows = []
    for index in tqdm(np.linspace(0, len(records) - 1, count).astype(int), desc="predicting"):
        record = records[index]
        (output,) = model([mapper(record)])
        instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= config.score]
        image = _read_shown(record["file_name"], mapper)
        scale = PANEL / max(image.shape[:2])
        seed_everything(index)  # of the Visualizer's random colors
        truth = Visualizer(image, metadata, scale).draw_dataset_dict(record)
        drawn = Visualizer(image, metadata, scale).draw_instance_predictions(instances)
        rows.append((truth.get_image(), drawn.get_image()))
    return rows


def draw(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw truth and prediction of images side by side."""
    lines = [rows[i : i + COLUMNS] for i in range(0, len(rows), COLUMNS)]
    heights = [max(truth.shape[0] for truth, _ in line) for line in lines]
    figure = Figure((2 * COLUMNS * PANEL / 100, sum(heights) / 100), layout="constrained")
    axes = figure.subplots(len(lines), 2 * COLUMNS, squeeze=False, height_ratios=heights)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, title in zip(axes[0], ["truth", "prediction"] * COLUMNS):
        ax.set_title(title)
    for ax, panel in zip(axes.flat, (panel for row in rows for panel in row)):
        ax.imshow(panel)
    return figure


def run(config: VisualizeConfig) -> None:
    """Write the picture."""
    save_figure(draw(predict(config)), config.out, dpi=100)
    print(f"{config.out}: truth and prediction side by side")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    with user_errors():
        run_command(VisualizeConfig, run, argv)
