"""Figures of the evaluation commands."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.metrics import ConfusionMatrixDisplay

BEST_COLOR, CHEAPEST_COLOR, MISSING_COLOR = "#e85410", "#ce28aa", "#dedede"
_CELLS_WITH_NUMBERS = 400
_CLASSES_WITH_NAMES = 60


def draw_heatmap(
    values: np.ndarray,
    rows: Sequence[Any],
    columns: Sequence[Any],
    title: str,
    row_name: str,
    column_name: str,
    limits: tuple[float, float],
    number: str = "{:.2f}",
    marks: Mapping[tuple[int, int], tuple[str, str]] | None = None,
) -> Figure:
    """Draw a table of numbers (R, C), colored by value between two limits; NaN is gray.

    Rows and columns have labels and a name, cells have numbers in the given format. ``marks`` has
    the color and legend of frames around cells (row, column).
    """
    height, width = values.shape
    width = 3.4 + 0.62 * width
    figure = Figure((width, 2.2 + 0.46 * height), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["YlGnBu"].with_extremes(bad=MISSING_COLOR)
    picture = axes.imshow(values, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
    figure.colorbar(picture)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=column_name, ylabel=row_name)
    lines = [textwrap.fill(line, int(9 * width)) for line in title.splitlines()]
    axes.set_title("\n".join(lines), fontsize=10)
    if values.size <= _CELLS_WITH_NUMBERS:
        for i, j in np.argwhere(~np.isnan(values)):
            color = "white" if picture.norm(values[i, j]) > 0.58 else "black"
            text = number.format(values[i, j])
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=7)
    for (i, j), (color, label) in (marks or {}).items():
        frame = Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, ec=color, lw=3, label=label)
        axes.add_patch(frame)
    if marks:
        figure.legend(handles=axes.patches, loc="outside lower center", fontsize=8, frameon=False)
    return figure


def draw_confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix (K, K): images of class i (row) that were taken for j (column)."""
    named = len(classes) <= _CLASSES_WITH_NAMES
    side = 3 + (0.36 * len(classes) if named else 7)
    figure = Figure((side + 1, side), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(counts, display_labels=classes if named else None)
    display.plot(
        ax=axes, cmap="Blues", include_values=named, values_format="d",
        xticks_rotation="vertical", text_kw={"fontsize": 7},
    )  # fmt: skip
    if not named:
        axes.set(xticks=[], yticks=[])
    axes.set_title(f"{int(np.trace(counts))} of {int(counts.sum())} correct")
    return figure


def draw_taps(
    panels: Sequence[tuple[str, np.ndarray, Mapping[tuple[int, int], tuple[np.ndarray, str]]]],
    strides: Mapping[int, int],
) -> Figure:
    """Draw images with their taps beside them: blocks downward, timesteps to the right.

    A panel is an image's name, its pixels (H, W, 3), and for each tap (t, b) the map's pixels
    (h, w, 3) and a caption. ``strides`` are those of the blocks.
    """
    timesteps = list(dict.fromkeys(t for t, _ in panels[0][2]))
    blocks = list(dict.fromkeys(b for _, b in panels[0][2]))
    columns = math.ceil(len(panels) ** 0.5)
    rows = math.ceil(len(panels) / columns)
    width, height = 1.2 * (len(timesteps) + 1.5) + 0.5, 1.4 * len(blocks) + 0.6
    figure = Figure((columns * width, rows * height), layout="constrained")
    parts = figure.subfigures(rows, columns, squeeze=False).flat
    for part, (name, image, taps) in zip(parts, panels):
        part.suptitle(name, fontsize=9)
        grid = part.add_gridspec(
            len(blocks), len(timesteps) + 1, width_ratios=[1.5, *[1] * len(timesteps)]
        )
        axes = part.add_subplot(grid[:, 0])
        axes.imshow(image)
        axes.set_axis_off()
        axes.set_title(f"{image.shape[1]} x {image.shape[0]} px", fontsize=7)
        for (t, b), (pixels, caption) in taps.items():
            axes = part.add_subplot(grid[blocks.index(b), timesteps.index(t) + 1])
            below, right = (side * strides[b] for side in pixels.shape[:2])
            axes.imshow(pixels, interpolation="nearest", extent=(0, right, below, 0))
            # a map covers the image rounded up to its stride
            axes.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0), xticks=[], yticks=[])
            axes.set_xlabel(caption, fontsize=6, labelpad=1)
            if b == blocks[0]:
                axes.set_title(f"t = {t}", fontsize=8)
            if t == timesteps[0]:
                axes.set_ylabel(f"b = {b}", fontsize=8)
    return figure
