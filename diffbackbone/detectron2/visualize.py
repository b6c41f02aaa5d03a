"""Draw a detector's predictions beside the truth, with Detectron2's Visualizer."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from detectron2.config import instantiate
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from tqdm import tqdm

from diffbackbone.cli import check_checkpoint, find_config, run_command
from diffbackbone.detectron2.checkpoint import Checkpointer
from diffbackbone.detectron2.config import load_yaml
from diffbackbone.detectron2.datasets import check_datasets, load_dicts
from diffbackbone.detectron2.engine import Trainer
from diffbackbone.detectron2.launch import CONFIG_DIR, user_errors
from diffbackbone.detectron2.lazyconfig_train_net import build_model, dataset_names, load_lazy
from diffbackbone.utils import save_figure, seed_everything

PANEL = 320
"""Longest side of a panel in pixels."""
COLUMNS = 2
"""Images side by side, each as truth and prediction."""


@dataclasses.dataclass
class VisualizeConfig:
    """Draw a detector's predictions beside the truth, and the curves of its training.

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


class Detector(NamedTuple):
    """A config's detector."""

    build: Callable[[], torch.nn.Module]
    mapper: Callable[[dict[str, Any]], dict[str, Any]]
    dataset: str  # name of the test set
    folder: str  # output folder of training
    weights: str  # the config's, perhaps ""


def read_config(config: str, options: Sequence[str]) -> Detector:
    """Read a YAML or a Python config."""
    path = find_config(config, CONFIG_DIR, (".yaml", ".py"))
    if path.endswith(".py"):
        cfg = load_lazy(path, options)
        mapper = instantiate(cfg.dataloader.test.mapper)
        build, names = functools.partial(build_model, cfg), dataset_names(cfg, "test")
        folder, weights = cfg.train.output_dir, cfg.train.init_checkpoint
    else:
        cfg = load_yaml(path, options)
        mapper = DatasetMapper(cfg, is_train=False)
        build, names = functools.partial(Trainer.build_model, cfg), list(cfg.DATASETS.TEST)
        folder, weights = cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS
    return Detector(build, mapper, names[0], folder, weights)


def choose_weights(detector: Detector, options: Sequence[str]) -> str:
    """Return the checkpoint of the options, else the last of training, else the config's."""
    given = any(o.startswith(("MODEL.WEIGHTS", "train.init_checkpoint=")) for o in options)
    last = Checkpointer(torch.nn.Identity(), detector.folder).get_checkpoint_file()
    first = detector.weights if given else last
    return first or detector.weights or str(Path(detector.folder, "model_final.pth"))


@torch.no_grad()
def predict(
    detector: Detector, weights: str, count: int = 8, score: float = 0.5
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw truth and predictions of ``count`` images of the test set, (H, W, 3) uint8 RGB."""
    model = detector.build().eval()
    Checkpointer(model, strict=True).load(weights)
    records = load_dicts(detector.dataset)
    metadata = MetadataCatalog.get(detector.dataset)
    chosen = np.unique(np.linspace(0, len(records) - 1, min(count, len(records))).astype(int))
    rows = []
    for index in tqdm(chosen, desc="predicting", unit="image"):
        record = records[int(index)]
        (output,) = model([detector.mapper(record)])
        instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= score]
        image = read_image(record["file_name"], format="RGB")
        scale = PANEL / max(image.shape[:2])
        seed_everything(int(index))  # of the Visualizer's random colors
        truth = Visualizer(image, metadata, scale).draw_dataset_dict(record)
        drawn = Visualizer(image, metadata, scale).draw_instance_predictions(instances)
        rows.append((truth.get_image(), drawn.get_image()))
    return rows


def read_curves(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Read (iteration, value) of the loss and AP50 in ``metrics.json``, empty without a log.

    A resumed run's values replace those logged before for the same iteration.
    """
    path = Path(folder, "metrics.json")
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entries = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        for name in ("total_loss", "bbox/AP50", "segm/AP50"):
            if name in entries:
                curves.setdefault(name, {})[entries["iteration"] + 1] = entries[name]
    return {name: sorted(points.items()) for name, points in curves.items()}


def draw(
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> Figure:
    """Draw truth and prediction of images, and the curves of training below if there are any."""
    columns = 2 * min(COLUMNS, len(rows))
    lines = [rows[i : i + COLUMNS] for i in range(0, len(rows), COLUMNS)]
    heights = [max(truth.shape[0] for truth, _ in line) / 100 for line in lines]
    heights += [2.6] * bool(curves)
    figure = Figure((columns * PANEL / 100, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for i, panel in enumerate(panel for row in rows for panel in row):
        ax = figure.add_subplot(grid[divmod(i, columns)])
        ax.imshow(panel)
        ax.set_axis_off()
        if i < columns:
            ax.set_title(("truth", "prediction")[i % 2])
    if curves:
        loss = figure.add_subplot(grid[-1, : columns // 2])
        loss.plot(*zip(*curves.get("total_loss", ())), color="0.3")
        loss.set(title="training loss", xlabel="iteration", ylim=(0, None))
        ap = figure.add_subplot(grid[-1, columns // 2 :])
        for name, label in {"bbox/AP50": "boxes", "segm/AP50": "masks"}.items():
            ap.plot(*zip(*curves.get(name, ())), marker="o", label=label)
        ap.set(title="AP50, test set", xlabel="iteration", ylim=(0, 100))
        ap.legend(loc="lower right")
    return figure


def run(config: VisualizeConfig) -> None:
    """Write the picture."""
    detector = read_config(config.config, config.opts)
    check_datasets([detector.dataset])
    weights = config.weights or choose_weights(detector, config.opts)
    check_checkpoint(weights.partition("?")[0])
    rows = predict(detector, weights, config.images, config.score)
    # the curves belong to the run whose checkpoint is drawn
    curves = {} if config.weights else read_curves(detector.folder)
    save_figure(draw(rows, curves), config.out, dpi=100)
    print(f"{config.out}: truth and prediction side by side")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    with user_errors():
        run_command(VisualizeConfig, run, argv)
