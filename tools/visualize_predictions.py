"""Draw a detector's predictions beside the truth, by Detectron2's Visualizer.

For instance::

    python tools/visualize_predictions.py --config mask_rcnn_gd_sample.yaml
    python tools/visualize_predictions.py --config mask_rcnn_gd_t75_b24.yaml \
        --weights work_dirs/mask_rcnn_gd_t75_b24/model_final.pth --images 12 --score 0.6
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _common
import _detectron2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL = 320
"""Longest side of a panel in pixels."""
MARGIN, HEADER = 10, 30


class Setup(NamedTuple):
    """What a config says of a detector.

    Attributes:
        build: Builds the model.
        mapper: Makes the model's input of a record.
        dataset: Name of the test set.
        folder: Where training left its checkpoints.
        weights: The weights that the config names, perhaps nothing.
    """

    build: Callable[[], Any]
    mapper: Callable[[dict[str, Any]], dict[str, Any]]
    dataset: str
    folder: str
    weights: str


def read_config(config_file: str, options: Sequence[str]) -> Setup:
    """Read a YAML or a Python config.

    Args:
        config_file: Its path.
        options: What the command line changes in it.

    Raises:
        ValueError: The config or an option is wrong, or names no test set.
    """
    if config_file.endswith(".py"):
        import lazyconfig_train_net
        from detectron2.config import instantiate

        args = argparse.Namespace(config_file=config_file, opts=list(options))
        cfg = lazyconfig_train_net.load(args)
        names = cfg.dataloader.test.dataset.names
        return Setup(
            functools.partial(lazyconfig_train_net.build_model, cfg),
            instantiate(cfg.dataloader.test.mapper),
            names if isinstance(names, str) else names[0],
            cfg.train.output_dir,
            cfg.train.init_checkpoint,
        )
    from detectron2.data import DatasetMapper

    from diffbackbone.detectron2.engine import Trainer

    cfg = _detectron2.load_yaml(config_file, options)
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: there is nothing to draw")
    mapper = DatasetMapper(cfg, is_train=False)
    build = functools.partial(Trainer.build_model, cfg)
    return Setup(build, mapper, cfg.DATASETS.TEST[0], cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS)


def choose_weights(setup: Setup, options: Sequence[str]) -> str:
    """The checkpoint to draw by: one from the options, the last of training, or the config's.

    Raises:
        FileNotFoundError: There is none yet.
    """
    import torch

    from diffbackbone.detectron2.engine import Checkpointer

    given = any(o.startswith(("MODEL.WEIGHTS", "train.init_checkpoint=")) for o in options)
    last = Checkpointer(torch.nn.Identity(), setup.folder).get_checkpoint_file()
    weights = (setup.weights if given else last) or last or setup.weights
    if not weights:
        raise FileNotFoundError(
            f"{setup.folder} holds no checkpoint yet; --weights FILE names another"
        )
    return weights


def predict(
    config_file: str, options: Sequence[str], weights: str | None, count: int, score: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Run a trained detector on images of its test set.

    Args:
        config_file: Path of the config.
        options: What the command line changes in it.
        weights: Checkpoint; None takes the last one of the config's output folder.
        count: Number of images, spread evenly over the test set.
        score: Smallest score that is drawn, 0 to 1.

    Returns:
        Truth and prediction of each image, (H, W, 3) uint8 RGB.

    Raises:
        ValueError: The config or an option is wrong, or the model finds no objects.
        FileNotFoundError: Data or weights are missing.
    """
    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.data.detection_utils import read_image
    from detectron2.utils.visualizer import Visualizer
    from tqdm import tqdm

    from diffbackbone.detectron2.engine import (
        Checkpointer,
        check_datasets,
        load_dicts,
        seed_everything,
    )

    setup = read_config(config_file, options)
    check_datasets((setup.dataset,))
    records = load_dicts(setup.dataset)
    weights = weights or choose_weights(setup, options)
    _common.check_checkpoint(weights.partition("?")[0])
    model = setup.build().eval()
    Checkpointer(model, strict=True).load(weights)
    metadata = MetadataCatalog.get(setup.dataset)
    chosen = np.unique(np.linspace(0, len(records) - 1, min(count, len(records))).astype(int))
    rows = []
    for index in tqdm(chosen, desc="predicting", unit="image"):
        record = records[int(index)]
        with torch.no_grad():
            (output,) = model([setup.mapper(record)])
        if "instances" not in output:
            raise ValueError(f"the model finds no objects to draw, it returns {', '.join(output)}")
        instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= score]
        image = read_image(record["file_name"], format="RGB")
        scale = PANEL / max(image.shape[:2])
        seed_everything(int(index))  # the Visualizer draws its colours
        truth = Visualizer(image, metadata, scale).draw_dataset_dict(record)
        drawn = Visualizer(image, metadata, scale).draw_instance_predictions(instances)
        rows.append((truth.get_image(), drawn.get_image()))
    return rows


