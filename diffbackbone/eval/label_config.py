"""Options of the label-efficiency grid, and their presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffbackbone.utils import UserError

TaskName = Literal["knn", "linear", "attention", "difformer", "difffeed", "upernet", "maskrcnn"]
WeightsName = Literal["pretrained", "random", "initial"]


@dataclass(kw_only=True)
class LabelEfficiencyConfig:
    """Compare pretrained and random features of a frozen U-Net with few labels, over many tasks.

    OUT gets results.jsonl (one line per finished cell), summary.md (means, standard deviations and
    differences paired by seed) and a picture for each task. Run the same command again to continue
    a run that was stopped. --preset heads compares kNN and all heads on plain handwritten digits.
    """

    out: Path = Path("work_dirs/label_efficiency")
    """Folder of the grid."""
    preset: Literal["grid", "heads"] = "grid"
    """Sets the defaults of the other options."""
    checkpoint: str | None = None
    """Pretrained weights; copied at first use, after which the copy is the default."""
    unet: str | None = None
    """Architecture (a preset); default: what a .safetensors checkpoint tells, tiny without it."""
    tasks: tuple[TaskName, ...] = (
        "knn", "linear", "attention", "difformer", "difffeed", "upernet", "maskrcnn"
    )  # fmt: skip
    """The last two are on scenes of several digits, the others on images of one digit."""
    weights: tuple[WeightsName, ...] = ("pretrained", "random")
    """random: drawn, also where guided-diffusion starts at zero; initial: as before training."""
    labels: tuple[float, ...] = (1.0, 0.1, 0.01)
    """Shares of the labels; a smaller share is part of a larger one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the labels, random weights, heads and the order of the images."""
    list: bool = False
    """Print which cells are finished; run none."""
    only_missing: bool = False
    """Leave finished cells out of --list."""
    time_limit: float | None = None
    """Minutes; a cell that would probably take longer is not started."""
    overwrite: bool = False
    """Remove results of other settings."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where classification tasks compute."""

    images: Literal["scenes", "scans"] = "scenes"
    """Images of one digit: on photographs, or scans on black."""
    scenes: int = 4000
    """Training scenes of several digits."""
    val_scenes: int = 200
    """Validation scenes of several digits."""
    digits: int = 10_000
    """Training scenes of one digit."""
    val_digits: int = 1000
    """Validation scenes of one digit."""
    image_size: int = 32
    """Height and width of the images of one digit."""
    tap: tuple[int, int] = (300, 33)
    """Timestep and block of kNN, linear probe, attention and DifFeed; tools/sweep.py finds the
    best. The timestep is that of the scenes too."""
    random_tap: tuple[int, int] = (150, 30)
    """The same for weights that are not pretrained."""
    pool: int = 4
    """Linear probe and kNN pool the map to N x N."""
    cache_pool: int = 8
    """Heads pool the map to N x N."""
    l2: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)
    """Strengths of the linear probe, of which held-out training images select one."""
    k: int = 5
    """Neighbors of kNN."""
    timesteps: tuple[int, ...] = (150, 300, 450)
    """Timesteps of the DifFormer head."""
    blocks: tuple[int, ...] = (12, 30, 33)
    """Blocks of the DifFormer head."""
    steps: dict[str, int] = field(
        default_factory=lambda: {"attention": 400, "difformer": 300, "difffeed": 120}
    )
    """Least number of training steps of each head."""
    width: int = 128
    """Width of the heads."""
    upernet: str = "upernet_gd_probe_sample.py"
    """Config of the UperNet."""
    upernet_options: tuple[str, ...] = ()
    """Changes in it: keys and values (JSON)."""
    maskrcnn: str = "mask_rcnn_gd_probe_sample.yaml"
    """Config of the Mask R-CNN."""
    maskrcnn_options: tuple[str, ...] = ()
    """Changes in it: keys and values."""

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("labels", all(0 < share <= 1 for share in self.labels), "above 0 and up to 1"),
            ("seeds", min(self.seeds) >= 0, "at least 0"),
            ("pool", 1 <= self.pool <= self.cache_pool, f"from 1 to {self.cache_pool}"),
            ("digits", self.digits >= 20, "at least 20"),
            ("scenes", self.scenes >= 1, "at least 1"),
        ):
            if not ok:
                raise UserError(f"--{name} must be {allowed}, got {getattr(self, name)}")


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
