"""Options shared by the evaluation commands, and what they build.

A command's configuration inherits from these dataclasses, so that its options are flat.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.checkpoint import read_unet_config
from diffbackbone.diffusion import NoiseSchedule
from diffbackbone.eval.data import ImageFolder, list_folder
from diffbackbone.models.gd_config import PRESETS, UNetConfig
from diffbackbone.utils import UserError


@dataclass(kw_only=True)
class BackboneOptions:
    """The features that are taken."""

    unet: str = "gd256_uncond"
    """A preset, or a .safetensors file of tools/pretrain.py, which tells its own architecture."""
    checkpoint: str | None = None
    """Guided-diffusion weights; without, they are random."""
    timesteps: tuple[int, ...] = ()
    """0-based timesteps t."""
    blocks: tuple[int, ...] = ()
    """1-based blocks b."""
    noise: Literal["random", "fixed", "image", "none"] = "fixed"
    """Noise added to the images: image draws it from their pixels and the seed."""
    seed: int = 0
    """Seed of the noise, random weights and everything else that is drawn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU that supports it, else float32."""

    def unet_config(self) -> UNetConfig:
        """Return the architecture that ``unet`` names."""
        return _unet_config(self.unet)

    def start(self) -> PartialState:
        """Join the processes started by torchrun or accelerate; their ``device`` is to be used.

        Raises:
            UserError: There is no GPU.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this torch finds no GPU; take auto or cpu")
        return PartialState(cpu=self.device == "cpu")

    def compute_dtype(self, device: torch.device) -> torch.dtype | None:
        """Return the type that autocast computes in; None leaves float32.

        Raises:
            UserError: bfloat16 without a GPU.
        """
        if device.type != "cuda" and self.precision == "bfloat16":
            raise UserError("--precision bfloat16 needs a GPU")
        if device.type != "cuda" or self.precision == "float32":
            return None
        supported = self.precision == "bfloat16" or torch.cuda.is_bf16_supported()
        return torch.bfloat16 if supported else None


@dataclass(kw_only=True)
class DataOptions:
    """The labeled images."""

    data: Path | None = None
    """Folder with train/<class>/ and val/<class>/."""
    train_dir: Path | None = None
    """Training images, in place of DATA/train."""
    val_dir: Path | None = None
    """Validation images, in place of DATA/val."""
    image_size: int | None = None
    """Height and width the images are brought to; default: the U-Net's."""
    workers: int = max(0, min(4, (os.cpu_count() or 1) - 1))
    """Processes that read images."""
    value_range: tuple[float, float] | None = None
    """Values of images deeper than 8 bits that are black and white; default: 0 65535 for integers,
    0 1 for floats."""

    def folder(self, split: Literal["train", "val"]) -> Path:
        """Return the folder of training or validation images.

        Raises:
            UserError: It is not given, or does not exist.
        """
        given = self.train_dir if split == "train" else self.val_dir
        if given is None:
            if self.data is None:
                raise UserError(f"give --data DIR (with DIR/train and DIR/val), or --{split}-dir")
            given = self.data / split
        folder = given.expanduser()
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder} of {split} images")
        return folder

    def list_folders(self) -> tuple[ImageFolder, ImageFolder]:
        """List the training and validation images; the classes are those of training."""
        train_root, val_root = self.folder("train"), self.folder("val")
        train = list_folder(train_root, None, self.value_range)
        return train, list_folder(val_root, train.classes, self.value_range)


@dataclass(kw_only=True)
class CacheOptions:
    """The cache of features."""

    cache: Path | None = None
    """Folder that keeps the features of a frozen U-Net for later runs."""
    feature_dtype: Literal["float16", "float32"] = "float16"
    """Type that features of a frozen U-Net are rounded to, with or without a cache."""
    overwrite_cache: bool = False
    """Replace a cache of other settings."""


@functools.lru_cache
def _unet_config(unet: str) -> UNetConfig:
    if unet in PRESETS:
        return PRESETS[unet]
    if not unet.endswith(".safetensors"):
        raise UserError(
            f"--unet {unet}: choose from {', '.join(PRESETS)}, or give a .safetensors file of "
            "tools/pretrain.py"
        )
    return read_unet_config(unet)


def build_backbone(
    options: BackboneOptions,
    feedback: str | None = None,
    freeze: bool = True,
    **kwargs: Any,
) -> DiffusionBackbone:
    """Build the backbone that the options describe; random weights follow from the seed.

    Args:
        options: With at least one block and timestep.
        feedback: See :class:`DiffusionBackbone`.
        freeze: See :class:`DiffusionBackbone`.
        **kwargs: Further arguments of :class:`DiffusionBackbone`.

    Raises:
        UserError: A block, timestep or feedback does not fit.
        FileNotFoundError: No such checkpoint.
        CheckpointError: The weights don't fit.
    """
    config = options.unet_config()
    torch.manual_seed(options.seed)
    try:
        schedule = NoiseSchedule(config.noise_schedule)
        schedule.check_timesteps(options.timesteps)
        if len(set(options.blocks)) < len(options.blocks):
            raise ValueError(f"blocks must differ, got {options.blocks}")
        return DiffusionBackbone(
            config,
            checkpoint=options.checkpoint,
            timestep=options.timesteps[0],
            blocks=options.blocks,
            feedback=feedback,
            out_channels=None,
            out_strides=None,
            noise=options.noise,
            freeze=freeze,
            seed=options.seed,
            save_frozen=False,
            **kwargs,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
