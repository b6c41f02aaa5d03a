"""The sample data set for segmentation, detection and pretraining.

The same scenes are written as ADE20K (SceneParse150) and as COCO (instances and panoptic), where
the usual readers of MMSegmentation and Detectron2 find them; a folder of further scenes has no
labels, for pretraining. Scene i of a split depends on the seed, the split and i alone, so a larger
set starts with the scenes of a smaller one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffbackbone.cli import run_command
from diffbackbone.sample_data import scenes, writers
from diffbackbone.sample_data.folder import write_folder
from diffbackbone.utils import settings_of


@dataclass
class SampleDataConfig:
    """Make a small data set of handwritten digits on photographs, as ADE20K and as COCO."""

    out: Path = Path("data/sample")
    """Folder to make."""
    train: int = 800
    """Training scenes."""
    val: int = 60
    """Validation scenes."""
    unlabelled: int = 400
    """Scenes without labels."""
    seed: int = 0
    """Seed of everything drawn."""
    min_size: int = 64
    """Smallest side of a scene."""
    max_size: int = 96
    """Largest side of a scene."""
    digits: tuple[int, int] = (3, 7)
    """Fewest and most digits drawn for a scene."""


def make_sample_data(out: str | os.PathLike[str], **options: Any) -> str:
    """Make the data set of `SampleDataConfig` and return a sentence about it."""
    return run(SampleDataConfig(Path(out), **options))


def run(config: SampleDataConfig) -> str:
    """Write the data set, whole or not at all, and return a sentence about it."""
    look = scenes.SceneConfig(config.min_size, config.max_size, *config.digits)
    counts = {split: getattr(config, split) for split in scenes.SPLITS}
    parameters = {
        "tool": "diffbackbone make_sample_data",
        "version": writers.FORMAT_VERSION,
        "seed": config.seed,
        "counts": counts,
        "scene": settings_of(look),
        "train_scan_share": scenes.TRAIN_SCAN_SHARE,
        "train_photo_share": scenes.TRAIN_PHOTO_SHARE,
    }

    def write(root: Path) -> None:
        pools = scenes.load_pools(config.seed)

        def make(split: str) -> Iterator[scenes.Scene]:
            for index in tqdm(range(counts[split]), split, unit="scene", disable=None):
                yield scenes.make_scene(pools[split], look, config.seed, split, index)

        for split in ("train", "val"):
            writers.write_labelled(root, split, make(split))
        (root / "unlabelled").mkdir()
        for number, scene in enumerate(make("unlabelled"), 1):
            writers.save_jpeg(scene.image, root / "unlabelled" / f"{number:08d}.jpg")

    if not write_folder(config.out, "sample_data.json", parameters, write):
        return f"{config.out} already holds this sample data; nothing to do"
    numbers = ", ".join(f"{count} {split}" for split, count in counts.items())
    return f"{config.out}: {numbers} scenes"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    print(run_command(SampleDataConfig, run, argv))
