r"""Write a backbone as a program that runs without this package, or a U-Net's weights alone.

For instance::

    # torch.export: torch.export.load("gd.pt2").module()(images)
    python tools/export.py --format pt2 --checkpoint 256x256_diffusion_uncond.pt \
        --timestep 90 --blocks 33 30 27 24 --size 512 --out gd.pt2
    # ONNX (pip install 'diffbackbone[export]'), with the projections and DifFeed's layers of a
    # detector or segmenter that was trained with this backbone
    python tools/export.py --format onnx --checkpoint work_dirs/difffeed/iter_16000.pth \
        --feedback bottleneck --out-strides 4 8 16 32 --size 512 --out difffeed.onnx
    # weights alone, in half the space, readable without unpickling anything
    python tools/export.py --format safetensors --checkpoint 256x256_diffusion_uncond.pt \
        --dtype float16 --out gd256.safetensors

A program takes ``images`` (batch, 3, H, W), RGB in [-1, 1], of the size and batch that it was made
for. It does not look at their values. Sizes that are no multiple of the padding work as well. What
is written is read again and run on random images beside the original; the largest relative
difference is printed, and nothing is left behind where it is too large.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common

_common.add_root()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from diffbackbone import CheckpointError, DiffusionBackbone, UNet, UNetConfig  # noqa: E402
from diffbackbone import checkpoint as reading  # noqa: E402
from diffbackbone.backbone import _DIGEST, MIN_SIZE  # noqa: E402
from diffbackbone.feedback import STRATEGIES  # noqa: E402
from diffbackbone.models.gd_config import resolve_config  # noqa: E402
from diffbackbone.pretraining import save_safetensors  # noqa: E402
from diffbackbone.runs import write_whole  # noqa: E402

SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONE_FILE = 1_500_000_000
"""Bytes of weights that go into one ONNX file, whose format ends at 2 GB."""
LARGEST_DIFFERENCE = {
    "pt2": 1e-4, "onnx": 1e-3, "float32": 1e-6, "float16": 5e-2, "bfloat16": 0.2
}  # fmt: skip
"""Relative differences from which on something is wrong, more than the rounding."""
EXPORTS = hasattr(torch.compiler, "is_exporting")  # torch 2.7; older ones export less
_PROGRAM_ONLY = ("blocks", "timestep", "feedback", "layers", "out_strides", "noise", "batch")


class ToolError(ValueError):
    """It cannot be done as given; the message says why."""


# -------------------------------------------------------------------------------------- arguments


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ToolError: The values don't go together, or a package is missing.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--format", choices=SUFFIXES, required=True)
    add("--out", type=Path, required=True, metavar="FILE")
    add(
        "--checkpoint", required=True, metavar="FILE",
        help="guided-diffusion weights, or a training checkpoint that holds them; or its URL",
    )  # fmt: skip
    add("--prefix", help="of the U-Net's keys, where the checkpoint holds several")
    add(
        "--unet", metavar="PRESET",
        help="a preset, or fields as JSON; without, what the checkpoint tells if it is a "
        ".safetensors of this project, else gd256_uncond",
    )  # fmt: skip
    add(
        "--size", type=int, nargs="+", metavar="N",
        help="side, or height and width, of the images; without, what the U-Net was trained at",
    )  # fmt: skip
    group = parser.add_argument_group("programs (pt2, onnx)")
    add = group.add_argument
    add("--blocks", type=int, nargs="+", metavar="B", help="1-based (33 30 27 24)")
    add("--timestep", type=int, metavar="T", help="0-based (90)")
    add("--feedback", choices=(*STRATEGIES, "none"), help="DifFeed's strategy (none)")
    add(
        "--layers", metavar="FILE",
        help="training checkpoint with projections and feedback layers, where it holds no U-Net "
        "(save_frozen off); without, they are looked for in --checkpoint",
    )  # fmt: skip
    add("--out-strides", type=int, nargs="+", metavar="S", help="of the maps (the blocks' own)")
    add("--noise", choices=("fixed", "none"), help="added to the images (fixed)")
    add("--batch", type=int, metavar="N", help="images at a time (1)")
    group = parser.add_argument_group("weights (safetensors)")
    group.add_argument("--dtype", choices=DTYPES, help="what they are rounded to (float32)")
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    suffix = SUFFIXES[args.format]
    if args.out.suffix != suffix:
        raise ToolError(f"--out {args.out}: the name of a {args.format} file ends in {suffix}")
    if args.out.is_dir():
        raise ToolError(f"--out {args.out} is a folder")
    program = args.format != "safetensors"
    for name in ("dtype",) if program else _PROGRAM_ONLY:
        if getattr(args, name) is not None:
            raise ToolError(
                f"--{name.replace('_', '-')} has no meaning with --format {args.format}"
            )
    if program and not EXPORTS:
        raise ToolError(
            f"--format {args.format} needs torch 2.7 or later, this is {torch.__version__}"
        )
    if args.size is not None and (len(args.size) > 2 or min(args.size) < MIN_SIZE):
        raise ToolError(f"--size is one or two numbers from {MIN_SIZE}, got {args.size}")
    if args.batch is not None and args.batch < 1:
        raise ToolError(f"--batch must be at least 1, got {args.batch}")
    if args.format == "onnx":
        missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ToolError(
                f"--format onnx needs {', '.join(missing)}: pip install 'diffbackbone[export]'"
            )
    for path in (args.checkpoint, args.layers):
        if path is not None:
            _common.check_checkpoint(path)


def read_config(args: argparse.Namespace) -> UNetConfig:
    """The architecture: what ``--unet`` says, what the file tells, or the 256-px model.

    Raises:
        ToolError: It is unknown.
        CheckpointError: The file is damaged.
    """
    given: Any = args.unet
    if given is None:
        stored = reading._stored_config(reading._find_file(args.checkpoint))
        return stored or UNetConfig.from_preset("gd256_uncond")
    try:
        if given.lstrip().startswith("{"):
            given = json.loads(given)
        return resolve_config(given)
    except ValueError as error:
        raise ToolError(f"--unet {args.unet}: {error}") from error


# ---------------------------------------------------------------------------------------- reading


def read_layers(source: str, prefix: str | None) -> dict[str, Tensor]:
    """Projections, feedback layers and the U-Net's digest in a training checkpoint.

    Args:
        source: Path or URL.
        prefix: Prefix of the U-Net's keys, where the file holds several.

    Returns:
        Part of a backbone's state dict; empty for a file of a U-Net alone.

    Raises:
        CheckpointError: The file is damaged, holds code or several backbones.
    """
    ends = ("unet." + reading._ANCHOR, _DIGEST)
    content = reading.read_checkpoint(source)
    roots: set[str] = set()
    for _ in range(reading._MAX_WRAPPERS):
        if not isinstance(content, Mapping):
            return {}
        keys = [key for key in content if isinstance(key, str)]
        roots = {key[: -len(end)] for key in keys for end in ends if key.endswith(end)}
        wrapper = reading.find_wrapper(content)
        if roots or wrapper is None:
            break
        content = content[wrapper]
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


def _numbers(layers: Mapping[str, Tensor], part: str) -> list[int]:
    """Numbers of the layers ``<part>.<number>.…``."""
    return sorted({int(key.split(".")[1]) for key in layers if key.startswith(f"{part}.")})


def build_backbone(args: argparse.Namespace, config: UNetConfig) -> DiffusionBackbone:
    """The frozen backbone with all its weights.

    Raises:
        ToolError: Blocks, timestep, strides or feedback don't fit, or layers are missing.
        CheckpointError: A file does not fit.
    """
    blocks = args.blocks or [33, 30, 27, 24]
    source = args.layers or args.checkpoint
    layers = read_layers(source, args.prefix)
    feedback = None if args.feedback in (None, "none") else args.feedback
    projections, sources = _numbers(layers, "proj"), _numbers(layers, "feedback")
    if feedback is not None and not sources:
        raise ToolError(
            f"--feedback {feedback}: {source} holds no feedback layers. They are learned together "
            "with a head: give that run's training checkpoint as --checkpoint or --layers"
        )
    if sources and args.feedback is None:
        raise ToolError(
            f"{source} holds feedback layers of blocks {sources}: say --feedback with their "
            "strategy, or --feedback none to leave them out"
        )
    if projections and len(projections) != len(blocks):
        raise ToolError(
            f"{source} holds projections of {len(projections)} maps, but --blocks names "
            f"{len(blocks)} ({blocks}): give the blocks that it was trained with"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # random weights, for a moment
            backbone = DiffusionBackbone(
                config,
                timestep=90 if args.timestep is None else args.timestep,
                blocks=blocks,
                feedback=feedback,
                out_channels=len(layers["proj.0.bias"]) if projections else None,
                out_strides=args.out_strides,
                noise=args.noise or "fixed",
                freeze=True,
            )
    except ValueError as error:
        raise ToolError(str(error)) from error
    print(backbone.load(args.checkpoint, args.prefix), flush=True)
    if feedback is None:
        layers = {name: x for name, x in layers.items() if not name.startswith("feedback.")}
    _load_layers(backbone, layers, source)
    return backbone.eval()


def _load_layers(backbone: DiffusionBackbone, layers: dict[str, Tensor], source: str) -> None:
    try:
        keys = backbone.load_state_dict(layers, strict=False)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except RuntimeError as error:  # of another shape
        raise CheckpointError(f"{source}: {' '.join(str(error).split())}") from error
    missing = [key for key in keys.missing_keys if not key.startswith("unet.")]
    if missing or keys.unexpected_keys:
        raise CheckpointError(
            f"{source}: the layers beside the U-Net are not those of these blocks and this "
            f"feedback; missing: {reading.some_keys(missing) or 'none'}; unexpected: "
            f"{reading.some_keys(keys.unexpected_keys) or 'none'}"
        )
    if layers:
        print(f"{source}: {len(layers)} tensors of projections and feedback", flush=True)


def build_unet(args: argparse.Namespace, config: UNetConfig) -> UNet:
    """The U-Net, as far as the file has it.

    Raises:
        CheckpointError: The file does not fit.
    """
    content = reading.read_checkpoint(args.checkpoint)
    keys, _, _ = reading._find_unet(content, args.checkpoint, args.prefix)
    if "label_emb.weight" not in keys:
        config = config.replace(num_classes=None)
    last = None
    if "out.2.weight" not in keys:  # of a backbone that ends at its last tap
        names = {f"{block.name}.": index for index, block in config.blocks.items()}
        built = [n for name, n in names.items() if any(key.startswith(name) for key in keys)]
        last = max(built, default=1)
    unet = UNet(config, last)
    print(reading.load_checkpoint(unet, args.checkpoint, args.prefix), flush=True)
    return unet.eval()


# ---------------------------------------------------------------------------------------- writing


def random_images(batch: int, size: Sequence[int], seed: int) -> Tensor:
    """Images (N, 3, H, W) of noise in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *size, generator=generator) * 2 - 1


