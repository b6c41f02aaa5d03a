r"""Time our backbone side by side with the code that others published: how fast, how much memory?

For instance::

    python tools/benchmark.py --reference-guided-diffusion ../guided-diffusion \
        --reference-diffssl ../diffssl --cases b24 bottleneck windowed
    python tools/benchmark.py --device cuda --batch 32 --dtypes bfloat16 --modes forward finetuned
    python tools/benchmark.py --unet tiny --sizes 64 --list

Every case and reference is a row. Ours and the reference get the same weights and the same x_t and
t, and their outputs are compared first: a row whose outputs differ is marked wrong and not timed.
Then they take turns; the ratio is the median over the rounds of the reference's time by ours. Each
runs in a process of its own, so that its peak memory is its own: on a CPU the resident set over
what the loaded code takes, on a GPU what torch allocated. Weights count, loading them does not.

Cases: b24 is block 24; taps are the blocks 33, 30, 27 and 24; bottleneck and windowed are block 24
after DifFeed's two passes. Modes: forward is inference; frozen and finetuned are a forward and a
backward pass, of which the first trains feedback layers at most and the second the U-Net too.

On a GPU the references' half precision is their own float16, which stands against ours in bfloat16
as well; on a CPU they run in bfloat16 under autocast.

Floating-point operations are those carried out, a multiplication and an addition counted as two;
shares are of the most that plain matrix products and convolutions reach in the same run.

The folder --out gets benchmark.json, benchmark.md and benchmark.png, replaced after every row, so
that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffbackbone.benchmark import report as _benchmark
from diffbackbone.benchmark.report import DTYPES, WorkerError

OURS = "ours"
CASES: dict[str, tuple[tuple[int, ...], str | None]] = {
    "b24": ((24,), None),
    "taps": ((24, 27, 30, 33), None),
    "bottleneck": ((24,), "bottleneck"),
    "windowed": ((24,), "windowed"),
}
"""Blocks, 1-based, and feedback of each case."""
MODES = ("forward", "frozen", "finetuned")
EXECUTIONS = ("eager", "compiled")
REFERENCES = {
    "guided-diffusion": (
        "guided_diffusion/unet.py",
        "git clone https://github.com/openai/guided-diffusion",
    ),
    "diffssl": ("ssl_diff/__init__.py", "git clone https://github.com/soumik-kanad/diffssl"),
}
"""Each reference: a file that its checkout holds, and where to get it."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.03}
"""Largest difference of outputs, relative to the largest value."""
GRADIENT_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.3, "float16": 0.1}
"""Likewise of gradients."""
TIMESTEP = 90


class Worker(_benchmark.Worker):
    """A process that runs one implementation; see ``_benchmark_worker.Worker``."""

    script = Path(__file__).with_name("references.py")
    settings = ("threads", "cudnn_benchmark")


@dataclasses.dataclass(frozen=True)
class Case:
    """What a row measures.

    Attributes:
        case: A key of :data:`CASES`.
        size: Height and width in pixels.
        batch: Images.
        dtype: One of :data:`DTYPES`.
        mode: One of :data:`MODES`.
        execution: One of :data:`EXECUTIONS`.
        reference: A key of :data:`REFERENCES`, or None for ours alone.
    """

    case: str
    size: int
    batch: int
    dtype: str
    mode: str
    execution: str
    reference: str | None

    def __str__(self) -> str:
        against = f" vs {self.reference}" if self.reference else ""
        return (
            f"{self.case} {self.size} px x {self.batch} {self.dtype} {self.mode} "
            f"{self.execution}{against}"
        )


