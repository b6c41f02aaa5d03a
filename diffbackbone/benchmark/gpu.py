"""Measure everything that needs a GPU, in one command that continues where it stopped.

    python tools/benchmark.py --suite gpu --out DIR
    python -m diffbackbone.benchmark.gpu --out DIR     # needs torch, numpy and safetensors only

Parts, each with a time limit:
  parity  outputs and gradients on the GPU in each type, against ours in float32 on the CPU
  speed   block 24, 32 images of 256 px and one of 1024 px, eager and compiled, beside the
          references whose checkouts are given; share of what matrix products reach
  steps   seconds and peak memory of fine-tuning UperNet (512 px, batch 2) and Mask R-CNN (1024 px)

Run the command again to continue. Rows in DIR/gpu.json are kept; those with an error, skipped
(such as steps whose framework was missing) or out of time are tried again after the others.
DIR/gpu.md has the tables. With --device cpu --unet tiny the suite can be tried on small images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffbackbone import cli
from diffbackbone.benchmark import report, steps, timing
from diffbackbone.benchmark.references import CASES, Case
from diffbackbone.benchmark.worker import describe_machine
from diffbackbone.utils import UserError, changed_settings, write_json, write_text

DTYPES = ("bfloat16", "float16", "float32")
PARTS = {
    "parity": (timing.Row, Case),
    "speed": (timing.Row, Case),
    "steps": (steps.Row, steps.Case),
}
"""Each part's classes of rows and cases."""
RETRIED = ("error", "skipped", "timeout")
PARITY_COLUMNS: dict[str, Callable[[timing.Row], Any]] = {
    "case": lambda row: row.case.case,
    "px:": lambda row: row.case.size,
    "mode": lambda row: row.case.mode,
    "type": lambda row: row.dtypes.get("ours", row.case.dtype),
    "difference:": timing.format_differences,
    "allowed:": lambda row: f"{timing.TOLERANCE[row.case.dtype]:g}",
    "result": lambda row: row.status,
    "note": lambda row: row.message,
}


@dataclasses.dataclass
class SuiteConfig:
    """Options of the suite."""

    out: Path = Path("work_dirs/benchmark_gpu")
    device: str = "cuda"
    unet: str = "gd256_uncond"
    checkpoint: str | None = None
    reference_guided_diffusion: Path | None = None
    reference_diffssl: Path | None = None
    parts: Sequence[str] = tuple(PARTS)
    minutes: float = 8  # time limit of each part
    repeats: int = 5
    threads: int | None = None


