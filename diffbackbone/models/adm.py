"""guided-diffusion's U-Nets (ADM) in diffusers' format, without diffusers.

The weights are the same under other names, but attention's q, k and v, one layer here, are three
there; in guided-diffusion's legacy order each head's q, k and v are neighbors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.models.ops import GROUPS
from diffbackbone.utils import UserError, atomic_write, write_json

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """Return the configuration of the ``UNet2DModel`` that computes the same, if there is one."""
    head_widths = {
        block.channels // config.heads(block.channels, block.part == "decoder")
        for block in config.blocks.values()
        if block.attention
    }
    problems = []
    if config.channel_mult[0] != 1:
        problems.append(f"a first level of {config.channel_mult[0]} times model_channels")
    if len(head_widths) > 1:
        problems.append(f"attention heads of different widths {sorted(head_widths)}")
    if not (config.resblock_updown or config.conv_resample):
        problems.append("pooling in place of convolutions (conv_resample=False)")
    if problems:
        raise UserError(f"diffusers' UNet2DModel doesn't have {' nor '.join(problems)}")
    sampler = "resnet" if config.resblock_updown else "conv"
    plain = ("ResnetDownsample", "ResnetUpsample") if config.resblock_updown else ("Down", "Up")
    attended = [2**level in config.attention_strides for level in range(len(config.widths))]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_res_blocks,
        "down_block_types": [f"{'AttnDown' if a else plain[0]}Block2D" for a in attended],
        "up_block_types": [f"{'AttnUp' if a else plain[1]}Block2D" for a in attended[::-1]],
        "downsample_type": sampler,
        "upsample_type": sampler,
        "attention_head_dim": head_widths.pop(),
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "num_class_embeds": config.num_classes,
        "dropout": config.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def to_diffusers(state_dict: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Rename the weights of a whole U-Net to those of ``UNet2DModel``."""
    diffusers_config(config)
    table = list(_weights(config))
    if different := sorted({ours for ours, _, _ in table} ^ state_dict.keys()):
        raise UserError(f"weights that are missing or not of this U-Net: {different[:4]}")
    weights = {}
    for ours, theirs, heads in table:
        value = state_dict[ours]
        if heads is not None and value.ndim == 3:  # a 1x1 convolution, there a matrix
            value = value[..., 0]
        if len(theirs) == 1:
            weights[theirs[0]] = value
        elif config.use_new_attention_order:
            weights.update(zip(theirs, value.chunk(3)))
        else:
            parts = value.unflatten(0, (heads, 3, -1)).unbind(1)
            weights.update(zip(theirs, (part.flatten(0, 1) for part in parts)))
    return weights


def _weights(config: UNetConfig) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    """Yield the weights: our name, diffusers' names and, for attention's matrices, the heads."""
    with torch.device("meta"):
        own = UNet(config).state_dict()
    for ours, theirs, heads in _layers(config):
        for end in ("weight", "bias"):
            if f"{ours}.{end}" in own:
                yield f"{ours}.{end}", tuple(f"{name}.{end}" for name in theirs), heads


def _layers(config: UNetConfig) -> list[tuple[str, tuple[str, ...], int | None]]:
    """List the layers: see :func:`_weights`; some don't exist in every block."""
    layers: list[tuple[str, tuple[str, ...], int | None]]
    layers = [(ours, (theirs,), None) for ours, theirs in ENDS.items()]

    def add_residual(ours: str, theirs: str) -> None:
        for name, other in RESIDUAL.items():
            layers.append((f"{ours}.{name}", (f"{theirs}.{other}",), None))

    def add_resampling(ours: str, theirs: str, conv: str) -> None:
        if config.resblock_updown:
            add_residual(ours, theirs)
        else:
            layers.append((f"{ours}.{conv}", (f"{theirs}.conv",), None))

    level = place = 0
    for block in list(config.blocks.values())[1:]:
        name, side = block.name, f"down_blocks.{level}"
        if block.part == "middle":
            level, place, side = 0, 0, "mid_block"
        elif block.part == "decoder":
            side = f"up_blocks.{level}"
        if block.resample == "down":
            add_resampling(f"{name}.0", f"{side}.downsamplers.0", "op")
            level, place = level + 1, 0
            continue
        add_residual(f"{name}.0", f"{side}.resnets.{place}")
        if block.attention:
            heads = config.heads(block.channels, block.part == "decoder")
            attention = f"{side}.attentions.{place}"
            layers.append((f"{name}.1.norm", (f"{attention}.group_norm",), None))
            layers.append((f"{name}.1.qkv", tuple(f"{attention}.to_{x}" for x in "qkv"), heads))
            layers.append((f"{name}.1.proj_out", (f"{attention}.to_out.0",), heads))
        place += 1
        if block.part == "middle":
            add_residual(f"{name}.2", f"{side}.resnets.1")
            place = 0
        if block.resample == "up":
            add_resampling(f"{name}.{1 + block.attention}", f"{side}.upsamplers.0", "conv")
            level, place = level + 1, 0
    return layers


def write_folder(
    folder: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    config: UNetConfig,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a whole U-Net as a pipeline's folder, with the scheduler of its noise schedule.

    Raises:
        UserError: diffusers has no such U-Net, or weights are missing.
    """
    from safetensors.torch import save

    folder = Path(folder)
    weights = to_diffusers(state_dict, config)
    content = save({name: x.detach().to("cpu", dtype).contiguous() for name, x in weights.items()})
    write_json(folder / "unet/config.json", diffusers_config(config))
    atomic_write(folder / WEIGHTS, lambda path: path.write_bytes(content))
    learned = config.out_channels == 2 * config.in_channels
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear" if config.noise_schedule == "linear" else "squaredcos_cap_v2",
        "variance_type": "learned_range" if learned else "fixed_small",
        "prediction_type": "epsilon",
    }
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    write_json(folder / "model_index.json", {"_class_name": "DDPMPipeline", **parts})
