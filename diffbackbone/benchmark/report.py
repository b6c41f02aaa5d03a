"""What benchmark.py and benchmark_steps.py share: worker processes, rows, reports and charts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from diffbackbone.utils import atomic_write, write_text

DTYPES = ("float32", "bfloat16", "float16")
COLORS = ("#3b6fb6", "#9dbce0", "#8a8a8a", "#e0a03c")
"""Of the parts of a bar."""

CaseType = TypeVar("CaseType")
RowType = TypeVar("RowType")


class WorkerError(Exception):
    """A worker could not do what it was asked for.

    Args:
        kind: ``"out of memory"``, ``"error"`` or ``"skipped"``.
        message: What happened.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """A process that answers commands.

    Args:
        args: The command line.
        log: File for what it prints.
    """

    script: ClassVar[Path]
    """What it runs."""
    settings: ClassVar[Sequence[str]] = ("threads",)
    """Options of the command line that it is told first."""

    def __init__(self, args: argparse.Namespace, log: Path) -> None:
        environment = dict(os.environ)
        if args.threads:
            environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(args.threads)
        self.log = log
        self.timeout = args.timeout
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(self.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
                start_new_session=True,  # an interruption is this process's to handle
            )
        with contextlib.suppress(BrokenPipeError):
            self._send({name: getattr(args, name) for name in self.settings})

    def _send(self, message: Mapping[str, Any]) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command: a method of the ``Worker`` in :attr:`script`.

        Raises:
            WorkerError: It failed, or the process ended or took too long.
        """
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(self.timeout, stop)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self._send({"command": command, **arguments})
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise WorkerError("error", f"{command} took more than {self.timeout:g} s")
        if not line:
            raise self._death(command)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], answer["message"])
        return answer["result"]

    def _death(self, command: str) -> WorkerError:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            what = "was killed (signal 9), as systems do when memory runs out"
            return WorkerError("out of memory", f"the process {what}, in {command!r}")
        lines = self.log.read_text(errors="replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return WorkerError("error", f"the process ended ({how}) in {command!r}{last}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


# --------------------------------------------------------------------------------------------------
# rows


def run(
    out: Path,
    cases: Sequence[CaseType],
    find_machine: Callable[[Path], dict[str, Any]],
    measure: Callable[[CaseType, Path, dict[str, Any]], RowType],
    write: Callable[[dict[str, Any], Sequence[RowType]], None],
) -> tuple[dict[str, Any], list[RowType]]:
    """Measure row after row, and write the reports after each.

    Args:
        out: Folder of the reports.
        cases: What to measure.
        find_machine: Is given a folder for temporary files; says what is measured on.
        measure: Is given a case, the folder and the machine; gives the row.
        write: Writes the reports of the machine and the rows so far.

    Returns:
        The machine and the rows.

    Raises:
        SystemExit: tqdm is missing, or the run was interrupted.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error}; pip install tqdm") from error
    if threading.current_thread() is threading.main_thread():  # leave no processes or weights
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rows: list[RowType] = []
    with tempfile.TemporaryDirectory(prefix="diffbackbone-benchmark-") as folder:
        try:
            machine = find_machine(Path(folder))
            with tqdm(cases, unit="row", file=sys.stderr) as bar:
                for case in bar:
                    bar.set_postfix_str(str(case))
                    rows.append(measure(case, Path(folder), machine))
                    write(machine, rows)
        except KeyboardInterrupt:
            kept = f"; {out} holds {len(rows)} of {len(cases)} rows" if rows else ""
            print(f"interrupted{kept}", file=sys.stderr)
            raise SystemExit(130) from None
    return machine, rows


