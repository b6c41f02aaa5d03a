"""Draw a segmentor's predictions: images, truth and prediction side by side in one picture.

For instance::

    python tools/mmseg_visualize.py upernet_difffeed_sample.py work_dirs/.../iter_800.pth
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import _common
import _mmseg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

UNLABELLED = (236, 236, 236)
MARGIN, HEADER, LEGEND = 8, 26, 24
PANEL = 220
"""Longest side of a panel in pixels."""


def colorize(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Colours of a label map.

    Args:
        labels: (H, W) class indices; those without a colour are unlabelled.
        palette: RGB of each class.

    Returns:
        (H, W, 3) uint8.
    """
    table = np.full((max(256, len(palette)), 3), UNLABELLED, dtype=np.uint8)
    table[: len(palette)] = np.asarray(palette, dtype=np.uint8)
    return table[labels]


def draw(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    columns: int = 2,
) -> Image.Image:
    """One picture of several scenes, each as image, truth and prediction, with a legend.

    Args:
        rows: Image (H, W, 3) uint8 RGB, true and predicted labels (H, W), for each scene.
        classes: Names of the classes.
        palette: RGB of each class.
        columns: Scenes beside one another.
    """
    font = ImageFont.load_default(13)
    cell = 3 * (PANEL + MARGIN) + MARGIN
    lines = -(-len(rows) // columns)
    shown = sorted({int(i) for _, *maps in rows for m in maps for i in np.unique(m)})
    shown = [index for index in shown if index < len(classes)]
    per_line = max(1, columns * cell // 130)
    height = HEADER + lines * (PANEL + MARGIN) + (-(-len(shown) // per_line)) * LEGEND + MARGIN
    picture = Image.new("RGB", (columns * cell, height), "white")
    pen = ImageDraw.Draw(picture)
    for number, (image, *maps) in enumerate(rows):
        left, top = (number % columns) * cell, HEADER + (number // columns) * (PANEL + MARGIN)
        panels = [image, *(colorize(labels, palette) for labels in maps)]
        for i, (panel, title) in enumerate(zip(panels, ("image", "truth", "prediction"))):
            x = left + MARGIN + i * (PANEL + MARGIN)
            scale = PANEL / max(panel.shape[:2])
            size = tuple(max(1, round(side * scale)) for side in panel.shape[1::-1])
            mode = Image.Resampling.BICUBIC if i == 0 else Image.Resampling.NEAREST
            picture.paste(Image.fromarray(panel).resize(size, mode), (x, top))
            if number < columns:
                pen.text((x, 5), title, fill="black", font=font)
    top = HEADER + lines * (PANEL + MARGIN)
    for i, index in enumerate(shown):
        x, y = MARGIN + (i % per_line) * 130, top + (i // per_line) * LEGEND
        pen.rectangle((x, y + 3, x + 14, y + 17), fill=tuple(palette[index]))
        pen.text((x + 20, y + 2), classes[index], fill="black", font=font)
    return picture


def predict(config: str, checkpoint: str, count: int, options: dict | None = None):
    """Run a trained segmentor on the first images of its test set.

    Args:
        config: Path of the config.
        checkpoint: Weights written in training.
        count: Number of images, spread evenly over the test set.
        options: Changes to the config.

    Returns:
        Scenes as in :func:`draw`, the classes' names, and the palette.
    """
    import torch
    from mmengine.config import Config
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import init_default_scope
    from mmengine.runner import load_checkpoint
    from mmseg.registry import DATASETS, MODELS
    from tqdm import tqdm

    from diffbackbone.images import read_image, to_uint8

    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options or {})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    init_default_scope(cfg.get("default_scope", "mmseg"))
    model = MODELS.build(cfg.model)  # mmseg's init_model drops init_cfg, hence frozen weights
    load_checkpoint(model, checkpoint, map_location="cpu")
    model.to(device).eval()
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int))
    rows = []
    for index in tqdm(chosen, desc="predicting", unit="image"):
        batch = pseudo_collate([dataset[int(index)]])
        with torch.no_grad():
            (sample,) = model.test_step(batch)
        truth, labels = (
            getattr(sample, name).data[0].cpu().numpy() for name in ("gt_sem_seg", "pred_sem_seg")
        )
        image = Image.fromarray(to_uint8(read_image(sample.img_path)))
        rows.append((np.asarray(image.resize(truth.shape[::-1])), truth, labels))
    return rows, dataset.metainfo["classes"], dataset.metainfo["palette"]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    _mmseg.prepare()
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="config file, or the name of one in configs/mmseg")
    parser.add_argument("checkpoint", help="weights written in training")
    parser.add_argument("--out", default="predictions.png", help="the picture to write")
    parser.add_argument("--images", type=int, default=8, help="how many images to draw")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes to the config")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images must be at least 1, got {args.images}")
    config = _mmseg.find_config(args.config)
    _common.check_checkpoint(args.checkpoint)
    _mmseg.check_data(config, args.cfg_options, ("test_dataloader",))
    _common.save_picture(
        draw(*predict(config, args.checkpoint, args.images, args.cfg_options)), args.out
    )
    print(f"{args.out}: images, truth and prediction side by side")


if __name__ == "__main__":
    main()
