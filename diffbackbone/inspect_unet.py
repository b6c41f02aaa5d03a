"""Print the cost of each block of a U-Net: `tools/inspect_unet.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from diffbackbone.checkpoint import read_unet_config
from diffbackbone.cli import run_command
from diffbackbone.costs import BlockCost, block_costs
from diffbackbone.models import resolve_network
from diffbackbone.utils import UserError, markdown_table, write_json


@dataclasses.dataclass
class InspectConfig:
    """Print a U-Net's blocks with what each costs: which block can I afford?

    Nothing is run: parameters, floating-point operations (a multiplication and an addition are two)
    and the most bytes alive at once are counted from the shapes, for one image, without gradients.
    """

    unet: str | None = None
    """A preset or diffusers://<folder or hub id>; either this or --checkpoint."""
    checkpoint: str | None = None
    """File of guided-diffusion weights, or its URL."""
    num_head_channels: int | None = None
    """Channels of an attention head; None takes the checkpoint's metadata, else 64."""
    size: tuple[int, ...] = (256,)
    """Side of the image, or height and width."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights and activations."""
    memory: float | None = None
    """Available GB; names the last block that fits."""
    json: Path | None = None
    """File for the numbers."""


def run(config: InspectConfig) -> list[BlockCost]:
    """Print the table, and return its numbers."""
    if not 1 <= len(config.size) <= 2 or min(config.size) < 32:
        raise UserError(f"--size takes one or two numbers of at least 32, got {config.size}")
    unet, dtype = architecture(config), getattr(torch, config.dtype)
    deepest = max(block.stride for block in unet.blocks.values())
    height, width = (math.ceil(side / deepest) * deepest for side in (config.size * 2)[:2])
    costs = block_costs(unet, height, width, dtype)
    sizes = [cost.total_parameters * dtype.itemsize + cost.activation_bytes for cost in costs]
    print(format_table(costs, sizes))
    print(f"{height}x{width} px, {config.dtype}, one image, inference")
    if config.memory is not None:
        fitting = [c.index for c, size in zip(costs, sizes) if size <= config.memory * 1e9]
        best = f"blocks up to {fitting[-1]}" if fitting else "no block"
        print(f"{best} fit into {config.memory:g} GB, without the framework's own memory")
    if config.json:
        write_json(config.json, [dataclasses.asdict(cost) for cost in costs], indent=1)
    return costs


def format_table(costs: Sequence[BlockCost], sizes: Sequence[int]) -> str:
    """Format costs as a Markdown table; `sizes` are bytes of weights and activations."""
    columns = ["b:", "module", "channels:", "stride:", "map:", "parameters (M):"]
    columns += ["U-Net to b (M):", "GFLOPs to b:", "weights + activations (GB):"]
    rows = [
        [
            cost.index,
            cost.name,
            cost.channels,
            cost.stride,
            f"{cost.height}x{cost.width}",
            f"{cost.parameters / 1e6:.1f}",
            f"{cost.total_parameters / 1e6:.1f}",
            f"{cost.flops / 1e9:.1f}",
            f"{size / 1e9:.2f}",
        ]
        for cost, size in zip(costs, sizes)
    ]
    return markdown_table(columns, rows)


def architecture(config: InspectConfig) -> Any:
    """Return the architecture of the network or the checkpoint."""
    if (config.unet is None) == (config.checkpoint is None):
        raise UserError("give either --unet or --checkpoint")
    heads = config.num_head_channels
    try:
        if config.unet is not None:
            return resolve_network(config.unet)
        given = {} if heads is None else {"num_head_channels": heads}
        return read_unet_config(config.checkpoint, **given)
    except ValueError as error:
        raise UserError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(InspectConfig, run, argv)
