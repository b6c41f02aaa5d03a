"""Options, rows and reports that both benchmarks share."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from diffbackbone import UNetConfig
from diffbackbone.utils import UserError, markdown_table, save_figure, write_json, write_text

Dtype = Literal["float32", "bfloat16", "float16"]
COLORS = ("#3b6fb6", "#9dbce0", "#8a8a8a", "#e0a03c")


@dataclasses.dataclass
class Options:
    """Options of every benchmark."""

    unet: str = "gd256_uncond"
    """Preset of the U-Net."""
    checkpoint: str | None = None
    """Its weights; random ones if left out."""
    device: Literal["cpu", "cuda"] | None = None
    """A GPU if there is one."""
    threads: int | None = None
    """CPU threads; torch's choice if left out."""
    repeats: int = 5
    """Rounds."""
    warmup: int = 1
    """Steps before the first round."""
    timeout: float = 3600
    """Seconds that a row may take."""
    list: bool = False
    """Print the rows and measure nothing."""

    def check(self, sizes: Sequence[int]) -> UNetConfig:
        """Choose the device and return the architecture.

        Raises:
            UserError: An option doesn't fit the machine or the U-Net.
        """
        gpu, path = torch.cuda.is_available(), self.checkpoint
        self.device = self.device or ("cuda" if gpu else "cpu")
        if self.device == "cuda" and not gpu:
            raise UserError("--device cuda: torch sees no GPU on this machine")
        if path and "://" not in path and not Path(path).expanduser().is_file():
            raise UserError(f"--checkpoint: there is no file {path}")
        if min(self.repeats, self.timeout, self.threads or 1) <= 0 or self.warmup < 0:
            raise UserError("--repeats, --timeout and --threads must be positive, --warmup >= 0")
        try:
            config = UNetConfig.from_preset(self.unet).replace(num_classes=None)
        except ValueError as error:
            raise UserError(f"--unet: {error}") from error
        deepest = max(block.stride for block in config.blocks.values())
        if wrong := [size for size in sizes if size < 1 or size % deepest]:
            raise UserError(f"--sizes must be multiples of {deepest}, got {wrong}")
        return config

    def describe(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is reported about a run on a machine."""
        return {
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "unet": self.unet,
            "weights": self.checkpoint or "random",
            "device": self.device,
            **machine,
        }


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder that is removed in the end, also when the process is terminated."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="diffbackbone-benchmark-") as folder:
        yield Path(folder)


def run_rows(
    stem: Path,
    machine: Mapping[str, Any],
    cases: Sequence[Any],
    measure: Callable[[Any], Any],
    table: Callable[[Sequence[Any]], str],
    chart: Callable[[Sequence[Any], str], Any],
) -> list[Any]:
    """Measure row after row, and replace ``stem``.json, .md and .png after each.

    ``measure`` returns the row of a case: a dataclass with ``case``, ``status`` and ``message``.
    """
    from tqdm import tqdm

    rows: list[Any] = []
    try:
        with tqdm(cases, unit="row") as bar:
            for case in bar:
                bar.set_postfix_str(str(case))
                rows.append(measure(case))
                lines = [f"* {name}: {value}" for name, value in machine.items()]
                if len(rows) < len(cases):
                    lines.append(f"* not finished: {len(rows)} of {len(cases)} rows")
                text = "\n".join([*lines, "", table(rows)])
                entries = [row_entry(row) for row in rows]
                content = {"machine": machine, "planned": len(cases), "rows": entries}
                write_json(f"{stem}.json", content)
                write_text(f"{stem}.md", text)
                save_figure(chart(rows, machine.get("gpu", machine["cpu"])), f"{stem}.png")
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; {len(rows)} of {len(cases)} rows are written") from None
    print(f"{text}\nwritten: {stem}.json, .md and .png")
    return rows


def row_entry(row: Any) -> dict[str, Any]:
    """Return a row as one flat JSON object."""
    entry = dataclasses.asdict(row)
    return {**entry.pop("case"), **entry}


def row_from_entry(entry: Mapping[str, Any], row: Callable[..., Any], case: Any) -> Any:
    """Return the row of a class, with its case, that :func:`row_entry` wrote."""
    names = {field.name for field in dataclasses.fields(case)}
    rest = {name: value for name, value in entry.items() if name not in names}
    return row(case(**{name: entry[name] for name in names}), **rest)


def table(columns: Mapping[str, Callable[[Any], Any]], rows: Sequence[Any]) -> str:
    """Return a Markdown table; each column has a function from a row to its cell."""
    return markdown_table(list(columns), ([cell(row) for cell in columns.values()] for row in rows))


def draw(
    names: Sequence[str],
    panels: Mapping[str, Sequence[tuple[Sequence[float], str]]],
    parts: Sequence[str] = (),
) -> Any:
    """Return a matplotlib figure of bar charts side by side.

    A panel has a bar for each row: the parts' lengths, and the text beside it.
    """
    from matplotlib.figure import Figure

    size = (3 + 6 * len(panels), 1.2 + 0.32 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    subplots = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, bars) in zip(subplots, panels.items()):
        widths = np.zeros((max(1, *(len(values) for values, _ in bars)), len(names)))
        for index, (values, _) in enumerate(bars):
            widths[: len(values), index] = values
        for width, left, color in zip(widths, widths.cumsum(0) - widths, COLORS):
            drawn = axes.barh(names, width, left=left, color=color)
        axes.bar_label(drawn, [text for _, text in bars], padding=4)
        axes.margins(x=0.4)
        if len(widths) > 1:
            axes.legend(parts, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(parts))
        axes.set_title(title, fontsize="medium")
    axes.invert_yaxis()
    return figure
