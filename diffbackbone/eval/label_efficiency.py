"""A grid of tasks, weights, shares of the labels and seeds on a frozen network, and its report."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from matplotlib.figure import Figure

from diffbackbone import load_checkpoint
from diffbackbone.cli import run_command
from diffbackbone.eval.label_tasks import (
    PRESETS,
    TASKS,
    Cell,
    LabelEfficiencyConfig,
    LabelEfficiencyRunner,
    config_file,
)
from diffbackbone.eval.options import BackboneOptions, DataOptions, check_settings
from diffbackbone.models import build_network
from diffbackbone.utils import (
    UserError,
    markdown_table,
    save_figure,
    settings_of,
    weights_digest,
    write_json,
    write_json_lines,
    write_text,
)

FORMAT = "diffbackbone label efficiency 4"
COLORS = {"pretrained": "tab:blue", "random": "tab:orange", "initial": "tab:gray"}
_MAY_CHANGE = {
    "out", "preset", "data", "checkpoint", "unet", "tasks", "weights", "labels", "seeds", "device"
}  # fmt: skip

Record = Mapping[str, Any]


def run(config: LabelEfficiencyConfig) -> None:
    """Measure what is missing of the grid; a cell that fails is left out."""
    cells = [
        Cell(task, weights, labels, seed)
        for seed in config.seeds  # first, so that a part of the grid can be compared
        for task in config.tasks
        for labels in config.labels
        for weights in config.weights
    ]
    unet = BackboneOptions(unet=config.unet or config.checkpoint or "tiny").network()
    runner = LabelEfficiencyRunner(config, unet)
    settings = grid_settings(config, unet)
    config.out.mkdir(parents=True, exist_ok=True)
    with FileLock(config.out / ".lock", timeout=0):
        records, failed = open_results(config.out, settings), []
        print(f"{sum(cell in records for cell in cells)} of {len(cells)} cells are finished")
        for cell in cells:
            if cell in records:
                continue
            start = time.perf_counter()
            try:
                result = runner.measure(cell)
            except UserError as error:
                failed.append(f"{cell.name}: {error}")
                print(f"{cell.name} FAILED: {error}")
                continue
            seconds = round(time.perf_counter() - start, 2)
            records[cell] = {**dataclasses.asdict(cell), **result, "seconds": seconds}
            write_json_lines(config.out / "results.jsonl", records.values())
            write_report(config, list(records.values()))
            print(f"{cell.name}: {TASKS[cell.task].score} {result['score']:.2f}, {seconds:.0f} s")
        write_report(config, list(records.values()))
    print(f"{config.out}: summary.md, results.jsonl and a picture for each task")
    if failed:
        raise UserError(f"{len(failed)} cells failed:\n  " + "\n  ".join(failed))


def grid_settings(config: LabelEfficiencyConfig, unet: Any) -> dict[str, Any]:
    """Return what results depend on: options, images, weights, content of the configs."""
    settings: dict[str, Any] = {"format": FORMAT}
    options = settings_of(config)
    settings.update({name: options[name] for name in options.keys() - _MAY_CHANGE})
    settings.update({f"unet.{name}": value for name, value in dataclasses.asdict(unet).items()})
    if config.data is not None:
        train, val = DataOptions(data=config.data).list_folders(unet.in_channels)
        settings["images"] = f"{train.digest()} {val.digest()}"
    if config.checkpoint is not None:
        model = build_network(unet)
        load_checkpoint(model, config.checkpoint)
        settings["weights"] = weights_digest(model)
    for task in {"upernet", "maskrcnn"} & set(config.tasks):
        content = config_file(config, task).read_bytes()
        settings[f"content of {task}"] = hashlib.sha256(content).hexdigest()
    return settings


def open_results(out: Path, settings: Mapping[str, Any]) -> dict[Cell, dict[str, Any]]:
    """Return the records of the finished cells.

    Settings of tasks and weights that were never asked for may be absent.
    """
    path, results = out / "settings.json", out / "results.jsonl"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    check_settings(out, saved, settings, saved.keys() ^ settings.keys())
    write_json(path, {**saved, **settings})
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    names = [field.name for field in dataclasses.fields(Cell)]
    return {Cell(*(r[name] for name in names)): r for r in map(json.loads, lines)}


# ----------------------------------------------------------------------------------------- reports


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def format_values(values: Sequence[float], sign: str = "") -> str:
    """Format mean ± standard deviation, and how many there are if fewer than three."""
    if not values:
        return ""
    mean, deviation = spread(values)
    text = f"{mean:{sign}.1f}" + (f" ± {deviation:.1f}" if len(values) > 1 else "")
    return text if len(values) > 2 else f"{text} ({len(values)})"


def summarize(records: Sequence[Record]) -> str:
    """Return a Markdown table: a row for each task, metric and share of labels.

    Columns are the weights, and the differences between pretrained and others, paired by seed.
    """
    weights = [name for name in COLORS if any(r["weights"] == name for r in records)]
    pairs = [("pretrained", name) for name in weights[1:] if weights[0] == "pretrained"]
    rows = []
    for task, own in _group(records, "task", TASKS).items():
        info = TASKS[task]
        for metric, share in itertools.product((info.score, *info.metrics), _shares(own)):
            here = [record for record in own if record["labels"] == share]
            images = sorted({record["train_images"] for record in here})
            found: dict[str, dict[int, float]] = {name: {} for name in weights}
            for record in here:
                values = {info.score: record["score"], **record["metrics"]}
                found[record["weights"]][record["seed"]] = values[metric]
            row = [info.title, metric, f"{share:.3g}", "/".join(f"{n:,}" for n in images)]
            row += [format_values(list(found[name].values())) for name in weights]
            for a, b in pairs:
                seeds = sorted(found[a].keys() & found[b].keys())
                row.append(format_values([found[a][seed] - found[b][seed] for seed in seeds], "+"))
            rows.append(row)
    names = ["labels", "images", *weights, *(f"{a} - {b}" for a, b in pairs)]
    return markdown_table(["task", "in %", *(f"{name}:" for name in names)], rows)


def _group(records: Iterable[Record], key: str, values: Iterable[str]) -> dict[str, list[Record]]:
    """Group records by a value; those of other values are left out."""
    groups = {value: [record for record in records if record[key] == value] for value in values}
    return {value: group for value, group in groups.items() if group}


def _shares(records: Iterable[Record]) -> list[float]:
    return sorted({record["labels"] for record in records}, reverse=True)


def draw_curves(task: str, records: Sequence[Record]) -> Figure:
    """Draw the score against the share of labels, a line with error bars for each weights."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, all_shares = figure.subplots(), _shares(records)
    for weights, own in _group(records, "weights", COLORS).items():
        shares = _shares(own)
        spreads = [spread([r["score"] for r in own if r["labels"] == share]) for share in shares]
        axes.errorbar(
            shares, *zip(*spreads), color=COLORS[weights], marker="o", capsize=4, label=weights
        )
    axes.set(xscale="log", xlabel="share of the labels", ylabel=f"{TASKS[task].score} in %")
    axes.set_xticks(all_shares, [f"{100 * share:g}%" for share in all_shares])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{TASKS[task].title}, frozen network")
    axes.grid(axis="y", alpha=0.4)
    axes.legend()
    return figure


def write_report(config: LabelEfficiencyConfig, records: Sequence[Record]) -> None:
    """Write ``summary.md`` and the pictures."""
    caption = (
        f"The network is frozen. Images: {config.image_size} px; (t, b) = {config.tap} "
        f"(pretrained) and {config.random_tap} (others), of DifFormer t = {config.timesteps} and "
        f"b = {config.blocks}. Mean ± standard deviation over the seeds; in brackets their number "
        "where it is below three. Differences are paired by seed."
    )
    parts = ["# Frozen features with few labels", caption, summarize(records)]
    for task, own in _group(records, "task", TASKS).items():
        save_figure(draw_curves(task, own), config.out / f"{task}.png")
        parts.append(f"![{task}]({task}.png)")
    write_text(config.out / "summary.md", "\n\n".join(parts) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the preset gives the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="grid")
    known, _ = parser.parse_known_args(argv)
    default = PRESETS.get(known.preset, PRESETS["grid"])
    run_command(LabelEfficiencyConfig, run, argv, default=default)
