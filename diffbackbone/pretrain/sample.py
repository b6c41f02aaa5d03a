"""Generate images with a guided-diffusion U-Net, and measure their FID.

OUT gets ``samples.npz`` as guided-diffusion writes it (``arr_0``, uint8 (N, H, W, C), and
``arr_1``, the labels of a class-conditional U-Net) and ``samples.png``, the first of them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from diffbackbone.checkpoint import load_checkpoint, stored_config
from diffbackbone.cli import run_command
from diffbackbone.diffusion import NoiseSchedule
from diffbackbone.images import read_image, to_uint8
from diffbackbone.models import resolve_network
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.pretrain.data import draw_noise, find_images
from diffbackbone.pretrain.sampling import sample_ddim, sample_ddpm, save_grid
from diffbackbone.sources import find_file
from diffbackbone.utils import RandomStream, UserError, atomic_write, require, write_json

SHOWN = 64
"""Images in the picture."""
INCEPTION = "checkpoints/weights-inception-2015-12-05-6726825d.pth"
"""Where torch-fidelity keeps the weights of FID's network, in torch.hub's folder."""


@dataclass(kw_only=True)
class SampleConfig:
    """Generate images with a guided-diffusion U-Net.

    An image depends on the seed and its number alone, not on the batch or the processes.
    """

    checkpoint: str
    """guided-diffusion weights, or unet.safetensors of tools/pretrain.py; a path or URL."""
    unet: str | None = None
    """Preset, or fields as JSON; default: what a .safetensors file says, else gd256_uncond."""
    out: Path = Path("work_dirs/samples")
    """Folder for the images."""
    count: int = 16
    """Number of images."""
    batch_size: int = 8
    """Images at a time."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """ddim is deterministic (eta = 0); ddpm draws noise in each step."""
    steps: int | None = None
    """Steps; default: 50 for ddim, 250 for ddpm."""
    label: int | None = None
    """Class of all images of a class-conditional U-Net; default: drawn for each image."""
    seed: int = 0
    """Seed of the noise."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if there is one."""
    fid_reference: Path | None = None
    """Compute the FID to these images: a folder, or a guided-diffusion .npz that has images."""
    fid_weights: Path | None = None
    """Weights of FID's network; default: where torch-fidelity keeps them."""


def check_fid(config: SampleConfig) -> Path:
    """Return the weights of FID's network, before samples are made that can't be compared."""
    require("--fid-reference", ["torch_fidelity"], "pip install torch-fidelity")
    weights = config.fid_weights or Path(torch.hub.get_dir()) / INCEPTION
    for path in (weights, config.fid_reference):
        if not path.exists():
            raise UserError(
                f"--fid-reference: {path} does not exist; torch-fidelity's releases have the "
                "weights, and --fid-weights names another place for them"
            )
    return weights


def read_reference(path: Path) -> Iterator[Tensor]:
    """Yield batches of reference images, uint8 (N, 3, H, W)."""
    if path.is_file():
        with np.load(path, allow_pickle=False) as content:
            for part in np.array_split(content["arr_0"], math.ceil(len(content["arr_0"]) / 64)):
                yield torch.from_numpy(part).permute(0, 3, 1, 2)
        return
    for image in find_images(path):
        yield torch.from_numpy(to_uint8(read_image(path / image))).permute(2, 0, 1)[None]


