"""How far do pretrained features get with few labels? Against random weights, over several tasks.

A grid: each task with each weights, share of the labels and seed. The U-Net stays frozen; all
weights have the same architecture, labels and validation images. ::

    python tools/pretrain.py --data data/scenes/unlabelled --unet tiny --out work_dirs/pretrain ...
    python tools/label_efficiency.py --checkpoint work_dirs/pretrain/unet.safetensors \
        --out work_dirs/label_efficiency
    python tools/label_efficiency.py --checkpoint ... --out ... --tasks knn linear --time-limit 30
    python tools/label_efficiency.py --out work_dirs/label_efficiency --list --only-missing

Tasks on scenes of one digit (1 of 10 classes, digits of any place and colour on photographs):
``knn``, ``linear``, ``attention``, ``difformer`` and ``difffeed``. Tasks on scenes of many digits:
``upernet`` and ``maskrcnn``. The scenes are those of ``make_sample_data.py``, made at first use:
training and validation share neither a scan nor a piece of a photograph. Pretrain on the same
tool's unlabelled scenes (of seed 0), and no validation scan is in those either.

* **Labels**: shares of the training images, class by class alike for single digits, whole scenes
  (at least one) else; a smaller share is part of a larger one. Evaluated is always on all
  validation images.
* **Seeds** draw the labels, the random weights, the heads and the order of the images.
* **Recipes** are the same for all weights, but for block and timestep of the features: pretrained
  and random ones are taken where they are best by ``tools/sweep.py`` (on training scans alone).
* **random** weights are drawn with the layers filled that guided-diffusion starts at zero, so that
  every residual branch does something; **initial** are those before training, with the zeros.

OUT gets ``results.jsonl`` (a line for each cell that is done), and after every cell ``summary.md``
(mean ± standard deviation over the seeds, and pretrained minus the others, seed by seed),
``results.csv`` and a picture for each task. A run that was killed goes on with the cells that are
missing: run the same command again. The checkpoint is copied at first use; where the file changes
later on, because pretraining goes on, leave ``--checkpoint`` out to finish the grid with the copy.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _classification as common
import _common
from _classification import Processes, ToolError
from _label_tasks import (
    PRETRAINED,
    TASKS,
    WEIGHTS,
    Cell,
    Lab,
    Recipe,
    checkpoint_digest,
    config_digests,
)
from PIL import Image, ImageDraw, ImageFont

from diffbackbone.features import CacheError, setting_differences
from diffbackbone.utils import UserError

FORMAT = "diffbackbone label efficiency 2"  # 2: folds choose the probe where labels are few
LABELS = (1.0, 0.1, 0.01)
SEEDS = (0, 1, 2)
COLOURS = {"pretrained": (38, 110, 172), "random": (206, 84, 30), "initial": (120, 120, 120)}
HEADS = ("linear", "attention", "difformer", "difffeed")
"""Tasks on the same images, compared with each other."""

_MIN_DIGITS = 100
"""Training scenes of one digit, so that each class keeps enough of them to choose by."""

Measure = Callable[[Cell], Mapping[str, Any]]
Record = Mapping[str, Any]


# ----------------------------------------------------------------------------------------- the grid


def make_grid(args: argparse.Namespace) -> list[Cell]:
    """All cells that the command line chooses.

    Cells of one seed come together, and in it the weights: what stopped early can be compared.
    """
    return [
        Cell(task, weights, labels, seed)
        for seed in args.seeds
        for task in args.tasks
        for labels in args.labels
        for weights in args.weights
    ]


def cell_of(record: Record) -> Cell:
    """The cell that a record belongs to."""
    return Cell(record["task"], record["weights"], record["labels"], record["seed"])


class Ledger:
    """The cells that are done, in ``results.jsonl``.

    The file is written whole each time, so that a kill leaves the one before or the one after.

    Args:
        out: Folder of the grid.
        settings: What all results depend on.
        overwrite: Throw away results of other settings.

    Raises:
        ToolError: The folder holds results of other settings, or damaged ones.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = out / "results.jsonl"
        self.records: dict[Cell, Record] = {}
        settings = wanted = {"configs": {}, **json.loads(json.dumps(settings))}
        made = self._read(out / "settings.json")
        if made:  # what no cell asks for is not known
            settings = {
                **wanted,
                "checkpoint": wanted["checkpoint"] or made["checkpoint"],
                "configs": {**made.get("configs", {}), **wanted["configs"]},
            }
            made["checkpoint"] = made["checkpoint"] or settings["checkpoint"]
            made["configs"] = {**settings["configs"], **made.get("configs", {})}
        differences = setting_differences(made, settings) if made else []
        if differences and not overwrite:
            raise ToolError(
                f"{out} holds results of other settings:\n  "
                + "\n  ".join(line.replace("the cache has", "it has") for line in differences)
                + "\nTake another --out, or --overwrite; without --checkpoint it goes on with "
                "the copy in weights/"
            )
        if not differences:
            self.records = read_records(self.path)
        self.replaced = bool(differences)
        self.settings = wanted if differences else settings

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        if not path.is_file():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ToolError(f"{path} is damaged ({error}): remove it") from error

    def add(self, record: Record) -> None:
        """Keep a cell's result."""
        self.records[cell_of(record)] = record
        common.write_lines(self.path, map(common.finite, self.records.values()))


