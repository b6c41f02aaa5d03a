"""Show features: their first three principal components as red, green and blue.

The components of a tap are those of all images together, so equal colors mean alike features in
all of them. Below a map are its size and the share of the variance that the colors show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.cli import run_command
from diffbackbone.eval.classify import read_checkpoint
from diffbackbone.eval.data import list_images, resize_short_side
from diffbackbone.eval.features import Tap, autocast
from diffbackbone.eval.options import BackboneOptions, build_backbone
from diffbackbone.eval.plots import draw_taps
from diffbackbone.images import normalize, read_image, to_tensor, to_uint8
from diffbackbone.utils import save_figure

BLOCKS = (12, 19, 24, 27, 30, 33)
CUT = 1.0
"""Percentage of each component's values that is clipped at either end."""


@dataclass(kw_only=True)
class VisualizeFeaturesConfig(BackboneOptions):
    """Show the principal components of features as colors."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Images, or folders of images, of any size."""
    out: Path = Path("features.png")
    """The picture."""
    timesteps: tuple[int, ...] = (10, 90, 300)
    """0-based timesteps t."""
    blocks: tuple[int, ...] = ()
    """1-based blocks b; default: 12 19 24 27 30 33, if the network has them."""
    classifier: Path | None = None
    """A best.pt or last.pt of tools/train_classifier.py: its U-Net, noise, seed, value range and
    trained layers are taken; of DifFeed, the second pass is shown."""
    image_size: int | None = None
    """Short side the images are resized to; default: their own."""
    value_range: tuple[float, float] | None = None
    """Values of images deeper than 8 bits that are black and white."""
    limit: int = 16
    """Images at most."""


def colorize(maps: Sequence[Tensor]) -> tuple[list[np.ndarray], float]:
    """Color the maps (C, h_i, w_i) of one tap by the principal components of all together.

    Returns:
        Pixels (h_i, w_i, 3) uint8 of each image, and the share of the variance they show. A
        component without variance is gray.
    """
    rows = torch.cat([x.double().flatten(1).T for x in maps])
    centered = rows - rows.mean(0)
    variances, axes = torch.linalg.eigh(centered.T @ centered)
    total, variances, axes = variances.sum(), variances[-3:].flip(0), axes[:, -3:].flip(1)
    # colors must not flip from run to run
    axes *= axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    kept = variances > 1e-12 * variances[0] + 1e-24 * rows.square().sum()  # others are rounding
    values = (centered @ axes * kept).numpy()
    low, high = np.percentile(values, [CUT, 100 - CUT], axis=0)
    flat = high <= low  # most values are the same
    low, high = np.where(flat, values.min(0), low), np.where(flat, values.max(0), high)
    shades = np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 0.5)
    pixels = (255 * shades.clip(0, 1)).round().astype(np.uint8)
    parts = np.split(pixels, np.cumsum([x[0].numel() for x in maps])[:-1])
    share = float(variances[kept].sum() / total.clamp_min(1e-300))
    return [p.reshape(*x.shape[1:], 3) for p, x in zip(parts, maps)], share


@torch.no_grad()
def color_taps(
    backbone: DiffusionBackbone,
    images: Sequence[np.ndarray],
    timesteps: Sequence[int],
    blocks: Sequence[int],
    device: torch.device | str = "cpu",
    compute: torch.dtype | None = None,
) -> list[dict[Tap, tuple[np.ndarray, str]]]:
    """Return ``{(t, b): (pixels (h, w, 3), caption)}`` for each image (H, W, C).

    With feedback, the taps are those of the second pass.
    """
    backbone.to(device).eval()
    found: list[dict[Tap, tuple[np.ndarray, str]]] = [{} for _ in images]
    for t in tqdm(timesteps, "taps", unit="timestep", leave=False, disable=None):
        features = []
        for image in images:
            x = normalize(to_tensor(image))[None].to(device)
            with autocast(x.device, compute):
                taps = backbone.forward_taps(x, [t], blocks)
            features.append({b: taps[t, b][0].float().cpu() for b in blocks})
        for b in blocks:
            pictures, share = colorize([maps[b] for maps in features])
            for own, pixels in zip(found, pictures):
                own[t, b] = pixels, f"{pixels.shape[0]}x{pixels.shape[1]}, {share:.0%}"
    return found


def build(config: VisualizeFeaturesConfig) -> tuple[VisualizeFeaturesConfig, DiffusionBackbone]:
    """Build the backbone; returns the options with all defaults filled in, too."""
    if config.classifier is None:
        config = replace(config, blocks=config.blocks or config.existing(BLOCKS))
        return config, build_backbone(config)
    saved = read_checkpoint(config.classifier)
    settings = saved["settings"]
    names = ("unet", "noise", "seed", "value_range")
    trained = replace(config, **{name: settings[name] for name in names})
    backbone = build_backbone(
        replace(trained, blocks=tuple(settings["blocks"])),
        None if settings["feedback"] == "none" else settings["feedback"],
        freeze=not settings["finetune"],
        feedback_layers=settings["feedback_layers"],
    )
    backbone.load_state_dict(saved["backbone"])
    known = tuple(b for b in BLOCKS if b <= backbone.unet.last_block)
    return replace(trained, blocks=config.blocks or known), backbone


def run(config: VisualizeFeaturesConfig) -> None:
    """Draw one figure of all images."""
    state = config.start()
    config, backbone = build(config)
    paths: list[Path] = []
    for path in map(Path.expanduser, config.images):
        paths += [path / name for name in list_images(path).paths] if path.is_dir() else [path]
    paths = paths[: config.limit]
    channels = backbone.in_channels
    images = [read_image(path, config.value_range, channels) for path in paths]
    if config.image_size is not None:
        images = [resize_short_side(pixels, config.image_size) for pixels in images]
    compute = config.compute_dtype(state.device)
    taps = color_taps(backbone, images, config.timesteps, config.blocks, state.device, compute)
    shown = [0, 1, 2] if channels >= 3 else [0, 0, 0]
    panels = [
        (path.name, to_uint8(pixels[..., shown]), own)
        for path, pixels, own in zip(paths, images, taps)
    ]
    strides = {b: backbone.unet.blocks[b].stride for b in config.blocks}
    save_figure(draw_taps(panels, strides), config.out)
    print(f"{config.out}: {len(paths)} images, b = {config.blocks}, t = {config.timesteps}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(VisualizeFeaturesConfig, run, argv)