def compute_fid(samples: np.ndarray, config: SampleConfig, weights: Path) -> float:
    """Return the FID of samples, uint8 (N, H, W, 3), by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature_extractor_weights_path=str(weights))
    for batch in tqdm(read_reference(config.fid_reference), "FID", leave=False, disable=None):
        metric.update(batch, real=True)
    for batch in torch.from_numpy(samples).permute(0, 3, 1, 2).split(64):
        metric.update(batch, real=False)
    return float(metric.compute())


def build_unet(config: SampleConfig) -> UNet:
    """Build the U-Net with its weights."""
    architecture: Any = UNetConfig.from_preset("gd256_uncond")
    if config.unet is not None:
        architecture = resolve_network(config.unet)
    elif stored := stored_config(find_file(config.checkpoint)):
        architecture = stored
    if type(architecture) is not UNetConfig:
        raise UserError(
            f"--unet {config.unet}: only guided-diffusion's U-Nets are sampled here; diffusers' "
            "pipelines sample those in diffusers' format"
        )
    unet = UNet(architecture)
    print(load_checkpoint(unet, config.checkpoint), flush=True)
    return unet.eval()


@torch.inference_mode()
def generate(config: SampleConfig, unet: UNet, state: PartialState) -> list[tuple[np.ndarray, int]]:
    """Return this process's images, uint8 (H, W, C), with their labels (-1 for none)."""
    size, channels = unet.config.image_size, unet.config.in_channels
    schedule, classes = NoiseSchedule(unet.config.noise_schedule), unet.config.num_classes
    steps = config.steps or {"ddim": 50, "ddpm": 250}[config.sampler]

    def noise(numbers: Sequence[int], step: int) -> Tensor:
        key = config.seed + (step << 32)
        drawn = [draw_noise(RandomStream.SAMPLES, key, n, size, channels) for n in numbers]
        return torch.stack(drawn).to(state.device)

    own = range(config.count)[state.process_index :: state.num_processes]
    found: list[tuple[np.ndarray, int]] = []
    bar = tqdm(total=len(own), unit="image", disable=None if state.is_main_process else True)
    for start in range(0, len(own), config.batch_size):
        numbers = own[start : start + config.batch_size]
        labels, y = [-1] * len(numbers), None
        if classes is not None:
            labels = [
                int(RandomStream.SAMPLES.generator(config.seed, n, 0, 0).integers(classes))
                if config.label is None
                else config.label
                for n in numbers
            ]
            y = torch.tensor(labels, device=state.device)
        predict = functools.partial(unet, y=y)
        if config.sampler == "ddim":
            images = sample_ddim(predict, schedule, noise(numbers, 0), steps)
        else:
            draws = (noise(numbers, step) for step in itertools.count())
            images = sample_ddpm(predict, schedule, draws, steps)
        pixels = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
        found += zip(pixels.numpy(), labels)
        bar.update(len(numbers))
    bar.close()
    return found


def run(config: SampleConfig) -> np.ndarray:
    """Generate, write and evaluate; return the images, uint8 (N, H, W, C)."""
    state = PartialState(cpu=config.device == "cpu")
    weights = check_fid(config) if config.fid_reference else None
    unet = build_unet(config).to(state.device)
    if config.label is not None and not 0 <= config.label < (unet.config.num_classes or 0):
        raise UserError(f"--label {config.label}: the U-Net has {unet.config.num_classes} classes")
    if config.count < 1 or (config.steps or 2) < 2:
        raise UserError("--count must be at least 1 and --steps 2")
    parts = generate(config, unet, state)
    world = state.num_processes
    if world > 1:
        gathered = gather_object([parts])
        parts = [gathered[i % world][i // world] for i in range(config.count)]
    samples, labels = (np.array(values) for values in zip(*parts))
    if not state.is_main_process:
        return samples
    arrays = {"arr_0": samples}
    if unet.config.num_classes is not None:
        arrays["arr_1"] = labels

    def save(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    atomic_write(config.out / "samples.npz", save)
    shown = torch.from_numpy(samples[:SHOWN]).permute(0, 3, 1, 2)
    save_grid(shown / 127.5 - 1, config.out / "samples.png")
    print(f"{config.out}: samples.npz, samples.png")
    if weights is not None:
        fid = compute_fid(samples, config, weights)
        write_json(config.out / "fid.json", {"fid": fid, "images": config.count})
        print(f"FID {fid:.2f} of {config.count} images")
    return samples


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(SampleConfig, run, argv)