def describe(args: argparse.Namespace, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The run, and the machine that a worker found."""
    return {
        "command": args.command_line,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "unet": args.unet,
        "weights": args.checkpoint or "random",
        "device": args.device,
        **machine,
    }


# --------------------------------------------------------------------------------------------------
# reports


def write_reports(
    stem: Path,
    machine: Mapping[str, Any],
    rows: Sequence[Any],
    planned: int,
    markdown: str,
    picture: Any,
) -> None:
    """Write JSON, Markdown and the chart; each whole or not at all.

    Args:
        stem: Path of the files without their suffixes.
        machine: What was measured on.
        rows: Dataclasses, each with the dataclass ``case`` in it.
        planned: How many rows there will be.
        markdown: The Markdown.
        picture: A PIL image, or None.
    """
    content = []
    for row in rows:
        entry = dataclasses.asdict(row)
        content.append({**entry.pop("case"), **entry})
    text = json.dumps({"machine": dict(machine), "planned": planned, "rows": content}, indent=1)
    write_text(f"{stem}.json", text + "\n")
    write_text(f"{stem}.md", markdown)
    if picture is not None:
        atomic_write(f"{stem}.png", lambda path: picture.save(path, format="PNG"))


def heading(
    title: str, machine: Mapping[str, Any], rows: Sequence[Any], planned: int
) -> Iterator[str]:
    """The first lines of the Markdown: the title and the machine."""
    yield from (f"# {title}", "")
    for name, value in machine.items():
        if name != "peaks":
            yield f"* {name}: {plain(value)}"
    for dtype, peak in machine.get("peaks", {}).items():
        reached = ", ".join(f"{kind} {si(value)}FLOP/s" for kind, value in peak.items())
        yield f"* peak in {dtype}: {reached}"
    if len(rows) < planned:
        yield f"* not finished: {len(rows)} of {planned} rows"
    yield ""


def table(columns: Mapping[str, str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table.

    Args:
        columns: Heading of each column, and how it is aligned, such as ``"--:"``.
        rows: The cells.
    """
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join(columns.values())}|"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def plain(value: object) -> str:
    """Text that does not end a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def si(value: float) -> str:
    """1.2e12 as ``1.2 T``."""
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value:.3g} "


# --------------------------------------------------------------------------------------------------
# charts


@dataclasses.dataclass(frozen=True)
class Panel:
    """One of the bar charts that stand side by side, with a bar a row.

    Attributes:
        title: What stands above.
        bars: The parts of each bar, from left to right, and the text beside it.
        parts: What the parts are; empty where there is but one.
        line: Where a vertical line is drawn, None for none.
    """

    title: str
    bars: Sequence[tuple[Sequence[float], str]]
    parts: Sequence[str] = ()
    line: float | None = None


def draw(names: Sequence[str], panels: Sequence[Panel]) -> Any:
    """Draw bar charts side by side.

    Args:
        names: Of the rows.
        panels: The charts.

    Returns:
        A PIL image; None if neither matplotlib nor Pillow is installed.
    """
    for library in (_draw_matplotlib, _draw_pil):
        with contextlib.suppress(ImportError):
            return library(names, panels)
    return None


def _draw_matplotlib(names: Sequence[str], panels: Sequence[Panel]) -> Any:
    from matplotlib.figure import Figure
    from PIL import Image

    size = (3 + 6 * len(panels), 1.2 + 0.32 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        lefts = [0.0] * len(names)
        for index in range(max(1, *(len(values) for values, _ in panel.bars))):
            widths = [values[index] if index < len(values) else 0.0 for values, _ in panel.bars]
            label = panel.parts[index] if panel.parts else None
            drawn = axes.barh(names, widths, left=lefts, color=COLORS[index], label=label)
            lefts = [left + width for left, width in zip(lefts, widths)]
        axes.bar_label(drawn, [text for _, text in panel.bars], padding=4)
        longest = max(len(text) for _, text in panel.bars)
        axes.set_xlim(0, 1.05 * (axes.dataLim.x1 or 1.0) / max(1 - 0.017 * longest, 0.3))
        if panel.line is not None:
            axes.axvline(panel.line, color="black", linewidth=0.8)
        if panel.parts:
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(panel.parts),
                fontsize="small",
            )  # fmt: skip
        axes.set_title(panel.title, fontsize="medium")
    axes.invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return Image.open(buffer)


def _draw_pil(names: Sequence[str], panels: Sequence[Panel]) -> Any:
    from PIL import Image, ImageDraw

    step, margin, length = 22, 12, 420
    measure_text = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    start = 2 * margin + round(max(measure_text(name) for name in names))
    lefts = [start]
    for panel in panels:
        texts = [measure_text(text) for _, text in panel.bars]
        room = [length + max(texts), measure_text(panel.title), *map(measure_text, panel.parts)]
        lefts.append(lefts[-1] + round(max(room)) + 2 * margin)
    top = 40 + step * max(len(panel.parts) for panel in panels)
    image = Image.new("RGB", (lefts[-1], step * len(names) + top + margin), "white")
    pen = ImageDraw.Draw(image)
    for index, name in enumerate(names):
        pen.text((margin, top + index * step), name, fill="black")
    for left, panel in zip(lefts, panels):
        pen.text((left, margin), panel.title, fill="black")
        for index, part in enumerate(panel.parts):
            pen.text((left, 34 + index * step), part, fill=COLORS[index])
        highest = max([panel.line or 0.0, *(sum(values) for values, _ in panel.bars)]) or 1.0
        for index, (values, text) in enumerate(panel.bars):
            y, total = top + index * step, 0.0
            for value, color in zip(values, COLORS):
                begin, total = left + round(length * total / highest), total + value
                end = left + round(length * total / highest)
                pen.rectangle((begin, y, end, y + step - 8), fill=color)
            pen.text((left + round(length * total / highest) + 6, y), text, fill="black")
        if panel.line is not None:
            at = left + round(length * panel.line / highest)
            pen.line((at, top - 6, at, image.height - margin), fill="black")
    return image


# --------------------------------------------------------------------------------------------------
# command line


def positive(text: str) -> int:
    """A positive number, for argparse.

    Raises:
        ValueError: It is none.
    """
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


positive.__name__ = "positive number"


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring."""
    summary, _, rest = doc.partition("\n\n")
    return argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_model_options(parser: argparse.ArgumentParser) -> Any:
    """Add the U-Net's options; gives their group."""
    group = parser.add_argument_group("models")
    group.add_argument("--unet", default="gd256_uncond", help="a preset's name")
    group.add_argument("--checkpoint", help="its weights; random ones if left out")
    return group


