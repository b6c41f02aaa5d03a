"""Accuracy of guided-diffusion's classifiers on a folder of images (the encoder of Table 1).

OUT gets ``results.json`` and, up to 200 classes, ``confusion.png``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from diffbackbone.checkpoint import load_checkpoint
from diffbackbone.cli import run_command
from diffbackbone.diffusion import NoiseSchedule, coordinate_noise
from diffbackbone.eval.data import RowImages, list_folder, load_batches
from diffbackbone.eval.plots import draw_confusion
from diffbackbone.models import build_network, resolve_network
from diffbackbone.models.classifier import ClassifierConfig
from diffbackbone.utils import UserError, save_figure, write_json

DRAWN = 200
"""Classes in the picture at most."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """Evaluate a guided-diffusion classifier on a folder of images."""

    checkpoint: str
    """256x256_classifier.pt or another; a path or URL."""
    unet: str = "gd256_classifier"
    """Preset, or fields as JSON."""
    data: Path
    """Folder with a subfolder for each class, such as ImageNet's val."""
    out: Path = Path("work_dirs/evaluate_classifier")
    """Folder for the results."""
    classes: Path | None = None
    """File with the names of all folders in the order of the classifier's outputs, one a line;
    default: DATA has a folder for each output, in the order of their names, as ImageNet's ids."""
    timestep: int = 0
    """0-based timestep t that images are noised to; 0 takes them as they are."""
    seed: int = 0
    """Seed of the noise, which is the same for all images."""
    batch_size: int = 32
    """Images at a time."""
    workers: int = 2
    """Processes that read images."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if there is one."""


@torch.inference_mode()
def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, write and return ``top1``, ``top5`` (shares of 1) and the number of images.

    Raises:
        UserError: The network is no classifier, or the folders don't match its outputs.
    """
    network = resolve_network(config.unet)
    if not isinstance(network, ClassifierConfig):
        raise UserError(f"--unet {config.unet} is not a classifier; see gd256_classifier")
    names = None
    if config.classes is not None:
        names = config.classes.expanduser().read_text(encoding="utf-8").split()
    folder = list_folder(config.data.expanduser(), names)
    outputs = network.out_channels
    if len(folder.classes) != outputs:
        raise UserError(
            f"the classifier has {outputs} outputs, "
            f"{config.classes or config.data} names {len(folder.classes)} classes; --classes FILE "
            "names them in the order of the outputs"
        )
    device = PartialState(cpu=config.device == "cpu").device
    schedule = NoiseSchedule(network.noise_schedule)
    schedule.check_timestep(config.timestep)
    classifier = build_network(network).eval()
    print(load_checkpoint(classifier, config.checkpoint), flush=True)
    classifier.to(device)
    noise = None
    if config.timestep:
        shape = network.in_channels, network.image_size, network.image_size
        noise = coordinate_noise(*shape, config.seed, device)
    starts = range(0, len(folder), config.batch_size)
    rows = [range(i, min(i + config.batch_size, len(folder))) for i in starts]
    images, hits = RowImages(folder, network.image_size), np.zeros(2)
    predicted = []
    batches = load_batches(images, rows, config.workers)
    for own, batch in tqdm(zip(rows, batches), "images", len(rows), disable=None):
        x_start = batch.to(device)
        x_t = x_start if noise is None else schedule.add_noise(x_start, config.timestep, noise)
        ranking = classifier(x_t, config.timestep).topk(min(5, outputs)).indices.cpu().numpy()
        right = ranking == folder.labels[list(own)][:, None]
        hits += right[:, 0].sum(), right.sum()
        predicted += ranking[:, 0].tolist()
    results = {"top1": hits[0] / len(folder), "top5": hits[1] / len(folder), "images": len(folder)}
    results |= {"checkpoint": config.checkpoint, "timestep": config.timestep}
    write_json(config.out / "results.json", results)
    if outputs <= DRAWN:
        counts = np.zeros((outputs, outputs), dtype=np.int64)
        np.add.at(counts, (folder.labels, predicted), 1)
        save_figure(draw_confusion(counts, folder.classes), config.out / "confusion.png")
    print(f"top-1 {100 * results['top1']:.2f}, top-5 {100 * results['top5']:.2f}; {config.out}")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(EvaluateConfig, run, argv)
