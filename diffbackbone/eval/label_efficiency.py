"""A grid of tasks, weights, shares of the labels and seeds on a frozen U-Net, and its report."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from matplotlib.figure import Figure

from diffbackbone import UNet, UNetConfig, load_checkpoint
from diffbackbone.cli import run_command
from diffbackbone.eval.label_config import PRESETS, Cell, LabelEfficiencyConfig
from diffbackbone.eval.label_tasks import TASKS, LabelEfficiencyRunner
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

FORMAT = "diffbackbone label efficiency 3"
COLORS = {"pretrained": "tab:blue", "random": "tab:orange", "initial": "tab:gray"}
HEADS = ("knn", "linear", "attention", "difformer", "difffeed")
HEAD_PAIRS = (("attention", "linear"), ("difformer", "attention"), ("difffeed", "attention"))
_MAY_CHANGE = {
    "out", "preset", "checkpoint", "unet", "tasks", "weights", "labels", "seeds", "list",
    "only_missing", "time_limit", "overwrite", "device",
}  # fmt: skip

Record = Mapping[str, Any]


# ----------------------------------------------------------------------------------------- results


class ResultsStore:
    """The finished cells, in ``results.jsonl``, and the settings they depend on.

    Args:
        out: Folder of the grid.
        settings: What the results depend on. Some may be absent: those of tasks and weights that
            were never asked for.
        overwrite: Discard results of other settings.

    Attributes:
        records: Record of each finished cell.
        replaced: Results of other settings were discarded.

    Raises:
        UserError: The folder holds results of other settings, or damaged ones.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = out / "results.jsonl"
        saved = _read_json(out / "settings.json")
        changes = changed_settings(saved, settings, saved.keys() ^ settings.keys())
        if changes and not overwrite:
            raise UserError(
                f"{out} holds results of other settings:\n  "
                + "\n  ".join(changes)
                + "\nTake another --out, or --overwrite; without --checkpoint it goes on with the "
                "copy in weights/"
            )
        self.replaced = bool(changes)
        self.records = {} if changes else read_records(self.path)
        self.settings = dict(settings) if changes else {**saved, **settings}
        write_json(out / "settings.json", self.settings)

    def add(self, record: Record) -> None:
        """Keep a cell's result."""
        self.records[cell_of(record)] = record
        write_json_lines(self.path, self.records.values())


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def cell_of(record: Record) -> Cell:
    """Return the cell that a record belongs to."""
    return Cell(*(record[field.name] for field in dataclasses.fields(Cell)))


