"""Time our backbone beside published code: how fast, how much memory?"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from diffbackbone import cli
from diffbackbone.benchmark import report
from diffbackbone.benchmark.references import CASES, Case, Measurements
from diffbackbone.benchmark.report import Dtype, Options
from diffbackbone.benchmark.worker import Worker, WorkerError
from diffbackbone.feedback import feedback_map
from diffbackbone.utils import UserError

OURS = "ours"
CHECKOUTS = {
    "guided-diffusion": ("openai/guided-diffusion", "guided_diffusion/unet.py"),
    "diffssl": ("soumik-kanad/diffssl", "ssl_diff/__init__.py"),
}
"""GitHub repository of each reference, and a file that its checkout holds."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.03}
"""Largest difference of outputs, relative to the largest value."""
GRADIENT_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.3, "float16": 0.1}
"""Likewise of gradients."""


@dataclasses.dataclass
class BenchmarkConfig(Options):
    """Time our backbone beside the code that others published.

    Every case and reference is a row. Both get the same weights, x_t and t. Outputs and gradients
    are compared first; a row where they differ is marked wrong and not timed. Then they take turns;
    the ratio is the median over the rounds of the reference's time by ours. Each has a process and
    a peak memory of its own, weights included: on a CPU the resident set beyond the loaded code, on
    a GPU what torch allocated. FLOP/s are set against square matrix products in the same run.

    Cases: b24 is block 24; taps are blocks 33, 30, 27 and 24; bottleneck and windowed are block 24
    after DifFeed's two passes. Modes: forward is inference; frozen (which trains feedback layers at
    most) and finetuned (the U-Net too) are a forward and a backward pass.

    In half precision references run in their own float16 on a GPU, also beside ours in bfloat16;
    on a CPU in bfloat16 under autocast.

    --suite gpu runs everything that a GPU is wanted for; see --suite gpu --help.
    """

    cases: tuple[Literal["b24", "taps", "bottleneck", "windowed"], ...] = tuple(CASES)
    """Every combination of cases, sizes, dtypes, modes and execution is measured."""
    sizes: tuple[int, ...] = (256,)
    """Height and width in pixels."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    modes: tuple[Literal["forward", "frozen", "finetuned"], ...] = ("forward",)
    execution: tuple[Literal["eager", "compiled"], ...] = ("eager",)
    batch: int = 1
    """Images in a batch."""
    reference_guided_diffusion: Path | None = None
    """Checkout of github.com/openai/guided-diffusion."""
    reference_diffssl: Path | None = None
    """Checkout of github.com/soumik-kanad/diffssl."""
    channels_last: bool = False
    """Ours in this memory format."""
    activation_checkpointing: bool = False
    """Ours recomputes blocks in the backward pass."""
    min_seconds: float = 0.2
    """A short step is repeated for this long in every round."""
    peak_seconds: float = 0.25
    """How long a matrix product may take when the machine's peak is measured."""
    cudnn_benchmark: bool = False
    """cuDNN tries its kernels."""
    out: Path = Path("work_dirs/benchmark")
    """Folder of the reports."""

    def references(self) -> dict[str, Path]:
        """Return the checkouts that are given.

        Raises:
            UserError: A folder is not that checkout.
        """
        found = {}
        for name, (repository, file) in CHECKOUTS.items():
            folder = getattr(self, f"reference_{name.replace('-', '_')}")
            if folder is None:
                continue
            if not (folder / file).is_file():
                source = f"git clone https://github.com/{repository}"
                raise UserError(f"--reference-{name} {folder}: there is no {file}; {source}")
            found[name] = folder.resolve()
        return found

    def plan(self) -> list[Case]:
        """Return the rows, small sizes first."""
        sizes, references = sorted(self.sizes), self.references() or (None,)
        options = (sizes, self.cases, self.dtypes, self.modes, self.execution, references)
        return [
            Case(case, size, self.batch, *rest)
            for size, case, *rest in itertools.product(*map(dict.fromkeys, options))
        ]


@dataclasses.dataclass
class Row:
    """What came out for a case; None where a number could not be had.

    Dicts have an entry for ``"ours"`` and one for the reference.
    """

    case: Case
    status: str = "ok"  # or "wrong", "out of memory", "timeout", "error", "skipped"
    message: str = ""
    difference: float | None = None  # of the outputs, relative to the reference's largest value
    gradient_difference: float | None = None
    ratio: float | None = None  # median over the rounds of the reference's seconds by ours
    ratio_range: tuple[float, float] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # median of all_seconds
    all_seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: dict[str, int] = dataclasses.field(default_factory=dict)  # of a step
    flops_per_second: dict[str, float] = dataclasses.field(default_factory=dict)
    matmul_share: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # of the peak that matrix products reach
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)  # computed in

    def fail(self, who: str, error: WorkerError) -> None:
        """Note what went wrong; the first error gives the status."""
        self.status = error.kind if self.status == "ok" else self.status
        self.message = "; ".join(filter(None, [self.message, f"{who}: {error}"]))

    def pair(self, values: Mapping[str, Any], form: Callable[[Any], str]) -> str:
        """Format our value and the reference's."""
        names = filter(None, (OURS, self.case.reference))
        return " / ".join(form(values[n]) if n in values else "-" for n in names if values)


