r"""Time whole training steps: UperNet and Mask R-CNN on the diffusion backbone, how fast, how big?

For instance::

    python tools/benchmark_steps.py --models upernet --modes frozen --threads 8
    python tools/benchmark_steps.py --unet tiny --sizes 64 --head-channels 32 --repeats 1

All rows on one GPU::

    python tools/benchmark_steps.py --device cuda --dtypes float32 bfloat16 --repeats 10 \
        --activation-checkpointing on off --checkpoint 256x256_diffusion_uncond.pt

A row is a step as the framework does it: the model and the optimizer of this project's config,
forward, backward, the optimizer's step. Batches are synthetic, always the same and there from the
start: pixels at random, with label maps of patches, or with 8 objects an image that have boxes and
masks. Weights are random where no checkpoint is given; heads always start from random ones, and
their proposals meet fewer objects than a trained detector's, so its mask head has less to do.

Models: upernet is upernet_gd_t90_b33-30-27-24_ade20k.py or upernet_difffeed_ade20k.py, a batch of 2
at 512 px; mask_rcnn is mask_rcnn_gd_t75_b24.yaml or mask_rcnn_difffeed.yaml, an image of 1024 px.
Feedback tells which: none is plain, bottleneck is DifFeed. A frozen U-Net is not trained, though
DifFeed's layers send gradients through its second pass; without DifFeed it has no backward pass.

A step's time is split in four. The U-Net's forward pass lasts from the noised images to its taps,
DifFeed's layers and both its passes included. Its backward pass lasts from the first tap whose
gradient is there to the end of the backward pass: autograd runs last what ran first, so that all
heads and projections are through by then. What activation checkpointing recomputes falls into it.
The optimizer's step is timed by itself; heads, losses, projections and preprocessing are the rest.
The share outside the U-Net is that of the optimizer and the rest. On a GPU the parts are timed by
events on its stream, which do not hold it up.

Peak memory is that of the timed steps, with the weights and the optimizer's state, in a process of
its own: on a CPU the resident set over what the loaded code takes, on a GPU what torch allocated,
and what it reserved for that. Operations are counted in the first step, which is not timed
(``--no-flops`` leaves it out).

Half precision is what the frameworks have: MMEngine's AmpOptimWrapper and Detectron2's AMPTrainer,
both for GPUs alone.

The folder --out gets steps.json, steps.md and steps.png, replaced after every row, so that an
interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffbackbone.benchmark import report as _benchmark
from diffbackbone.benchmark.report import DTYPES, WorkerError


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of which there are configs.

    Attributes:
        stack: What it needs: the name of a check in ``diffbackbone.compat``.
        configs: By feedback.
        size: Height and width of its images in training, in pixels.
        batch: Images a step.
    """

    stack: str
    configs: Mapping[str, str]
    size: int
    batch: int


MODELS = {
    "upernet": Model(
        "check_mmseg_stack",
        {
            "none": "upernet_gd_t90_b33-30-27-24_ade20k.py",
            "bottleneck": "upernet_difffeed_ade20k.py",
        },
        512,
        2,
    ),
    "mask_rcnn": Model(
        "check_detectron2_stack",
        {"none": "mask_rcnn_gd_t75_b24.yaml", "bottleneck": "mask_rcnn_difffeed.yaml"},
        1024,
        1,
    ),
}
MODES = ("frozen", "finetuned")
FEEDBACK = ("none", "bottleneck")
CHECKPOINTING = ("config", "on", "off")
PARTS = ("U-Net forward", "U-Net backward", "optimizer", "the rest")


class Worker(_benchmark.Worker):
    """A process that trains one model; see ``_benchmark_steps_worker.StepsWorker``."""

    script = Path(__file__).with_name("training.py")


@dataclasses.dataclass(frozen=True)
class Case:
    """What a row measures.

    Attributes:
        model: A key of :data:`MODELS`.
        mode: One of :data:`MODES`.
        feedback: One of :data:`FEEDBACK`.
        size: Height and width in pixels.
        batch: Images.
        dtype: One of :data:`_benchmark.DTYPES`.
        activation_checkpointing: One of :data:`CHECKPOINTING`.
    """

    model: str
    mode: str
    feedback: str
    size: int
    batch: int
    dtype: str
    activation_checkpointing: str

    def __str__(self) -> str:
        feedback = "" if self.feedback == "none" else f" {self.feedback}"
        recompute = self.activation_checkpointing
        recompute = "" if recompute == "config" else f" checkpointing {recompute}"
        return (
            f"{self.model} {self.mode}{feedback} {self.size} px x {self.batch} "
            f"{self.dtype}{recompute}"
        )


