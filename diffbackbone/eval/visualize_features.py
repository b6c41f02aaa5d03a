"""Show features: their first three principal components as red, green and blue.

A figure has the image, and beside it the taps: a row for each block, a column for each timestep.
The components of a tap are those of all images together, so equal colors mean alike features in
all of them. Below a map are its size and the share of the variance that the colors show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from diffbackbone.backbone import MIN_SIZE, DiffusionBackbone
from diffbackbone.checkpoint import CheckpointError, read_checkpoint
from diffbackbone.cli import run_command
from diffbackbone.eval.data import list_images
from diffbackbone.eval.features import Tap, autocast
from diffbackbone.eval.options import BackboneOptions, build_backbone
from diffbackbone.eval.plots import draw_taps
from diffbackbone.images import normalize, read_image, resize, to_tensor, to_uint8
from diffbackbone.utils import UserError, save_figure

BLOCKS = (12, 19, 24, 27, 30, 33)
DPI = 120


@dataclass(kw_only=True)
class VisualizeFeaturesConfig(BackboneOptions):
    """Show the principal components of features as colors."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Images, or folders of images, of any size."""
    out: Path = Path("features.png")
    """A .png for one sheet of all images, or a folder for a figure per image."""
    timesteps: tuple[int, ...] = (10, 90, 300)
    """0-based timesteps t."""
    blocks: tuple[int, ...] = ()
    """1-based blocks b; default: 12 19 24 27 30 33, as far as the U-Net goes."""
    feedback: Literal["none", "all", "bottleneck", "windowed", "multi-scale"] = "none"
    """DifFeed: show its second pass."""
    classifier: Path | None = None
    """A best.pt or last.pt of tools/train_classifier.py: its U-Net, noise, seed, value range and
    trained layers are taken."""
    image_size: int | None = None
    """Short side the images are resized to; default: their own."""
    value_range: tuple[float, float] | None = None
    """Values of images deeper than 8 bits that are black and white."""
    limit: int = 16
    """Images at most."""
    cell: int = 128
    """Longer side of each map in pixels."""
    percentile: float = 1.0
    """Share of each component's values that is cut off at either end, in percent."""
    smooth: bool = False
    """Interpolate the maps."""


