"""Options of the label-efficiency grid, and their presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

TaskName = Literal["knn", "linear", "attention", "difformer", "difffeed", "upernet", "maskrcnn"]
WeightsName = Literal["pretrained", "random", "initial"]


@dataclass(kw_only=True)
class LabelEfficiencyConfig:
    """Compare pretrained and random features of a frozen network with few labels, over many tasks.

    With --data the classification tasks are on your own images, and any network serves. --preset
    heads compares kNN and all heads on plain handwritten digits. OUT gets results.jsonl (one line
    per finished cell), summary.md (means, standard deviations and differences paired by seed) and a
    picture for each task. Run the same command again to continue a run that was stopped.
    """

    out: Path = Path("work_dirs/label_efficiency")
    """Folder of the grid."""
    preset: Literal["grid", "heads"] = "grid"
    """Sets the defaults of the other options."""
    data: Path | None = None
    """Folder with train/<class>/ and val/<class>/; default: made images of digits. UperNet and Mask
    R-CNN are always on made scenes."""
    checkpoint: str | None = None
    """Pretrained weights; networks such as timm:resnet50 bring their own."""
    unet: str | None = None
    """Network; default: that of a .safetensors checkpoint, else tiny. DifFeed, UperNet, Mask R-CNN
    and --weights initial need one of guided-diffusion."""
    tasks: tuple[TaskName, ...] = (
        "knn", "linear", "attention", "difformer", "difffeed", "upernet", "maskrcnn"
    )  # fmt: skip
    """The last two are on scenes of several digits, the others on images of one digit, or on DATA.
    """
    weights: tuple[WeightsName, ...] = ("pretrained", "random")
    """random: drawn, also where guided-diffusion starts at zero; of timm, as before training.
    initial: as before training."""
    labels: tuple[float, ...] = (1.0, 0.1, 0.01)
    """Shares of the labels; a smaller share is part of a larger one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the labels, random weights, heads and the order of the images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where classification tasks compute."""
    images: Literal["scenes", "scans"] = "scenes"
    """Images of one digit: on photographs, or scans on black."""
    scenes: int = 4000
    """Training scenes of several digits; there are a twentieth as many for validation."""
    digits: int = 10_000
    """Training scenes of one digit; there are a tenth as many for validation."""
    image_size: int = 32
    """Height and width of the images that are classified."""
    tap: tuple[int, int] = (300, 33)
    """Timestep and block of kNN, linear probe, attention and DifFeed; tools/sweep.py finds the
    best. The timestep is that of the scenes too."""
    random_tap: tuple[int, int] = (150, 30)
    """The same for weights that are not pretrained."""
    pool: int = 4
    """Height and width that linear probe and kNN pool the map to."""
    timesteps: tuple[int, ...] = (150, 300, 450)
    """Timesteps of the DifFormer head."""
    blocks: tuple[int, ...] = (12, 30, 33)
    """Blocks of the DifFormer head."""
    steps: dict[str, int] = field(
        default_factory=lambda: {"attention": 400, "difformer": 300, "difffeed": 120}
    )
    """Least number of training steps of each head."""
    upernet: str = "upernet_gd_probe_sample.py"
    """Config of the UperNet."""
    upernet_options: tuple[str, ...] = ()
    """Changes in it: KEY=VALUE."""
    maskrcnn: str = "mask_rcnn_gd_probe_sample.yaml"
    """Config of the Mask R-CNN."""
    maskrcnn_options: tuple[str, ...] = ()
    """Changes in it: KEY VALUE."""


PRESETS = {
    "grid": LabelEfficiencyConfig(),
    "heads": LabelEfficiencyConfig(
        preset="heads",
        out=Path("work_dirs/compare"),
        tasks=("knn", "linear", "attention", "difformer", "difffeed"),
        weights=("random",),
        labels=(1.0,),
        seeds=(0,),
        images="scans",
        image_size=64,
        tap=(150, 24),
        random_tap=(150, 24),
        timesteps=(90, 150, 300),
        blocks=(19, 24, 30),
        steps={"attention": 440, "difformer": 430, "difffeed": 425},
    ),
}


@dataclass(frozen=True)
class Cell:
    """One measurement: a task with some weights, a share of the labels and a seed."""

    task: str
    weights: str
    labels: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        return f"{self.task}-{self.weights}-{self.labels:g}-{self.seed}"
