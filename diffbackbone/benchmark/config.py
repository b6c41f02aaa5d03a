"""Options of the benchmark, and the rows that they ask for."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

import torch

from diffbackbone import UNetConfig
from diffbackbone.utils import UserError

PASSES: dict[str, tuple[tuple[int, ...], str | None]] = {
    "b24": ((24,), None),
    "taps": ((24, 27, 30, 33), None),
    "bottleneck": ((24,), "bottleneck"),
    "windowed": ((24,), "windowed"),
}
"""Cases of the backbone alone: blocks, 1-based, and feedback."""
STEPS = {
    "upernet": ("upernet_gd_t90_b33-30-27-24_ade20k.py", 512, 2),
    "upernet_difffeed": ("upernet_difffeed_ade20k.py", 512, 2),
    "mask_rcnn": ("mask_rcnn_gd_t75_b24.yaml", 1024, 1),
    "mask_rcnn_difffeed": ("mask_rcnn_difffeed.yaml", 1024, 1),
}
"""Cases of whole training steps: config, default size and batch."""
CHECKOUTS = {
    "guided-diffusion": ("openai/guided-diffusion", "guided_diffusion/unet.py"),
    "diffssl": ("soumik-kanad/diffssl", "ssl_diff/__init__.py"),
}
"""GitHub repository of each reference, and a file that its checkout holds."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str  # a key of PASSES or STEPS
    size: int  # height and width in pixels
    batch: int
    dtype: str
    mode: str  # "forward", or forward and backward: "frozen", "finetuned"
    execution: str = "eager"  # or "compiled"
    reference: str | None = None  # "cpu" is ours in float32 on the CPU, compared but not timed

    def __str__(self) -> str:
        text = f"{self.name} {self.size} px x {self.batch} {self.dtype} {self.mode} "
        return text + self.execution + (f" vs {self.reference}" if self.reference else "")


@dataclasses.dataclass
class BenchmarkConfig:
    """Time our backbone beside published code, and whole training steps of the frameworks.

    Every case and reference is a row. b24 is block 24, taps are blocks 33, 30, 27 and 24,
    bottleneck and windowed are block 24 after DifFeed's two passes: forward is inference, frozen
    (which trains feedback layers at most) and finetuned (the U-Net too) are a forward and a
    backward pass. Both implementations get the same weights, x_t and t. Their outputs and gradients
    are compared first; a row where they differ is marked wrong and not timed. Then they take turns;
    the ratio is the median over the rounds of the reference's time by ours. In half precision the
    references run in their own float16 on a GPU, also beside ours in bfloat16; on a CPU in bfloat16
    under autocast.

    upernet and mask_rcnn are training steps as MMSegmentation and Detectron2 do them, with model
    and optimizer of this project's configs, on a synthetic batch. Heads start from random weights,
    so the mask head meets fewer objects than in a trained detector. Half precision is the
    frameworks' own and needs a GPU.

    Each implementation has a process of its own. Peak memory is that of the timed steps, weights
    included: on a CPU the resident set beyond the loaded code, on a GPU what torch allocated.
    FLOP/s are set against a square matrix product in the same process.

    --suite gpu runs everything that a GPU is wanted for; see --suite gpu --help.
    """

    cases: tuple[
        Literal[
            "b24", "taps", "bottleneck", "windowed",
            "upernet", "upernet_difffeed", "mask_rcnn", "mask_rcnn_difffeed",
        ],
        ...,
    ] = tuple(PASSES)  # fmt: skip
    """Every combination of cases, sizes, dtypes, modes and execution is measured."""
    sizes: tuple[int, ...] = ()
    """Height and width in pixels; default: 256, 512 (upernet), 1024 (mask_rcnn)."""
    batch: int | None = None
    """Images in a batch; default: 1, 2 for upernet."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    modes: tuple[Literal["forward", "frozen", "finetuned"], ...] = ()
    """Default: forward; of training steps frozen and finetuned."""
    execution: tuple[Literal["eager", "compiled"], ...] = ("eager",)
    """Training steps are eager."""
    reference_guided_diffusion: Path | None = None
    """Checkout of github.com/openai/guided-diffusion."""
    reference_diffssl: Path | None = None
    """Checkout of github.com/soumik-kanad/diffssl."""
    unet: str = "gd256_uncond"
    """Preset of the U-Net."""
    checkpoint: str | None = None
    """Its weights; random ones if left out."""
    activation_checkpointing: bool | None = None
    """Ours recomputes blocks in the backward pass; default: as training steps' configs say."""
    head_channels: int | None = None
    """Width of the heads of training steps; the config's if left out."""
    device: Literal["cpu", "cuda"] | None = None
    """A GPU if there is one."""
    repeats: int = 5
    """Rounds."""
    timeout: float = 3600
    """Seconds that a row may take."""
    out: Path = Path("work_dirs/benchmark")
    """Folder of benchmark.json and benchmark.md."""

    def __post_init__(self) -> None:
        UNetConfig.from_preset(self.unet)  # rejects unknown ones
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        for name, folder in self.checkouts().items():
            repository, file = CHECKOUTS[name]
            if not (folder / file).is_file():
                source = f"git clone https://github.com/{repository}"
                raise UserError(f"--reference-{name} {folder}: there is no {file}; {source}")

    def checkouts(self) -> dict[str, Path]:
        """Return the checkouts that are given."""
        given = {
            "guided-diffusion": self.reference_guided_diffusion,
            "diffssl": self.reference_diffssl,
        }
        return {name: folder.resolve() for name, folder in given.items() if folder is not None}

    def plan(self) -> list[Case]:
        """Return the rows, case by case, small sizes first."""
        plan = []
        for name in dict.fromkeys(self.cases):
            _, size, batch = STEPS.get(name, ("", 256, 1))
            modes = self.modes or ("forward",)
            execution, references = self.execution, list(self.checkouts())
            if name in STEPS:
                modes = [mode for mode in self.modes if mode != "forward"] or [
                    "frozen",
                    "finetuned",
                ]
                execution, references = ("eager",), []
            elif PASSES[name][1] and "guided-diffusion" in references:
                references.remove("guided-diffusion")  # it has no feedback
            sizes = sorted(self.sizes or (size,))
            options = (sizes, self.dtypes, modes, execution, references or [None])
            for size, dtype, *rest in itertools.product(*map(dict.fromkeys, options)):
                plan.append(Case(name, size, self.batch or batch, dtype, *rest))
        return plan
