"""Write a backbone as a program that runs without this package, or a U-Net's weights alone.

A program takes ``images`` (batch, 3, H, W), RGB in [-1, 1], of the size and batch that it was made
for, and does not check their values. Its file is read again and compared with the backbone on
random images before it is put into place.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffbackbone import checkpoint as reading
from diffbackbone.backbone import DIGEST_KEY, DiffusionBackbone
from diffbackbone.cli import run_command
from diffbackbone.models import resolve_network
from diffbackbone.models.adm import write_folder
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.saving import save_safetensors
from diffbackbone.sources import CheckpointError, find_file
from diffbackbone.utils import UserError, atomic_write, require

ONE_FILE = 1_500_000_000
"""Bytes of weights that go into one ONNX file, whose format ends at 2 GB."""
LARGEST_DIFFERENCE = {"pt2": 1e-4, "onnx": 1e-3}
"""Relative differences that rounding alone does not reach."""


@dataclass
class ExportConfig:
    """Write a backbone as a torch.export or ONNX program, or a U-Net's weights as safetensors."""

    format: Literal["pt2", "onnx", "safetensors", "diffusers"]
    """pt2: torch.export.load(FILE).module()(images); onnx: needs diffbackbone[export]; diffusers: a
    folder for DDPMPipeline.from_pretrained."""
    out: Path
    """File, or diffusers' folder, to write."""
    checkpoint: str | None = None
    """guided-diffusion weights, or a training checkpoint that holds them; a path or URL. Networks
    of diffusers and timm have weights of their own."""
    prefix: str | None = None
    """Prefix of the U-Net's keys, where the checkpoint holds several."""
    unet: str | None = None
    """Network: a name, or fields as JSON; default: what a .safetensors file says, else
    gd256_uncond. Programs take any family, weights U-Nets of guided-diffusion."""
    size: tuple[int, ...] | None = None
    """Side, or height and width, of the images; default: the size the U-Net was trained at."""
    blocks: tuple[int, ...] = (33, 30, 27, 24)
    """Programs: tapped blocks, 1-based."""
    timestep: int = 90
    """Programs: 0-based timestep."""
    feedback: str | None = None
    """Programs: DifFeed's strategy, or pairs of blocks (24:14,21:17); none leaves trained feedback
    layers out."""
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


def read_config(options: ExportConfig) -> Any:
    """Return the architecture: of ``--unet``, of the file, or of the 256-px model."""
    if options.unet is None and options.checkpoint is not None:
        stored = reading.stored_config(find_file(options.checkpoint))
        return stored or UNetConfig.from_preset("gd256_uncond")
    config = resolve_network(options.unet or "gd256_uncond")
    if type(config) is not UNetConfig and options.format in ("safetensors", "diffusers"):
        raise UserError(f"--format {options.format} takes U-Nets of guided-diffusion")
    if options.checkpoint is None and isinstance(config, UNetConfig):
        raise UserError("--checkpoint is missing: the U-Net's weights would be random")
    return config


def read_layers(options: ExportConfig) -> dict[str, Tensor]:
    """Read projections, feedback layers and the U-Net's digest from a training checkpoint."""
    source = options.layers or options.checkpoint
    if source is None:
        return {}
    content = reading.read_checkpoint(source)
    content, roots = reading.unwrap(content, "unet." + reading.ANCHOR, DIGEST_KEY)
    if options.prefix is not None:
        roots &= {options.prefix.removesuffix("unet.")}
    if len(roots) > 1:
        raise CheckpointError(
            f"{source} holds backbones under {sorted(roots)}; choose one by its U-Net's --prefix"
        )
    (root,) = roots or {""}
    parts = ["proj.", DIGEST_KEY] + ["feedback."] * (options.feedback != "none")
    own = tuple(root + part for part in parts)
    return {
        key[len(root) :]: x
        for key, x in content.items()
        if isinstance(x, Tensor) and str(key).startswith(own)
    }


