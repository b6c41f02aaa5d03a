"""Run the tests in other Pythons, with other versions of torch, numpy and the frameworks.

For instance::

    python tools/check_matrix.py --list
    python tools/check_matrix.py --cells core-3.9-old core-3.13-new
    python tools/check_matrix.py --detectron2-wheel ~/wheels/detectron2-0.6-cp311-*.whl

Each cell gets a virtual environment of its own, made of pinned versions, in which its tests run;
then the environment is deleted, so that there is one at a time (up to 8 GB). Interpreters are found
as ``python3.9``, ``python3.10``, ... on PATH; ``--python 3.9=/path/to/python`` names another.
Detectron2 and mmcv with compiled operators have no wheel to download: their cells take the one
given.

The folder --work gets matrix.json and matrix.md, replaced whole after every cell, and a log for
each. The same command goes on after an interruption, and runs again what did not pass. A cell whose
interpreter or packages can't be had is a row that says why. The exit code is 0 only where all cells
passed.

This file needs Python alone, nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")

# --------------------------------------------------------------------------------------------------
# the cells

TESTS: dict[str, tuple[str, ...]] = {
    "core": (
        *("test_unet.py", "test_diffusion.py", "test_feedback.py", "test_backbone.py"),
        *("test_checkpoint.py", "test_hostile_files.py", "test_compat.py", "test_ops.py"),
        *("test_unpickle.py", "test_costs.py", "test_heads.py", "test_pretraining.py"),
    ),
    "short": (  # what takes a third of the time
        *("test_unet.py", "test_diffusion.py", "test_checkpoint.py", "test_hostile_files.py"),
        *("test_unpickle.py", "test_compat.py", "test_ops.py"),
    ),
    "mmseg": ("test_compat.py", "test_unpickle.py", "test_mmseg.py"),
    "openmmlab": ("test_compat.py", "test_unpickle.py", "test_mmseg.py", "test_mmpretrain.py"),
    "detectron2": ("test_checkpoint.py", "test_detectron2.py", "test_detectron2_engine.py"),
    "both": (
        *("test_compat.py", "test_unpickle.py", "test_mmseg.py", "test_mmpretrain.py"),
        *("test_detectron2.py", "test_detectron2_engine.py"),
    ),
}
"""Files of ``tests/`` that a cell runs, by the name of the set."""

MMSEG = ("mmengine==0.10.7", "mmsegmentation==1.2.2", "ftfy", "regex")
OPENMMLAB = (*MMSEG, "mmpretrain==1.2.0")
LITE = "mmcv-lite==2.1.0"
TESTED = ("torch==2.11.0", "torchvision==0.26.0")
OLD_IMAGES = ("opencv-python==4.10.0.84", "matplotlib<3.10", "scipy<1.14")  # take numpy 1


@dataclasses.dataclass(frozen=True)
class Cell:
    """One environment, and what runs in it.

    Attributes:
        name: What it is called.
        python: Version of the interpreter, two numbers.
        packages: What pip installs.
        tests: Key of ``TESTS``.
        extras: Of this package, by setup.py.
        wheels: Packages whose wheel has to be given: ``detectron2``, ``mmcv``.
    """

    name: str
    python: str
    packages: tuple[str, ...]
    tests: str = "core"
    extras: str = ""
    wheels: tuple[str, ...] = ()


CELLS = (
    Cell("core-3.9-old", "3.9", ("torch==2.1.2", "numpy==1.24.4", "safetensors==0.4.0")),
    Cell("core-3.9-new", "3.9", ("torch==2.8.0", "numpy==2.0.2"), "short"),
    Cell("core-3.10-old", "3.10", ("torch==2.1.2", "numpy==1.26.4"), "short"),
    Cell("core-3.10-new", "3.10", ("torch==2.14.1", "numpy>=2"), "short"),
    Cell("core-3.11-old", "3.11", ("torch==2.1.2", "numpy==1.26.4"), "short"),
    Cell("core-3.11-new", "3.11", ("torch==2.15.0", "numpy>=2")),
    Cell("core-3.12-old", "3.12", ("torch==2.2.2", "numpy==1.26.4"), "short"),
    Cell("core-3.12-new", "3.12", ("torch==2.15.0", "numpy>=2"), "short"),
    Cell("core-3.13-old", "3.13", ("torch==2.6.0", "numpy==2.1.3"), "short"),
    Cell("core-3.13-new", "3.13", ("torch==2.15.0", "numpy>=2"), "short"),
    Cell(
        "openmmlab-old",
        "3.9",
        ("torch==2.6.0", "torchvision==0.21.0", "numpy==1.26.4", *OPENMMLAB, LITE, *OLD_IMAGES),
        tests="openmmlab",
        extras="mmseg,mmpretrain,sample",
    ),
    # without torchvision, which has no wheel for each build of torch
    Cell("mmseg-lean", "3.11", ("torch==2.13.0", "numpy>=2", *MMSEG, LITE), "mmseg", "sample"),
    Cell(
        "openmmlab-new",
        "3.13",
        ("torch==2.15.0", "numpy>=2", *OPENMMLAB, LITE),
        tests="openmmlab",
        extras="mmseg,mmpretrain,sample",
    ),
    Cell("mmseg-only", "3.11", (*TESTED, *MMSEG, LITE), tests="both", extras="mmseg,sample"),
    Cell("mmcv-full", "3.11", (*TESTED, *MMSEG), "mmseg", "sample", ("mmcv",)),
    Cell(
        "detectron2-only",
        "3.11",
        TESTED,
        tests="both",
        extras="detectron2,sample",
        wheels=("detectron2",),
    ),
    Cell(
        "tested",
        "3.11",
        (*TESTED, *OPENMMLAB, LITE),
        tests="both",
        extras="mmseg,mmpretrain,detectron2,sample",
        wheels=("detectron2",),
    ),
)
SHOWN = ("mmengine", "mmcv", "mmcv-lite", "mmsegmentation", "mmpretrain", "detectron2")
"""Frameworks that the table names where they are installed."""
ALWAYS = ("safetensors", "pytest", "pillow", "setuptools<82")


# --------------------------------------------------------------------------------------------------
# running one


@dataclasses.dataclass
class Row:
    """What became of a cell.

    Attributes:
        cell: Its name.
        python: Version that ran; what the cell asks for where none did.
        packages: What the cell pins.
        tests: Files that ran.
        commit: Of the code, empty where git does not know.
        outcome: ``passed``, ``failed``, or ``not run``.
        reason: Why it did not pass.
        versions: Of torch, numpy and the frameworks, as installed.
        passed: Number of tests.
        failed: Number of tests, those included that could not be collected.
        skipped: Number of tests.
        seconds: That the tests took.
    """

    cell: str
    python: str
    packages: list[str]
    tests: list[str]
    commit: str = ""
    outcome: str = "not run"
    reason: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


class NotRunError(Exception):
    """A cell's environment can't be had."""


DESCRIBE = """
import importlib.metadata as metadata, json, platform
found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
print(json.dumps({"python": platform.python_version(), **found}))
"""


def find_python(version: str, given: Mapping[str, str]) -> str:
    """The interpreter of a version.

    Raises:
        NotRunError: There is none, or it is another version.
    """
    python = given.get(version) or shutil.which(f"python{version}")
    if not python:
        raise NotRunError(
            f"no python{version} on PATH (--python {version}=/path/to/python names one)"
        )
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotRunError(f"{python} does not start: {error.strerror}") from error
    if found.returncode or found.stdout.strip() != version:
        said = (found.stdout + found.stderr).strip().splitlines() or ["nothing"]
        raise NotRunError(f"{python} is no Python {version}: it says {said[-1]!r}")
    return python


def execute(command: Sequence[str], log: Path, timeout: float | None = None) -> int:
    """Run a command in the checkout, with what it says appended to a log.

    Returns:
        Its exit code.

    Raises:
        subprocess.TimeoutExpired: It took too long; it is ended with all that it started.
    """
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    env.pop("PYTHONPATH", None)
    with open(log, "ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def install(cell: Cell, python: str, env: Path, wheels: Mapping[str, str], log: Path) -> str:
    """Make the environment of a cell.

    Returns:
        Its interpreter.

    Raises:
        NotRunError: pip can't, or a wheel is not given.
    """
    missing = [name for name in cell.wheels if name not in wheels]
    if missing:
        raise NotRunError(" and ".join(f"no --{name}-wheel was given" for name in missing))
    if execute([python, "-m", "venv", str(env)], log):
        raise NotRunError(f"venv: {last_error(log)}")
    inside = str(env / "bin" / "python")
    # setuptools in build environments too: mmcv is built by what setuptools 82 dropped
    limits = env / "limits.txt"
    limits.write_text("setuptools<82\n", encoding="utf-8")
    pip = [inside, "-m", "pip", "install", "--disable-pip-version-check", "--no-cache-dir"]
    pip += ["--no-compile", "--quiet", "--progress-bar", "off"]  # most of it is never imported
    files = [str(Path(wheels[name]).resolve()) for name in cell.wheels]
    os.environ["PIP_CONSTRAINT"] = str(limits)
    try:
        # with this package itself, so that pip holds the versions against setup.py
        own = ["-e", f"{ROOT}[{cell.extras}]" if cell.extras else str(ROOT)]
        code = execute([*pip, *ALWAYS, *cell.packages, *files, *own], log)
    finally:
        del os.environ["PIP_CONSTRAINT"]
    if code:
        raise NotRunError(f"pip: {last_error(log)}")
    return inside


def last_error(log: Path) -> str:
    """What a log says last of an error, in one line."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    line = " ".join(errors[-1].removeprefix("ERROR:").split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def count(report: Path) -> dict[str, int]:
    """Tests by what became of them, from pytest's XML."""
    suites = ET.parse(report).getroot().iter("testsuite")
    numbers = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for key in numbers:
            numbers[key] += int(suite.get(key, 0))
    failed = numbers["failures"] + numbers["errors"]
    skipped = numbers["skipped"]
    return {
        "passed": max(0, numbers["tests"] - failed - skipped),
        "failed": failed,
        "skipped": skipped,
    }


