"""A data set for classification: the scans of `load_digits`, a folder for each split and class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from diffbackbone.cli import run_command
from diffbackbone.sample_data.folder import write_folder
from diffbackbone.sample_data.scenes import DIGIT_NAMES, split_scans


@dataclass
class DigitsConfig:
    """Make a small data set of handwritten digits for classification, without a download."""

    out: Path = Path("data/digits")
    """Folder to make."""
    size: int = 64
    """Height and width of the images."""
    limit: int | None = None
    """Maximum number of images of each class and split."""
    seed: int = 0
    """Seed of the division into training and validation."""


def make_digits(out: str | os.PathLike[str], **options: Any) -> str:
    """Make the data set of `DigitsConfig` and return a sentence about it."""
    return run(DigitsConfig(Path(out), **options))


def run(config: DigitsConfig) -> str:
    """Write ``SPLIT/CLASS/NUMBER.png`` and return a sentence about it."""
    counts = {"train": 0, "val": 0}

    def write(root: Path) -> None:
        digits = load_digits()
        for split, indices in split_scans(digits.target, config.seed).items():
            for digit, name in enumerate(DIGIT_NAMES):
                folder = root / split / f"{digit}_{name}"
                folder.mkdir(parents=True)
                for index in indices[digits.target[indices] == digit][: config.limit]:
                    enlarge(digits.images[index], config.size).save(folder / f"{index:04d}.png")
                    counts[split] += 1

    parameters = {"tool": "diffbackbone make_sample_digits", "version": 1, "size": config.size}
    parameters |= {"limit": config.limit, "seed": config.seed}
    if not write_folder(config.out, "sample_digits.json", parameters, write):
        return f"{config.out} already holds these digits; nothing to do"
    numbers = f"{counts['train']} training and {counts['val']} validation"
    return f"{config.out}: {numbers} images of digits"


def enlarge(scan: np.ndarray, size: int) -> Image.Image:
    """Draw a scan (8 x 8, ink from 0 to 16) as light ink on black, with an empty rim."""
    gray = np.pad(np.clip(scan * (255 / 16), 0, 255).round().astype(np.uint8), 1)
    return Image.fromarray(gray).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    print(run_command(DigitsConfig, run, argv))
