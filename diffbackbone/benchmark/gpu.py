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
from collections.abc import Sequence
from pathlib import Path

from diffbackbone import cli
from diffbackbone.benchmark import report, timing
from diffbackbone.benchmark.config import PASSES, STEPS, BenchmarkConfig, Case

PARTS = ("parity", "speed", "steps")


def plan(config: BenchmarkConfig) -> dict[str, list[Case]]:
    """Return the cases of each part; on a CPU small ones."""
    small, dtypes = config.device == "cpu", ("bfloat16", "float16", "float32")
    images = ((64, 2), (128, 1)) if small else ((256, 32), (1024, 1))  # px, batch
    size = images[0][0]
    parity = [Case(name, size, 1, dtype, "forward") for dtype in dtypes for name in PASSES]
    parity += [Case("b24", size, 1, dtype, "finetuned") for dtype in ("float32", "bfloat16")]
    return {
        "parity": [dataclasses.replace(case, reference="cpu") for case in parity],
        "speed": [
            Case("b24", *image, dtype, "forward", execution, reference)
            for execution in ("eager", "compiled")
            for dtype in dtypes
            if (execution, dtype) != ("compiled", "float32")
            for image in images
            for reference in list(config.checkouts()) or [None]
        ],
        "steps": [
            Case(name, 64 if small else side, batch, dtype, "finetuned")
            for name, (_, side, batch) in STEPS.items()
            for dtype in ("float32", "bfloat16")
        ],
    }


def run(
    config: BenchmarkConfig, parts: Sequence[str] = PARTS, minutes: float = 8
) -> dict[str, int]:
    """Measure missing rows of parts for some minutes each; return how many are still missing."""
    stem, cases = config.out / "gpu", plan(config)
    rows = report.read_rows(stem, report.describe(config))
    rows = timing.run(config, stem, cases, rows, parts, minutes)
    missing = {part: sum(case not in rows for case in cases[part]) for part in PARTS}
    print(f"rows that are missing: {missing}")
    return missing


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; its options are read by argparse, as tyro may be missing."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--suite", choices=["gpu"], help="this suite")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/benchmark_gpu"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--unet", help="preset")
    parser.add_argument("--checkpoint", help="the U-Net's weights; random ones if left out")
    parser.add_argument("--reference-guided-diffusion", type=Path, help="checkout of its code")
    parser.add_argument("--reference-diffssl", type=Path, help="checkout of its code")
    parser.add_argument("--repeats", type=int, help="rounds of each row")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=8, help="time limit of each part")
    options = vars(parser.parse_args(argv))
    options.pop("suite", None)
    parts, minutes = options.pop("parts"), options.pop("minutes")
    with cli.user_errors():
        head_channels = 16 if options["device"] == "cpu" else None
        run(BenchmarkConfig(**options, head_channels=head_channels), parts, minutes)


if __name__ == "__main__":
    main()