def run_cell(cell: Cell, args: argparse.Namespace) -> Row:
    """Run a cell; whatever goes wrong with it is in the row."""
    row = Row(cell.name, cell.python, list(cell.packages), list(TESTS[cell.tests]))
    row.commit = find_commit()
    log, report = args.work / f"{cell.name}.log", args.work / f"{cell.name}.xml"
    env = args.work / f"env-{cell.name}"
    for old in (log, report):
        old.unlink(missing_ok=True)
    shutil.rmtree(env, ignore_errors=True)
    try:
        python = install(cell, find_python(cell.python, args.python), env, args.wheels, log)
        told = subprocess.run([python, "-c", DESCRIBE], capture_output=True, text=True, check=True)
        found = json.loads(told.stdout)
        row.python = found["python"]
        row.versions = {k: found[k] for k in ("torch", "numpy", *SHOWN) if k in found}
        files = [f"tests/{name}" for name in TESTS[cell.tests]]
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        began = time.monotonic()
        try:
            code = execute([*pytest, *files], log, args.timeout)
        finally:
            row.seconds = round(time.monotonic() - began, 1)
        row.outcome = "failed"
        if report.is_file():
            vars(row).update(count(report))
        if code == 0 and row.passed and not row.failed:
            row.outcome = "passed"
        elif not report.is_file():
            row.reason = f"pytest ended with {code}: {last_error(log)}"
        else:
            row.reason = f"pytest ended with {code}, see {log.name}"
    except NotRunError as error:
        row.reason = str(error)
    except subprocess.TimeoutExpired:
        row.outcome, row.reason = "failed", f"ended after {args.timeout:.0f} s"
    except (OSError, ValueError, KeyError, subprocess.SubprocessError, ET.ParseError) as error:
        row.outcome, row.reason = "failed", f"{type(error).__name__}: {error}"
    finally:
        if not args.keep:
            shutil.rmtree(env, ignore_errors=True)
    return row


