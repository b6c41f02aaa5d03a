"""Recommend a block, timestep and pooling by what a sweep has measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffbackbone.costs import block_costs
from diffbackbone.eval.plots import BEST_COLOR, CHEAPEST_COLOR, draw_heatmap
from diffbackbone.eval.probe import MEASURES
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.utils import markdown_table


def flops_to(config: UNetConfig, blocks: Sequence[int], image_size: int) -> dict[int, int]:
    """Return the operations from a square image to each block, with the backbone's padding."""
    deepest = max(block.stride for block in config.blocks.values())
    size = math.ceil(image_size / deepest) * deepest
    costs = block_costs(config.replace(num_classes=None), size, size, last_block=max(blocks))
    return {cost.index: cost.flops for cost in costs if cost.index in blocks}


def summarize(
    records: Sequence[Mapping[str, Any]], measures: Sequence[str]
) -> list[dict[str, Any]]:
    """Average over the seeds.

    Returns:
        For each combination ``b``, ``t``, ``pool``, ``features``, and for each measure its mean and
        ``<measure>_std`` (None for a single seed).
    """
    groups: dict[tuple[int, int, int], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["b"], record["t"], record["pool"]), []).append(record)
    cells = []
    for (b, t, pool), own in groups.items():
        cell: dict[str, Any] = {"b": b, "t": t, "pool": pool, "features": own[0]["features"]}
        for measure in measures:
            values = np.array([record[measure] for record in own])
            cell[measure] = float(values.mean())
            cell[f"{measure}_std"] = float(values.std(ddof=1)) if len(values) > 1 else None
        cells.append(cell)
    return cells


def recommend(
    cells: Sequence[Mapping[str, Any]],
    measure: str,
    flops: Mapping[int, int],
    images: int,
    seeds: int,
) -> dict[str, Any]:
    """Find the best combination, and the cheapest within its standard error.

    The standard error is that of a share of the validation images and of the mean over the seeds.
    Ties go to the fewest operations, then the fewest features, then the smallest timestep.

    Args:
        cells: From :func:`summarize`.
        measure: Measure to judge by.
        flops: Operations up to each block.
        images: Number of validation images.
        seeds: Number of seeds.

    Returns:
        ``best`` and ``cheapest`` (cells with ``flops``; the same one where no cheaper block is
        within the error), ``standard_error``, ``within`` (how many cells are) and ``combinations``.
    """
    cells = [{**cell, "flops": flops[cell["b"]]} for cell in cells]

    def order(cell: Mapping[str, Any]) -> tuple[float, ...]:
        return -cell[measure], cell["flops"], cell["features"], cell["pool"], cell["t"]

    best = min(cells, key=order)
    share, spread = best[measure], best[f"{measure}_std"] or 0.0
    error = math.sqrt(share * (1 - share) / images + spread**2 / seeds)
    good = [cell for cell in cells if cell[measure] >= share - error]
    least = min(cell["flops"] for cell in good)
    cheapest = best
    if least < best["flops"]:
        cheapest = min((cell for cell in good if cell["flops"] == least), key=order)
    return {
        "measure": measure,
        "best": best,
        "cheapest": cheapest,
        "standard_error": error,
        "within": len(good),
        "combinations": len(cells),
    }


def describe(advices: Sequence[Mapping[str, Any]]) -> str:
    """Format the recommendation of the first measure, and the best cells of the others."""
    advice = advices[0]
    measure, best, cheapest = advice["measure"], advice["best"], advice["cheapest"]
    text = (
        f"**Take {_name(best)}**: {_percent(best, measure)}% by {MEASURES[measure]} (standard "
        f"error {100 * advice['standard_error']:.1f}), {best['flops'] / 1e9:.3g} GFLOPs an image. "
    )
    if cheapest is not best:
        text += (
            f"**Cheaper, and within one standard error: {_name(cheapest)}**, "
            f"{_percent(cheapest, measure)}%, {cheapest['flops'] / 1e9:.3g} GFLOPs "
            f"({1 - cheapest['flops'] / best['flops']:.0%} less). "
        )
    text += f"{advice['within'] - 1} other combinations are within one standard error."
    for other in advices[1:]:
        found = other["best"]
        text += f" By {MEASURES[other['measure']]} the best is {_name(found)} "
        text += f"({_percent(found, other['measure'])}%)."
    return (
        f"{text} This is the best of {advice['combinations']} combinations by the same images that "
        "it is scored on, so the accuracy is a little too good: confirm it on other images."
    )


def _name(cell: Mapping[str, Any]) -> str:
    return f"b = {cell['b']}, t = {cell['t']}, pool = {cell['pool']}"


def _percent(cell: Mapping[str, Any], measure: str, separator: str = " ± ") -> str:
    spread = cell[f"{measure}_std"]
    text = f"{100 * cell[measure]:.1f}"
    return text if spread is None else f"{text}{separator}{100 * spread:.1f}"


def show_grid(
    cells: Sequence[Mapping[str, Any]], pool: int, advice: Mapping[str, Any], caption: str
) -> tuple[str, Figure]:
    """Show one measure at one pool, blocks by timesteps, as a Markdown table and a heat map.

    The best of all combinations is bold and framed, the cheapest one within its error italic.
    """
    measure = advice["measure"]
    own = {(cell["b"], cell["t"]): cell for cell in cells if cell["pool"] == pool}
    blocks, timesteps = (list(dict.fromkeys(key[i] for key in own)) for i in (0, 1))
    texts = [[_percent(own[b, t], measure) for t in timesteps] for b in blocks]
    marks = {}
    for key, color, star, label in (
        ("cheapest", CHEAPEST_COLOR, "*", "fewest operations within one standard error"),
        ("best", BEST_COLOR, "**", "best of all blocks, timesteps and pools"),
    ):
        found = advice[key]
        if found["pool"] == pool and (key == "best" or found is not advice["best"]):
            i, j = blocks.index(found["b"]), timesteps.index(found["t"])
            marks[i, j] = color, label
            texts[i][j] = f"{star}{texts[i][j]}{star}"
    columns = ["b \\ t:", *(f"{t}:" for t in timesteps)]
    table = markdown_table(columns, ([b, *line] for b, line in zip(blocks, texts)))
    every = [100 * cell[measure] for cell in cells]
    figure = draw_heatmap(
        np.array([[100 * own[b, t][measure] for t in timesteps] for b in blocks]),
        blocks,
        timesteps,
        title=f"{MEASURES[measure]}, top-1 in %, pooled to {pool}x{pool}\n{caption}",
        row_name="block b",
        column_name="timestep t",
        texts=[[_percent(own[b, t], measure, "\n±") for t in timesteps] for b in blocks],
        limits=(min(every), max(every)),
        marks=marks,
    )
    return table, figure