def read_records(path: Path) -> dict[Cell, Record]:
    """The cells that are done, of ``results.jsonl``; none where there is no such file.

    Raises:
        ToolError: A line is damaged.
    """
    records: dict[Cell, Record] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[cell_of(record)] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ToolError(
                f"{path}, line {number}, is damaged ({error}): remove it, and its cell is measured "
                "again"
            ) from error
    return records


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the lock ends with the process.

    Raises:
        ToolError: Another run works there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ToolError(f"another run works in {out}: wait for it, or take another") from error
        yield


def run_grid(
    cells: Sequence[Cell],
    ledger: Ledger,
    measure: Measure,
    report: Callable[[], None],
    say: Callable[[str], None],
    time_limit: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[str]:
    """Measure the cells that are missing.

    A cell that fails is reported and left out, the others go on; three in a row end the run.

    Args:
        cells: The cells wanted, in order.
        ledger: What is done.
        measure: Measures a cell.
        report: Called after every cell.
        say: Prints.
        time_limit: Seconds; a cell that can be expected to take longer than what is left of it is
            not begun. None sets no limit.
        clock: Gives seconds.

    Returns:
        What failed.
    """
    start = clock()
    missing = [cell for cell in cells if cell not in ledger.records]
    say(f"{len(cells) - len(missing)} of {len(cells)} cells are done, {len(missing)} missing")
    failed: list[str] = []
    row = 0
    for number, cell in enumerate(missing, 1):
        begin = clock()
        expected = _expected(cell, ledger.records.values())
        if time_limit is not None and begin - start + expected > time_limit:
            say(
                f"the time is up: {len(missing) - number + 1} cells are left; the next one, "
                f"{cell.name}, takes {expected:.0f} s or so"
            )
            break
        try:
            result = measure(cell)
        except (ToolError, CacheError) as error:
            failed.append(f"{cell.name}: {error}")
            say(f"{number}/{len(missing)} {cell.name} FAILED: {error}")
            row += 1
            if row == 3:
                say("three cells in a row failed: stopped")
                break
            continue
        row = 0
        seconds = clock() - begin
        ledger.add({**dataclasses.asdict(cell), **result, "seconds": round(seconds, 2)})
        report()
        say(
            f"{number}/{len(missing)} {cell.name}: {TASKS[cell.task].score} {result['score']:.2f} "
            f"({result['train_images']} labelled images, {seconds:.0f} s)"
        )
    return failed


def _expected(cell: Cell, records: Any) -> float:
    """Seconds that cells of the task took so far; 0 where there are none."""
    seconds = [record["seconds"] for record in records if record["task"] == cell.task]
    return statistics.median(seconds) if seconds else 0.0


# ---------------------------------------------------------------------------------------- reports


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation (None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def scores(records: Sequence[Record], **chosen: Any) -> dict[int, float]:
    """Scores by seed of the records that have the given values."""
    return {
        record["seed"]: record["score"]
        for record in records
        if all(record[name] == value for name, value in chosen.items())
    }


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Differences seed by seed, of the seeds that both have."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def written(values: Sequence[float], sign: bool = False) -> str:
    """Mean ± standard deviation, and how many there are where these are fewer than three."""
    if not values:
        return ""
    mean, deviation = spread(values)
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    if deviation is not None:
        text += f" ± {deviation:.1f}"
    return text if len(values) > 2 else f"{text} ({len(values)})"


def summarise(records: Sequence[Record], caption: str) -> str:
    """The summary as Markdown: a table for each task, then heads against each other.

    Args:
        records: Of all cells that are done.
        caption: What was measured.
    """
    parts = ["# Frozen features with few labels", caption]
    for task in [name for name in TASKS if any(r["task"] == name for r in records)]:
        own = [record for record in records if record["task"] == task]
        kinds = [name for name in WEIGHTS if any(r["weights"] == name for r in own)]
        others = [kind for kind in kinds if kind != "pretrained" and "pretrained" in kinds]
        header = ["labels", "images", *kinds, *(f"pretrained - {kind}" for kind in others)]
        lines = [_row(header), "|" + "---:|" * len(header)]
        for labels in _shares(own):
            images = sorted({r["train_images"] for r in own if r["labels"] == labels})
            found = {kind: scores(own, weights=kind, labels=labels) for kind in kinds}
            row = [f"{labels:.3g}", "/".join(f"{n:,}" for n in images)]
            row += [written(list(found[kind].values())) for kind in kinds]
            for kind in others:
                row.append(written(difference(found["pretrained"], found[kind]), sign=True))
            lines.append(_row(row))
        parts += [f"## {TASKS[task].title}: {TASKS[task].score} in %", "\n".join(lines)]
        metrics = _other_metrics(own, kinds)
        parts += [*([metrics] if metrics else []), f"![{task}]({task}.png)"]
    heads = [task for task in HEADS if any(r["task"] == task for r in records)]
    if len(heads) > 1:
        parts += ["## Heads against each other: top-1 in %", _compare_heads(records, heads)]
    return "\n\n".join(parts) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shares(records: Sequence[Record]) -> list[float]:
    return sorted({record["labels"] for record in records}, reverse=True)


_OTHERS = ("box AP50", "mask AP", "mask AP50", "mAcc")


def _other_metrics(records: Sequence[Record], kinds: Sequence[str]) -> str:
    """A table of what else a task measured, as far as it is worth a look."""
    names = [name for name in _OTHERS if any(name in r["metrics"] for r in records)]
    if not names:
        return ""
    header = ["labels", *(f"{name}, {kind}" for name in names for kind in kinds)]
    lines = [_row(header), "|" + "---:|" * len(header)]
    for labels in _shares(records):
        values = [
            [
                r["metrics"][name]
                for r in records
                if r["weights"] == kind and r["labels"] == labels and name in r["metrics"]
            ]
            for name in names
            for kind in kinds
        ]
        lines.append(_row([f"{labels:.3g}", *map(written, values)]))
    return "\n".join(lines)


def _compare_heads(records: Sequence[Record], heads: Sequence[str]) -> str:
    pairs = [("attention", "linear"), ("difformer", "attention"), ("difffeed", "attention")]
    pairs = [pair for pair in pairs if set(pair) <= set(heads)]
    header = ["weights", "labels", *(TASKS[head].title for head in heads)]
    header += [f"{a} - {b}" for a, b in pairs]
    lines = [_row(header), "|---|" + "---:|" * (len(header) - 1)]
    for kind in WEIGHTS:
        for labels in _shares([r for r in records if r["weights"] == kind]):
            found = {
                head: scores(records, task=head, weights=kind, labels=labels) for head in heads
            }
            if any(found.values()):
                row = [kind, f"{labels:.3g}"]
                row += [written(list(found[head].values())) for head in heads]
                row += [written(difference(found[a], found[b]), sign=True) for a, b in pairs]
                lines.append(_row(row))
    return "\n".join(lines)


def csv_text(records: Sequence[Record]) -> str:
    """One line for each cell, in the grid's order, with every metric that a task has."""
    metrics = list(dict.fromkeys(name for r in records for name in r["metrics"]))
    names = [name for name in (records[0] if records else {}) if name != "metrics"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, *metrics])
    for record in sorted(records, key=_order):
        values = [record["metrics"].get(name, "") for name in metrics]
        writer.writerow([*(record[name] for name in names), *values])
    return file.getvalue()


def _order(record: Record) -> tuple[Any, ...]:
    places = list(TASKS).index(record["task"]), list(WEIGHTS).index(record["weights"])
    return (*places, -record["labels"], record["seed"])


def draw_curves(title: str, score: str, records: Sequence[Record]) -> Image.Image:
    """Score against the share of labels (logarithmic), a line with error bars for each weights.

    Args:
        title: Above all.
        score: What is measured, in %.
        records: Of one task.
    """
    head, label, small = (ImageFont.load_default(size) for size in (24, 18, 15))
    shares = sorted({record["labels"] for record in records})
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for kind in WEIGHTS:
        for share in shares:
            values = list(scores(records, weights=kind, labels=share).values())
            if values:
                mean, deviation = spread(values)
                lines.setdefault(kind, []).append((share, mean, deviation or 0.0))
    top = max(mean + deviation for line in lines.values() for _, mean, deviation in line)
    step = next(s for s in (1, 2, 5, 10, 20, 25) if s == 25 or top <= 5 * s)
    top = step * max(1, math.ceil(top / step))
    left, up, width, height = 84, 80, 620, 380
    picture = Image.new("RGB", (left + width + 40, up + height + 118), "white")
    pen = ImageDraw.Draw(picture)
    low, high = math.log(shares[0]), math.log(shares[-1])

    def place(share: float, value: float) -> tuple[float, float]:
        at = (math.log(share) - low) / (high - low) if high > low else 0.5
        return left + 40 + at * (width - 80), up + height * (1 - value / top)

    pen.text((16, 14), title, fill="black", font=head)
    for tick in range(0, top + 1, step):
        y = place(shares[0], tick)[1]
        pen.line((left, y, left + width, y), fill=(224, 228, 232))
        pen.text((left - 10, y), str(tick), fill="black", font=label, anchor="rm")
    pen.text((16, 46), f"{score} in %", fill=(90, 90, 90), font=small)
    for share in shares:
        x = place(share, 0)[0]
        pen.line((x, up + height, x, up + height + 6), fill="black")
        pen.text((x, up + height + 10), f"{100 * share:g}%", fill="black", font=label, anchor="ma")
    at = (left + width / 2, up + height + 38)
    pen.text(at, "share of the labels", fill="black", font=label, anchor="ma")
    pen.line((left, up, left, up + height, left + width, up + height), fill="black")
    for kind, line in lines.items():
        colour = COLOURS[kind]
        points = [place(share, mean) for share, mean, _ in line]
        if len(points) > 1:
            pen.line(points, fill=colour, width=3)
        for (share, mean, deviation), (x, y) in zip(line, points):
            ends = [place(share, max(0.0, mean + d))[1] for d in (deviation, -deviation)]
            pen.line((x, *ends[:1], x, *ends[1:]), fill=colour, width=2)
            for end in ends:
                pen.line((x - 7, end, x + 7, end), fill=colour, width=2)
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
    x = float(left)
    for kind in lines:
        pen.rectangle((x, up + height + 82, x + 24, up + height + 88), fill=COLOURS[kind])
        pen.text((x + 32, up + height + 85), kind, fill="black", font=label, anchor="lm")
        x += 32 + label.getlength(kind) + 36
    return picture


def write_report(out: Path, records: Sequence[Record], caption: str) -> None:
    """Write ``summary.md``, ``results.csv`` and the pictures, each whole."""
    _common.write_text(out / "summary.md", summarise(records, caption))
    _common.write_text(out / "results.csv", csv_text(records))
    for task, info in TASKS.items():
        own = [record for record in records if record["task"] == task]
        if own:
            picture = draw_curves(f"{info.title}, frozen U-Net", info.score, own)
            _common.save_picture(picture, out / f"{task}.png")


def list_cells(cells: Sequence[Cell], records: Mapping[Cell, Record], missing: bool) -> str:
    """The cells one a line, with their score or as missing."""
    lines = []
    for cell in cells:
        record = records.get(cell)
        if record is None:
            lines.append(f"{cell.name}: missing")
        elif not missing:
            score = f"{TASKS[cell.task].score} {record['score']:.2f}"
            lines.append(f"{cell.name}: {score} ({record['seconds']:.0f} s)")
    done = sum(cell in records for cell in cells)
    return "\n".join([*lines, f"{done} of {len(cells)} cells are done"])


# ---------------------------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ToolError: A value is not allowed; the message names what is.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="work_dirs/label_efficiency", help="folder of the grid")
    parser.add_argument("--checkpoint", metavar="FILE", help="pretrained weights")
    parser.add_argument(
        "--unet", metavar="PRESET",
        help="architecture; default: what --checkpoint (.safetensors) tells, tiny without it",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), metavar="TASK",
        help=f"of {', '.join(TASKS)}; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--weights", nargs="+", default=["pretrained", "random"], metavar="WEIGHTS",
        help=f"of {', '.join(WEIGHTS)}; default: pretrained random",
    )  # fmt: skip
    parser.add_argument(
        "--labels", nargs="+", type=float, default=list(LABELS), metavar="SHARE",
        help="shares of the labels, above 0 and up to 1",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    for name, of in (("--tap", "pretrained"), ("--random-tap", "other")):
        parser.add_argument(
            name, nargs=2, type=int, metavar=("T", "B"),
            help=f"timestep and block of linear probe, kNN, attention and DifFeed with {of} "
            "weights; tools/sweep.py finds the best",
        )  # fmt: skip
    parser.add_argument(
        "--pool", type=int, metavar="N",
        help=f"linear probe and kNN pool the map to N x N; default: {Recipe.pool}",
    )  # fmt: skip
    for name, least, of in (("digits", _MIN_DIGITS, "one digit"), ("scenes", 1, "many digits")):
        parser.add_argument(
            f"--{name}", type=int, metavar="N",
            help=f"training scenes of {of}, at least {least}; default: {getattr(Recipe, name)}",
        )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="say which cells are done, run none")
    parser.add_argument(
        "--only-missing",
        action="store_true",
        help="leave done cells out of --list",
    )
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="begin no cell after")
    parser.add_argument(
        "--overwrite", action="store_true", help="throw away results of other settings"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda, for classification")
    args = parser.parse_args(argv)
    for name, allowed in (("tasks", TASKS), ("weights", WEIGHTS)):
        for value in getattr(args, name):
            if value not in allowed:
                raise ToolError(f"--{name} {value}: choose from {', '.join(allowed)}")
    for labels in args.labels:
        if not 0 < labels <= 1:
            raise ToolError(f"--labels {labels:g}: a share must lie above 0 and up to 1")
    for seed in args.seeds:
        if seed < 0:
            raise ToolError(f"--seeds {seed}: a seed must be at least 0")
    if args.pool is not None and not 1 <= args.pool <= Recipe.cache_pool:
        raise ToolError(f"--pool {args.pool}: must be from 1 to {Recipe.cache_pool}")
    for name, least in (("digits", _MIN_DIGITS), ("scenes", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ToolError(f"--{name} {value}: must be at least {least}")
    for name in ("tasks", "weights", "labels", "seeds"):
        common.check_different(args, name)
    if args.time_limit is not None and not args.time_limit > 0:
        raise ToolError(f"--time-limit {args.time_limit:g}: minutes must be above 0")
    return args


def run(args: argparse.Namespace, processes: Processes, recipe: Recipe | None = None) -> None:
    """Measure what is missing of the grid, or list it.

    Args:
        args: From :func:`parse`.
        processes: One.
        recipe: How much is done; None takes the usual.

    Raises:
        ToolError: It cannot be done as given, or cells failed.
        CheckpointError: Weights don't fit.
    """
    if processes.world_size > 1:
        raise ToolError("label_efficiency runs in one process")
    recipe = recipe or Recipe()
    for name in ("tap", "random_tap"):
        if getattr(args, name):
            recipe = dataclasses.replace(recipe, **{name: tuple(getattr(args, name))})
    for name in ("pool", "digits", "scenes"):
        if getattr(args, name):
            recipe = dataclasses.replace(recipe, **{name: getattr(args, name)})
    out, cells = Path(args.out), make_grid(args)
    if args.list:
        records = read_records(out / "results.jsonl")
        processes.say(list_cells(cells, records, args.only_missing))
        return
    source = args.checkpoint
    if source is None and (out / PRETRAINED).is_file():
        source = str(out / PRETRAINED)
    if source is None and "pretrained" in args.weights:
        raise ToolError(
            "--weights pretrained needs --checkpoint FILE; without one take --weights random"
        )
    if source is not None:
        _common.check_checkpoint(source)
    config = common.unet_config(args.unet or source or "tiny")
    settings = {
        "format": FORMAT,
        "checkpoint": None if source is None else checkpoint_digest(config, source),
        "unet": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "configs": config_digests(args.tasks, recipe),
    }
    with lock(out):
        ledger = Ledger(out, settings, args.overwrite)
        lab = Lab(out, config, source, recipe, processes)
        if ledger.replaced:
            lab.clear()
        common.write_json(out / "settings.json", ledger.settings)
        caption = lab.caption()

        def report() -> None:
            write_report(out, list(ledger.records.values()), caption)

        limit = None if args.time_limit is None else 60 * args.time_limit
        failed = run_grid(cells, ledger, lab.measure, report, processes.say, limit)
        report()
    processes.say(f"{out}: summary.md, results.csv, results.jsonl and a picture for each task")
    if failed:
        raise ToolError(f"{len(failed)} cells failed:\n  " + "\n  ".join(failed))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: It cannot be done as given; the message says why.
    """

    def guarded(args: argparse.Namespace, processes: Processes) -> None:
        try:
            run(args, processes)
        except UserError as error:
            raise ToolError(str(error)) from error

    common.run_tool(lambda: parse(argv), guarded)


if __name__ == "__main__":
    main()
