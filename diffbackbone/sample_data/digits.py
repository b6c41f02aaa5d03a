"""Make a small data set for classification, without a download: real handwritten digits.

The 1,797 scans of `sklearn.datasets.load_digits` (8x8, 17 grey values) become RGB images in one
folder for each class. Training and validation share no scan: three quarters of each class are for
training, drawn by the seed.

    python tools/make_sample_digits.py --out data/digits
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffbackbone.sample_data.scenes import DIGIT_NAMES, split_scans

_MISSING: ImportError | None = None
try:
    from PIL import Image
    from sklearn.datasets import load_digits
except ImportError as error:  # reported by make_digits, after the arguments are checked
    _MISSING = error

TOOL = "diffbackbone make_sample_digits"
MANIFEST = "sample_digits.json"
MIN_SIZE = 32


class SampleDigitsError(ValueError):
    """The digits cannot be made as asked; the message says why."""


def enlarge(scan: np.ndarray, size: int) -> Image.Image:
    """Picture of a scan: light ink on black, with an empty rim of one scan pixel.

    Args:
        scan: (8, 8), ink from 0 to 16.
        size: Height and width of the picture.
    """
    grey = np.pad(np.clip(scan * (255 / 16), 0, 255).round().astype(np.uint8), 1)
    return Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def make_digits(
    out: str | os.PathLike[str], size: int = 64, limit: int | None = None, seed: int = 0
) -> str:
    """Write the data set; `out` appears whole or not at all.

    Args:
        out: Folder to make.
        size: Height and width of the images.
        limit: Images of each class and split at most; None takes all.
        seed: Seed of the division into training and validation.

    Returns:
        A sentence that says what was done.

    Raises:
        SampleDigitsError: An argument is bad, a package is missing or `out` is in use.
    """
    if size < MIN_SIZE or seed < 0 or (limit is not None and limit < 1):
        raise SampleDigitsError(
            f"size must be at least {MIN_SIZE}, seed at least 0 and limit at least 1, but size "
            f"{size}, seed {seed} and limit {limit} were given"
        )
    out = Path(out).resolve()
    wanted = {"tool": TOOL, "version": 1, "size": size, "limit": limit, "seed": seed}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        try:
            found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found == wanted:
            return f"{out} already holds these digits; nothing to do"
        raise SampleDigitsError(f"{out} holds something else: remove it, or take another folder")
    if _MISSING is not None:
        raise SampleDigitsError(
            f"making the digits needs packages that cannot be imported here ({_MISSING}); install "
            "them with: pip install diffbackbone[sample]"
        ) from _MISSING
    digits = load_digits()
    out.parent.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "val": 0}
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        new = scratch / "new"
        for split, indices in split_scans(digits.target, seed).items():
            for digit, name in enumerate(DIGIT_NAMES):
                folder = new / split / f"{digit}_{name}"
                folder.mkdir(parents=True)
                for index in indices[digits.target[indices] == digit][:limit]:
                    enlarge(digits.images[index], size).save(folder / f"{index:04d}.png")
                    counts[split] += 1
        (new / MANIFEST).write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()  # empty, as was seen above
        new.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return f"{out}: {counts['train']} training and {counts['val']} validation images of digits"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: The digits cannot be made; the message says why.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="data/digits", help="folder to make")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--limit", type=int, help="images of each class and split at most")
    parser.add_argument("--seed", type=int, default=0, help="seed of the division")
    args = parser.parse_args(argv)
    try:
        print(make_digits(args.out, args.size, args.limit, args.seed))
    except (SampleDigitsError, OSError) as error:
        raise SystemExit(f"make_sample_digits: {error}") from error


if __name__ == "__main__":
    main()