@dataclasses.dataclass
class Row:
    """What came out for a case; None where a number could not be had.

    Attributes:
        case: What was measured.
        status: ``"ok"``, ``"out of memory"``, ``"error"`` or ``"skipped"``.
        message: What went wrong.
        seconds: Median seconds of the whole ``"step"``, and of the U-Net's ``"forward"`` and
            ``"backward"`` pass and the ``"optimizer"`` in it.
        all_seconds: The same in every round.
        outside_share: Median share of a step that is spent outside the U-Net.
        peak_bytes: Peak memory.
        reserved_bytes: What torch reserved on a GPU.
        flops: Floating-point operations a step.
        parameters: Of the whole model.
        trained: Those of them that are trained.
        recomputes: Whether the U-Net recomputes its blocks in the backward pass.
    """

    case: Case
    status: str = "ok"
    message: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    all_seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    outside_share: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    flops: int | None = None
    parameters: int | None = None
    trained: int | None = None
    recomputes: bool | None = None

    @property
    def parts(self) -> list[float]:
        """Median seconds of :data:`PARTS`, which add up to the step; empty if it was not timed."""
        if not self.seconds:
            return []
        parts = [self.seconds[what] for what in ("forward", "backward", "optimizer")]
        return [*parts, max(self.seconds["step"] - sum(parts), 0.0)]


# --------------------------------------------------------------------------------------------------
# measuring


def measure(case: Case, args: argparse.Namespace, folder: Path) -> Row:
    """Measure one row.

    Args:
        case: What to measure.
        args: The command line.
        folder: For what the process prints.
    """
    row = Row(case)
    if reason := unavailable(case, args.device):
        row.status, row.message = "skipped", reason
        return row
    worker = Worker(args, folder / "steps.log")
    try:
        _measure(row, worker, args)
    except WorkerError as error:
        row.status, row.message = error.kind, str(error)
    finally:
        worker.close()
    return row


def unavailable(case: Case, device: str) -> str:
    """Why a case can't be measured; empty if it can."""
    from diffbackbone import compat

    try:
        getattr(compat, MODELS[case.model].stack)()
    except ImportError as error:
        return str(error)
    if device == "cpu" and case.dtype != "float32":
        return f"{case.dtype}: the frameworks' mixed precision needs a GPU"
    return ""


def _measure(row: Row, worker: Worker, args: argparse.Namespace) -> None:
    case = row.case
    job = {
        **dataclasses.asdict(case),
        "config": MODELS[case.model].configs[case.feedback],
        "unet": args.unet,
        "checkpoint": args.checkpoint,
        "head_channels": args.head_channels,
        "device": args.device,
    }
    loaded = worker.ask("load", job=job)
    row.parameters, row.trained = loaded["parameters"], loaded["trained"]
    row.recomputes = loaded["activation_checkpointing"]
    if not args.no_flops:
        row.flops = worker.ask("first")
    for _ in range(args.warmup):
        worker.ask("time", number=1)
    rounds = [worker.ask("time", number=1) for _ in range(args.repeats)]
    row.all_seconds = {what: [seconds[what] for seconds in rounds] for what in rounds[0]}
    row.seconds = {what: statistics.median(every) for what, every in row.all_seconds.items()}
    row.outside_share = statistics.median(
        1 - (seconds["forward"] + seconds["backward"]) / seconds["step"] for seconds in rounds
    )
    peak = worker.ask("peak")
    row.peak_bytes, row.reserved_bytes = peak["peak_bytes"], peak.get("reserved_bytes")


# --------------------------------------------------------------------------------------------------
# reports

COLUMNS = {
    "model": "---", "U-Net": "---", "feedback": "---", "px": "--:", "batch": "--:", "type": "---",
    "checkpointing": "---", "s a step": "--:", **dict.fromkeys(PARTS, "--:"),
    "outside the U-Net": "--:", "peak memory (GB)": "--:", "reserved (GB)": "--:", "TFLOP": "--:",
    "parameters (M)": "--:", "trained (M)": "--:", "note": "---",
}  # fmt: skip


def format_markdown(machine: Mapping[str, Any], rows: Sequence[Row], planned: int) -> str:
    """The machine and a table of the rows, in Markdown."""
    lines = [
        *_benchmark.heading("Training steps", machine, rows, planned),
        "Seconds are medians of the rounds; the parts of a step are explained by "
        "`tools/benchmark_steps.py --help`.",
        "",
        *_benchmark.table(COLUMNS, [list(_cells(row)) for row in rows]),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> Iterator[str]:
    case = row.case

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value / scale, form)

    recompute = case.activation_checkpointing
    if row.recomputes is not None:
        recompute = "on" if row.recomputes else "off"
    yield from (case.model, case.mode, case.feedback, str(case.size), str(case.batch), case.dtype)
    yield recompute
    yield f"**{row.seconds['step']:.4g}**" if row.status == "ok" else f"**{row.status}**"
    yield from (f"{part:.3g}" for part in row.parts or [])
    yield from [""] * (0 if row.parts else len(PARTS))
    yield number(row.outside_share, ".0%")
    yield number(row.peak_bytes, ".2f", 1e9)
    yield number(row.reserved_bytes, ".2f", 1e9)
    yield number(row.flops, ".3g", 1e12)
    yield number(row.parameters, ".1f", 1e6)
    yield number(row.trained, ".1f", 1e6)
    yield _benchmark.plain(row.message)


