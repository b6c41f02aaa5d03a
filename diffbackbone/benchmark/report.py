"""Rows of the benchmark, and their files."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffbackbone.benchmark.config import BenchmarkConfig, Case
from diffbackbone.utils import (
    UserError,
    changed_settings,
    markdown_table,
    write_json,
    write_text,
)

OURS = "ours"


@dataclasses.dataclass
class Row:
    """The result of a case; None and absent entries could not be measured."""

    case: Case
    status: str = "ok"  # or "wrong", "out of memory", "timeout", "error", "skipped"
    message: str = ""
    outputs: float | None = None  # difference relative to the reference's largest value
    gradients: float | None = None  # likewise
    ratio: float | None = None  # median over the rounds of the reference's seconds by ours
    range: Sequence[float] = ()  # lowest and highest
    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Of "ours" and the reference: "dtype" that it computes in, "flops", "matmul_peak" (FLOP/s),
    "peak_bytes", "rounds" (the seconds of a step and its parts in each), and their medians
    "seconds"."""


def _each(key: str, form: Callable[[dict[str, Any]], str]) -> Callable[[Row], str]:
    """Return a cell with our figure and the reference's, where results have a key."""

    def cell(row: Row) -> str:
        results = [row.results.get(who, {}) for who in filter(None, (OURS, row.case.reference))]
        texts = [form(result) if key in result else "-" for result in results]
        return " / ".join(texts) if set(texts) != {"-"} else ""

    return cell


def _seconds(result: dict[str, Any]) -> str:
    text = "{step:.4g}"
    if "forward" in result["seconds"]:
        text += " (U-Net {forward:.3g} + {backward:.3g}, optimizer {optimizer:.3g})"
    return text.format(**result["seconds"])


def _outside(result: dict[str, Any]) -> str:
    """Return the share of a training step that is spent outside the U-Net."""
    seconds = result["seconds"]
    if "forward" not in seconds:
        return "-"
    return f"{1 - (seconds['forward'] + seconds['backward']) / seconds['step']:.0%}"


def _share(result: dict[str, Any]) -> str:
    """Return the share of the peak that matrix products reach, which TF32 may exceed in steps."""
    if "forward" in result["seconds"]:
        return "-"
    return f"{result['flops'] / result['seconds']['step'] / result['matmul_peak']:.0%}"


def _ratio(row: Row) -> str:
    return (
        "" if row.ratio is None else "**{:.2f}** ({:.2f} to {:.2f})".format(row.ratio, *row.range)
    )


def _difference(row: Row) -> str:
    found = [row.outputs, row.gradients]
    return ", gradients ".join(f"{value:.1e}" for value in found if value is not None)


COLUMNS: dict[str, Callable[[Row], Any]] = {
    "case": lambda row: row.case.name,
    "px:": lambda row: row.case.size,
    "batch:": lambda row: row.case.batch,
    "type": _each("dtype", lambda result: result["dtype"]),
    "mode": lambda row: row.case.mode,
    "execution": lambda row: row.case.execution,
    "against": lambda row: row.case.reference or "",
    "result": lambda row: row.status,
    "ratio:": _ratio,
    "seconds:": _each("seconds", _seconds),
    "outside the U-Net:": _each("seconds", _outside),
    "peak memory (GB):": _each("peak_bytes", lambda result: f"{result['peak_bytes'] / 1e9:.2f}"),
    "TFLOP:": _each("flops", lambda result: f"{result['flops'] / 1e12:.3g}"),
    "of matmul peak:": _each("seconds", _share),
    "difference:": _difference,
    "note": lambda row: row.message,
}
LEGEND = """
Seconds are medians of the rounds; the ratio is the reference's time by ours (lowest to highest of
the rounds). Where two numbers stand, the first is ours.
"""


def format_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the rows, without empty columns."""
    cells = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    return markdown_table(list(cells), zip(*cells.values()))


def describe(config: BenchmarkConfig) -> dict[str, Any]:
    """Return what is reported about a run and its machine."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "unet": config.unet,
        "weights": config.checkpoint or "random",
        "gpu": torch.cuda.get_device_name() if config.device == "cuda" else None,
        "cpu": f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


def write_reports(
    stem: Path,
    machine: Mapping[str, Any],
    parts: Mapping[str, Iterable[Case]],
    rows: Mapping[Case, Row],
) -> None:
    """Write ``stem``.json, and ``stem``.md with a table of each part."""
    lines = [f"* {name}: {value}" for name, value in machine.items() if value] + [LEGEND]
    for heading, cases in parts.items():
        measured = [rows[case] for case in cases if case in rows]
        if measured:
            lines += [f"## {heading}\n", f"{len(measured)} of {len(cases)} rows.\n"]
            lines += [format_table(measured)]
    content = {"machine": machine, "rows": [dataclasses.asdict(row) for row in rows.values()]}
    write_json(f"{stem}.json", content)
    write_text(f"{stem}.md", "\n".join(lines))


def read_rows(stem: Path, machine: Mapping[str, Any]) -> dict[Case, Row]:
    """Return the rows of ``stem``.json; none where there is no such file.

    Raises:
        UserError: They are of other weights, of another GPU or torch.
    """
    file = Path(f"{stem}.json")
    if not file.exists():
        return {}
    saved = json.loads(file.read_text())
    names = ("unet", "weights", "gpu", "torch")
    settings = [{name: x[name] for name in names} for x in (saved["machine"], machine)]
    if changed := changed_settings(*settings):
        raise UserError(f"{file} has other settings, choose another --out: {changed}")
    rows = [Row(**{**row, "case": Case(**row["case"])}) for row in saved["rows"]]
    return {row.case: row for row in rows}
