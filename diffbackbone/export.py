"""Write a backbone as a program that runs without this package, or a U-Net's weights alone.

A program takes ``images`` (batch, 3, H, W), RGB in [-1, 1], of the size and batch that it was made
for, and does not check their values. Each file is read again and run on random images beside the
original before it is put into place; nothing is kept where the difference is too large.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffbackbone import checkpoint as reading
from diffbackbone.backbone import _DIGEST, MIN_SIZE, DiffusionBackbone
from diffbackbone.cli import run_command
from diffbackbone.models.gd_config import UNetConfig, resolve_config
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.saving import save_safetensors
from diffbackbone.sources import CheckpointError, find_file, some_keys
from diffbackbone.utils import UserError, atomic_write

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONE_FILE = 1_500_000_000
"""Bytes of weights that go into one ONNX file, whose format ends at 2 GB."""
LARGEST_DIFFERENCE = {
    "pt2": 1e-4,
    "onnx": 1e-3,
    "float32": 1e-6,
    "float16": 5e-2,
    "bfloat16": 0.2,
}
"""Relative differences that rounding alone does not reach."""


@dataclass
class ExportConfig:
    """Write a backbone as a torch.export or ONNX program, or a U-Net's weights as safetensors."""

    format: Literal["pt2", "onnx", "safetensors"]
    """pt2: torch.export.load(FILE).module()(images); onnx: needs diffbackbone[export]."""
    out: Path
    """File to write."""
    checkpoint: str
    """guided-diffusion weights, or a training checkpoint that holds them; a path or URL."""
    prefix: str | None = None
    """Prefix of the U-Net's keys, where the checkpoint holds several."""
    unet: str | None = None
    """Preset, or fields as JSON; default: what a .safetensors file says, else gd256_uncond."""
    size: tuple[int, ...] | None = None
    """Side, or height and width, of the images; default: the size the U-Net was trained at."""
    blocks: tuple[int, ...] = (33, 30, 27, 24)
    """Programs: tapped blocks, 1-based."""
    timestep: int = 90
    """Programs: 0-based timestep."""
    feedback: Literal["all", "bottleneck", "windowed", "multi-scale", "none"] | None = None
    """Programs: DifFeed's strategy; none leaves trained feedback layers out."""
    layers: str | None = None
    """Programs: training checkpoint with projections and feedback layers, where it holds no U-Net
    (save_frozen off); default: they are looked for in the checkpoint."""
    out_strides: tuple[int, ...] | None = None
    """Programs: strides of the maps; default: the blocks' own."""
    noise: Literal["fixed", "none"] = "fixed"
    """Programs: noise added to the images."""
    batch: int = 1
    """Programs: images at a time."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Weights: type that they are rounded to."""

    def __post_init__(self) -> None:
        suffix = SUFFIXES[self.format]
        if self.out.suffix != suffix or self.out.is_dir():
            raise UserError(f"--out {self.out}: a {self.format} file's name ends in {suffix}")
        if self.size is not None and (len(self.size) not in (1, 2) or min(self.size) < MIN_SIZE):
            raise UserError(f"--size is one or two numbers from {MIN_SIZE}, got {self.size}")
        if self.batch < 1:
            raise UserError(f"--batch must be at least 1, got {self.batch}")
        if self.format == "safetensors":
            return
        if not hasattr(torch.compiler, "is_exporting"):
            raise UserError(
                f"--format {self.format} needs torch 2.7 or newer, this is {torch.__version__}"
            )
        missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
        if self.format == "onnx" and missing:
            raise UserError(
                f"--format onnx needs {', '.join(missing)}: pip install 'diffbackbone[export]'"
            )

    def images(self, default: int) -> tuple[int, int]:
        """Return height and width of the images."""
        height, width = ((self.size or (default,)) * 2)[:2]
        return height, width


def read_config(options: ExportConfig) -> UNetConfig:
    """Return the architecture: of ``--unet``, of the file, or of the 256-px model.

    Raises:
        UserError: It is unknown.
        CheckpointError: The file is damaged.
    """
    if options.unet is None:
        stored = reading.stored_config(find_file(options.checkpoint))
        return stored or UNetConfig.from_preset("gd256_uncond")
    try:
        return resolve_config(options.unet)
    except (ValueError, TypeError) as error:
        raise UserError(f"--unet {options.unet}: {error}") from error


# ---------------------------------------------------------------------------------------- reading


