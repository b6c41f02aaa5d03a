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
    *,
    title: str,
    row_name: str,
    column_name: str,
    texts: Sequence[Sequence[str]] | None = None,
    limits: tuple[float, float] | None = None,
    marks: Mapping[tuple[int, int], tuple[str, str]] | None = None,
) -> Figure:
    """Draw a table of numbers, colored by value.

    Args:
        values: (R, C); NaN where there is none.
        rows: Labels of the R rows, from the top.
        columns: Labels of the C columns.
        title: Title, of one or more lines.
        row_name: Name of the rows.
        column_name: Name of the columns.
        texts: Text of each cell; None writes the values.
        limits: Values of the lightest and the darkest color; None takes the range of the values.
        marks: Color and legend of a frame around a cell (row, column).
    """
    count = values.shape
    width = 3.4 + 0.62 * count[1]
    figure = Figure((width, 2.2 + 0.46 * count[0]), layout="constrained")
    axes = figure.subplots()
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    colors = colormaps["YlGnBu"].with_extremes(bad=MISSING_COLOR)
    picture = axes.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto")
    figure.colorbar(picture)
    axes.set_xticks(range(count[1]), columns)
    axes.set_yticks(range(count[0]), rows)
    axes.set(xlabel=column_name, ylabel=row_name)
    lines = [textwrap.fill(line, int(9 * width)) for line in title.splitlines()]
    axes.set_title("\n".join(lines), fontsize=10)
    if values.size <= _CELLS_WITH_NUMBERS:
        for i, j in np.argwhere(~np.isnan(values)):
            color = "white" if values[i, j] > (low + 1.4 * high) / 2.4 else "black"
            text = f"{values[i, j]:.2f}" if texts is None else texts[i][j]
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=7)
    for (i, j), (color, label) in (marks or {}).items():
        frame = Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, ec=color, lw=3, label=label)
        axes.add_patch(frame)
    if marks:
        figure.legend(handles=axes.patches, loc="outside lower center", fontsize=8, frameon=False)
    return figure


def draw_confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix.

    Args:
        counts: (K, K): images of class i (row) that were taken for class j (column).
        classes: K names.
    """
    named = len(classes) <= _CLASSES_WITH_NAMES
    side = 3 + (0.36 * len(classes) if named else 7)
    figure = Figure((side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(shares, display_labels=classes if named else None)
    display.plot(ax=axes, cmap="Blues", include_values=False, xticks_rotation="vertical")
    if named:
        for i, j in np.argwhere(counts):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, int(counts[i, j]), ha="center", va="center", color=color, fontsize=7)
    else:
        axes.set(xticks=[], yticks=[])
    axes.set_title(f"{int(np.trace(counts))} of {int(counts.sum())} correct; colors: share of row")
    return figure


def draw_taps(
    panels: Sequence[tuple[str, np.ndarray, Mapping[tuple[int, int], tuple[np.ndarray, str]]]],
    strides: Mapping[int, int],
    size: float = 1.1,
    smooth: bool = False,
) -> Figure:
    """Draw images with their taps beside them: blocks downward, timesteps to the right.

    Args:
        panels: For each image its name, its pixels (H, W, 3), and for each tap (t, b) the map's
            pixels (h, w, 3) and a caption.
        strides: Stride of each block.
        size: Longer side of a map in inches.
        smooth: Interpolate between the map's pixels.
    """
    timesteps = list(dict.fromkeys(t for t, _ in panels[0][2]))
    blocks = list(dict.fromkeys(b for _, b in panels[0][2]))
    shapes = [size * np.array(image.shape[:2]) / max(image.shape[:2]) for _, image, _ in panels]
    height = max((y + 0.3) * len(blocks) + 0.6 for y, _ in shapes)
    width = max((max(x, 0.8) + 0.1) * (len(timesteps) + 1.5) + 0.5 for _, x in shapes)
    # about as wide as high
    columns = min(
        range(1, len(panels) + 1),
        key=lambda n: max(n * width, math.ceil(len(panels) / n) * height),
    )
    rows = math.ceil(len(panels) / columns)
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
            filter_ = "bicubic" if smooth else "nearest"
            axes.imshow(pixels, interpolation=filter_, extent=(0, right, below, 0))
            # a map covers the image rounded up to its stride
            axes.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0), xticks=[], yticks=[])
            axes.set_xlabel(caption, fontsize=6, labelpad=1)
            if b == blocks[0]:
                axes.set_title(f"t = {t}", fontsize=8)
            if t == timesteps[0]:
                axes.set_ylabel(f"b = {b}", fontsize=8)
    return figure