def compose(rows: Sequence[tuple[np.ndarray, np.ndarray]], columns: int = 2) -> Image.Image:
    """One picture of several images, each as truth and prediction.

    Args:
        rows: Truth and prediction of each image, (H, W, 3) uint8 RGB.
        columns: Images beside one another.
    """
    font = ImageFont.load_default(16)
    cell = 2 * (PANEL + MARGIN) + MARGIN
    lines = -(-len(rows) // columns)
    size = min(columns, len(rows)) * cell, HEADER + lines * (PANEL + MARGIN)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for number, panels in enumerate(rows):
        left = (number % columns) * cell + MARGIN
        top = HEADER + (number // columns) * (PANEL + MARGIN)
        for i, (panel, title) in enumerate(zip(panels, ("truth", "prediction"))):
            x = left + i * (PANEL + MARGIN)
            picture.paste(Image.fromarray(np.ascontiguousarray(panel)), (x, top))
            if number < columns:
                pen.text((x, 7), title, fill="black", font=font)
    return picture


def read_curves(folder: str) -> dict[str, list[tuple[int, float]]]:
    """What training logged: the loss, and the average precision of each evaluation.

    Args:
        folder: Where training wrote its ``metrics.json``.

    Returns:
        Iterations and values by name; empty where nothing was logged. What a resumed run logged
        again replaces what was there.
    """
    path = Path(folder, "metrics.json")
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entries = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        for name in ("total_loss", "bbox/AP50", "segm/AP50"):
            if name in entries:
                curves.setdefault(name, {})[entries["iteration"] + 1] = entries[name]
    return {name: sorted(points.items()) for name, points in curves.items()}


def draw_curves(curves: dict[str, list[tuple[int, float]]], width: int) -> Image.Image:
    """Loss and AP50 over the iterations.

    Args:
        curves: See :func:`read_curves`.
        width: Of the picture, in pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, 2.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = {"bbox/AP50": "boxes", "segm/AP50": "masks"}
    if "total_loss" in curves:
        left.plot(*zip(*curves["total_loss"]), color="0.3")
    for name, label in names.items():
        if name in curves:
            right.plot(*zip(*curves[name]), marker="o", label=label)
    left.set(title="training loss", xlabel="iteration", ylim=(0, None))
    right.set(title="AP50, test set", xlabel="iteration", ylim=(0, 100))
    if right.lines:
        right.legend(loc="lower right")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def stack(top: Image.Image, bottom: Image.Image) -> Image.Image:
    """One picture above another."""
    size = max(top.width, bottom.width), top.height + bottom.height
    picture = Image.new("RGB", size, "white")
    picture.paste(top, (0, 0))
    picture.paste(bottom, (0, top.height))
    return picture


def entry(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", "--config-file", required=True, help="YAML or Python config")
    parser.add_argument("--weights", help="checkpoint; the last of the config's output folder")
    parser.add_argument("--out", default="predictions.png", help="the picture to write")
    parser.add_argument("--images", type=int, default=8, help="how many images to draw")
    parser.add_argument("--score", type=float, default=0.5, help="smallest score to draw")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="changes to the config")
    args = parser.parse_args(argv)
    if args.images < 1 or not 0 <= args.score <= 1:
        parser.error(f"--images from 1, --score 0 to 1; got {args.images} and {args.score}")
    _detectron2.prepare()
    config = _common.find_config(args.config, _detectron2.CONFIG_DIR, (".yaml", ".py"))
    with _detectron2.clear_errors():
        picture = compose(predict(config, args.opts, args.weights, args.images, args.score))
        curves = read_curves(read_config(config, args.opts).folder)
        if curves and not args.weights:  # those of the run whose checkpoint this is
            picture = stack(picture, draw_curves(curves, picture.width))
        _common.save_picture(picture, args.out)
    print(f"{args.out}: truth and prediction side by side")


if __name__ == "__main__":
    entry()