def read_layers(source: str, prefix: str | None) -> dict[str, Tensor]:
    """Read projections, feedback layers and the U-Net's digest from a training checkpoint.

    Args:
        source: Path or URL.
        prefix: Prefix of the U-Net's keys, where the file holds several.

    Returns:
        Part of a backbone's state dict; empty for a file of a U-Net alone.

    Raises:
        CheckpointError: The file is damaged, holds code or several backbones.
    """
    content = reading.read_checkpoint(source)
    content, roots = reading.unwrap(content, "unet." + reading.ANCHOR, _DIGEST)
    if prefix is not None:
        roots &= {prefix.removesuffix("unet.")}
    if len(roots) > 1:
        raise CheckpointError(
            f"{source} holds backbones under {sorted(roots)}; choose one by its U-Net's --prefix"
        )
    found = {}
    for root in roots:
        for key, value in content.items():
            name = str(key)[len(root) :]
            own = name.startswith(("proj.", "feedback.")) or name == _DIGEST
            if str(key).startswith(root) and own and isinstance(value, Tensor):
                found[name] = value
    reading.check_finite(source, found)
    return found


def build_backbone(options: ExportConfig, config: UNetConfig) -> DiffusionBackbone:
    """Build the frozen backbone with all its weights.

    Raises:
        ValueError: Blocks, timestep, strides or feedback don't fit.
        CheckpointError: A file does not fit, or layers are missing.
    """
    source = options.layers or options.checkpoint
    layers = read_layers(source, options.prefix)
    feedback = None if options.feedback in (None, "none") else options.feedback
    projections, sources = (
        sorted({int(key.split(".")[1]) for key in layers if key.startswith(part)})
        for part in ("proj.", "feedback.")
    )
    if feedback is not None and not sources:
        raise CheckpointError(
            f"--feedback {feedback}: {source} holds no feedback layers; give the training "
            "checkpoint that learned them as --checkpoint or --layers"
        )
    if sources and options.feedback is None:
        raise CheckpointError(
            f"{source} holds feedback layers of blocks {sources}: give --feedback with their "
            "strategy, or --feedback none to leave them out"
        )
    if projections and len(projections) != len(options.blocks):
        raise CheckpointError(
            f"{source} holds projections of {len(projections)} maps, but --blocks names "
            f"{len(options.blocks)}: give the blocks that it was trained with"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # weights are random until they are loaded
        backbone = DiffusionBackbone(
            config,
            timestep=options.timestep,
            blocks=options.blocks,
            feedback=feedback,
            out_channels=len(layers["proj.0.bias"]) if projections else None,
            out_strides=options.out_strides,
            noise=options.noise,
            freeze=True,
        )
    print(backbone.load(options.checkpoint, options.prefix), flush=True)
    if feedback is None:
        layers = {name: x for name, x in layers.items() if not name.startswith("feedback.")}
    _load_layers(backbone, layers, source)
    return backbone.eval()


def _load_layers(backbone: DiffusionBackbone, layers: dict[str, Tensor], source: str) -> None:
    try:
        keys = backbone.load_state_dict(layers, strict=False)
    except (CheckpointError, RuntimeError) as error:  # RuntimeError: of another shape
        raise CheckpointError(f"{source}: {' '.join(str(error).split())}") from error
    missing = [key for key in keys.missing_keys if not key.startswith("unet.")]
    if missing or keys.unexpected_keys:
        raise CheckpointError(
            f"{source}: projections and feedback layers don't fit these blocks and this feedback; "
            f"missing: {some_keys(missing) or 'none'}; unexpected: "
            f"{some_keys(keys.unexpected_keys) or 'none'}"
        )
    if layers:
        print(f"{source}: {len(layers)} tensors of projections and feedback", flush=True)


def build_unet(options: ExportConfig, config: UNetConfig) -> UNet:
    """Build the U-Net, as far as the file has it.

    Raises:
        CheckpointError: The file does not fit.
    """
    content = reading.read_checkpoint(options.checkpoint)
    keys, _, _ = reading.find_state_dict(content, options.checkpoint, options.prefix)
    if "label_emb.weight" not in keys:
        config = config.replace(num_classes=None)
    last = None
    if "out.2.weight" not in keys:  # a backbone that ends at its last tap
        names = {f"{block.name}.": index for index, block in config.blocks.items()}
        built = [n for name, n in names.items() if any(key.startswith(name) for key in keys)]
        last = max(built, default=1)
    unet = UNet(config, last)
    print(reading.load_checkpoint(unet, options.checkpoint, options.prefix), flush=True)
    return unet.eval()


# ---------------------------------------------------------------------------------------- writing


def random_images(batch: int, size: Sequence[int], seed: int) -> Tensor:
    """Return images (N, 3, H, W) of noise in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *size, generator=generator) * 2 - 1


def largest_difference(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative difference; infinite for other shapes or NaN."""
    if [x.shape for x in ours] != [x.shape for x in expected]:
        return float("inf")
    worst = 0.0
    for x, y in zip(ours, expected):
        error = float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-12))
        worst = max(worst, error) if error == error else float("inf")
    return worst