def read_records(path: Path) -> dict[Cell, Record]:
    """Return the records of ``results.jsonl``; none if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {cell_of(record): record for record in map(json.loads, lines)}


def run_grid(
    cells: Sequence[Cell],
    store: ResultsStore,
    measure: Callable[[Cell], Mapping[str, Any]],
    report: Callable[[], None],
    time_limit: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[str]:
    """Measure the missing cells; a cell that fails is left out, three in a row end the run.

    Args:
        cells: The cells wanted, in order.
        store: The finished ones.
        measure: Measures a cell.
        report: Called after every cell.
        time_limit: Seconds; a cell whose task usually takes longer than is left is not started.
        clock: Returns seconds.

    Returns:
        What failed.
    """
    start = clock()
    missing = [cell for cell in cells if cell not in store.records]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are finished")
    failed: list[str] = []
    in_a_row = 0
    for number, cell in enumerate(missing, 1):
        begin = clock()
        seconds = [r["seconds"] for r in store.records.values() if r["task"] == cell.task]
        expected = statistics.median(seconds) if seconds else 0.0
        if time_limit is not None and begin - start + expected > time_limit:
            left = len(missing) - number + 1
            print(f"time limit: {left} cells are left; {cell.name} would take {expected:.0f} s")
            break
        try:
            result = measure(cell)
        except UserError as error:
            failed.append(f"{cell.name}: {error}")
            print(f"{number}/{len(missing)} {cell.name} FAILED: {error}")
            in_a_row += 1
            if in_a_row == 3:
                print("stopped: three cells in a row failed")
                break
            continue
        in_a_row = 0
        took = clock() - begin
        store.add({**dataclasses.asdict(cell), **result, "seconds": round(took, 2)})
        report()
        print(
            f"{number}/{len(missing)} {cell.name}: {TASKS[cell.task].score} {result['score']:.2f} "
            f"({result['train_images']} labeled images, {took:.0f} s)"
        )
    return failed


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

    Args:
        groups: Records by the column's name.
        pairs: Columns whose differences, paired by seed, are added.
        metric: What is compared; None takes the score.
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
    return markdown_table([f"{name}:" for name in names], rows)


def summarize(records: Sequence[Record], caption: str) -> str:
    """Return the summary as Markdown: tables for each task, then heads against each other."""
    parts = ["# Frozen features with few labels", caption]
    pairs = [("pretrained", other) for other in ("random", "initial")]
    for task, info in TASKS.items():
        own = [record for record in records if record["task"] == task]
        groups = _group(own, "weights", COLORS)
        if not own:
            continue
        parts += [f"## {info.title}: {info.score} in %", compare(groups, pairs)]
        for name in info.metrics:
            parts += [f"{name} in %:", compare(groups, pairs, name)]
        parts.append(f"![{task}]({task}.png)")
    for weights, own in _group(records, "weights", COLORS).items():
        groups = _group(own, "task", HEADS)
        if len(groups) > 1:
            parts += [f"## Heads on {weights} features: top-1 in %", compare(groups, HEAD_PAIRS)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


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
        means, deviations = zip(*spreads)
        axes.errorbar(
            shares, means, deviations, color=COLORS[weights], marker="o", capsize=4, label=weights
        )
    shares = _shares(records)
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{100 * share:g}%" for share in shares])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set(title=f"{TASKS[task].title}, frozen U-Net", xlabel="share of the labels")
    axes.set_ylabel(f"{TASKS[task].score} in %")
    axes.grid(axis="y", alpha=0.4)
    axes.legend()
    return figure


def write_report(out: Path, records: Sequence[Record], caption: str) -> None:
    """Write ``summary.md`` and the pictures."""
    write_text(out / "summary.md", summarize(records, caption))
    for task, own in _group(records, "task", TASKS).items():
        save_figure(draw_curves(task, own), out / f"{task}.png")


def list_cells(cells: Sequence[Cell], records: Mapping[Cell, Record], missing: bool) -> str:
    """Return one line for each cell: its score, or that it is missing."""
    lines = []
    for cell in cells:
        if cell not in records:
            lines.append(f"{cell.name}: missing")
        elif not missing:
            score = f"{TASKS[cell.task].score} {records[cell]['score']:.2f}"
            lines.append(f"{cell.name}: {score} ({records[cell]['seconds']:.0f} s)")
    finished = sum(cell in records for cell in cells)
    return "\n".join([*lines, f"{finished} of {len(cells)} cells are finished"])


# ------------------------------------------------------------------------------------ command line


def run(config: LabelEfficiencyConfig) -> None:
    """Measure what is missing of the grid, or list it.

    Raises:
        UserError: The options don't fit, the folder holds other results, or cells failed.
    """
    out, copy = config.out, config.out / "weights" / "pretrained.safetensors"
    if config.checkpoint is None and copy.is_file():
        config = dataclasses.replace(config, checkpoint=str(copy))
    cells = [
        Cell(task, weights, labels, seed)
        for seed in config.seeds  # first, so that a part of the grid can be compared
        for task in config.tasks
        for labels in config.labels
        for weights in config.weights
    ]
    if config.list:
        print(list_cells(cells, read_records(out / "results.jsonl"), config.only_missing))
        return
    if config.checkpoint is None and "pretrained" in config.weights:
        raise UserError("--weights pretrained needs --checkpoint; without it take --weights random")
    unet = BackboneOptions(unet=config.unet or config.checkpoint or "tiny").unet_config()
    settings = grid_settings(config, unet)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            store = ResultsStore(out, settings, config.overwrite)
            if store.replaced:
                _clear(out, config.checkpoint)
            runner = LabelEfficiencyRunner(config, unet)

            def report() -> None:
                write_report(out, list(store.records.values()), _caption(config))

            limit = None if config.time_limit is None else 60 * config.time_limit
            failed = run_grid(cells, store, runner.measure, report, limit)
            report()
    except Timeout as error:
        raise UserError(f"another run works in {out}; take another --out") from error
    print(f"{out}: summary.md, results.jsonl and a picture for each task")
    if failed:
        raise UserError(f"{len(failed)} cells failed:\n  " + "\n  ".join(failed))


def grid_settings(config: LabelEfficiencyConfig, unet: UNetConfig) -> dict[str, Any]:
    """Return what results depend on: options, the checkpoint's weights, the configs' content.

    Raises:
        UserError: A task's framework is not installed, or its config can't be read.
    """
    settings: dict[str, Any] = {"format": FORMAT}
    options = settings_of(config)
    settings.update({name: options[name] for name in options.keys() - _MAY_CHANGE})
    settings.update({f"unet.{name}": value for name, value in dataclasses.asdict(unet).items()})
    if config.checkpoint is not None:
        model = UNet(unet)
        load_checkpoint(model, config.checkpoint)
        settings["weights"] = weights_digest(model)
    for task in config.tasks:
        if (read := TASKS[task].read) is not None:
            try:
                text = json.dumps(read(getattr(config, task)), sort_keys=True, default=str)
            except (ImportError, OSError, ValueError) as error:
                raise UserError(f"{error}\nleave {task} out of --tasks to go on") from error
            settings[f"content of {task}"] = hashlib.sha256(text.encode()).hexdigest()
    return settings


def _clear(out: Path, checkpoint: str | None) -> None:
    """Remove everything made with other settings; a checkpoint that was given stays."""
    (out / "results.jsonl").unlink(missing_ok=True)
    for name in ("cells", "weights", "cache", "digits", "scenes"):
        if not (checkpoint and Path(checkpoint).is_relative_to(out / name)):
            shutil.rmtree(out / name, ignore_errors=True)


def _caption(config: LabelEfficiencyConfig) -> str:
    return (
        f"The U-Net is frozen. Digits: {config.image_size} px; (t, b) = {config.tap} (pretrained) "
        f"and {config.random_tap} (others), of DifFormer t = {config.timesteps} and b = "
        f"{config.blocks}. Mean ± standard deviation over the seeds; in brackets how many where "
        "these are fewer than three. Differences are paired by seed."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the preset gives the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="grid")
    known, _ = parser.parse_known_args(argv)
    default = PRESETS.get(known.preset, PRESETS["grid"])
    run_command(LabelEfficiencyConfig, run, argv, default=default)