def add_measuring_options(parser: argparse.ArgumentParser, repeats: int, out: str) -> Any:
    """Add the options that tell how to measure, and ``--out``; gives the group of the former."""
    group = parser.add_argument_group("how to measure")
    group.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if there is one")
    group.add_argument("--threads", type=positive, help="of the CPU; torch's choice if left out")
    group.add_argument("--repeats", type=positive, default=repeats, help="rounds")
    group.add_argument("--warmup", type=int, default=1, help="steps before the first round")
    group.add_argument("--timeout", type=float, default=3600, help="seconds that anything may take")
    parser.add_argument("--out", type=Path, default=out, help="folder")
    return group


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    script: str,
    seconds: Sequence[str] = ("timeout",),
) -> argparse.Namespace:
    """Read the command line, and check what both scripts have.

    Args:
        parser: Knows the options.
        argv: Arguments; None takes the command line's.
        script: The script's name.
        seconds: Options that must be positive.
    """
    args = parser.parse_args(argv)
    if args.warmup < 0:
        parser.error(f"--warmup can't be negative, got {args.warmup}")
    for name in seconds:
        if not 0 < getattr(args, name) < threading.TIMEOUT_MAX:
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} must be positive, got {getattr(args, name)}")
    args.command_line = shlex.join([script, *(sys.argv[1:] if argv is None else argv)])
    return args


def check_machine(args: argparse.Namespace) -> None:
    """Choose the device where none was given, and look for it and the checkpoint.

    Raises:
        SystemExit: The one or the other is not there.
    """
    import torch

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: torch sees no GPU on this machine")
    if args.checkpoint is not None:
        if "://" not in args.checkpoint and not Path(args.checkpoint).expanduser().is_file():
            raise SystemExit(f"error: there is no checkpoint {args.checkpoint!r}")


def check_sizes(config: Any, sizes: Sequence[int]) -> None:
    """Check that the U-Net takes images of these sizes without padding.

    Raises:
        SystemExit: It does not.
    """
    deepest = max(block.stride for block in config.blocks.values())
    if wrong := [size for size in sizes if size % deepest]:
        raise SystemExit(f"error: --sizes must be multiples of {deepest}, got {wrong}")
