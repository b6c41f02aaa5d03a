"""Look at features: their first three principal components as red, green and blue.

A picture has the image, and beside it the taps: a row for each block, a column for each
timestep. ::

    python tools/visualize_features.py cat.jpg dog.jpg --checkpoint 256x256_diffusion_uncond.pt \
        --blocks 19 24 27 30 33 --timesteps 10 90 300 --out work_dirs/features.png
    python tools/visualize_features.py cat.jpg --checkpoint ... --feedback bottleneck --out ...
    python tools/visualize_features.py cat.jpg --checkpoint ... --classifier best.pt --out cat.png

The components of a block and timestep are those of all images together, so equal colours mean alike
features in all of them. Signs follow a rule, so they don't flip between runs. Below a map stand its
size and the share of the variance that its colours show.

Images of any size are taken as they are; ``--image-size`` brings the short side to a size. An OUT
that ends in ``.png`` gets all images on one sheet; any other is a folder, a picture for each image.
With ``--feedback`` the taps are those of DifFeed's second pass, whose feedback layers
``--classifier`` reads from a run of tools/train_classifier.py; without, they are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import _analysis
import _classification as common
import _common
import numpy as np
import torch
import train_classifier
from _classification import Processes, ToolError
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffbackbone import DiffusionBackbone
from diffbackbone.backbone import MIN_SIZE
from diffbackbone.feedback import STRATEGIES
from diffbackbone.images import normalize, read_image, resize, to_tensor, to_uint8

BLOCKS = (12, 19, 24, 27, 30, 33)
TIMESTEPS = (10, 90, 300)
_TAKEN = ("unet", "noise", "seed", "feedback", "value_range")  # from --classifier
_GAP, _CAPTION, _HEAD = 8, 20, 30
_INPUT = 1.5
"""Size of the image beside its maps."""
_GREY = (90, 90, 90)


@dataclass(frozen=True)
class ColouredTap:
    """One tap of one image.

    Attributes:
        pixels: (h, w, 3) uint8.
        stride: Pixels of the image for each of the map's.
        variance: Share of the variance of all images' features that the colours show.
    """

    pixels: np.ndarray
    stride: int
    variance: float


def colour(maps: Sequence[Tensor], percentile: float) -> tuple[list[np.ndarray], float]:
    """Colours of the maps of one tap, from principal components of all of them together.

    Args:
        maps: (C, h_i, w_i) of each image.
        percentile: Each component reaches from this percentile of all its values (black) to as
            much below 100 (full); what lies outside is cut off.

    Returns:
        Pixels (h_i, w_i, 3) uint8 of each image, and the share of the variance they show. A
        component without variance is grey.
    """
    mean, axes, shares = _analysis.principal_components(maps)
    projected = [torch.einsum("kc,chw->hwk", axes, x.double() - mean[:, None, None]) for x in maps]
    values = torch.cat([x.reshape(-1, 3) for x in projected]).numpy()
    low, high = np.percentile(values, [percentile, 100 - percentile], axis=0)
    # where most values are one, the percentiles coincide
    flat = high <= low
    low, high = np.where(flat, values.min(0), low), np.where(flat, values.max(0), high)
    span = np.where(high > low, high - low, 1.0)
    pictures = []
    for x in projected:
        shade = np.where(high > low, (x.numpy() - low) / span, 0.5)
        pictures.append((255 * shade.clip(0, 1)).round().astype(np.uint8))
    return pictures, float(shares.sum())


def colour_taps(
    backbone: DiffusionBackbone,
    images: Sequence[np.ndarray],
    timesteps: Sequence[int],
    blocks: Sequence[int],
    *,
    percentile: float = 1.0,
    device: torch.device | str = "cpu",
    compute: torch.dtype | None = None,
    processes: Processes | None = None,
) -> list[dict[tuple[int, int], ColouredTap]]:
    """Colour the taps of some images, each of its own size.

    Features of one timestep are held at a time.

    Args:
        backbone: Gives the taps; with feedback, those of the second pass.
        images: Of :func:`diffbackbone.images.read_image`, any size from 32 px.
        timesteps: 0-based timesteps t.
        blocks: 1-based blocks b.
        percentile: See :func:`colour`.
        device: Where to compute.
        compute: What autocast shall compute in; None leaves float32.
        processes: Shows a progress bar; None for none.

    Returns:
        ``{(t, b): ColouredTap}`` of each image.
    """
    backbone.to(device).eval()
    device = torch.device(device)
    found: list[dict[tuple[int, int], ColouredTap]] = [{} for _ in images]
    steps = [(t, i) for t in timesteps for i in range(len(images))]
    bar = steps if processes is None else processes.bar(steps, len(steps), "taps", "image")
    features: dict[int, list[Tensor]] = {b: [] for b in blocks}
    for t, i in bar:
        pixels = normalize(to_tensor(images[i]))[None].to(device)
        with torch.no_grad(), common.autocast(device, compute):
            taps = backbone.forward_taps(pixels, [t], blocks)
        for b in blocks:
            features[b].append(taps[t, b][0].float().cpu())
        if i == len(images) - 1:
            for b in blocks:
                pictures, share = colour(features[b], percentile)
                for own, picture in zip(found, pictures):
                    stride = backbone.unet.blocks[b].stride
                    own[t, b] = ColouredTap(picture, stride, share)
                features[b].clear()
    return found


def draw_panel(
    image: Image.Image,
    name: str,
    taps: dict[tuple[int, int], ColouredTap],
    cell: int,
    smooth: bool = False,
) -> Image.Image:
    """Picture of an image with its taps beside it, blocks downwards and timesteps to the right.

    Args:
        image: RGB.
        name: What to call it.
        taps: From :func:`colour_taps`.
        cell: Longer side of each map in pixels.
        smooth: Interpolate between the map's pixels.
    """
    head, label, small = (ImageFont.load_default(size) for size in (19, 17, 13))
    timesteps = list(dict.fromkeys(t for t, _ in taps))
    blocks = list(dict.fromkeys(b for _, b in taps))
    scale = cell / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    words = [f"b = {b}" for b in blocks]
    margin = round(max(label.getlength(text) for text in words)) + 24
    captions = {
        key: f"{tap.pixels.shape[0]}x{tap.pixels.shape[1]}, {tap.variance:.0%}"
        for key, tap in taps.items()
    }
    widest = round(max(small.getlength(text) for text in captions.values()))
    step_x, step_y = max(size[0], widest) + 2 * _GAP, size[1] + _CAPTION + _GAP
    shown = tuple(round(_INPUT * side) for side in size)
    below = f"{image.width} x {image.height} px"
    left = 2 * _GAP + max(shown[0], round(small.getlength(below))) + margin
    top = 2 * _GAP + _HEAD
    name = common.shorten(name, head, 4 * max(cell, 160))
    width = max(left + step_x * len(timesteps) + _GAP, 3 * _GAP + round(head.getlength(name)))
    height = _HEAD + max(step_y * len(blocks), shown[1] + _CAPTION + _GAP)
    picture = Image.new("RGB", (width, top + height), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((_GAP, _GAP), name, fill="black", font=head)
    top += _HEAD
    picture.paste(image.resize(shown, Image.Resampling.BICUBIC, reducing_gap=3.0), (_GAP, top))
    pen.text((_GAP, top + shown[1] + 3), below, fill=_GREY, font=small)
    filter_ = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    for j, t in enumerate(timesteps):
        x = left + j * step_x + size[0] / 2
        pen.text((x, top - 8), f"t = {t}", fill="black", font=label, anchor="ms")
    for i, b in enumerate(blocks):
        y = top + i * step_y
        pen.text((left - 12, y + size[1] / 2), words[i], fill="black", font=label, anchor="rm")
        for j, t in enumerate(timesteps):
            tap, x = taps[t, b], left + j * step_x
            # a map covers the image rounded up to its stride: cut what lies beyond it
            box = (0, 0, image.width / tap.stride, image.height / tap.stride)
            picture.paste(Image.fromarray(tap.pixels).resize(size, filter_, box), (x, y))
            pen.text((x, y + size[1] + 3), captions[t, b], fill=_GREY, font=small)
    return picture


def arrange(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels in as many columns as make the sheet about as wide as high."""

    def rows_of(columns: int) -> list[Sequence[Image.Image]]:
        return [panels[i : i + columns] for i in range(0, len(panels), columns)]

    def size_of(columns: int) -> tuple[int, int]:
        height = sum(max(panel.height for panel in row) for row in rows_of(columns))
        return columns * max(panel.width for panel in panels), height

    columns = min(range(1, len(panels) + 1), key=lambda n: max(size_of(n)))
    width, height = size_of(columns)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for row in rows_of(columns):
        for i, panel in enumerate(row):
            sheet.paste(panel, (i * width // columns, top))
        top += max(panel.height for panel in row)
    return sheet


# ------------------------------------------------------------------------------------ command line


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ToolError: The values don't go together.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", help="images, or folders of images")
    parser.add_argument("--out", default="features.png", help="a .png, or a folder")
    common.add_backbone_arguments(parser)
    parser.add_argument(
        "--feedback", choices=("none", *STRATEGIES), default="none", help="DifFeed's second pass"
    )
    parser.add_argument(
        "--classifier", metavar="FILE", help="best.pt or last.pt of tools/train_classifier.py"
    )
    group = parser.add_argument_group("picture")
    group.add_argument("--image-size", type=int, help="short side of the images; default: as it is")
    common.add_value_range(group)
    group.add_argument("--limit", type=int, default=16, help="images at most")
    group.add_argument("--cell", type=int, default=128, help="longer side of each map in pixels")
    group.add_argument("--percentile", type=float, default=1.0, help="cut off at either end")
    group.add_argument("--smooth", action="store_true", help="interpolate the maps")
    known, _ = parser.parse_known_args(argv)
    if known.classifier:
        saved = train_classifier.read_checkpoint(Path(known.classifier))["settings"]
        parser.set_defaults(**{name: saved[name] for name in _TAKEN if name in saved})
    args = parser.parse_args(argv)
    common.check_backbone(args)
    args.timesteps = args.timesteps or list(TIMESTEPS)
    common.check_at_least_one(args, "limit")
    if args.image_size is not None and args.image_size < MIN_SIZE:
        raise ToolError(f"--image-size must be at least {MIN_SIZE}, got {args.image_size}")
    if args.cell < 16:
        raise ToolError(f"--cell must be at least 16, got {args.cell}")
    if not 0 <= args.percentile < 50:
        raise ToolError(f"--percentile must be from 0 to below 50, got {args.percentile}")
    return args


def find_images(given: Sequence[str], limit: int) -> Iterator[Path]:
    """The images named, and those of the folders named, up to a limit.

    Raises:
        ToolError: There is no such file or folder, or no image in a folder.
    """
    count = 0
    for text in given:
        path = Path(text).expanduser()
        if path.is_dir():
            folder = common.list_images(path)
            paths = [folder.path(i) for i in range(len(folder.listing))]
        elif path.is_file():
            paths = [path]
        else:
            raise ToolError(f"there is no image {path}")
        for found in paths:
            if count < limit:
                yield found
            count += 1


def read_resized(path: Path, size: int | None, value_range: common.Range | None) -> np.ndarray:
    """Read an image (H, W, 3) with its short side brought to ``size``.

    Raises:
        ImageError: It is broken, or its values have no known range.
        ToolError: It is too small for the U-Net.
    """
    pixels = read_image(path, value_range)
    height, width = pixels.shape[:2]
    if size is not None:
        scale = size / min(height, width)
        height, width = (max(size, round(side * scale)) for side in (height, width))
        pixels = resize(pixels, (width, height))
    if min(height, width) < MIN_SIZE:
        raise ToolError(
            f"the image {path} has {width} x {height} px, at least {MIN_SIZE} x "
            f"{MIN_SIZE} are needed: enlarge it with --image-size"
        )
    return pixels


def _build(args: argparse.Namespace, processes: Processes) -> DiffusionBackbone:
    """The backbone that the arguments describe; fills in which blocks it is asked for."""
    feedback = None if args.feedback == "none" else args.feedback
    built, freeze = argparse.Namespace(**vars(args)), True
    if args.classifier:  # built as it was in training, whatever is to be seen of it
        saved = train_classifier.read_checkpoint(Path(args.classifier))
        built.blocks, freeze = saved["settings"]["blocks"], saved["settings"]["freeze"]
    elif built.blocks is None:
        count = len(common.unet_config(args.unet).blocks)
        built.blocks = [b for b in BLOCKS if b <= count]
    backbone = common.build_backbone(built, feedback, freeze)
    last = backbone.unet.last_block
    args.blocks = args.blocks or [b for b in BLOCKS if b <= last]
    if not 1 <= min(args.blocks) <= max(args.blocks) <= last:
        raise ToolError(f"--blocks {args.blocks}: the U-Net of --classifier has blocks 1 to {last}")
    if args.classifier:
        train_classifier.load_weights(backbone, saved["backbone"])
    elif feedback is not None:
        processes.say("warning: no --classifier, so the feedback layers are random")
    if not args.classifier or freeze:  # a fine-tuned U-Net's weights are in the run
        common.warn_random(args, processes)
    return backbone


def run(args: argparse.Namespace, processes: Processes) -> list[Path]:
    """Draw the pictures.

    Args:
        args: The command line.
        processes: One.

    Returns:
        The pictures written.

    Raises:
        ToolError: It cannot be done as given.
        CheckpointError: Weights don't fit.
    """
    if processes.world_size > 1:
        raise ToolError("visualize_features runs in one process")
    paths = list(find_images(args.images, args.limit))
    pictures = [read_resized(path, args.image_size, args.value_range) for path in paths]
    backbone = _build(args, processes)
    taps = colour_taps(
        backbone,
        pictures,
        args.timesteps,
        args.blocks,
        percentile=args.percentile,
        device=processes.device,
        compute=common.compute_dtype(args.precision, processes.device),
        processes=processes,
    )
    panels = [
        draw_panel(Image.fromarray(to_uint8(pixels)), path.name, own, args.cell, args.smooth)
        for pixels, path, own in zip(pictures, paths, taps)
    ]
    out = Path(args.out)
    if out.suffix.lower() == ".png":
        written = {out: arrange(panels)}
    else:
        width = len(str(len(paths) - 1))
        written = {
            out / f"{i:0{width}d}_{path.stem}.png": panel
            for i, (path, panel) in enumerate(zip(paths, panels))
        }
    for path, picture in written.items():
        _common.save_picture(picture, path)
    count = f"{len(paths)} image{'s' if len(paths) > 1 else ''}"
    processes.say(f"{out}: {count}, principal components of b={args.blocks}, t={args.timesteps}")
    return list(written)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: It cannot be done as given; the message says why.
    """
    common.run_tool(lambda: parse(argv), run)


if __name__ == "__main__":
    main()
