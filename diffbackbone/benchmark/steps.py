"""Time whole training steps of UperNet and Mask R-CNN on the diffusion backbone."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from diffbackbone import cli
from diffbackbone.benchmark import report
from diffbackbone.benchmark.report import Dtype, Options
from diffbackbone.benchmark.training import Case, Training
from diffbackbone.benchmark.worker import Worker, WorkerError

DEFAULTS = {"upernet": (512, 2), "mask_rcnn": (1024, 1)}
"""Size and batch of each model's configs."""
PARTS = ("U-Net forward", "U-Net backward", "optimizer", "the rest")


@dataclasses.dataclass
class StepsConfig(Options):
    """Time whole training steps of UperNet and Mask R-CNN on the diffusion backbone.

    A row is a step as the framework does it, with the model and optimizer of this project's
    configs: upernet_gd_t90_b33-30-27-24_ade20k.py, mask_rcnn_gd_t75_b24.yaml, or with feedback
    upernet_difffeed_ade20k.py, mask_rcnn_difffeed.yaml. The batch is synthetic and always the same:
    random pixels with label maps of patches, or with 8 objects an image. Heads start from random
    weights, so the mask head meets fewer objects than in a trained detector. Half precision is the
    frameworks' own and needs a GPU.

    A step has four parts. The U-Net's forward pass lasts from the noised images to the taps,
    DifFeed included. Its backward pass lasts from the first tap's gradient to the end, recomputed
    blocks included. The optimizer's step is timed by itself. The rest are heads, losses,
    projections and preprocessing. The share outside the U-Net is the optimizer and the rest.

    Peak memory is that of the timed steps, with weights and optimizer state: on a CPU the resident
    set beyond the loaded code, on a GPU what torch allocated.
    """

    models: tuple[Literal["upernet", "mask_rcnn"], ...] = ("upernet", "mask_rcnn")
    """Every combination of models, modes, feedback, sizes, dtypes and checkpointing is measured."""
    modes: tuple[Literal["frozen", "finetuned"], ...] = ("frozen", "finetuned")
    feedback: tuple[Literal["none", "bottleneck"], ...] = ("none", "bottleneck")
    sizes: tuple[int, ...] = ()
    """Height and width in pixels; 512 for upernet and 1024 for mask_rcnn if left out."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    activation_checkpointing: tuple[Literal["config", "on", "off"], ...] = ("config",)
    """Recompute the U-Net's blocks in the backward pass."""
    batch: int | None = None
    """Images a step; 2 for upernet and 1 for mask_rcnn if left out."""
    flops: bool = True
    """Count operations, in one step more."""
    head_channels: int | None = None
    """Width of the heads; the config's if left out."""
    repeats: int = 3
    """Rounds."""
    out: Path = Path("work_dirs/benchmark_steps")
    """Folder of the reports."""

    def plan(self) -> list[Case]:
        """Return the rows, model by model, small sizes first."""
        options = (self.modes, self.feedback, self.dtypes, self.activation_checkpointing)
        rest = list(itertools.product(*map(dict.fromkeys, options)))
        return [
            Case(model, mode, feedback, size, self.batch or DEFAULTS[model][1], dtype, recompute)
            for model in dict.fromkeys(self.models)
            for size in sorted(set(self.sizes or DEFAULTS[model][:1]))
            for mode, feedback, dtype, recompute in rest
        ]


@dataclasses.dataclass
class Row:
    """What came out for a case; None where a number could not be had."""

    case: Case
    status: str = "ok"  # or "out of memory", "timeout", "error", "skipped"
    message: str = ""
    # medians of the whole "step", and of the U-Net's "forward" and "backward" pass and the
    # "optimizer" in it
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    all_seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    outside_share: float | None = None  # median share of a step that is spent outside the U-Net
    peak_bytes: int | None = None
    reserved_bytes: int | None = None  # by torch on a GPU
    flops: int | None = None  # of a step
    parameters: int | None = None
    trained: int | None = None  # those of them that are trained
    recomputes: bool | None = None  # whether the U-Net recomputes blocks in the backward pass

    @property
    def parts(self) -> list[float]:
        """Median seconds of :data:`PARTS`, which add up to the step; empty if it was not timed."""
        if not self.seconds:
            return []
        parts = [self.seconds[what] for what in ("forward", "backward", "optimizer")]
        return [*parts, max(self.seconds["step"] - sum(parts), 0.0)]


