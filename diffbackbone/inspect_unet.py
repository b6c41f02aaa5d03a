"""Print the cost of each block of a U-Net: `tools/inspect_unet.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

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

    unet: str = "gd256_uncond"
    """A preset, diffusers://<folder or hub id>, or fields as JSON."""
    checkpoint: str | None = None
    """File of guided-diffusion weights, or its URL, in place of a preset."""
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
    try:
        unet = resolve_network(config.unet)
        if config.checkpoint is not None:
            unet = read_unet_config(config.checkpoint)
    except ValueError as error:
        raise UserError(str(error)) from error
    dtype = getattr(torch, config.dtype)
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
    rows = []
    for cost, size in zip(costs, sizes):
        shape = (cost.index, cost.name, cost.channels, cost.stride, f"{cost.height}x{cost.width}")
        millions = (f"{count / 1e6:.1f}" for count in (cost.parameters, cost.total_parameters))
        rows.append([*shape, *millions, f"{cost.flops / 1e9:.1f}", f"{size / 1e9:.2f}"])
    columns = ["b:", "module", "channels:", "stride:", "map:", "parameters (M):"]
    columns += ["U-Net to b (M):", "GFLOPs to b:", "weights + activations (GB):"]
    return markdown_table(columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(InspectConfig, run, argv)
