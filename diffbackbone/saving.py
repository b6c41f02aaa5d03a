"""Writing weights for this package and for guided-diffusion."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbackbone.checkpoint import METADATA_KEY
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.utils import UserError


def guided_diffusion_flags(config: UNetConfig) -> dict[str, Any]:
    """The command-line flags that make guided-diffusion's own scripts build this U-Net."""
    attention = [config.image_size // stride for stride in sorted(config.attention_strides)]
    mult = config.channel_mult
    if config.image_size == 512 and mult == (0.5, 1, 1, 2, 2, 4, 4):
        mult = ()  # its default for this size; it reads whole numbers only
    fractions = any(m != int(m) for m in mult)
    channels = config.in_channels == 3 and config.out_channels in (3, 6)
    if fractions or not channels or not (config.resblock_updown or config.conv_resample):
        raise ValueError(
            "guided-diffusion has no flags for fractions in channel_mult, for other channels than "
            "3 to 3 or 6, nor for conv_resample=False"
        )
    return {
        "image_size": config.image_size,
        "num_channels": config.model_channels,
        "channel_mult": ",".join(map(str, mult)),
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": ",".join(map(str, attention)),
        "num_head_channels": config.num_head_channels or -1,
        "num_heads": config.num_heads,
        "num_heads_upsample": config.num_heads_upsample or -1,
        "use_scale_shift_norm": config.use_scale_shift_norm,
        "resblock_updown": config.resblock_updown,
        "use_new_attention_order": config.use_new_attention_order,
        "learn_sigma": config.out_channels == 6,
        "class_cond": config.num_classes is not None,
        "dropout": config.dropout,
        "noise_schedule": config.noise_schedule,
        "diffusion_steps": 1000,
    }


def save_safetensors(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    config: UNetConfig,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a U-Net's weights, rounded to a type, and its architecture as metadata.

    Raises:
        UserError: A weight does not fit into the type.
    """
    from safetensors.torch import save

    rounded = {name: x.detach().to("cpu", dtype).contiguous() for name, x in weights.items()}
    if lost := [name for name, x in rounded.items() if not torch.isfinite(x).all()]:
        raise UserError(
            f"{lost[0]} and {len(lost) - 1} more tensors are not finite in {dtype}; choose another "
            "type"
        )
    metadata = {"format": "pt", METADATA_KEY: json.dumps(dataclasses.asdict(config))}
    Path(path).write_bytes(save(rounded, metadata))