def measure(case: Case, config: StepsConfig, folder: Path, timeout: float | None = None) -> Row:
    """Measure one row within some seconds; ``folder`` gets what the process prints."""
    row = Row(case)
    if config.device == "cpu" and case.dtype != "float32":
        text = f"{case.dtype}: the frameworks' mixed precision needs a GPU"
        return Row(case, "skipped", text)
    worker = Worker(Training, folder / "steps.log", timeout or config.timeout, config.threads)
    with contextlib.closing(worker):
        try:
            _measure(row, worker, config)
        except WorkerError as error:
            row.status, row.message = error.kind, str(error)
    return row


def _measure(row: Row, worker: Worker, config: StepsConfig) -> None:
    loaded = worker.ask(
        "load",
        case=row.case,
        device=config.device,
        unet=config.unet,
        checkpoint=config.checkpoint,
        head_channels=config.head_channels,
    )
    row.parameters, row.trained, row.recomputes = loaded
    if config.flops:
        row.flops = worker.ask("first")
    for _ in range(config.warmup):
        worker.ask("time")
    rounds = [worker.ask("time") for _ in range(config.repeats)]
    row.all_seconds = {what: [seconds[what] for seconds in rounds] for what in rounds[0]}
    row.seconds = {what: statistics.median(every) for what, every in row.all_seconds.items()}
    row.outside_share = statistics.median(
        1 - (seconds["forward"] + seconds["backward"]) / seconds["step"] for seconds in rounds
    )
    row.peak_bytes, row.reserved_bytes = worker.ask("peak")


# --------------------------------------------------------------------------------------------------
# reports


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = getattr(row, name)
        return "" if value is None else format(value / scale, form)

    return cell


COLUMNS: dict[str, Callable[[Row], Any]] = {
    "model": lambda row: row.case.model,
    "U-Net": lambda row: row.case.mode,
    "feedback": lambda row: row.case.feedback,
    "px:": lambda row: row.case.size,
    "batch:": lambda row: row.case.batch,
    "type": lambda row: row.case.dtype,
    "checkpointing": lambda row: {
        None: row.case.activation_checkpointing,
        True: "on",
        False: "off",
    }[row.recomputes],
    "s a step:": lambda row: (
        f"**{row.seconds['step']:.4g}**" if row.seconds else f"**{row.status}**"
    ),
    **{
        f"{name}:": lambda row, index=index: f"{row.parts[index]:.3g}" if row.parts else ""
        for index, name in enumerate(PARTS)
    },
    "outside the U-Net:": _number("outside_share", ".0%"),
    "peak memory (GB):": _number("peak_bytes", ".2f", 1e9),
    "reserved (GB):": _number("reserved_bytes", ".2f", 1e9),
    "TFLOP:": _number("flops", ".3g", 1e12),
    "parameters (M):": _number("parameters", ".1f", 1e6),
    "trained (M):": _number("trained", ".1f", 1e6),
    "note": lambda row: row.message,
}


def format_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the rows."""
    return "Seconds are medians of the rounds.\n\n" + report.table(COLUMNS, rows)


def chart(rows: Sequence[Row], device: str) -> Any:
    """Return a figure of a step's seconds as stacked bars, and of the memory beside them."""
    seconds, memory = [], []
    for row in rows:
        text = row.status
        if row.outside_share is not None:
            text = f"{row.seconds['step']:.3g} s, {row.outside_share:.0%} outside"
        seconds.append((row.parts, text))
        gigabytes = (row.peak_bytes or 0) / 1e9
        memory.append(([gigabytes], f"{gigabytes:.2f}" if gigabytes else ""))
    title = f"seconds a step, and the share outside the U-Net, {device}"
    panels = {title: seconds, "peak memory (GB)": memory}
    return report.draw([str(row.case) for row in rows], panels, PARTS)


def run(config: StepsConfig) -> list[Row]:
    """Measure every row and write the reports."""
    config.check(config.sizes)
    cases, stem = config.plan(), config.out / "steps"
    if config.list:
        print("\n".join(map(str, cases)))
        return []
    with report.temporary_folder() as folder:
        log = folder / "machine.log"
        with contextlib.closing(Worker(Training, log, config.timeout, config.threads)) as worker:
            machine = config.describe(worker.ask("machine", device=config.device))

        def measure_case(case: Case) -> Row:
            return measure(case, config, folder)

        return report.run_rows(stem, machine, cases, measure_case, format_table, chart)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    cli.run_command(StepsConfig, run, argv)