def principal_components(rows: Tensor, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean and the first principal axes.

    An axis points to where its largest entry (in size) is positive, so that colors don't flip from
    run to run.

    Args:
        rows: (N, C) float64.
        count: Number of axes, at most C; those beyond the rank are 0.

    Returns:
        Mean (C,), axes (count, C) of length 1, and the share (count,) of the variance of each.
    """
    mean = rows.mean(0)
    centered = rows - mean
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    values, axes = values.flip(0)[:count], vectors.T.flip(0)[:count]
    # smaller sums of squares are rounding errors
    floor = 1e-12 * (values[0].clamp_min(0) + 1e-12 * rows.square().sum())
    kept = (values > floor).double()
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    shares = kept * values / centered.square().sum().clamp_min(1e-300)
    return mean, axes * largest.sign() * kept[:, None], shares


def colorize(maps: Sequence[Tensor], percentile: float = 1.0) -> tuple[list[np.ndarray], float]:
    """Color the maps of one tap by the principal components of all of them together.

    Args:
        maps: (C, h_i, w_i) of each image.
        percentile: Each component's range is from this percentile of all its values to as much
            below 100.

    Returns:
        Pixels (h_i, w_i, 3) uint8 of each image, and the share of the variance they show. A
        component without variance is gray.
    """
    rows = torch.cat([x.double().flatten(1).T for x in maps])
    mean, axes, shares = principal_components(rows)
    values = ((rows - mean) @ axes.T).numpy()
    low, high = np.percentile(values, [percentile, 100 - percentile], axis=0)
    flat = high <= low  # most values are the same
    low, high = np.where(flat, values.min(0), low), np.where(flat, values.max(0), high)
    shades = np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 0.5)
    pixels = (255 * shades.clip(0, 1)).round().astype(np.uint8)
    parts = np.split(pixels, np.cumsum([x[0].numel() for x in maps])[:-1])
    return [p.reshape(*x.shape[1:], 3) for p, x in zip(parts, maps)], float(shares.sum())


@torch.no_grad()
def color_taps(
    backbone: DiffusionBackbone,
    images: Sequence[np.ndarray],
    timesteps: Sequence[int],
    blocks: Sequence[int],
    percentile: float = 1.0,
    device: torch.device | str = "cpu",
    compute: torch.dtype | None = None,
) -> list[dict[Tap, tuple[np.ndarray, str]]]:
    """Color the taps of images, each of its own size.

    Args:
        backbone: With feedback, the taps are those of the second pass.
        images: Of :func:`diffbackbone.images.read_image`, from 32 px.
        timesteps: 0-based timesteps t.
        blocks: 1-based blocks b.
        percentile: See :func:`colorize`.
        device: Where to compute.
        compute: Type that autocast computes in; None leaves float32.

    Returns:
        For each image ``{(t, b): (pixels (h, w, 3), caption)}``.
    """
    backbone.to(device).eval()
    found: list[dict[Tap, tuple[np.ndarray, str]]] = [{} for _ in images]
    for t in tqdm(timesteps, "taps", unit="timestep", leave=False, disable=None):
        features: dict[int, list[Tensor]] = {b: [] for b in blocks}
        for image in images:
            x = normalize(to_tensor(image))[None].to(device)
            with autocast(x.device, compute):
                taps = backbone.forward_taps(x, [t], blocks)
            for b in blocks:
                features[b].append(taps[t, b][0].float().cpu())
        for b in blocks:
            pictures, share = colorize(features[b], percentile)
            for own, pixels in zip(found, pictures):
                caption = f"{pixels.shape[0]}x{pixels.shape[1]}, {share:.0%}"
                own[t, b] = pixels, caption
    return found


def find_images(given: Sequence[Path], limit: int) -> list[Path]:
    """Return the images named, and those of the folders named, up to a limit."""
    paths = []
    for path in map(Path.expanduser, given):
        if path.is_dir():
            folder = list_images(path)
            paths += [folder.path(i) for i in range(len(folder))]
        else:
            paths.append(path)
    return paths[:limit]


def read_resized(
    path: Path, size: int | None, value_range: Sequence[float] | None = None
) -> np.ndarray:
    """Read an image (H, W, 3), its short side resized to ``size`` if given.

    Raises:
        UserError: It is broken, or too small for the U-Net.
    """
    pixels = read_image(path, value_range)
    if size is not None:
        scale = size / min(pixels.shape[:2])
        height, width = (max(size, round(side * scale)) for side in pixels.shape[:2])
        pixels = resize(pixels, (width, height))
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIZE:
        raise UserError(
            f"the image {path} has {width} x {height} px, at least {MIN_SIZE} x {MIN_SIZE} are "
            "needed: enlarge it with --image-size"
        )
    return pixels


def read_classifier(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and the backbone's weights of a trained classifier.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: It is not a checkpoint of tools/train_classifier.py.
    """
    content = read_checkpoint(path, mapped=False)
    if not isinstance(content, dict) or "backbone" not in content or "settings" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of tools/train_classifier.py")
    return content["settings"], content["backbone"]


def build(config: VisualizeFeaturesConfig) -> tuple[VisualizeFeaturesConfig, DiffusionBackbone]:
    """Build the backbone; returns the options, too, with all that follows filled in."""
    blocks = config.blocks
    if config.classifier is None:
        default = tuple(b for b in BLOCKS if b <= len(config.unet_config().blocks))
        config = replace(config, blocks=blocks or default)
        feedback = None if config.feedback == "none" else config.feedback
        if feedback:
            print("warning: no --classifier, so the feedback layers are random")
        return config, build_backbone(config, feedback)
    settings, weights = read_classifier(config.classifier)
    taken = {name: settings[name] for name in ("unet", "noise", "seed", "feedback", "value_range")}
    config = replace(config, **taken, blocks=tuple(settings["blocks"]))
    feedback = None if config.feedback == "none" else config.feedback
    backbone = build_backbone(config, feedback, freeze=not settings["finetune"])
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{config.classifier} is of another model: {error}") from error
    last = backbone.unet.last_block
    blocks = blocks or tuple(b for b in BLOCKS if b <= last)
    if max(blocks) > last:
        raise UserError(f"--blocks {blocks}: the U-Net of --classifier has blocks 1 to {last}")
    return replace(config, blocks=blocks), backbone


def run(config: VisualizeFeaturesConfig) -> list[Path]:
    """Draw the figures.

    Returns:
        The files written.
    """
    state = config.start()
    if not 0 <= config.percentile < 50:
        raise UserError(f"--percentile must be from 0 to below 50, got {config.percentile}")
    config, backbone = build(config)
    paths = find_images(config.images, config.limit)
    images = [read_resized(path, config.image_size, config.value_range) for path in paths]
    taps = color_taps(
        backbone,
        images,
        config.timesteps,
        config.blocks,
        config.percentile,
        state.device,
        config.compute_dtype(state.device),
    )
    strides = {b: backbone.unet.blocks[b].stride for b in config.blocks}
    panels = [(path.name, to_uint8(pixels), own) for path, pixels, own in zip(paths, images, taps)]
    if config.out.suffix.lower() == ".png":
        figures = {config.out: panels}
    else:
        width = len(str(len(paths) - 1))
        figures = {
            config.out / f"{i:0{width}d}_{path.stem}.png": [panel]
            for i, (path, panel) in enumerate(zip(paths, panels))
        }
    for path, shown in figures.items():
        save_figure(draw_taps(shown, strides, config.cell / DPI, config.smooth), path, DPI)
    print(f"{config.out}: {len(paths)} images, b = {config.blocks}, t = {config.timesteps}")
    return list(figures)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(VisualizeFeaturesConfig, run, argv)
