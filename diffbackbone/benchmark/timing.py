"""Time our backbone beside published code, and whole training steps: `tools/benchmark.py`."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffbackbone import cli
from diffbackbone.benchmark import references, report
from diffbackbone.benchmark.config import PASSES, BenchmarkConfig, Case
from diffbackbone.benchmark.report import OURS, Row
from diffbackbone.benchmark.worker import Worker, WorkerError

TOLERANCES = {
    "outputs": {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.03},
    "gradients": {"float32": 1e-2, "bfloat16": 0.3, "float16": 0.1},
}
"""Largest difference, relative to the largest value."""
RETRIED = ("error", "skipped", "timeout")


def measure(case: Case, config: BenchmarkConfig, folder: Path, timeout: float) -> Row:
    """Measure one row.

    Args:
        case: What is measured.
        config: The options.
        folder: For weights, outputs and logs.
        timeout: Seconds that it may take.
    """
    deadline = time.monotonic() + timeout
    if case.name in PASSES and not (folder / "weights.pt").exists():
        references.write_weights(config, folder)
    row = Row(case)
    workers: dict[str, Worker] = {}
    errors: list[WorkerError] = []
    with contextlib.ExitStack() as stack:
        for who in filter(None, (OURS, case.reference)):
            worker = Worker(who, folder / f"{who}.log", deadline - time.monotonic())
            stack.enter_context(worker)
            try:
                row.results[who] = worker.ask("load", who, case, config, folder)
                workers[who] = worker
            except WorkerError as error:  # the other is still timed
                errors.append(error)
        if case.reference and not errors:
            compare(row, folder)
        if row.status != "wrong" and case.reference != "cpu":
            try:
                take_turns(row, workers, config.repeats)
            except WorkerError as error:
                errors.append(error)
    if errors:
        row.status, row.message = errors[0].kind, "; ".join(map(str, errors))
    return row


def take_turns(row: Row, workers: Mapping[str, Worker], repeats: int) -> None:
    """Time the implementations in turn, and note the results."""
    rounds = []
    for index in range(repeats):
        order = list(workers)[:: -1 if index % 2 else 1]
        rounds.append({who: workers[who].ask("time") for who in order})
    for who, worker in workers.items():
        own = [seconds[who] for seconds in rounds]
        medians = {part: statistics.median(seconds[part] for seconds in own) for part in own[0]}
        row.results[who] |= {"rounds": own, "seconds": medians, "peak_bytes": worker.ask("peak")}
    if len(workers) == 2:
        ratios = [seconds[row.case.reference]["step"] / seconds[OURS]["step"] for seconds in rounds]
        row.ratio, row.range = statistics.median(ratios), (min(ratios), max(ratios))


def compare(row: Row, folder: Path) -> None:
    """Compare outputs, and the gradients that both have; mark the row wrong if they differ.

    Args:
        row: Gets the differences.
        folder: Where the two workers wrote them.
    """
    ours, theirs = (torch.load(folder / f"{who}.pt") for who in (OURS, row.case.reference))
    row.outputs = difference(ours["outputs"], theirs["outputs"])
    if common := ours["gradients"].keys() & theirs["gradients"].keys():
        row.gradients = difference(
            *([written["gradients"][name] for name in common] for written in (ours, theirs))
        )
    for kind, tolerances in TOLERANCES.items():
        found, allowed = getattr(row, kind), tolerances[row.case.dtype]
        if found is not None and not found <= allowed:  # also NaN
            row.status = "wrong"
            row.message = f"{kind} differ by {found:.1e} of the largest value, allowed {allowed:g}"
            return


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the largest difference of tensors, relative to the largest value of the second."""
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return math.inf
    pairs = [(x.float(), y.float()) for x, y in zip(ours, theirs)]
    return torch.stack([(x - y).abs().max() / y.abs().max() for x, y in pairs]).max().item()


def run(
    config: BenchmarkConfig,
    stem: Path,
    parts: Mapping[str, Sequence[Case]],
    rows: dict[Case, Row] | None = None,
    chosen: Sequence[str] | None = None,
    minutes: float = math.inf,
) -> dict[Case, Row]:
    """Measure cases, and write the reports after each.

    Args:
        config: The options.
        stem: Path of the reports, without suffix.
        parts: Cases, by the heading of their table.
        rows: Those of earlier runs; they are kept, and tried again after the others if they failed.
        chosen: Headings of the parts to measure; None takes all.
        minutes: Time limit of each part.

    Returns:
        All rows.
    """
    machine, rows = report.describe(config), dict(rows or {})
    with tempfile.TemporaryDirectory(prefix="diffbackbone-benchmark-") as folder:
        for part in parts if chosen is None else chosen:
            deadline = time.monotonic() + 60 * minutes
            todo = [x for x in parts[part] if x not in rows or rows[x].status in RETRIED]
            for number, case in enumerate(sorted(todo, key=rows.__contains__), 1):
                left = min(deadline - time.monotonic(), config.timeout)
                if left <= 0:
                    break
                print(f"{number}/{len(todo)} {case}: ", end="", flush=True)
                row = measure(case, config, Path(folder), left)
                print(row.status, row.message, flush=True)
                if row.status == "timeout" and left < config.timeout and number > 1:
                    break  # the next run has more time for it
                rows[case] = row
                report.write_reports(stem, machine, parts, rows)
    print(f"written: {stem}.json and .md")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``--suite gpu`` is a command of its own, which needs no tyro."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # removes temporary files
    argv = sys.argv[1:] if argv is None else list(argv)
    if any(argument.partition("=")[0] == "--suite" for argument in argv):
        from diffbackbone.benchmark import gpu

        gpu.main(argv)
        return

    def start(config: BenchmarkConfig) -> None:
        rows = run(config, config.out / "benchmark", {"Seconds and memory": config.plan()})
        print(report.format_table(list(rows.values())))

    cli.run_command(BenchmarkConfig, start, argv)
