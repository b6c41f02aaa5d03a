"""Print a U-Net's blocks with what each costs: which block can I afford?

For instance::

    python tools/inspect_unet.py --unet gd256_uncond --size 512
    python tools/inspect_unet.py --checkpoint my_model.pt --size 480 640 --dtype bfloat16
    python tools/inspect_unet.py --unet gd256_uncond --size 1024 --memory 8

Nothing is run: parameters, floating-point operations (a multiplication and an addition are two) and
the most bytes alive at once are counted from the shapes, for one image, without gradients.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import _common

DTYPES = ("float32", "bfloat16", "float16")


def format_table(costs: Sequence[Any], weight_bytes: int) -> str:
    """A Markdown table of :class:`diffbackbone.costs.BlockCost`.

    Args:
        costs: One entry a block.
        weight_bytes: Bytes of one weight.
    """
    lines = [
        "| b | module | channels | stride | map | parameters (M) | U-Net to b (M) | GFLOPs to b "
        "| weights + activations (GB) |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for cost in costs:
        memory = (cost.total_parameters * weight_bytes + cost.activation_bytes) / 1e9
        lines.append(
            f"| {cost.index} | {cost.name} | {cost.channels} | {cost.stride} | "
            f"{cost.height}x{cost.width} | {cost.parameters / 1e6:.1f} | "
            f"{cost.total_parameters / 1e6:.1f} | {cost.flops / 1e9:.1f} | {memory:.2f} |"
        )
    return "\n".join(lines)


def entry(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--unet", help="a preset's name")
    which.add_argument("--checkpoint", help="a file of guided-diffusion weights, or its URL")
    parser.add_argument(
        "--num-head-channels", type=int, help="of the checkpoint (what it tells, else 64)"
    )
    parser.add_argument("--size", type=int, nargs="+", default=[256], help="side, or height width")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--memory", type=float, help="GB there are: name the last block that fits")
    parser.add_argument("--json", help="write the numbers to this file too")
    args = parser.parse_args(argv)
    if len(args.size) > 2 or min(args.size) < 32:
        parser.error(f"--size is one or two numbers from 32, got {args.size}")
    _common.add_root()
    import torch

    from diffbackbone.checkpoint import read_unet_config
    from diffbackbone.costs import block_costs
    from diffbackbone.unet import UNetConfig

    try:
        if args.unet:
            config = UNetConfig.from_preset(args.unet)
        else:
            heads = args.num_head_channels
            given = {} if heads is None else {"num_head_channels": heads}
            config = read_unet_config(args.checkpoint, **given)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    dtype = getattr(torch, args.dtype)
    deepest = max(block.stride for block in config.blocks.values())
    height, width = (math.ceil(side / deepest) * deepest for side in (args.size * 2)[:2])
    costs = block_costs(config, height, width, dtype)
    print(format_table(costs, dtype.itemsize))
    print(f"\n{height}x{width} px, {args.dtype}, one image, inference")
    if args.memory is not None:
        need = [(c.index, c.total_parameters * dtype.itemsize + c.activation_bytes) for c in costs]
        fitting = [index for index, size in need if size <= args.memory * 1e9]
        best = f"blocks up to {fitting[-1]}" if fitting else "no block"
        print(f"{best} fit into {args.memory:g} GB, without what the framework itself takes")
    if args.json:
        content = [dataclasses.asdict(cost) for cost in costs]
        _common.write_text(args.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    entry()
