"""The paper's fine-grained data sets as folders with a subfolder for each class (Table 7)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from scipy.io import loadmat
from tqdm import tqdm

from diffbackbone.cli import run_command
from diffbackbone.sample_data.folder import write_folder
from diffbackbone.utils import UserError

Image = tuple[str, str, Path]
"""Split (train or val), class and file of an image."""


def _lines(path: Path) -> Iterator[list[str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield line.strip().split(" ", 1)


def read_aircraft(root: Path) -> Iterator[Image]:
    """FGVC-Aircraft, ``fgvc-aircraft-2013b``: variants, training and validation together."""
    for split, part in (("train", "trainval"), ("val", "test")):
        for name, label in _lines(root / f"data/images_variant_{part}.txt"):
            yield split, label, root / f"data/images/{name}.jpg"


def read_cars(root: Path) -> Iterator[Image]:
    """Stanford Cars: ``devkit/``, ``cars_train/``, ``cars_test/`` and the labels of the test."""
    names = loadmat(root / "devkit/cars_meta.mat", squeeze_me=True)["class_names"]
    labels = root / "cars_test_annos_withlabels.mat"
    labels = labels if labels.is_file() else root / "devkit" / labels.name
    files = {"train": root / "devkit/cars_train_annos.mat", "val": labels}
    for split, folder in (("train", "cars_train"), ("val", "cars_test")):
        for entry in loadmat(files[split], squeeze_me=True)["annotations"].reshape(-1):
            yield split, str(names[entry["class"] - 1]), root / folder / str(entry["fname"])


def read_flowers(root: Path) -> Iterator[Image]:
    """Oxford Flowers, ``flowers-102``: training and validation together."""
    labels = loadmat(root / "imagelabels.mat", squeeze_me=True)["labels"]
    parts = loadmat(root / "setid.mat")
    for split, names in (("train", ("trnid", "valid")), ("val", ("tstid",))):
        for index in sorted(int(i) for name in names for i in parts[name].flat):
            yield split, f"{labels[index - 1]:03d}", root / f"jpg/image_{index:05d}.jpg"


def read_birds(root: Path) -> Iterator[Image]:
    """CUB-200-2011 and NABirds, which have the same list files."""
    training = dict(_lines(root / "train_test_split.txt"))
    for key, path in _lines(root / "images.txt"):
        yield "train" if training[key] == "1" else "val", path.split("/")[0], root / "images" / path


def read_dogs(root: Path) -> Iterator[Image]:
    """Stanford Dogs: ``Images/`` and the lists."""
    for split, part in (("train", "train"), ("val", "test")):
        for path in loadmat(root / f"{part}_list.mat", squeeze_me=True)["file_list"].reshape(-1):
            yield split, str(path).split("/")[0], root / "Images" / str(path)


SETS = {
    "aircraft": (read_aircraft, "fgvc-aircraft-2013b", (100, 6667, 3333)),
    "cars": (read_cars, "stanford_cars", (196, 8144, 8041)),
    "cub": (read_birds, "CUB_200_2011", (200, 5994, 5794)),
    "dogs": (read_dogs, "stanford_dogs", (120, 12000, 8580)),
    "flowers": (read_flowers, "flowers-102", (102, 2040, 6149)),
    "nabirds": (read_birds, "nabirds", (555, 23929, 24633)),
}
"""Reader, usual folder, and Table 7's numbers of classes, training and test images."""


@dataclass(kw_only=True)
class FgvcConfig:
    """Sort a fine-grained data set into OUT/train/CLASS/ and OUT/val/CLASS/, by hard links.

    All evaluation commands take such a folder. The data set itself is not downloaded. Where hard
    links can't be made, files are copied.
    """

    set: Annotated[
        Literal["aircraft", "cars", "cub", "dogs", "flowers", "nabirds"], tyro.conf.Positional
    ]
    """Name of the data set."""
    source: Path
    """The data set as it is distributed, or the folder that has it under its usual name."""
    out: Path
    """Folder to make."""
    partial: bool = False
    """Accept other numbers of images and classes than Table 7's."""


def run(config: FgvcConfig) -> str:
    """Make the folder and return a sentence about it.

    Raises:
        UserError: An image is missing, or the numbers differ from Table 7's.
    """
    read, usual, expected = SETS[config.set]
    source = config.source.expanduser()
    root = source / usual if (source / usual).is_dir() else source
    images = list(read(root))
    splits = [split for split, _, _ in images]
    found = {
        "classes": len({name for _, name, _ in images}),
        "train": splits.count("train"),
        "val": splits.count("val"),
    }
    wrong = [
        f"{number:,} {name} (Table 7: {right:,})"
        for (name, number), right in zip(found.items(), expected)
        if number != right
    ]
    if wrong and not config.partial:
        raise UserError(f"{root} has {', '.join(wrong)}; --partial takes it as it is")
    if missing := next((path for _, _, path in images if not path.is_file()), None):
        raise UserError(f"{missing} is missing")

    def link_all(folder: Path) -> None:
        for split, name, path in tqdm(images, config.set, leave=False, disable=None):
            place = folder / split / re.sub(r"[/\\\0]", "_", name)
            place.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place / path.name)
            except OSError:  # another disk, or no hard links
                shutil.copy2(path, place / path.name)

    write_folder(config.out, "prepared.json", {"set": config.set, **found}, link_all)
    note = f"; differs from Table 7: {', '.join(wrong)}" if wrong else ", as in Table 7"
    return f"{config.out}: {found['classes']} classes, {found['train']:,} training and " + (
        f"{found['val']:,} validation images{note}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    print(run_command(FgvcConfig, run, argv))