@dataclasses.dataclass
class Row:
    """What came out for a case; None where a number could not be had.

    Attributes:
        case: What was measured.
        status: ``"ok"``, ``"wrong"``, ``"out of memory"``, ``"error"`` or ``"skipped"``.
        message: What went wrong and where.
        difference: Largest difference of the outputs, relative to the reference's largest value.
        gradient_difference: Likewise of the gradients.
        ratio: Median over the rounds of the reference's seconds by ours.
        ratio_range: Lowest and highest of them.
        seconds: Median seconds a step, of ``"ours"`` and the reference.
        all_seconds: The same in every round.
        peak_bytes: Peak memory.
        flops: Floating-point operations a step.
        flops_per_second: By the median seconds.
        matmul_share: Of the peak that matrix products reach.
        convolution_share: Of the peak that convolutions reach.
        dtypes: In what type each computed.
    """

    case: Case
    status: str = "ok"
    message: str = ""
    difference: float | None = None
    gradient_difference: float | None = None
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    all_seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: dict[str, int] = dataclasses.field(default_factory=dict)
    flops_per_second: dict[str, float] = dataclasses.field(default_factory=dict)
    matmul_share: dict[str, float] = dataclasses.field(default_factory=dict)
    convolution_share: dict[str, float] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)

    def fail(self, who: str, error: WorkerError) -> None:
        """Note what went wrong with an implementation; the first one tells the status."""
        if self.status == "ok":
            self.status = error.kind
        self.message = "; ".join(filter(None, [self.message, f"{who}: {error}"]))


# --------------------------------------------------------------------------------------------------
# measuring


def measure(
    case: Case, args: argparse.Namespace, config: Any, folder: Path, peaks: Mapping[str, Any]
) -> Row:
    """Measure one row.

    Args:
        case: What to measure.
        args: The command line.
        config: The architecture.
        folder: Holds the weights; outputs go there too.
        peaks: FLOP/s by type, of ``"matmul"`` and ``"convolution"``.
    """
    row = Row(case)
    if reason := unavailable(case, args.device):
        row.status, row.message = "skipped", reason
        return row
    workers: dict[str, Worker] = {}
    try:
        _measure(row, workers, args, config, folder)
    finally:
        for worker in workers.values():
            worker.close()
    for who, flops in row.flops.items():
        if who not in row.seconds:
            continue
        row.flops_per_second[who] = flops / row.seconds[who]
        best = peaks.get(row.dtypes[who].split()[0], {})
        for share, kind in ((row.matmul_share, "matmul"), (row.convolution_share, "convolution")):
            if kind in best:
                share[who] = row.flops_per_second[who] / best[kind]
    return row


def unavailable(case: Case, device: str) -> str:
    """Why a case can't be measured; empty if it can."""
    if device == "cpu" and case.dtype == "float16":
        return "float16 is for GPUs; on a CPU take bfloat16"
    if case.reference == "guided-diffusion" and CASES[case.case][1]:
        return "guided-diffusion has no feedback"
    return ""