def build_backbone(options: ExportConfig, config: Any) -> DiffusionBackbone:
    """Build the frozen backbone with all its weights; a CheckpointError says what doesn't fit."""
    source, layers = options.layers or options.checkpoint, read_layers(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # weights are random until they are loaded
        backbone = DiffusionBackbone(
            config,
            timestep=options.timestep,
            blocks=options.blocks,
            feedback=None if options.feedback == "none" else options.feedback,
            out_channels=len(layers["proj.0.bias"]) if "proj.0.bias" in layers else None,
            out_strides=options.out_strides,
            noise=options.noise,
            freeze=True,
        )
    if options.checkpoint is not None:
        print(backbone.load(options.checkpoint, options.prefix), flush=True)
    unet = backbone.unet.state_dict(prefix="unet.")
    try:
        backbone.load_state_dict({**unet, **layers})
    except (CheckpointError, RuntimeError) as error:  # torch's lists the keys that don't fit
        raise CheckpointError(
            f"{source}: projections and feedback layers don't fit --blocks and --feedback (none "
            f"leaves trained feedback layers out): {error}"
        ) from error
    if source is not None:
        print(f"{source}: {len(layers)} tensors of projections and feedback", flush=True)
    return backbone.eval()


def random_images(shape: Sequence[int], seed: int) -> Tensor:
    """Return images (N, C, H, W) of noise in [-1, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def verify(ours: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> None:
    """Raise a UserError where maps' relative difference exceeds a limit, or shapes differ."""
    difference = math.inf
    if [x.shape for x in ours] == [x.shape for x in expected]:
        pairs = [(x.double(), y.double()) for x, y in zip(ours, expected)]
        differences = [(x - y).norm() / y.norm().clamp(min=1e-12) for x, y in pairs]
        difference = float(torch.stack(differences).max())  # NaN if one is
    if not difference <= limit:
        raise UserError(
            f"the written file differs from the original by {difference:.2g} on random images, "
            f"more than {limit:g}: nothing was kept"
        )
    print(f"verified on random images: largest relative difference {difference:.2g}", flush=True)


@torch.no_grad()
def export_program(options: ExportConfig, config: Any) -> None:
    """Write a backbone as pt2 or ONNX, once the file gives the backbone's maps."""
    if not hasattr(torch.compiler, "is_exporting"):
        raise UserError(f"programs need torch 2.7 or later, this is {torch.__version__}")
    if options.format == "onnx":
        packages = ("onnx", "onnxscript", "onnxruntime")
        require("--format onnx", packages, "pip install 'diffbackbone[export]'")
    backbone = build_backbone(options, config)
    size = ((options.size or (config.image_size,)) * 2)[:2]
    shape = options.batch, config.in_channels, *size
    checks = [random_images(shape, seed) for seed in (1, 2)]
    expected = [backbone(x) for x in checks]  # keeps the fixed noise, which becomes a constant
    print(f"exporting for images {shape}; minutes for a large U-Net")
    for i, (block, x) in enumerate(zip(backbone.blocks, expected[0])):
        print(f"  map{i}: block {block}, stride {backbone.strides[i]}, {tuple(x.shape)}")
    program = torch.export.export(backbone, (random_images(shape, 0),))
    path = Path(os.path.realpath(options.out))  # "<path>.data" belongs beside a link's target

    def save(partial: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            saved = Path(folder) / path.name
            print("writing", flush=True)
            run = _save_onnx(program, saved) if options.format == "onnx" else _save(program, saved)
            for x, maps in zip(checks, expected):
                verify(run(x), maps, LARGEST_DIFFERENCE[options.format])
            data = Path(f"{saved}.data")
            if data.exists():  # never a program beside another's weights
                path.unlink(missing_ok=True)
                os.replace(data, f"{path}.data")
                print(f"the weights are in {path.name}.data, which belongs beside it")
            os.replace(saved, partial)

    atomic_write(path, save)


def _save(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Write a program of torch.export, and return what the file computes."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _save_onnx(
    program: torch.export.ExportedProgram, path: Path
) -> Callable[[Tensor], list[Tensor]]:
    """Write a program as ONNX, and return what the file computes."""
    import onnxruntime

    outputs = program.graph_signature.user_outputs
    names = [f"map{i}" for i in range(len(outputs))]
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=names, verbose=False
    )
    weights = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    exported.save(path, external_data=weights > ONE_FILE)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]


def read_unet(options: ExportConfig, config: UNetConfig) -> UNet:
    """Read a U-Net as far as the checkpoint has it."""
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
    return unet


def export_weights(options: ExportConfig, config: UNetConfig) -> None:
    """Write a U-Net's weights with its architecture."""
    unet, dtype = read_unet(options, config), getattr(torch, options.dtype)

    def save(path: Path) -> None:
        save_safetensors(path, unet.state_dict(), unet.config, dtype)

    atomic_write(options.out, save)


def export_diffusers(options: ExportConfig, config: UNetConfig) -> None:
    """Write a whole U-Net as the folder of a diffusers pipeline."""
    unet, dtype = read_unet(options, config), getattr(torch, options.dtype)
    write_folder(options.out, unet.state_dict(), unet.config, dtype)
    print(f"{options.out}: DDPMPipeline.from_pretrained reads it", flush=True)


def run(options: ExportConfig) -> None:
    """Export as the options say."""
    exporters = {"safetensors": export_weights, "diffusers": export_diffusers}
    try:
        exporters.get(options.format, export_program)(options, read_config(options))
    except ValueError as error:  # blocks, timestep, strides, types
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    if options.out.is_file():
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(ExportConfig, run, argv)