class Suite:
    """Measures the rows that are missing in a folder.

    Args:
        config: The options.
        folder: For temporary files.

    Attributes:
        plan: Cases of each part.
        rows: Measured rows of each part, by case.
    """

    def __init__(self, config: SuiteConfig, folder: Path) -> None:
        self.config, self.folder, self.file = config, folder, config.out / "gpu.json"
        shared = ("device", "unet", "checkpoint", "repeats", "threads")
        options = {name: getattr(config, name) for name in shared}
        options["timeout"] = 60 * config.minutes
        small = config.device == "cpu"
        self.images = ((64, 2), (128, 1)) if small else ((256, 32), (1024, 1))  # px, batch
        self.timing = timing.BenchmarkConfig(
            **options,
            dtypes=DTYPES,
            sizes=tuple(size for size, _ in self.images),
            reference_guided_diffusion=config.reference_guided_diffusion,
            reference_diffssl=config.reference_diffssl,
            peak_seconds=1e-3 if small else 0.25,
        )
        self.steps = steps.StepsConfig(
            **options,
            modes=("finetuned",),
            dtypes=("float32", "bfloat16"),
            sizes=(64,) if small else (),
            head_channels=16 if small else None,
        )
        self.bench = timing.Bench(self.timing, folder)
        self.machine = self.timing.describe(describe_machine(config.device))
        names = ("unet", "weights", "gpu", "torch")
        self.settings = {name: self.machine.get(name) for name in names}
        self.plan = self._plan()
        self.rows: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        if self.file.exists():
            self._load()

    def _plan(self) -> dict[str, list[Any]]:
        size, _ = self.images[0]
        parity = [("forward", case, dtype) for dtype in DTYPES for case in CASES]
        parity += [("finetuned", "b24", dtype) for dtype in ("float32", "bfloat16")]
        speed = [("eager", dtype) for dtype in DTYPES]
        speed += [("compiled", dtype) for dtype in ("bfloat16", "float16")]
        return {
            "parity": [Case(c, size, 1, dtype, mode, "eager", "cpu") for mode, c, dtype in parity],
            "speed": [
                Case("b24", *image, dtype, "forward", execution, reference)
                for execution, dtype in speed
                for image in self.images
                for reference in self.bench.references or (None,)
            ],
            "steps": self.steps.plan(),
        }

    def _load(self) -> None:
        saved = json.loads(self.file.read_text())
        if changed := changed_settings(saved["settings"], self.settings):
            raise UserError(f"{self.file} has other settings, choose another --out: {changed}")
        self.machine = {**saved["machine"], **self.machine}  # keeps the peaks
        for part, classes in PARTS.items():
            for entry in saved["parts"][part]:
                row = report.row_from_entry(entry, *classes)
                self.rows[part][str(row.case)] = row

    def missing(self, part: str) -> list[Any]:
        """Return the cases that have no row."""
        return [case for case in self.plan[part] if str(case) not in self.rows[part]]

    def run(self, part: str) -> None:
        """Measure a part's missing rows until time is up."""
        deadline = time.monotonic() + 60 * self.config.minutes
        again = [row.case for row in self.rows[part].values() if row.status in RETRIED]
        cases = [*self.missing(part), *(case for case in self.plan[part] if case in again)]
        if cases and part != "steps" and not self.bench.peaks:
            self.machine |= self.bench.prepare()
        for measured, case in enumerate(cases):
            if (left := deadline - time.monotonic()) <= 0:
                break
            print(f"{part}: {case}: ", end="", flush=True)
            if part == "steps":
                row: Any = steps.measure(case, self.steps, self.folder, left)
            else:
                row = self.bench.measure(case, left)
            print(" ".join(f"{row.status} {row.message}".split()), flush=True)
            if row.status == "timeout" and measured:  # the next run has more time for it
                break
            self.rows[part][str(case)] = row
            self.write()

    def write(self) -> None:
        """Write gpu.json and gpu.md."""
        parity, speed, steps_rows = (list(rows.values()) for rows in self.rows.values())
        parts = {
            part: [report.row_entry(row) for row in rows.values()]
            for part, rows in self.rows.items()
        }
        content = {"settings": self.settings, "machine": self.machine, "parts": parts}
        lines = [f"* {name}: {value}" for name, value in self.machine.items()]
        for part, cases in self.plan.items():
            if missing := self.missing(part):
                lines.append(f"* not finished: {len(missing)} of {len(cases)} rows of {part}")
        lines += ["\n## Parity with float32 on the CPU\n", report.table(PARITY_COLUMNS, parity)]
        lines += ["## Speed of block 24\n", timing.format_table(speed)]
        lines += ["## Fine-tuning steps\n", steps.format_table(steps_rows)]
        write_json(self.file, content)
        write_text(self.file.with_suffix(".md"), "\n".join(lines))


def run(config: SuiteConfig) -> dict[str, int]:
    """Run the parts that are not finished; return how many rows of each are missing."""
    with report.temporary_folder() as folder:
        suite = Suite(config, folder)
        for part in config.parts:
            suite.run(part)
    missing = {part: len(suite.missing(part)) for part in PARTS}
    print(f"written: {suite.file}, .md; rows that are missing: {missing}")
    return missing


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; its options are read by argparse, as tyro may be missing."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--suite", choices=["gpu"], help="this suite")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--unet", help="preset")
    parser.add_argument("--checkpoint", help="the U-Net's weights; random ones if left out")
    for name in timing.CHECKOUTS:
        parser.add_argument(f"--reference-{name}", type=Path, help="checkout of its code")
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--minutes", type=float, help="time limit of each part (8)")
    parser.add_argument("--repeats", type=int, help="rounds of each row (5)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = vars(parser.parse_args(argv))
    options.pop("suite", None)
    with cli.user_errors():
        run(SuiteConfig(**options))


if __name__ == "__main__":
    main()
