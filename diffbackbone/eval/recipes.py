"""Options of the classifier, and the recipes that set them.

docs/classification.md says which values are the paper's, which the published code's. Momentum and
weight decay are not printed; ``digits`` is for ``tools/make_sample_digits.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from diffbackbone.eval.options import BackboneOptions, CacheOptions, DataOptions
from diffbackbone.feedback import DEFAULT_LAYERS
from diffbackbone.utils import UserError

POOLS = {"linear": 2, "mlp": 4, "cnn": 8, "attention": 16, "difformer": 16}
RecipeName = Literal["probe", "probe-sgd", "ablation", "semi-1", "semi-10", "fgvc", "digits"]


@dataclass(kw_only=True)
class ClassifierConfig(DataOptions, BackboneOptions, CacheOptions):
    """Train and evaluate a classification head on the features of a diffusion U-Net.

    Images are in one folder for each class: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg. The
    recipe sets the defaults (see docs/classification.md). Nothing is selected by the
    validation images unless --select-on val asks for it: with several learning rates, held-out
    training images select learning rate and number of epochs (OUT/search), and the head is then
    trained so on all training images; with one, the last epoch counts. The rates share one pass
    over the images, or are trained one after the other with DifFeed or --finetune.

    OUT gets last.pt (for --resume), best.pt (the selected head), metrics.jsonl (one line per
    epoch), results.json, confusion.png and the tracker's logs. A run that was killed and resumed
    ends with the same numbers. Several processes: torchrun or accelerate launch.
    """

    head: Literal["linear", "mlp", "cnn", "attention", "difformer"] | None = None
    """Default: linear; attention with feedback."""
    feedback: str = "none"
    """DifFeed: run the U-Net twice. all, bottleneck (the paper's), windowed, multi-scale, or pairs
    of a decoder and an encoder block such as 24:14,21:17."""
    feedback_layers: tuple[Literal["conv", "batch", "group", "relu", "silu", "depthwise"], ...] = (
        DEFAULT_LAYERS
    )
    """Layers of each feedback; conv is 1x1."""
    first_blocks: tuple[int, ...] = ()
    """Blocks of DifFeed's first pass that the difformer head takes beside --blocks."""
    pool: int | None = None
    """Height and width of the pooled map; default: linear 2, mlp 4, cnn 8, transformers 16."""
    hidden: tuple[int, ...] = ()
    """Widths of the layers of mlp or cnn."""
    width: int = 1024
    """Width of the tokens."""
    layers: int = 2
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the transformer's MLPs over its own."""
    norm: Literal["layer", "batch"] = "layer"
    """Norm of the tokenizer."""
    proj: bool = True
    """Have the tokenizer's 1x1 convolution (attention)."""
    readout: Literal["cls", "mean"] = "cls"
    """What the transformer is read out by: a CLS token, or the mean of the tokens."""
    out: Path | None = None
    """Folder of the run; default: work_dirs/classifier, or evaluation/ beside an evaluated file."""
    recipe: RecipeName = "probe"
    """Sets the defaults of the other options."""
    resume: bool = False
    """Continue from OUT/last.pt, if it exists."""
    evaluate: Path | None = None
    """Train nothing; evaluate a best.pt, or a latest.pth of the published code."""
    published: str | None = None
    """Options that the published finetune.py was run with, as one string after an equals sign: they
    say how to build the network of latest.pth, in place of those here."""
    finetune: bool = False
    """Train the U-Net too."""
    epochs: int = 28
    """Epochs."""
    batch_size: int | None = None
    """Images of a step over all processes and accumulated parts; default: 128, 16 with feedback."""
    accumulate: int = 1
    """Parts that each process divides its share of a batch into, to save memory."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer."""
    lr: tuple[float, ...] = ()
    """Learning rate; of several the best is selected."""
    backbone_lr: float | None = None
    """Learning rate of a fine-tuned U-Net; default: that of the head."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay."""
    step: int = 7
    """Epochs between drops of the learning rate."""
    gamma: float = 0.1
    """Factor of such a drop."""
    augment: Literal["none", "flip", "crop-flip"] = "flip"
    """Augmentation of the training images."""
    subset: str | None = None
    """Train on a share (1%, 0.01) or on the images of a list file."""
    select_on: Literal["heldout", "val", "none"] | None = None
    """Images that select learning rate and epoch; default: heldout for several rates, else none."""
    holdout: float = 0.1
    """Share of the training images held out to select by."""
    eval_every: int = 1
    """Epochs between evaluations."""
    activation_checkpointing: bool = False
    """Save memory, take more time."""
    log_with: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Tracker, where it is installed."""


_PROBE = ClassifierConfig()
_SEMI = replace(_PROBE, finetune=True, optimizer="sgd", lr=(1e-3,))
RECIPES: dict[str, ClassifierConfig] = {
    "probe": _PROBE,
    "probe-sgd": replace(_PROBE, optimizer="sgd", augment="crop-flip"),
    "ablation": replace(_PROBE, epochs=15),
    "semi-1": replace(_SEMI, subset="1%"),
    "semi-10": replace(_SEMI, subset="10%"),
    "fgvc": _PROBE,
    "digits": replace(
        _PROBE, unet="tiny", epochs=20, batch_size=64, width=128, augment="none"
    ),
}  # fmt: skip
RECIPES = {name: replace(config, recipe=name) for name, config in RECIPES.items()}


def resolve(config: ClassifierConfig) -> ClassifierConfig:
    """Fill in the defaults that depend on other options.

    Raises:
        UserError: Options exclude each other.
    """
    feedback, several = config.feedback != "none", len(config.lr) > 1
    head = config.head or ("attention" if feedback else "linear")
    transformer, difformer = head in ("attention", "difformer"), head == "difformer"
    timesteps = config.timesteps or ((90, 150, 300) if difformer else (150,))
    default = 19 if config.recipe == "fgvc" and head == "linear" else 24
    blocks = config.blocks or ((19, 24, 30) if difformer else (default,))
    lr = 1e-4 if transformer else 1e-3
    if config.optimizer == "sgd":
        lr = 5e-2 if transformer and not feedback else 1e-2
    file = config.evaluate
    out = file.parent / "evaluation" / file.stem if file else Path("work_dirs/classifier")
    selecting = ("heldout",) if feedback or config.finetune else ("heldout", "val")
    wrong = None
    if len(timesteps) * len(blocks) > 1 and not difformer:
        wrong = f"--head {head} takes one block and timestep, got {blocks} and {timesteps}"
    elif config.published is not None and config.evaluate is None:
        wrong = "--published is for --evaluate latest.pth"
    elif config.first_blocks and not (feedback and difformer):
        wrong = "--first-blocks needs --feedback and --head difformer"
    elif several and (config.select_on or "heldout") not in selecting:
        wrong = f"several learning rates here need --select-on {' or '.join(selecting)}"
    elif config.cache is not None and config.augment == "crop-flip":
        wrong = "--cache: random crops change the features; use --augment flip or none"
    if wrong:
        raise UserError(wrong)
    return replace(
        config,
        out=config.out or out,
        image_size=config.image_size or config.network().image_size,
        head=head,
        pool=config.pool or POOLS[head],
        timesteps=timesteps,
        blocks=blocks,
        batch_size=config.batch_size or (16 if feedback else 128),
        lr=config.lr or (lr,),
        select_on=config.select_on or ("heldout" if several else "none"),
    )