def find_commit() -> str:
    """The commit of this checkout, with a plus where files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return "" if done.returncode else done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no") if commit else ""
    return f"{commit}+" if changed else commit


# --------------------------------------------------------------------------------------------------
# the table


def read_rows(work: Path) -> dict[str, Row]:
    """The rows of earlier runs, by cell.

    Raises:
        SystemExit: The file is no table of this tool.
    """
    path = work / "matrix.json"
    if not path.is_file():
        return {}
    try:
        rows = [Row(**row) for row in json.loads(path.read_text("utf-8"))["rows"]]
    except (ValueError, TypeError, KeyError) as error:
        raise SystemExit(
            f"error: {path} is no table of this tool ({type(error).__name__}: {error}); move it "
            "away or take another --work"
        ) from error
    return {row.cell: row for row in rows}


def write_rows(work: Path, rows: Mapping[str, Row]) -> None:
    """Write both tables, each whole or not at all, in the order of ``CELLS``."""
    order = [cell.name for cell in CELLS]
    known = sorted(rows.values(), key=lambda r: order.index(r.cell) if r.cell in order else 999)
    content: Any = {"rows": [dataclasses.asdict(row) for row in known]}
    write_whole(work / "matrix.json", json.dumps(content, indent=2) + "\n")
    write_whole(work / "matrix.md", format_markdown(known))


def write_whole(path: Path, text: str) -> None:
    """Write beside a file's place, and move there what is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def format_markdown(rows: Sequence[Row]) -> str:
    """The table for people, and what its sets of tests hold."""
    titles = [
        "Cell",
        "Python",
        "torch",
        "numpy",
        "Frameworks",
        "Tests",
        "Result",
        "Skipped",
        "Time",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    sets = {files: name for name, files in TESTS.items()}
    used = []
    for row in rows:
        tests = sets.get(tuple(row.tests), "other")
        used += [tests] if tests not in used else []
        have = [f"{name} {row.versions[name]}" for name in SHOWN if name in row.versions]
        result = f"{row.passed} passed" + (f", **{row.failed} failed**" if row.failed else "")
        if row.outcome == "not run":
            result = "not run"
        if row.reason:
            result += f": {row.reason}".replace("|", "\\|")
        told = row.outcome != "not run"
        cells = (
            *(row.cell, row.python, row.versions.get("torch", wanted(row, "torch"))),
            *(row.versions.get("numpy", wanted(row, "numpy")), ", ".join(have) or "none"),
            *(tests, result, str(row.skipped) if told else ""),
            f"{row.seconds / 60:.1f} min" if told else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name in used:
        if name in TESTS:
            lines.append(f"Tests *{name}*: {', '.join(TESTS[name])}.")
    return "\n".join(lines) + "\n"


def wanted(row: Row, package: str) -> str:
    """The version that a cell asks for, in brackets."""
    found = [p[len(package) :].removeprefix("==") for p in row.packages if _name(p) == package]
    return f"({found[0]})" if found else ""


def _name(requirement: str) -> str:
    return requirement.partition("<")[0].partition(">")[0].partition("=")[0]


# --------------------------------------------------------------------------------------------------
# command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong options end the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="+", metavar="NAME", choices=names, default=names)
    parser.add_argument("--list", action="store_true", help="print the cells and run none")
    parser.add_argument("--work", type=Path, default=ROOT / "work_dirs" / "matrix", metavar="DIR")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--again", action="store_true", help="run cells that passed before, too")
    parser.add_argument(
        "--python", action="append", default=[], metavar="3.9=PATH", help="an interpreter"
    )
    parser.add_argument("--detectron2-wheel", metavar="FILE")
    parser.add_argument("--mmcv-wheel", metavar="FILE", help="with compiled operators")
    parser.add_argument(
        "--timeout", type=float, default=3600, metavar="SECONDS", help="for the tests of a cell"
    )
    args = parser.parse_args(argv)
    pythons = {}
    for pair in args.python:
        version, _, path = pair.partition("=")
        if version not in PYTHONS or not path:
            parser.error(f"--python takes VERSION=PATH, VERSION of {', '.join(PYTHONS)}: {pair!r}")
        pythons[version] = path
    args.python = pythons
    given = {"detectron2": args.detectron2_wheel, "mmcv": args.mmcv_wheel}
    args.wheels = {name: path for name, path in given.items() if path}
    for name, path in args.wheels.items():
        if not Path(path).is_file():
            parser.error(f"--{name}-wheel: there is no file {path!r}")
    args.work = args.work.resolve()
    return args


def is_done(cell: Cell, row: Row | None) -> bool:
    """Whether a row of an earlier run stands for the cell as it is now."""
    return (
        row is not None
        and row.outcome == "passed"
        and (row.packages, row.tests) == (list(cell.packages), list(TESTS[cell.tests]))
    )


def entry(argv: Sequence[str] | None = None) -> int:
    """Command line.

    Returns:
        The exit code: 0 where all cells passed.
    """
    args = parse(argv)
    cells = [cell for cell in CELLS if cell.name in args.cells]
    if args.list:
        for cell in cells:
            wheels = [f"{name} (--{name}-wheel)" for name in cell.wheels]
            packages = ", ".join([*cell.packages, *wheels])
            extras = f", extras {cell.extras}" if cell.extras else ""
            print(f"{cell.name}: Python {cell.python}, {packages}{extras}; tests: {cell.tests}")
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    rows = read_rows(args.work)
    for cell in cells:
        if is_done(cell, rows.get(cell.name)) and not args.again:
            print(f"{cell.name}: passed before", flush=True)
            continue
        print(f"{cell.name}: runs, see {args.work / cell.name}.log", flush=True)
        row = rows[cell.name] = run_cell(cell, args)
        write_rows(args.work, rows)
        numbers = f"{row.passed} passed, {row.failed} failed, {row.skipped} skipped"
        print(f"{cell.name}: {row.outcome}, {numbers} {row.reason}".rstrip(), flush=True)
    print((args.work / "matrix.md").read_text("utf-8") if cells and rows else "no cells")
    return 0 if all(rows[cell.name].outcome == "passed" for cell in cells) else 1


if __name__ == "__main__":
    sys.exit(entry())
