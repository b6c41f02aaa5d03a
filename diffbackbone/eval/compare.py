"""Which backbone suits my images? Sweeps of several networks, side by side.

OUT gets ``summary.md``, ``compare.png`` and ``results.json``, and for each network a folder with
its sweep (:mod:`diffbackbone.eval.sweep`). A comparison that was killed continues.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from diffbackbone.cli import run_command
from diffbackbone.costs import FusedAttention, LiveTensors
from diffbackbone.eval import sweep
from diffbackbone.eval.features import autocast
from diffbackbone.eval.options import BackboneOptions, DataOptions, build_backbone, split_model
from diffbackbone.eval.probe import MEASURES
from diffbackbone.utils import UserError, markdown_table, save_figure, write_json, write_text

DEPTHS = (0.5, 0.65, 0.8, 1.0)
"""Blocks that are tried, as shares of a network's number of blocks."""
SECONDS = 2.0
"""The speed of a network is measured for this long."""


@dataclass(kw_only=True)
class CompareConfig(DataOptions):
    """Compare networks on labeled images: accuracy, speed, memory, operations."""

    models: tuple[str, ...]
    """Networks as --unet of other commands takes them, with weights after "=":
    gd256_uncond=256x256_diffusion_uncond.pt timm:resnet50 diffusers://FOLDER; as JSON with options:
    '{"preset": "timm:resnet18", "pretrained": false}'."""
    out: Path = Path("work_dirs/compare")
    """Folder for the results."""
    timesteps: tuple[int, ...] = (50, 150, 300)
    """0-based timesteps t to try with diffusion models."""
    depths: tuple[float, ...] = DEPTHS
    """Blocks to try, as shares of the number of a network's blocks."""
    pools: tuple[int, ...] = (1, 2)
    """Heights and widths that maps are pooled to."""
    subset: str | None = None
    """Labels for a share of the training images (1%, 0.01), or for those of a list file."""
    seeds: tuple[int, ...] = (0,)
    """Each draws the subset and the held-out images; several give mean and spread."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    precision: str = "auto"
    """auto: bfloat16 on a GPU that supports it, else float32."""


def sweep_of(config: CompareConfig, model: str) -> sweep.SweepConfig:
    """Return the sweep of one network: its blocks, and timesteps if it takes noise."""
    unet, checkpoint = split_model(model)
    network = BackboneOptions(unet=unet).network()
    count, timed = len(network.blocks), getattr(network, "timed", True)
    shared = {field.name for field in fields(DataOptions)}
    shared |= {"pools", "subset", "seeds", "device", "precision"}
    return sweep.SweepConfig(
        **{name: getattr(config, name) for name in shared},
        unet=unet,
        checkpoint=checkpoint,
        out=config.out / re.sub(r"\W+", "_", model).strip("_"),
        blocks=tuple(dict.fromkeys(math.ceil(share * count) for share in config.depths)),
        timesteps=config.timesteps if timed else (0,),
        noise="fixed" if timed else "none",
        probe="cached",  # the same solver for all, and kNN
        cka=False,
    )


@torch.inference_mode()
def measure_cost(config: sweep.SweepConfig, tap: dict[str, Any], size: int) -> dict[str, float]:
    """Measure a frozen network that ends at a tap.

    ``memory`` is bytes of the weights and of one image's activations that are alive at once.
    """
    state = config.start()
    config = replace(config, blocks=(tap["b"],), timesteps=(tap["t"],))
    backbone = build_backbone(config).to(state.device).eval()
    shape = config.batch_size, backbone.in_channels, size, size
    images = torch.rand(shape, device=state.device) * 2 - 1
    with autocast(state.device, config.compute_dtype(state.device)):
        backbone(images[:1])
        with LiveTensors() as live, FusedAttention(live):
            backbone(images[:1])
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            backbone(images)
            if state.device.type == "cuda":
                torch.cuda.synchronize()
            count += len(images)
        seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    return {
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "memory": weights + live.peak,
        "images_per_second": count / seconds,
    }


def run(config: CompareConfig) -> list[dict[str, Any]]:
    """Sweep every network, then compare their best taps.

    Returns:
        The content of ``results.json``: for each network ``model``, the best tap ``b``, ``t`` and
        ``pool`` by the linear probe, ``linear``, ``knn`` (shares of 1, each at its own best tap),
        ``flops`` and what :func:`measure_cost` returns.
    """
    sweeps = {model: sweep_of(config, model) for model in config.models}
    if len({own.out for own in sweeps.values()}) < len(config.models):
        raise UserError(f"--models contains duplicates: {' '.join(config.models)}")
    rows = []
    for model, own in sweeps.items():
        print(model, flush=True)
        found = sweep.run(own)
        if not found:  # a process that only helps with the features
            continue
        linear, knn = (advice["best"] for advice in found["advice"])
        size = own.image_size or own.network().image_size
        row = {"model": model, "image_size": size}
        row |= {name: linear[name] for name in ("b", "t", "pool", "flops", "linear", "linear_std")}
        row |= {name: knn[name] for name in ("knn", "knn_std")}
        rows.append(row | measure_cost(own, linear, size))
    if rows:
        write_json(config.out / "results.json", rows)
        save_figure(draw(rows), config.out / "compare.png")
        write_text(config.out / "summary.md", summarize(rows))
        print(f"{config.out}: summary.md, compare.png, results.json")
    return rows


def summarize(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table, the best network first."""
    header = ["network", "px", "b", "t", "pool", *(f"{MEASURES[m]} (%)" for m in ("linear", "knn"))]
    header += ["images/s", "GFLOPs per image", "parameters (M)", "memory (MB)"]
    table = []
    for row in sorted(rows, key=lambda row: -row["linear"]):
        cells = [f"`{row['model']}`", *(row[k] for k in ("image_size", "b", "t", "pool"))]
        cells += [sweep.format_percent(row, measure) for measure in ("linear", "knn")]
        cells += [f"{row['images_per_second']:,.1f}", f"{row['flops'] / 1e9:,.3g}"]
        cells += [f"{row['parameters'] / 1e6:,.1f}", f"{row['memory'] / 1e6:,.1f}"]
        table.append(cells)
    notes = (
        "Each network at the block, timestep and pooling that are best by linear probe; kNN at its "
        "own best. The accuracies are those of the best of several taps, so they are slightly "
        "optimistic. Speed, operations and memory are those of a network that ends at that block; "
        "memory is that of the weights and of the activations of one image."
    )
    return f"# Comparison\n\n{markdown_table(header, table)}\n\n{notes}\n\n![chart](compare.png)\n"


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw accuracy against speed, a point for each network and measure."""
    figure = Figure((8, 5), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        x, color = row["images_per_second"], f"C{i}"
        for measure, marker in (("linear", "o"), ("knn", "s")):
            error = 100 * (row[f"{measure}_std"] or 0)
            axes.errorbar(x, 100 * row[measure], error, fmt=marker, color=color, capsize=3)
        axes.plot([], [], "o", color=color, label=row["model"])
    for measure, marker in (("linear", "o"), ("knn", "s")):
        axes.plot([], [], marker, color="gray", label=MEASURES[measure])
    axes.set(xscale="log", xlabel="images per second", ylabel="top-1 accuracy (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=2, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(CompareConfig, run, argv)
