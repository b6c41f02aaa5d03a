"""Options shared by the evaluation commands, and the backbone that they describe.

A command's configuration inherits from these dataclasses, so that its options are flat.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.checkpoint import read_unet_config
from diffbackbone.eval.data import ImageFolder, list_folder
from diffbackbone.models import resolve_network
from diffbackbone.utils import UserError, changed_settings


@dataclass(kw_only=True)
class BackboneOptions:
    """The network and its features."""

    unet: str = "gd256_uncond"
    """A preset, a .safetensors file of tools/pretrain.py (which contains its architecture), or
    anything else that DiffusionBackbone takes by name."""
    checkpoint: str | None = None
    """Guided-diffusion weights; without, they are random."""
    timesteps: tuple[int, ...] = ()
    """0-based timesteps t."""
    blocks: tuple[int, ...] = ()
    """1-based blocks b."""
    noise: Literal["random", "fixed", "image", "none"] = "fixed"
    """Noise added to the images: image draws it from their pixels and the seed."""
    seed: int = 0
    """Seed of the noise, of random weights and of everything else that is drawn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU that supports it, else float32."""

    def network(self) -> Any:
        """Return the architecture; see :func:`diffbackbone.models.resolve_network`."""
        return _network(self.unet)

    def existing(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Return those of some blocks that the network has."""
        return tuple(b for b in blocks if b in self.network().blocks)

    def start(self) -> PartialState:
        """Join the processes started by torchrun or accelerate; compute on their ``device``."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU")
        return PartialState(cpu=self.device == "cpu")

    def compute_dtype(self, device: torch.device) -> torch.dtype | None:
        """Return the type for autocast; None leaves float32."""
        supported = device.type == "cuda" and torch.cuda.is_bf16_supported()
        if self.precision == "bfloat16" or (self.precision == "auto" and supported):
            return torch.bfloat16
        return None


@dataclass(kw_only=True)
class DataOptions:
    """The labeled images."""

    data: Path = Path()
    """Folder with train/<class>/ and val/<class>/."""
    train_dir: Path = Path("train")
    """Training images: a folder in DATA, or an absolute path."""
    val_dir: Path = Path("val")
    """Validation images: a folder in DATA, or an absolute path."""
    only_classes: Path | None = None
    """File with the names of the classes to use, one a line (ImageNet-50); default: all."""
    image_size: int | None = None
    """Height and width of the images; default: the network's."""
    batch_size: int = 64
    """Images in the network at a time."""
    workers: int = max(0, min(4, (os.cpu_count() or 1) - 1))
    """Processes that read images."""
    value_range: tuple[float, float] | None = None
    """Values of images deeper than 8 bits that are black and white; default: 0 65535 for integers,
    0 1 for floats."""

    def list_folders(self, channels: int = 3) -> tuple[ImageFolder, ImageFolder]:
        """List the training and validation images; the classes are those of training."""
        root, options = self.data.expanduser(), {"value_range": self.value_range}
        if self.only_classes is not None:
            options["only"] = self.only_classes.expanduser().read_text(encoding="utf-8").split("\n")
            options["only"] = [name.strip() for name in options["only"] if name.strip()]
        train = list_folder(root / self.train_dir, **options, channels=channels)
        val = list_folder(root / self.val_dir, train.classes, **options, channels=channels)
        return train, val


@dataclass(kw_only=True)
class CacheOptions:
    """The cache of features."""

    cache: Path | None = None
    """Folder that keeps the features of a frozen network for later runs."""
    feature_dtype: Literal["float16", "float32"] = "float16"
    """Type that features of a frozen network are rounded to, with or without a cache."""
    overwrite_cache: bool = False
    """Replace a cache of other settings."""


def split_model(model: str) -> tuple[str, str | None]:
    """Split ``NETWORK`` or ``NETWORK=WEIGHTS``; a network may be JSON."""
    return re.fullmatch(r"(\{.*\}|[^=]*)(?:=(.+))?", model, re.DOTALL).groups()


@functools.lru_cache
def _network(unet: str) -> Any:
    if unet.endswith(".safetensors") and "://" not in unet:
        return read_unet_config(unet)
    try:
        return resolve_network(unet)
    except ValueError as error:
        raise UserError(f"--unet {unet}: {error}") from error


def build_backbone(
    options: BackboneOptions, feedback: str | None = None, freeze: bool = True, **kwargs: Any
) -> DiffusionBackbone:
    """Build the backbone that the options describe; random weights follow from the seed.

    Further arguments are those of :class:`DiffusionBackbone`, whose errors become UserErrors.
    """
    torch.manual_seed(options.seed)
    try:
        backbone = DiffusionBackbone(
            options.network(),
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
        backbone.schedule.check_timesteps(options.timesteps)
    except ValueError as error:
        raise UserError(str(error)) from error
    return backbone


def check_settings(
    what: Path, saved: Mapping[str, Any], settings: Mapping[str, Any], ignore: Iterable[str] = ()
) -> None:
    """Raise a UserError where a folder's settings differ from those of its continuation."""
    if changes := changed_settings(saved, settings, ignore):
        raise UserError(
            f"{what} was made with other settings:\n  "
            + "\n  ".join(changes)
            + "\nUse another folder, or an option that overwrites it"
        )
