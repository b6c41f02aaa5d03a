"""guided-diffusion's U-Nets (ADM) in diffusers' format, and back, without diffusers.

The weights are the same numbers under other names. Attention's q, k and v, which guided-diffusion
keeps in one layer, are three layers; in its legacy order each head's q, k and v are neighbors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
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
    """Return the configuration of the ``UNet2DModel`` that computes the same.

    Raises:
        UserError: There is none.
    """
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


def unet_config(
    config: Mapping[str, Any],
    use_new_attention_order: bool = False,
    noise_schedule: str = "linear",
) -> UNetConfig:
    """Return the architecture that a ``UNet2DModel`` shares with guided-diffusion.

    Args:
        config: diffusers' configuration.
        use_new_attention_order: Order of q, k and v in the weights to come.
        noise_schedule: Schedule that the weights were trained with.

    Raises:
        UserError: guided-diffusion has no such U-Net.
    """
    widths = config["block_out_channels"]
    attended = [name == "AttnDownBlock2D" for name in config["down_block_types"]]
    found = UNetConfig(
        model_channels=widths[0],
        channel_mult=tuple(width / widths[0] for width in widths),
        num_res_blocks=config["layers_per_block"],
        attention_strides=tuple(2**level for level, a in enumerate(attended) if a),
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        num_head_channels=config["attention_head_dim"],
        use_scale_shift_norm=config["resnet_time_scale_shift"] == "scale_shift",
        resblock_updown=config["downsample_type"] == "resnet",
        use_new_attention_order=use_new_attention_order,
        num_classes=config["num_class_embeds"],
        dropout=config.get("dropout", 0.0),
        image_size=config["sample_size"] or 256,
        noise_schedule=noise_schedule,
    )
    expected = diffusers_config(found)
    different = [
        f"{name}={config[name]!r}, expected {value!r}"
        for name, value in expected.items()
        if name in config and config[name] != value
    ]
    if different:
        raise UserError(f"guided-diffusion has no such U-Net: {'; '.join(different)}")
    return found


def to_diffusers(state_dict: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Rename the weights of a whole U-Net to those of ``UNet2DModel``.

    Raises:
        UserError: diffusers has no such U-Net, or a weight is missing or unknown.
    """
    diffusers_config(config)
    table = list(_weights(config))
    _check_names(state_dict, (ours for ours, _, _ in table))
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


def from_diffusers(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Rename the weights of a ``UNet2DModel`` to guided-diffusion's.

    Args:
        weights: diffusers' state dict.
        config: See :func:`unet_config`.

    Raises:
        UserError: A weight is missing or unknown.
    """
    table = list(_weights(config))
    _check_names(weights, (name for _, theirs, _ in table for name in theirs))
    state_dict = {}
    for ours, theirs, heads in table:
        parts = [weights[name] for name in theirs]
        if len(parts) == 1 or config.use_new_attention_order:
            value = torch.cat(parts)
        else:
            value = torch.stack([x.unflatten(0, (heads, -1)) for x in parts], 1).flatten(0, 2)
        state_dict[ours] = value[..., None] if heads is not None and value.ndim == 2 else value
    return state_dict


def _check_names(given: Iterable[str], expected: Iterable[str]) -> None:
    given, expected = set(given), set(expected)
    if given != expected:
        raise UserError(
            f"the weights are not those of this U-Net; missing: {sorted(expected - given)[:4]}, "
            f"unknown: {sorted(given - expected)[:4]}"
        )


def _weights(config: UNetConfig) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    """Yield the weights: our name, diffusers' names and, for attention's matrices, the heads."""
    with torch.device("meta"):
        own = UNet(config).state_dict()
    for ours, theirs, heads in _layers(config):
        for end in ("weight", "bias"):
            if f"{ours}.{end}" in own:
                yield f"{ours}.{end}", tuple(f"{name}.{end}" for name in theirs), heads


def _layers(config: UNetConfig) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    """Yield the layers: see :func:`_weights`; some don't exist in every block."""

    def residual(ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...], None]]:
        for name, other in RESIDUAL.items():
            yield f"{ours}.{name}", (f"{theirs}.{other}",), None

    for ours, theirs in ENDS.items():
        yield ours, (theirs,), None
    level = place = 0
    for block in config.blocks.values():
        name = block.name
        if block.index == 1:
            continue
        if block.part == "middle":
            level = place = 0
        side = {"encoder": f"down_blocks.{level}", "middle": "mid_block"}.get(
            block.part, f"up_blocks.{level}"
        )
        heads = config.heads(block.channels, block.part == "decoder")
        if block.resample == "down":
            if config.resblock_updown:
                yield from residual(f"{name}.0", f"{side}.downsamplers.0")
            else:
                yield f"{name}.0.op", (f"{side}.downsamplers.0.conv",), None
            level, place = level + 1, 0
            continue
        yield from residual(f"{name}.0", f"{side}.resnets.{place}")
        next_layer = 1
        if block.attention:
            attention = f"{side}.attentions.{place}"
            yield f"{name}.1.norm", (f"{attention}.group_norm",), None
            yield f"{name}.1.qkv", tuple(f"{attention}.to_{x}" for x in "qkv"), heads
            yield f"{name}.1.proj_out", (f"{attention}.to_out.0",), heads
            next_layer = 2
        place += 1
        if block.part == "middle":
            yield from residual(f"{name}.2", f"{side}.resnets.1")
            level = place = 0
        if block.resample == "up":
            if config.resblock_updown:
                yield from residual(f"{name}.{next_layer}", f"{side}.upsamplers.0")
            else:
                yield f"{name}.{next_layer}.conv", (f"{side}.upsamplers.0.conv",), None
            level, place = level + 1, 0


def write_folder(
    folder: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    config: UNetConfig,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a whole U-Net as a pipeline's folder, with the scheduler of its noise schedule.

    Args:
        folder: Where to.
        state_dict: guided-diffusion's weights.
        config: The architecture.
        dtype: Type that the weights are rounded to.

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


def read_folder(
    folder: str | os.PathLike[str], use_new_attention_order: bool = False
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """Read a ``UNet2DModel`` of a pipeline's folder as a guided-diffusion U-Net.

    Args:
        folder: What :func:`write_folder` or diffusers has written.
        use_new_attention_order: Order of q, k and v in the weights that are returned.

    Returns:
        The architecture and its state dict.

    Raises:
        FileNotFoundError: A file is missing.
        UserError: guided-diffusion has no such U-Net.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    defaults = {"num_class_embeds": None, "sample_size": None, "layers_per_block": 2}
    read = json.loads((folder / "unet/config.json").read_text())
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    cosine = scheduler["beta_schedule"] == "squaredcos_cap_v2"
    config = unet_config(
        {**defaults, **read}, use_new_attention_order, "cosine" if cosine else "linear"
    )
    return config, from_diffusers(load_file(folder / WEIGHTS), config)
