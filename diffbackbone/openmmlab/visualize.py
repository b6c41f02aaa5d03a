"""Draw a segmentor's predictions: images, truth and prediction side by side in one picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tqdm import tqdm

from diffbackbone.cli import CONFIGS, check_checkpoint, find_config, user_errors
from diffbackbone.images import read_image, to_uint8
from diffbackbone.openmmlab.repairs import prepare
from diffbackbone.utils import save_figure

COLUMNS = 2  # images beside each other, each with truth and prediction


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with user_errors():
        prepare("mmseg")
        from mmengine.config import Config, DictAction

        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("config", help="config file, or the name of one in configs/mmseg")
        parser.add_argument("checkpoint", help="weights written in training")
        parser.add_argument("--out", default="predictions.png", help="picture to write")
        parser.add_argument(
            "--images", type=int, default=8, help="number of images, spread over the test set"
        )
        parser.add_argument(
            "--cfg-options", nargs="+", action=DictAction, help="changes to the config, KEY=VALUE"
        )
        args = parser.parse_args(argv)
        check_checkpoint(args.checkpoint)
        cfg = Config.fromfile(find_config(args.config, CONFIGS / "mmseg", (".py",)))
        cfg.merge_from_dict(args.cfg_options or {})
        save_figure(draw(*predict(cfg, args.checkpoint, args.images)), args.out)
        print(f"{args.out}: images, truth and prediction side by side")


def predict(cfg: Any, checkpoint: str, count: int) -> tuple[list[tuple], Any, Any]:
    """Run a trained segmentor on images of its test set; returns the arguments of :func:`draw`."""
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import init_default_scope
    from mmengine.runner import load_checkpoint
    from mmseg.registry import DATASETS, MODELS

    init_default_scope("mmseg")
    model = MODELS.build(cfg.model)  # mmseg's init_model drops init_cfg, hence frozen weights
    load_checkpoint(model, checkpoint, map_location="cpu")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    rows = []
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    for index in tqdm(chosen, desc="predicting", unit="image"):
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([dataset[int(index)]]))
        maps = [getattr(sample, name).data[0] for name in ("gt_sem_seg", "pred_sem_seg")]
        image = to_uint8(read_image(sample.img_path))
        rows.append((image, *(labels.cpu().numpy() for labels in maps)))
    return rows, dataset.metainfo["classes"], dataset.metainfo["palette"]


def draw(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Figure:
    """Draw (image (H, W, 3) uint8, true labels (H, W), predicted labels) rows, and a legend."""
    colors = np.array([*palette, (236, 236, 236)], dtype=np.uint8)
    lines = -(-len(rows) // COLUMNS)
    figure = Figure(figsize=(7 * COLUMNS, 2.4 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, 3 * COLUMNS, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, title in zip(axes[0], ["image", "truth", "prediction"] * COLUMNS):
        ax.set_title(title, loc="left")
    for (image, *maps), row in zip(rows, axes.reshape(-1, 3)):
        for ax, picture in zip(row, [image, *(colors[np.minimum(m, len(classes))] for m in maps)]):
            ax.imshow(picture, interpolation="nearest")
    found = np.unique(np.concatenate([labels.ravel() for _, *maps in rows for labels in maps]))
    handles = [Patch(color=colors[i] / 255, label=classes[i]) for i in found if i < len(classes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=10)
    return figure