def largest_difference(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative difference of a map, infinite where shapes differ or a value is NaN."""
    if [x.shape for x in ours] != [x.shape for x in expected]:
        return float("inf")
    worst = 0.0
    for x, y in zip(ours, expected):
        error = float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-12))
        worst = max(worst, error) if error == error else float("inf")
    return worst


def write(path: Path, save: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    """Write a file and what belongs to it, check them, and only then put them into place.

    Args:
        path: Where to.
        save: Writes a path, and perhaps ``<path>.data``.
        check: Reads what was saved, and raises where it is wrong.

    Raises:
        ToolError: The disk is full or can't be written.
    """
    path = Path(os.path.realpath(path))  # "<path>.data" belongs beside a link's target

    def save_checked(partial: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            saved = Path(folder) / path.name
            save(saved)
            check(saved)
            data = Path(f"{saved}.data")
            if data.exists():  # no program without its weights, nor with those of another
                path.unlink(missing_ok=True)
                os.replace(data, f"{path}.data")
            os.replace(saved, partial)

    try:
        write_whole(path, save_checked)
    except OSError as error:
        raise ToolError(f"cannot write {path}: {error}") from error


def _verified(limit: float, difference: float) -> None:
    if not difference <= limit:
        raise ToolError(
            f"what was written differs from the original by {difference:.2g} on random images, "
            f"more than {limit:g}: nothing was kept"
        )
    print(f"verified on random images: largest relative difference {difference:.2g}", flush=True)


@torch.no_grad()
def export_program(args: argparse.Namespace, config: UNetConfig) -> None:
    """Write a backbone as pt2 or ONNX.

    Raises:
        ToolError: It can't be done as given, or the program computes something else.
    """
    backbone = build_backbone(args, config)
    batch = args.batch or 1
    height, width = ((args.size or [config.image_size]) * 2)[:2]
    checks = [random_images(batch, (height, width), seed) for seed in (1, 2)]
    expected = [backbone(x) for x in checks]  # which keeps the fixed noise, a constant from now on
    print(f"exporting for images ({batch}, 3, {height}, {width}); minutes for a large U-Net")
    for i, (block, x) in enumerate(zip(backbone.blocks, expected[0])):
        print(f"  map{i}: block {block}, stride {backbone.strides[i]}, {tuple(x.shape)}")
    program = torch.export.export(backbone, (random_images(batch, (height, width), 0),))
    if args.format == "onnx":
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=[f"map{i}" for i in range(len(backbone.blocks))],
            verbose=False,
        )
        size = sum(x.numel() * x.element_size() for x in program.state_dict.values())

    def save(path: Path) -> None:
        print("writing", flush=True)
        if args.format == "onnx":
            exported.save(path, external_data=size > ONE_FILE)
            if size > ONE_FILE:
                print(f"the weights are in {args.out.name}.data, which belongs beside it")
        else:
            torch.export.save(program, path)

    def check(path: Path) -> None:
        run = _run_onnx(path) if args.format == "onnx" else torch.export.load(path).module()
        difference = max(largest_difference(run(x), y) for x, y in zip(checks, expected))
        _verified(LARGEST_DIFFERENCE[args.format], difference)

    write(args.out, save, check)


def _run_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]


@torch.no_grad()
def export_weights(args: argparse.Namespace, config: UNetConfig) -> None:
    """Write a U-Net's weights with its architecture.

    Raises:
        ToolError: They don't fit into the type, or the file computes something else.
    """
    unet = build_unet(args, config)
    config, last = unet.config, unet.last_block
    dtype = args.dtype or "float32"
    size = ((args.size or [min(config.image_size, 256)]) * 2)[:2]
    deepest = max(block.stride for block in config.blocks.values())
    x = random_images(1, [-(-side // deepest) * deepest for side in size], 1)
    y = None if config.num_classes is None else torch.zeros(1, dtype=torch.long)

    def save(path: Path) -> None:
        print("writing", flush=True)
        try:
            save_safetensors(path, unet.state_dict(), config, DTYPES[dtype])
        except ValueError as error:
            raise ToolError(f"{error}; take another --dtype") from error

    def run(unet: UNet) -> list[Tensor]:
        if hasattr(unet, "out"):
            return [unet(x, 90, y)]
        return list(unet.forward_features(x, 90, [unet.last_block], y).values())

    def check(path: Path) -> None:
        again = UNet(reading.read_unet_config(path), None if hasattr(unet, "out") else last).eval()
        reading.load_checkpoint(again, path)
        _verified(LARGEST_DIFFERENCE[dtype], largest_difference(run(again), run(unet)))

    write(args.out, save, check)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: It cannot be done as given; the message says why.
    """
    try:
        args = parse(argv)
        config = read_config(args)
        if args.format == "safetensors":
            export_weights(args, config)
        else:
            export_program(args, config)
    except (ToolError, CheckpointError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