def chart(machine: Mapping[str, Any], rows: Sequence[Row]) -> Any:
    """Stacked bars of a step's seconds, and of the memory beside them, as a PIL image.

    Returns:
        The image; None if neither matplotlib nor Pillow is installed.
    """
    seconds, memory = [], []
    for row in rows:
        text = row.status
        if row.outside_share is not None:
            text = f"{row.seconds['step']:.3g} s, {row.outside_share:.0%} outside"
        seconds.append((row.parts, text))
        gigabytes = [] if row.peak_bytes is None else [row.peak_bytes / 1e9]
        memory.append((gigabytes, "".join(f"{value:.2f}" for value in gigabytes)))
    title = f"seconds a step, and what of it is outside the U-Net, {machine.get('gpu', 'CPU')}"
    panels = [
        _benchmark.Panel(title, seconds, PARTS),
        _benchmark.Panel("peak memory (GB)", memory),
    ]
    return _benchmark.draw([str(row.case) for row in rows], panels)


def write_reports(out: Path, machine: Mapping[str, Any], rows: Sequence[Row], planned: int) -> None:
    """Write JSON, Markdown and the chart; each whole or not at all."""
    markdown, picture = format_markdown(machine, rows, planned), chart(machine, rows)
    _benchmark.write_reports(out / "steps", machine, rows, planned, markdown, picture)


# --------------------------------------------------------------------------------------------------
# command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = _benchmark.make_parser(__doc__)
    what = parser.add_argument_group("what to measure; every combination is measured")
    what.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    what.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    what.add_argument("--feedback", nargs="+", choices=FEEDBACK, default=list(FEEDBACK))
    what.add_argument(
        "--sizes", nargs="+", type=_benchmark.positive,
        help="px; 512 for upernet and 1024 for mask_rcnn if left out",
    )  # fmt: skip
    what.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    what.add_argument(
        "--activation-checkpointing", nargs="+", choices=CHECKPOINTING, default=["config"],
        help="whether the U-Net recomputes blocks in the backward pass; what the config says if "
        "left out",
    )  # fmt: skip
    what.add_argument(
        "--batch", type=_benchmark.positive,
        help="images a step; 2 for upernet and 1 for mask_rcnn if left out",
    )  # fmt: skip
    what.add_argument(
        "--no-flops", action="store_true",
        help="leave out the step that operations are counted in, which takes as long as another",
    )  # fmt: skip
    what.add_argument("--list", action="store_true", help="print the rows and measure nothing")
    model = _benchmark.add_model_options(parser)
    model.add_argument(
        "--head-channels", type=_benchmark.positive, help="width of the heads; the config's if "
        "left out",
    )  # fmt: skip
    _benchmark.add_measuring_options(parser, 3, "work_dirs/benchmark_steps")
    return _benchmark.parse(parser, argv, "benchmark_steps.py")


def check(args: argparse.Namespace) -> None:
    """Check what depends on the U-Net and on the machine.

    Raises:
        SystemExit: An option does not fit.
    """
    from diffbackbone.unet import UNetConfig

    _benchmark.check_machine(args)
    try:
        config = UNetConfig.from_preset(args.unet)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    _benchmark.check_sizes(config, args.sizes or ())


def plan(args: argparse.Namespace) -> list[Case]:
    """The rows, model by model and small sizes first."""
    options = (args.modes, args.feedback, args.dtypes, args.activation_checkpointing)
    unique: Iterable[Iterable[Any]] = (dict.fromkeys(option) for option in options)
    rest = list(itertools.product(*unique))
    return [
        Case(name, mode, feedback, size, args.batch or MODELS[name].batch, dtype, recompute)
        for name in dict.fromkeys(args.models)
        for size in sorted(set(args.sizes or [MODELS[name].size]))
        for mode, feedback, dtype, recompute in rest
    ]


def find_machine(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is measured on.

    Raises:
        SystemExit: The machine can't do this.
    """
    worker = Worker(args, folder / "machine.log")
    try:
        return _benchmark.describe(args, worker.ask("machine", device=args.device))
    except WorkerError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        worker.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(argv)
    check(args)
    cases = plan(args)
    if args.list:
        print("\n".join(map(str, cases)))
        return
    machine, rows = _benchmark.run(
        args.out,
        cases,
        lambda folder: find_machine(args, folder),
        lambda case, folder, _: measure(case, args, folder),
        lambda machine, rows: write_reports(args.out, machine, rows, len(cases)),
    )
    print(format_markdown(machine, rows, len(cases)))
    print(f"written to {args.out}: steps.json, steps.md, steps.png")


if __name__ == "__main__":
    main()
