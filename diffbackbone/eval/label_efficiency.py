"""A grid of tasks, weights, shares of the labels and seeds on a frozen U-Net, and its report."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from filelock import FileLock
from matplotlib.figure import Figure

from diffbackbone import UNet, UNetConfig, load_checkpoint
from diffbackbone.cli import run_command
from diffbackbone.eval.label_config import PRESETS, Cell, LabelEfficiencyConfig
from diffbackbone.eval.label_tasks import TASKS, LabelEfficiencyRunner, config_file
from diffbackbone.eval.options import BackboneOptions
from diffbackbone.utils import (
    UserError,
    changed_settings,
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
HEADS = ("knn", "linear", "attention", "difformer", "difffeed")
HEAD_PAIRS = (("attention", "linear"), ("difformer", "attention"), ("difffeed", "attention"))
_MAY_CHANGE = {
    "out", "preset", "checkpoint", "unet", "tasks", "weights", "labels", "seeds", "device"
}  # fmt: skip

Record = Mapping[str, Any]


def run(config: LabelEfficiencyConfig) -> None:
    """Measure what is missing of the grid; a cell that fails is left out."""
    if config.checkpoint is None and "pretrained" in config.weights:
        raise UserError("--weights pretrained needs --checkpoint; without it use --weights random")
    cells = [
        Cell(task, weights, labels, seed)
        for seed in config.seeds  # first, so that a part of the grid can be compared
        for task in config.tasks
        for labels in config.labels
        for weights in config.weights
    ]
    unet = BackboneOptions(unet=config.unet or config.checkpoint or "tiny").network()
    settings = grid_settings(config, unet)
    config.out.mkdir(parents=True, exist_ok=True)
    with FileLock(config.out / ".lock", timeout=0):
        records, failed = open_results(config, settings), []
        runner = LabelEfficiencyRunner(config, unet)
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


def grid_settings(config: LabelEfficiencyConfig, unet: UNetConfig) -> dict[str, Any]:
    """Return what results depend on: options, the checkpoint's weights, the configs' content."""
    settings: dict[str, Any] = {"format": FORMAT}
    options = settings_of(config)
    settings.update({name: options[name] for name in options.keys() - _MAY_CHANGE})
    settings.update({f"unet.{name}": value for name, value in dataclasses.asdict(unet).items()})
    if config.checkpoint is not None:
        model = UNet(unet)
        load_checkpoint(model, config.checkpoint)
        settings["weights"] = weights_digest(model)
    for task in {"upernet", "maskrcnn"} & set(config.tasks):
        content = config_file(config, task).read_bytes()
        settings[f"content of {task}"] = hashlib.sha256(content).hexdigest()
    return settings


def open_results(
    config: LabelEfficiencyConfig, settings: Mapping[str, Any]
) -> dict[Cell, dict[str, Any]]:
    """Return the records of the finished cells.

    Settings of tasks and weights that were never asked for may be absent.
    """
    path, results = config.out / "settings.json", config.out / "results.jsonl"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if changes := changed_settings(saved, settings, saved.keys() ^ settings.keys()):
        raise UserError(
            f"{config.out} holds results of other settings:\n  "
            + "\n  ".join(changes)
            + "\nUse another --out"
        )
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


def compare(
    groups: Mapping[str, Sequence[Record]],
    pairs: Iterable[tuple[str, str]],
    metric: str | None = None,
) -> str:
    """Return a Markdown table: a row for each share of labels, a column for each group.

    Columns for the differences of pairs of groups, paired by seed, are added. The score is
    compared, or a metric.
    """
    pairs = [pair for pair in pairs if set(pair) <= groups.keys()]
    rows = []
    for share in _shares(record for group in groups.values() for record in group):
        here = {k: [r for r in group if r["labels"] == share] for k, group in groups.items()}
        images = sorted({r["train_images"] for group in here.values() for r in group})
        found = {
            k: {r["seed"]: r["metrics"][metric] if metric else r["score"] for r in group}
            for k, group in here.items()
        }
        row = [f"{share:.3g}", "/".join(f"{n:,}" for n in images)]
        row += [format_values(list(scores.values())) for scores in found.values()]
        for a, b in pairs:
            seeds = sorted(found[a].keys() & found[b].keys())
            row.append(format_values([found[a][seed] - found[b][seed] for seed in seeds], "+"))
        rows.append(row)
    names = ["labels", "images", *groups, *(f"{a} - {b}" for a, b in pairs)]
    return markdown_table([f"{name}:" for name in names], rows).strip()


def summarize(records: Sequence[Record]) -> list[str]:
    """Return the parts of the summary: tables for each task, then heads against each other."""
    parts = []
    pairs = [("pretrained", other) for other in ("random", "initial")]
    for task, own in _group(records, "task", TASKS).items():
        info, groups = TASKS[task], _group(own, "weights", COLORS)
        parts += [f"## {info.title}: {info.score} in %", compare(groups, pairs)]
        for name in info.metrics:
            parts += [f"{name} in %:", compare(groups, pairs, name)]
        parts.append(f"![{task}]({task}.png)")
    for weights, own in _group(records, "weights", COLORS).items():
        groups = _group(own, "task", HEADS)
        if len(groups) > 1:
            parts += [f"## Heads on {weights} features: top-1 in %", compare(groups, HEAD_PAIRS)]
    return parts


def _group(
    records: Iterable[Record], name: str, values: Iterable[str]
) -> dict[str, Sequence[Record]]:
    """Group records by a value; those of other values are left out."""
    groups = {value: [record for record in records if record[name] == value] for value in values}
    return {value: group for value, group in groups.items() if group}


def _shares(records: Iterable[Record]) -> list[float]:
    return sorted({record["labels"] for record in records}, reverse=True)


def draw_curves(task: str, records: Sequence[Record]) -> Figure:
    """Draw the score against the share of labels, a line with error bars for each weights."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for weights, own in _group(records, "weights", COLORS).items():
        shares = _shares(own)
        spreads = [spread([r["score"] for r in own if r["labels"] == share]) for share in shares]
        axes.errorbar(
            shares, *zip(*spreads), color=COLORS[weights], marker="o", capsize=4, label=weights
        )
    shares = _shares(records)
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{100 * share:g}%" for share in shares])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="share of the labels", ylabel=f"{TASKS[task].score} in %")
    axes.set_title(f"{TASKS[task].title}, frozen U-Net")
    axes.grid(axis="y", alpha=0.4)
    axes.legend()
    return figure


def write_report(config: LabelEfficiencyConfig, records: Sequence[Record]) -> None:
    """Write ``summary.md`` and the pictures."""
    caption = (
        f"The U-Net is frozen. Digits: {config.image_size} px; (t, b) = {config.tap} (pretrained) "
        f"and {config.random_tap} (others), of DifFormer t = {config.timesteps} and b = "
        f"{config.blocks}. Mean ± standard deviation over the seeds; in brackets their number "
        "where it is below three. Differences are paired by seed."
    )
    parts = ["# Frozen features with few labels", caption, *summarize(records)]
    write_text(config.out / "summary.md", "\n\n".join(parts) + "\n")
    for task, own in _group(records, "task", TASKS).items():
        save_figure(draw_curves(task, own), config.out / f"{task}.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the preset gives the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="grid")
    known, _ = parser.parse_known_args(argv)
    default = PRESETS.get(known.preset, PRESETS["grid"])
    run_command(LabelEfficiencyConfig, run, argv, default=default)