def write(path: Path, save: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    """Write a file, check it, and only then put it into place.

    Args:
        path: File to write.
        save: Writes a path, and perhaps ``<path>.data``.
        check: Reads what was saved, and raises where it is wrong.
    """
    path = Path(os.path.realpath(path))  # "<path>.data" belongs beside a link's target

    def save_checked(partial: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            saved = Path(folder) / path.name
            print("writing", flush=True)
            save(saved)
            check(saved)
            data = Path(f"{saved}.data")
            if data.exists():  # never a program beside another's weights
                path.unlink(missing_ok=True)
                os.replace(data, f"{path}.data")
            os.replace(saved, partial)

    atomic_write(path, save_checked)


def _verify(limit: float, difference: float) -> None:
    if not difference <= limit:
        raise UserError(
            f"the written file differs from the original by {difference:.2g} on random images, "
            f"more than {limit:g}: nothing was kept"
        )
    print(f"verified on random images: largest relative difference {difference:.2g}", flush=True)


@torch.no_grad()
def export_program(options: ExportConfig, config: UNetConfig) -> None:
    """Write a backbone as pt2 or ONNX.

    Raises:
        UserError: The program computes something else.
        CheckpointError: See :func:`build_backbone`.
    """
    backbone = build_backbone(options, config)
    batch, size = options.batch, options.images(config.image_size)
    checks = [random_images(batch, size, seed) for seed in (1, 2)]
    expected = [backbone(x) for x in checks]  # keeps the fixed noise, which becomes a constant
    print(f"exporting for images ({batch}, 3, {size[0]}, {size[1]}); minutes for a large U-Net")
    for i, (block, x) in enumerate(zip(backbone.blocks, expected[0])):
        print(f"  map{i}: block {block}, stride {backbone.strides[i]}, {tuple(x.shape)}")
    program = torch.export.export(backbone, (random_images(batch, size, 0),))
    if options.format == "onnx":
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=[f"map{i}" for i in range(len(backbone.blocks))],
            verbose=False,
        )
        weights = sum(x.numel() * x.element_size() for x in program.state_dict.values())

    def save(path: Path) -> None:
        if options.format == "pt2":
            torch.export.save(program, path)
            return
        exported.save(path, external_data=weights > ONE_FILE)
        if weights > ONE_FILE:
            print(f"the weights are in {options.out.name}.data, which belongs beside it")

    def check(path: Path) -> None:
        run = _run_onnx(path) if options.format == "onnx" else torch.export.load(path).module()
        difference = max(largest_difference(run(x), y) for x, y in zip(checks, expected))
        _verify(LARGEST_DIFFERENCE[options.format], difference)

    write(options.out, save, check)


def _run_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        path, session_options, providers=["CPUExecutionProvider"]
    )
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]


@torch.no_grad()
def export_weights(options: ExportConfig, config: UNetConfig) -> None:
    """Write a U-Net's weights with its architecture.

    Raises:
        UserError: The file computes something else.
        ValueError: A weight is not finite in the type.
        CheckpointError: See :func:`build_unet`.
    """
    unet = build_unet(options, config)
    config, last = unet.config, unet.last_block
    deepest = config.blocks.deepest_stride(len(config.blocks))
    size = [-(-side // deepest) * deepest for side in options.images(min(config.image_size, 256))]
    x = random_images(1, size, 1)
    y = None if config.num_classes is None else torch.zeros(1, dtype=torch.long)

    def run(unet: UNet) -> list[Tensor]:
        if hasattr(unet, "out"):
            return [unet(x, 90, y)]
        return list(unet.forward_features(x, 90, [unet.last_block], y).values())

    def check(path: Path) -> None:
        again = UNet(reading.read_unet_config(path), None if hasattr(unet, "out") else last).eval()
        reading.load_checkpoint(again, path)
        _verify(LARGEST_DIFFERENCE[options.dtype], largest_difference(run(again), run(unet)))

    def save(path: Path) -> None:
        save_safetensors(path, unet.state_dict(), config, DTYPES[options.dtype])

    write(options.out, save, check)


def run(options: ExportConfig) -> None:
    """Export as the options say.

    Raises:
        UserError: It cannot be done as given.
        FileNotFoundError: No such checkpoint.
    """
    config = read_config(options)
    try:
        if options.format == "safetensors":
            export_weights(options, config)
        else:
            export_program(options, config)
    except ValueError as error:  # blocks, timestep, strides, types
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(ExportConfig, run, argv)