class Bench:
    """Measures rows.

    Args:
        config: The options.
        folder: For weights and outputs.
    """

    def __init__(self, config: BenchmarkConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.references, self.unet = config.references(), config.check(config.sizes)
        self.peaks: dict[str, float] = {}  # FLOP/s of matrix products, by type
        try:
            for blocks, feedback in (CASES[name] for name in config.cases):
                self.unet.blocks.check(blocks)
                if feedback:
                    feedback_map(self.unet.blocks, feedback)
        except ValueError as error:
            raise UserError(f"--unet {config.unet} lacks blocks of the cases: {error}") from error

    def worker(self, name: str, timeout: float) -> Worker:
        """Start a process."""
        log = self.folder / f"{name}.log"
        return Worker(Measurements, log, timeout, self.config.threads)

    def prepare(self) -> dict[str, Any]:
        """Write the weights and measure the peaks; return the description of the run."""
        config, device = self.config, self.config.device
        dtypes = set(config.dtypes)
        if device == "cpu":
            dtypes.discard("float16")
        elif self.references:
            dtypes.add("float16")  # theirs
        with contextlib.closing(self.worker("prepare", config.timeout)) as worker:
            strategies = sorted({CASES[name][1] for name in config.cases} - {None})
            weights = {"unet": self.unet, "checkpoint": config.checkpoint, "folder": self.folder}
            worker.ask("prepare", strategies=strategies, **weights)
            for dtype in sorted(dtypes):
                options = {"device": device, "dtype": dtype, "seconds": config.peak_seconds}
                self.peaks[dtype] = worker.ask("matmul_peak", **options)
            machine = worker.ask("machine", device=device)
        return {**config.describe(machine), "matmul_peaks": self.peaks}

    def measure(self, case: Case, timeout: float | None = None) -> Row:
        """Measure one row within some seconds."""
        row, workers = Row(case), {}
        if self.config.device == "cpu" and case.dtype == "float16":
            return Row(case, "skipped", "float16 is for GPUs; on a CPU take bfloat16")
        if case.reference == "guided-diffusion" and CASES[case.case][1]:
            return Row(case, "skipped", "guided-diffusion has no feedback")
        try:
            self._measure(row, workers, timeout or self.config.timeout)
        finally:
            for worker in workers.values():
                worker.close()
        for who in row.flops.keys() & row.seconds.keys():
            row.flops_per_second[who] = row.flops[who] / row.seconds[who]
            if peak := self.peaks.get(row.dtypes[who].split()[0]):
                row.matmul_share[who] = row.flops_per_second[who] / peak
        return row

    def _measure(self, row: Row, workers: dict[str, Worker], timeout: float) -> None:
        case, config = row.case, self.config
        first: dict[str, float] = {}  # seconds, of those that have not failed

        @contextlib.contextmanager
        def noting(who: str) -> Iterator[None]:
            try:
                yield
            except WorkerError as error:
                row.fail(who, error)
                first.pop(who, None)
                workers[who].close()

        deadline = time.monotonic() + timeout
        for who in filter(None, (OURS, case.reference)):
            workers[who] = self.worker(who, deadline - time.monotonic())
            with noting(who):
                row.dtypes[who] = self._load(workers[who], who, case)
                row.peak_bytes[who], first[who] = workers[who].ask("first")
        if len(first) == 2:
            compare(row, self.folder)
        if row.status == "wrong" or case.reference == "cpu":
            return

        number: dict[str, int] = {}
        for who in list(first):
            with noting(who):
                for _ in range(config.warmup):
                    first[who] = workers[who].ask("time", number=1)
                number[who] = min(max(math.ceil(config.min_seconds / first[who]), 1), 1000)
        rounds: list[dict[str, float]] = []
        for index in range(config.repeats):
            seconds: dict[str, float] = {}
            for who in list(first)[:: -1 if index % 2 else 1]:
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
            with noting(who):
                row.flops[who] = workers[who].ask("flops")

    def _load(self, worker: Worker, who: str, case: Case) -> str:
        device = self.config.device
        if who == "cpu":
            case, device = dataclasses.replace(case, dtype="float32", execution="eager"), "cpu"
        return worker.ask(
            "load", name=who, case=case, unet=self.unet, folder=self.folder, device=device,
            checkout=self.references.get(who), options=self.config,
        )  # fmt: skip


def compare(row: Row, folder: Path) -> None:
    """Compare the outputs, and the gradients that both have; mark the row wrong if they differ.

    Args:
        row: Gets the differences.
        folder: Where the two workers wrote them.
    """

    def read(kind: str) -> list[Any]:
        names = (OURS, row.case.reference)
        return [torch.load(folder / f"{name}.{kind}.pt", mmap=True) for name in names]

    ours, theirs = read("outputs")
    shapes = [[tuple(x.shape) for x in maps] for maps in (ours, theirs)]
    if shapes[0] != shapes[1]:
        row.status, row.message = "wrong", f"outputs of shapes {shapes[0]} and {shapes[1]}"
        return
    row.difference = max(difference(a, b) for a, b in zip(ours, theirs))
    checks = [("outputs", row.difference, TOLERANCE[row.case.dtype])]
    ours, theirs = read("gradients")
    if common := ours.keys() & theirs.keys():
        row.gradient_difference = max(difference(ours[name], theirs[name]) for name in common)
        checks.append(("gradients", row.gradient_difference, GRADIENT_TOLERANCE[row.case.dtype]))
    for what, found, allowed in checks:
        if not found <= allowed:  # also NaN
            row.status = "wrong"
            row.message = f"{what} differ by {found:.1e} of the largest value, allowed {allowed:g}"


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value of the second."""
    ours, theirs = ours.float(), theirs.float()
    largest, found = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    return found / largest if largest else math.inf if found else 0.0


# --------------------------------------------------------------------------------------------------
# reports


def _ratio(row: Row) -> str:
    if row.ratio is None or row.ratio_range is None:
        return "" if row.status == "ok" else f"**{row.status}**"
    return "**{:.2f}** ({:.2f} to {:.2f})".format(row.ratio, *row.ratio_range)


def format_differences(row: Row) -> str:
    """Return the differences of outputs and gradients."""
    found = [row.difference, row.gradient_difference]
    return ", gradients ".join(f"{value:.1e}" for value in found if value is not None)


COLUMNS: dict[str, Callable[[Row], Any]] = {
    "case": lambda row: row.case.case,
    "px:": lambda row: row.case.size,
    "batch:": lambda row: row.case.batch,
    "type": lambda row: " / ".join(dict.fromkeys(row.dtypes.values())) or row.case.dtype,
    "mode": lambda row: row.case.mode,
    "execution": lambda row: row.case.execution,
    "against": lambda row: row.case.reference or "-",
    "ratio:": _ratio,
    "seconds:": lambda row: row.pair(row.seconds, "{:.4g}".format),
    "peak memory (GB):": lambda row: row.pair(row.peak_bytes, lambda x: f"{x / 1e9:.2f}"),
    "TFLOP:": lambda row: row.pair(row.flops, lambda x: f"{x / 1e12:.3g}"),
    "TFLOP/s:": lambda row: row.pair(row.flops_per_second, lambda x: f"{x / 1e12:.3g}"),
    "of matmul peak:": lambda row: row.pair(row.matmul_share, "{:.0%}".format),
    "difference:": format_differences,
    "note": lambda row: row.message,
}


def format_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the rows."""
    legend = (
        "Seconds are medians of a step; the ratio is the reference's time by ours (lowest to "
        "highest of the rounds). Where two numbers stand, the first is ours.\n\n"
    )
    return legend + report.table(COLUMNS, rows)


def chart(rows: Sequence[Row], device: str) -> Any:
    """Return a figure of the ratios, or of our seconds where there is no reference."""
    compared, bars = any(row.case.reference for row in rows), []
    for row in rows:
        value = row.ratio if compared else row.seconds.get(OURS)
        text = f"{value:.3g} {'x' if compared else 's'}" if value else row.status
        bars.append(([value or 0.0], text))
    title = f"{'time of the reference by ours' if compared else 'seconds a step'}, {device}"
    figure = report.draw([str(row.case) for row in rows], {title: bars})
    if compared:
        figure.axes[0].axvline(1.0, color="black", linewidth=0.8)
    return figure


def run(config: BenchmarkConfig) -> list[Row]:
    """Measure every row and write the reports."""
    cases = config.plan()
    with report.temporary_folder() as folder:
        bench = Bench(config, folder)
        if config.list:
            print("\n".join(map(str, cases)))
            return []
        machine, stem = bench.prepare(), config.out / "benchmark"
        return report.run_rows(stem, machine, cases, bench.measure, format_table, chart)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``--suite gpu`` is a command of its own, which needs no tyro."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if any(argument.partition("=")[0] == "--suite" for argument in argv):
        from diffbackbone.benchmark import gpu

        gpu.main(argv)
    else:
        cli.run_command(BenchmarkConfig, run, argv)