def _measure(
    row: Row,
    workers: dict[str, Worker],
    args: argparse.Namespace,
    config: Any,
    folder: Path,
) -> None:
    case = row.case
    blocks, feedback = CASES[case.case]
    job = {
        "config": dataclasses.asdict(config),
        "weights": str(folder / "weights.pt"),
        "feedback_weights": str(folder / "feedback.pt"),
        "blocks": blocks,
        "feedback": feedback,
        "t": TIMESTEP,
        "size": case.size,
        "batch": case.batch,
        "dtype": case.dtype,
        "mode": case.mode,
        "compiled": case.execution == "compiled",
        "device": args.device,
        "channels_last": args.channels_last,
        "activation_checkpointing": args.activation_checkpointing,
        "checkout": args.references.get(case.reference),
    }
    names = [OURS, *filter(None, [case.reference])]
    first: dict[str, float] = {}

    @contextlib.contextmanager
    def noting(who: str) -> Iterator[None]:
        """Note an error and go on with whoever is left."""
        try:
            yield
        except WorkerError as error:
            row.fail(who, error)
            first.pop(who, None)
            if who in workers:
                workers[who].close()

    for who in names:
        with noting(who):
            workers[who] = Worker(args, folder / f"{who}.log")
            loaded = workers[who].ask("load", job={**job, "implementation": who})
            row.dtypes[who] = loaded["dtype"]
            files = {kind: str(folder / f"{who}.{kind}.pt") for kind in ("outputs", "gradients")}
            result = workers[who].ask("first", **files)
            row.peak_bytes[who] = result["peak_bytes"]
            first[who] = result["seconds"]
    if len(first) == 2:
        compare(row, folder)
    if row.status == "wrong":
        return

    number: dict[str, int] = {}
    for who in list(first):
        with noting(who):
            for _ in range(args.warmup):
                first[who] = workers[who].ask("time", number=1)
            number[who] = min(max(math.ceil(args.min_seconds / first[who]), 1), 1000)
    rounds: list[dict[str, float]] = []
    for index in range(args.repeats):
        seconds: dict[str, float] = {}
        turn = list(first)
        for who in turn if index % 2 == 0 else turn[::-1]:
            with noting(who):
                seconds[who] = workers[who].ask("time", number=number[who])
        rounds.append(seconds)
    for who in first:
        row.all_seconds[who] = [seconds[who] for seconds in rounds]
        row.seconds[who] = statistics.median(row.all_seconds[who])
    if len(first) == 2:
        ratios = [seconds[case.reference] / seconds[OURS] for seconds in rounds]
        row.ratio, row.ratio_range = statistics.median(ratios), (min(ratios), max(ratios))
    for who in list(first):
        with contextlib.suppress(WorkerError):  # not countable
            row.flops[who] = workers[who].ask("flops")


def compare(row: Row, folder: Path) -> None:
    """Compare the outputs, and the gradients that both have.

    Args:
        row: Is marked wrong if they differ.
        folder: Where the two workers wrote them.
    """
    import torch

    def read(who: str | None, kind: str) -> Any:
        return torch.load(folder / f"{who}.{kind}.pt", mmap=True, weights_only=True)

    ours, theirs = (read(who, "outputs") for who in (OURS, row.case.reference))
    shapes = [[tuple(x.shape) for x in maps] for maps in (ours, theirs)]
    if shapes[0] != shapes[1]:
        row.status, row.message = "wrong", f"outputs of shapes {shapes[0]} and {shapes[1]}"
        return
    row.difference = max(difference(a, b) for a, b in zip(ours, theirs))
    checks = [("outputs", row.difference, TOLERANCE[row.case.dtype])]
    ours, theirs = (read(who, "gradients") for who in (OURS, row.case.reference))
    if common := ours.keys() & theirs.keys():
        row.gradient_difference = max(difference(ours[name], theirs[name]) for name in common)
        allowed = GRADIENT_TOLERANCE[row.case.dtype]
        checks.append(("gradients", row.gradient_difference, allowed))
    for what, found, allowed in checks:
        if not found <= allowed:  # NaN is wrong too
            row.status = "wrong"
            row.message = f"{what} differ by {found:.1e} of the largest value, allowed {allowed:g}"
            return


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the largest value of the second."""
    ours, theirs = ours.float(), theirs.float()
    largest = theirs.abs().max().item()
    found = (ours - theirs).abs().max().item()
    return found / largest if largest else math.inf if found else 0.0


# --------------------------------------------------------------------------------------------------
# reports


COLUMNS = {
    "case": "---", "px": "--:", "batch": "--:", "type": "---", "mode": "---", "execution": "---",
    "against": "---", "ratio": "--:", "seconds": "--:", "peak memory (GB)": "--:", "TFLOP": "--:",
    "FLOP/s": "--:", "of matmul peak": "--:", "of convolution peak": "--:", "difference": "--:",
    "note": "---",
}  # fmt: skip


def format_markdown(machine: Mapping[str, Any], rows: Sequence[Row], planned: int) -> str:
    """The machine and a table of the rows, in Markdown."""
    lines = [
        *_benchmark.heading("Benchmark", machine, rows, planned),
        "Seconds are medians of a step; the ratio is the reference's time by ours (lowest to "
        "highest of the rounds). Where two numbers stand, the first is ours.",
        "",
        *_benchmark.table(COLUMNS, [list(_cells(row)) for row in rows]),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> Iterator[str]:
    case, types = row.case, list(dict.fromkeys(row.dtypes.values()))

    def pair(values: Mapping[str, float], form: str, scale: float = 1.0) -> str:
        if not values:
            return ""
        names = [OURS, *filter(None, [case.reference])]
        return " / ".join(format(values[n] / scale, form) if n in values else "-" for n in names)

    yield case.case
    yield str(case.size)
    yield str(case.batch)
    yield " / ".join(types) or case.dtype
    yield case.mode
    yield case.execution
    yield case.reference or "-"
    if row.ratio is None or row.ratio_range is None:
        yield "" if row.status == "ok" else f"**{row.status}**"
    else:
        low, high = row.ratio_range
        yield f"**{row.ratio:.2f}** ({low:.2f} to {high:.2f})"
    yield pair(row.seconds, ".4g")
    yield pair(row.peak_bytes, ".2f", 1e9)
    yield pair(row.flops, ".3g", 1e12)
    yield " / ".join(
        _benchmark.si(row.flops_per_second[name]) if name in row.flops_per_second else "-"
        for name in ([OURS, *filter(None, [case.reference])] if row.flops_per_second else [])
    )
    yield pair(row.matmul_share, ".0%")
    yield pair(row.convolution_share, ".0%")
    found = [row.difference, row.gradient_difference]
    yield ", gradients ".join(f"{value:.1e}" for value in found if value is not None)
    yield _benchmark.plain(row.message)


def chart(machine: Mapping[str, Any], rows: Sequence[Row]) -> Any:
    """Bars of the ratios as a PIL image, or of our seconds where there is no reference.

    Returns:
        The image; None if neither matplotlib nor Pillow is installed.
    """
    compared = any(row.case.reference for row in rows)
    bars = []
    for row in rows:
        value = row.ratio if compared else row.seconds.get(OURS)
        text = row.status
        if value is not None:
            text = f"{value:.2f}x" if compared else f"{value:.3g} s"
        bars.append(([value or 0.0], text))
    title = "time of the reference by ours" if compared else "seconds a step"
    title += f", {machine.get('gpu', machine['cpu'])}"
    panel = _benchmark.Panel(title, bars, line=1.0 if compared else None)
    return _benchmark.draw([str(row.case) for row in rows], [panel])


def write_reports(out: Path, machine: Mapping[str, Any], rows: Sequence[Row], planned: int) -> None:
    """Write JSON, Markdown and the chart; each whole or not at all."""
    markdown, picture = format_markdown(machine, rows, planned), chart(machine, rows)
    _benchmark.write_reports(out / "benchmark", machine, rows, planned, markdown, picture)


# --------------------------------------------------------------------------------------------------
# command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = _benchmark.make_parser(__doc__)
    what = parser.add_argument_group("what to measure; every combination is measured")
    what.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    what.add_argument(
        "--sizes", nargs="+", type=_benchmark.positive, default=[256], help="px, such as 512"
    )
    what.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    what.add_argument("--modes", nargs="+", choices=MODES, default=["forward"])
    what.add_argument("--execution", nargs="+", choices=EXECUTIONS, default=["eager"])
    what.add_argument("--batch", type=_benchmark.positive, default=1, help="images in a batch")
    what.add_argument("--list", action="store_true", help="print the rows and measure nothing")
    model = _benchmark.add_model_options(parser)
    for name, (_, get) in REFERENCES.items():
        model.add_argument(f"--reference-{name}", metavar="DIR", help=f"checkout: {get}")
    model.add_argument("--channels-last", action="store_true", help="ours in this memory format")
    model.add_argument(
        "--activation-checkpointing", action="store_true",
        help="ours recomputes blocks in the backward pass",
    )  # fmt: skip
    how = _benchmark.add_measuring_options(parser, 5, "work_dirs/benchmark")
    how.add_argument(
        "--min-seconds", type=float, default=0.2,
        help="a short step is repeated for so long in every round",
    )  # fmt: skip
    how.add_argument(
        "--peak-seconds", type=float, default=0.25,
        help="the machine's peak: how long a product or convolution may take",
    )  # fmt: skip
    how.add_argument("--cudnn-benchmark", action="store_true", help="cuDNN tries its kernels out")
    seconds = ("min_seconds", "peak_seconds", "timeout")
    args = _benchmark.parse(parser, argv, "benchmark.py", seconds)
    args.references = {}
    for name, (file, get) in REFERENCES.items():
        folder = getattr(args, f"reference_{name.replace('-', '_')}")
        if folder is None:
            continue
        for needed in dict.fromkeys(("guided_diffusion/unet.py", file)):
            if not Path(folder, needed).is_file():
                parser.error(f"--reference-{name} {folder}: there is no {needed}; {get}")
        args.references[name] = str(Path(folder).resolve())
    return args


def find_config(args: argparse.Namespace) -> Any:
    """The architecture, without a label embedding; and check what depends on it.

    Raises:
        SystemExit: An option does not fit.
    """
    from diffbackbone.feedback import feedback_map
    from diffbackbone.unet import UNetConfig

    _benchmark.check_machine(args)
    try:
        config = UNetConfig.from_preset(args.unet).replace(num_classes=None)
        for name in args.cases:
            blocks, feedback = CASES[name]
            config.check_blocks(blocks, f"the blocks of the case {name}")
            if feedback:
                feedback_map(config, feedback)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    _benchmark.check_sizes(config, args.sizes)
    return config


def plan(args: argparse.Namespace) -> list[Case]:
    """The rows, small sizes first."""
    options = (args.cases, args.dtypes, args.modes, args.execution, args.references or (None,))
    unique: Iterable[Iterable[Any]] = (dict.fromkeys(option) for option in options)
    return [
        Case(case, size, args.batch, dtype, mode, execution, reference)
        for size, (case, dtype, mode, execution, reference) in itertools.product(
            sorted(set(args.sizes)), itertools.product(*unique)
        )
    ]


def find_machine(args: argparse.Namespace, config: Any, folder: Path) -> dict[str, Any]:
    """Write the weights, and measure the machine's peaks.

    Raises:
        SystemExit: The checkpoint does not fit, or the machine can't do this.
    """
    strategies = sorted({CASES[name][1] for name in args.cases} - {None})
    worker = Worker(args, folder / "prepare.log")
    try:
        worker.ask(
            "prepare",
            config=dataclasses.asdict(config),
            checkpoint=args.checkpoint,
            weights=str(folder / "weights.pt"),
            feedback=strategies,
            feedback_weights=str(folder / "feedback.pt"),
        )
        machine = worker.ask("machine", device=args.device)
        peaks = {}
        for dtype in dict.fromkeys(args.dtypes):
            if args.device == "cpu" and dtype == "float16":
                continue
            peaks[dtype] = worker.ask(
                "peaks", device=args.device, dtype=dtype, seconds=args.peak_seconds
            )
        if args.device == "cuda" and "bfloat16" in peaks and args.references:
            peaks.setdefault("float16", worker.ask(
                "peaks", device=args.device, dtype="float16", seconds=args.peak_seconds
            ))  # fmt: skip
    except WorkerError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        worker.close()
    return {**_benchmark.describe(args, machine), "peaks": peaks}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(argv)
    config = find_config(args)
    cases = plan(args)
    if args.list:
        print("\n".join(map(str, cases)))
        return
    machine, rows = _benchmark.run(
        args.out,
        cases,
        lambda folder: find_machine(args, config, folder),
        lambda case, folder, machine: measure(case, args, config, folder, machine["peaks"]),
        lambda machine, rows: write_reports(args.out, machine, rows, len(cases)),
    )
    print(format_markdown(machine, rows, len(cases)))
    print(f"written to {args.out}: benchmark.json, benchmark.md, benchmark.png")


if __name__ == "__main__":
    main()
