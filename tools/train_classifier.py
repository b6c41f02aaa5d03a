"""Train and evaluate a classification head on the features of a diffusion U-Net.

Images lie in one folder for each class: ``DIR/train/<class>/*.jpg``, ``DIR/val/<class>/*.jpg``. ::

    python tools/train_classifier.py --data DIR --checkpoint 256x256_diffusion_uncond.pt \
        --head linear --cache work_dirs/cache --lr 1e-4 3e-4 1e-3 3e-3 1e-2 --out work_dirs/linear
    python tools/train_classifier.py --data DIR --checkpoint ... --head difformer --out ...
    torchrun --nproc_per_node 4 tools/train_classifier.py --data DIR --checkpoint ... \
        --feedback bottleneck --recipe probe-sgd --out work_dirs/difffeed

A recipe sets what the command line leaves open:

* ``probe``: the protocol that the paper prints (Section 4): Adam, 28 epochs, learning rate times
  0.1 every 7, centre crops, mirrored at random. The batch of 128 is that of the published scripts
  (4 x 32). Adam's learning rate is printed nowhere: 1e-3 (linear, mlp, cnn) and 1e-4 (transformers)
  are this tool's own; give several with ``--lr`` to have one chosen.
* ``probe-sgd``: the same with what the published scripts have: SGD without momentum, learning rate
  1e-2 (linear), 5e-2 (attention, difformer), 1e-2 with batches of 16 (feedback), random crops.
* ``ablation``: ``probe`` with the 15 epochs of Table 2.
* ``semi-1``, ``semi-10``: 1% and 10% of the labels, class by class alike, U-Net fine-tuned
  (Table 5). The paper prints nothing more; SGD with 1e-3 is what a comment in the code advises.
* ``fgvc``: ``probe`` for the fine-grained sets of Table 7, whose sizes it compares.
* ``digits``: small numbers for ``tools/make_sample_digits.py`` and the ``tiny`` U-Net.

Nothing is chosen by the validation images unless ``--select-on val`` asks for it: with several
learning rates a tenth of the training images is held out to choose learning rate and epoch by,
with one the last epoch counts.

OUT gets ``last.pt`` (all that ``--resume`` needs), ``best.pt`` (the chosen head), ``metrics.jsonl``
(one line an epoch), ``results.json``, ``confusion.png`` and, where TensorBoard is installed, its
logs. What is drawn in a step follows from the seed, the epoch and the image or step alone, so a run
that was killed and resumed ends with the numbers of one that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _classification as common
import _common
import numpy as np
import torch
import torch.nn.functional as F
from _classification import FeatureOptions, ImageFolder, Processes, RowImages, ToolError
from torch import Tensor, nn

from diffbackbone import CheckpointError, DiffusionBackbone
from diffbackbone.checkpoint import read_checkpoint as read_weights
from diffbackbone.features import FeatureCache, Tap
from diffbackbone.feedback import STRATEGIES
from diffbackbone.heads import HEADS, build_head

FORMAT = "diffbackbone classifier 1"
TRANSFORMERS = ("attention", "difformer")
POOLS = {"linear": 2, "mlp": 4, "cnn": 8, "attention": 16, "difformer": 16}

_PROBE: dict[str, Any] = {
    "freeze": True,
    "optimizer": "adam",
    "epochs": 28,
    "step": 7,
    "gamma": 0.1,
    "batch_size": 128,
    "augment": "flip",
}
_SEMI = {**_PROBE, "freeze": False, "optimizer": "sgd", "lr": [1e-3]}
RECIPES: dict[str, dict[str, Any]] = {
    "probe": _PROBE,
    "probe-sgd": {**_PROBE, "optimizer": "sgd", "augment": "crop-flip", "batch_size": None},
    "ablation": {**_PROBE, "epochs": 15},
    "semi-1": {**_SEMI, "subset": "1%"},
    "semi-10": {**_SEMI, "subset": "10%"},
    "fgvc": dict(_PROBE),
    "digits": {
        **_PROBE,
        "unet": "tiny",
        "epochs": 20,
        "batch_size": 64,
        "width": 128,
        "augment": "none",
    },
}
TABLE_7 = {
    "Aircraft": (100, 6667, 3333),
    "Cars": (196, 8144, 8041),
    "CUB": (200, 5994, 5794),
    "Dogs": (120, 12000, 8580),
    "Flowers": (102, 2040, 6149),
    "NABirds": (555, 23929, 24633),
}
"""Classes, training and test images of the paper's fine-grained sets."""
_OF_TRAINING = ("last.pt", "best.pt", "metrics.jsonl")
"""Files that tell a training run from an evaluation."""
_FREE = {  # may differ between a run and its continuation
    "data", "train_dir", "val_dir", "workers", "device", "cache", "shard_mib", "overwrite_cache",
    "out", "resume", "evaluate", "epochs", "recipe", "checkpoint", "eval_every",
}  # fmt: skip
_MODEL = (  # what --evaluate takes from the checkpoint
    "unet", "head", "feedback", "timesteps", "blocks", "pool", "hidden", "width", "layers",
    "num_heads", "image_size", "value_range", "noise", "seed", "feature_dtype", "freeze",
)  # fmt: skip


# -------------------------------------------------------------------------------------- arguments


def build_parser() -> argparse.ArgumentParser:
    """The command line; a recipe's values are its defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default="work_dirs/classifier",
        help="folder of the run; of --evaluate: by default evaluation/ beside the checkpoint",
    )  # fmt: skip
    parser.add_argument("--recipe", choices=RECIPES, default="probe", help="see above")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, if any")
    parser.add_argument(
        "--evaluate", metavar="FILE", help="train nothing: evaluate a best.pt or last.pt"
    )
    common.add_data_arguments(parser)
    common.add_backbone_arguments(parser)
    common.add_cache_arguments(parser)
    head = parser.add_argument_group("head")
    head.add_argument("--head", choices=HEADS, help="default: linear; attention with feedback")
    head.add_argument(
        "--feedback", choices=("none", *STRATEGIES), default="none",
        help="DifFeed: run the U-Net twice (the paper takes bottleneck)",
    )  # fmt: skip
    head.add_argument("--pool", type=int, help=f"sides of the pooled map; default: {POOLS}")
    head.add_argument("--hidden", type=int, nargs="+", help="widths of the MLP's or CNN's layers")
    head.add_argument("--width", type=int, default=1024, help="width of the tokens")
    head.add_argument("--layers", type=int, default=2, help="transformer blocks")
    head.add_argument("--num-heads", type=int, default=8, help="attention heads")
    train = parser.add_argument_group("training (default: the recipe's)")
    mode = train.add_mutually_exclusive_group()
    mode.add_argument("--freeze", action="store_true", default=None, help="keep the U-Net")
    mode.add_argument("--finetune", action="store_false", dest="freeze", help="train it too")
    train.add_argument("--epochs", type=int)
    train.add_argument("--batch-size", type=int, help="over all processes")
    train.add_argument("--optimizer", choices=("adam", "sgd"))
    train.add_argument("--lr", type=float, nargs="+", help="several: one pass, the best is chosen")
    train.add_argument("--backbone-lr", type=float, help="of a fine-tuned U-Net; default: as --lr")
    train.add_argument("--momentum", type=float, default=0.0, help="of SGD")
    train.add_argument("--weight-decay", type=float, default=0.0)
    train.add_argument("--step", type=int, help="epochs between drops of the learning rate")
    train.add_argument("--gamma", type=float, help="factor of such a drop")
    train.add_argument("--augment", choices=("none", "flip", "crop-flip"))
    train.add_argument("--subset", help="train on a share (1%%, 0.01) or the images of a list file")
    train.add_argument(
        "--select-on", choices=("auto", "heldout", "val", "none"), default="auto",
        help="what chooses learning rate and epoch; auto: heldout with several rates, else none",
    )  # fmt: skip
    train.add_argument("--holdout", type=float, default=0.1, help="share held out to choose by")
    train.add_argument("--eval-every", type=int, default=1, help="epochs between evaluations")
    train.add_argument(
        "--activation-checkpointing", action="store_true", help="less memory, more time"
    )
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line: a recipe, or a checkpoint to evaluate, gives the defaults.

    Raises:
        ToolError: The values don't go together.
    """
    parser = build_parser()
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**RECIPES[known.recipe])
    if known.evaluate:
        path = Path(known.evaluate)
        saved = read_checkpoint(path)["settings"]
        parser.set_defaults(**{name: saved[name] for name in _MODEL if name in saved})
        parser.set_defaults(out=str(path.parent / "evaluation" / path.stem))
    args = parser.parse_args(argv)
    return resolve(args)


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other arguments, and check that all go together.

    Raises:
        ToolError: They don't.
    """
    common.check_common(args)
    feedback = args.feedback != "none"
    args.head = args.head or ("attention" if feedback else "linear")
    difformer = args.head == "difformer"
    args.timesteps = list(args.timesteps or ((90, 150, 300) if difformer else (150,)))
    args.blocks = list(args.blocks or ((19, 24, 30) if difformer else (24,)))
    taps = len(args.timesteps) * len(args.blocks)
    if taps > 1 and not difformer:
        raise ToolError(
            f"--head {args.head} takes one map, but {len(args.blocks)} blocks at "
            f"{len(args.timesteps)} timesteps make {taps}; difformer takes several"
        )
    args.pool = POOLS[args.head] if args.pool is None else args.pool
    if args.hidden and args.head not in ("mlp", "cnn"):
        raise ToolError(f"--hidden is for --head mlp and cnn, not {args.head}")
    if args.batch_size is None:  # the published scripts, over their four GPUs
        args.batch_size = 16 if feedback else 128
    if args.lr is None:
        if args.optimizer == "sgd":
            args.lr = [5e-2 if args.head in TRANSFORMERS and not feedback else 1e-2]
        else:
            args.lr = [1e-4 if args.head in TRANSFORMERS else 1e-3]
    several = len(args.lr) > 1
    if args.select_on == "auto":
        args.select_on = "heldout" if several else "none"
    counts = ("epochs", "batch_size", "step", "eval_every", "pool", "width", "layers")
    common.check_at_least_one(args, *counts)
    rates = [*args.lr, *([] if args.backbone_lr is None else [args.backbone_lr])]
    if any(not 0 < lr < 1e30 for lr in rates) or len(set(args.lr)) < len(args.lr):
        raise ToolError(f"learning rates must be different and above 0, got {rates}")
    if not 0 < args.gamma <= 1 or not 0 < args.holdout < 1:
        raise ToolError("--gamma must lie above 0 and up to 1, --holdout between 0 and 1")
    if several and (feedback or not args.freeze):
        raise ToolError(
            "several learning rates share one pass through a U-Net that stays the same: give one "
            "with --feedback or --finetune"
        )
    if several and args.select_on == "none":
        raise ToolError("several learning rates need --select-on heldout or val to choose one")
    if args.cache:
        why = None
        if feedback:
            why = "--feedback is trained, and the features change with it"
        elif not args.freeze:
            why = "--finetune changes the features"
        elif args.noise == "random":
            why = "--noise random changes the features; take fixed or none"
        elif args.augment == "crop-flip":
            why = "random crops change the features; take --augment flip or none"
        if why:
            raise ToolError(f"--cache: {why}")
    if args.backbone_lr is not None and args.freeze:
        raise ToolError("--backbone-lr is for --finetune")
    return args


# ------------------------------------------------------------------------------------------ model


class Classifier(nn.Module):
    """A backbone with one head, or with one head for each learning rate.

    Args:
        backbone: Gives the taps.
        heads: Heads alike.
        options: Which taps.
    """

    def __init__(
        self, backbone: DiffusionBackbone, heads: Sequence[nn.Module], options: FeatureOptions
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.options = options
        self.taps: list[Tap] = [(t, b) for t in options.timesteps for b in options.blocks]

    @property
    def constant(self) -> bool:
        """Whether the features of an image stay the same during training."""
        return self.backbone.frozen and self.backbone.feedback is None

    def forward(self, x: Tensor | Mapping[Tap, Tensor]) -> list[Tensor]:
        """Classify.

        Args:
            x: Images (N, 3, H, W), or features ``{(t, b): (N, C, h, w)}`` where these are constant.

        Returns:
            Logits (N, num_classes) of each head.
        """
        with common.autocast(next(self.parameters()).device, self.options.compute):
            if isinstance(x, Tensor):
                x = self.backbone.forward_taps(x, self.options.timesteps, self.options.blocks)
            inputs = x if len(self.taps) > 1 or self._takes_several() else x[self.taps[0]]
            return [head(inputs).float() for head in self.heads]

    def _takes_several(self) -> bool:
        return isinstance(self.heads[0], HEADS["difformer"])


def build_model(
    args: argparse.Namespace, classes: int, compute: torch.dtype | None, heads: int = 1
) -> Classifier:
    """Build backbone and heads; all heads start with the same values.

    Raises:
        ToolError: A head does not fit the taps.
    """
    backbone = common.build_backbone(
        args,
        None if args.feedback == "none" else args.feedback,
        args.freeze,
        activation_checkpointing=args.activation_checkpointing,
    )
    infos = [backbone.unet.config.blocks[b] for b in args.blocks]
    channels = [info.channels for info in infos]
    sizes = [math.ceil(args.image_size / info.stride) for info in infos]
    transformer = {
        "pool": args.pool,
        "width": args.width,
        "layers": args.layers,
        "num_heads": args.num_heads,
    }
    hidden = {"hidden": tuple(args.hidden)} if args.hidden else {}
    arguments: dict[str, Any] = {
        "linear": {"pool": args.pool},
        "mlp": {"pool": args.pool, **hidden},
        "cnn": {"pool": args.pool, **hidden},
        "attention": {"size": sizes[0], **transformer},
        "difformer": {
            "sizes": sizes,
            "blocks": args.blocks,
            "timesteps": args.timesteps,
            **transformer,
        },
    }[args.head]
    built = []
    for _ in range(heads):
        torch.manual_seed(args.seed + 1)
        try:
            one = channels if args.head == "difformer" else channels[0]
            built.append(build_head(args.head, one, classes, **arguments))
        except ValueError as error:
            raise ToolError(f"--head {args.head} does not fit: {error}") from error
    options = FeatureOptions(
        tuple(args.timesteps),
        tuple(args.blocks),
        args.pool,
        args.feature_dtype,
        args.image_size,
        compute,
    )
    return Classifier(backbone, built, options)


def build_optimizer(args: argparse.Namespace, model: Classifier) -> torch.optim.Optimizer:
    """One optimizer for all: a group for each head, or for head, feedback and U-Net.

    Adam and SGD work element by element, so a group is an optimizer of its own.
    """
    groups = [
        {"params": list(head.parameters()), "lr": lr, "base_lr": lr}
        for head, lr in zip(model.heads, args.lr)
    ]
    if model.backbone.feedback is not None:
        groups[0]["params"] += list(model.backbone.feedback.parameters())
    if not args.freeze:
        unet = [p for p in model.backbone.unet.parameters() if p.requires_grad]
        lr = args.lr[0] if args.backbone_lr is None else args.backbone_lr
        groups.append({"params": unet, "lr": lr, "base_lr": lr})
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=args.weight_decay)
    return torch.optim.SGD(groups, momentum=args.momentum, weight_decay=args.weight_decay)


# ----------------------------------------------------------------------------------------- batches


@dataclass
class Source:
    """Where the features or images of a folder come from.

    Attributes:
        folder: The images.
        args: The command line.
        processes: The processes.
        cache: Their features, if they are cached.
    """

    folder: ImageFolder
    args: argparse.Namespace
    processes: Processes
    cache: FeatureCache | None = None

    def batches(
        self, model: Classifier, epoch: int, batches: Sequence[np.ndarray], crop: bool, desc: str
    ) -> Iterator[tuple[Tensor | dict[Tap, Tensor], Tensor]]:
        """Inputs of the model and labels, batch by batch.

        Args:
            model: Which features, and the backbone that computes them where there is no cache.
            epoch: Random crops depend on it.
            batches: Rows of each batch (n,).
            crop: Whether to crop at random.
            desc: For the progress bar.
        """
        device, count = self.processes.device, len(self.folder.listing)
        labels = torch.from_numpy(self.folder.labels)
        bar = self.processes.bar(batches, len(batches), desc)
        if self.cache is not None:
            for rows in bar:
                found = self.cache.read(rows, model.taps)
                features = {tap: x.to(device, non_blocking=True) for tap, x in found.items()}
                yield features, labels[rows % count].to(device)
            return
        images = RowImages(self.folder, self.args.image_size, seed=self.args.seed if crop else None)
        loaded = common.image_batches(images, epoch, batches, self.args.workers)
        for number, (rows, pixels) in enumerate(zip(bar, loaded)):
            # fresh noise and dropout follow from these numbers alone
            common.seed_step(self.args.seed, epoch, number, self.processes.rank)
            pixels = pixels.to(device, non_blocking=True)
            own = labels[rows % count].to(device)
            yield model.options.extract(model.backbone, pixels) if model.constant else pixels, own


def train_epoch(
    model: Classifier,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Source,
    learn_from: np.ndarray,
    epoch: int,
) -> dict[str, list[float]]:
    """One epoch; every image once, mirrored or not, in an order of this epoch.

    Args:
        model: The model.
        wrapped: The same, perhaps in DistributedDataParallel.
        optimizer: Of its parameters.
        source: Training images.
        learn_from: Those of them that are trained on (N,).
        epoch: From 0.

    Returns:
        Loss and top-1 accuracy of each head over the epoch.
    """
    args, processes = source.args, source.processes
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * args.gamma ** (epoch // args.step)
    total, world = len(source.folder.listing), processes.world_size
    order = learn_from[common.permutation(args.seed, epoch, len(learn_from))]
    mirrored = np.zeros(total, dtype=bool)
    if args.augment != "none":
        mirrored = common.flips(args.seed, epoch, total)
    rows = order + total * mirrored[order]
    shares, weights = [], []
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start : start + args.batch_size]
        mine = batch[
            len(batch) * processes.rank // world : len(batch) * (processes.rank + 1) // world
        ]
        # a process without a share still has to take part in the step
        shares.append(mine if len(mine) else batch[:1])
        weights.append((len(mine) > 0) * world / len(batch))
    model.train()
    sums = torch.zeros(2, len(model.heads), dtype=torch.float64)
    seen = source.batches(model, epoch, shares, args.augment == "crop-flip", f"epoch {epoch + 1}")
    for (inputs, labels), weight in zip(seen, weights):
        logits = wrapped(inputs)
        losses = torch.stack([F.cross_entropy(x, labels, reduction="sum") for x in logits])
        optimizer.zero_grad(set_to_none=True)
        (losses.sum() * weight).backward()
        optimizer.step()
        if weight:
            sums[0] += losses.detach().cpu().double()
            sums[1] += torch.stack(
                [(common.true_ranks(x.detach(), labels) == 0).sum() for x in logits]
            ).cpu()
    loss, top1 = (processes.sum(sums) / len(order)).tolist()
    return {"train_loss": loss, "train_top1": top1}


@torch.no_grad()
def evaluate(
    model: Classifier, source: Source, indices: np.ndarray, desc: str, confusion: bool = False
) -> tuple[list[dict[str, float]], np.ndarray | None]:
    """Evaluate each head; every image counts once, whatever the number of processes.

    Args:
        model: The model.
        source: The images.
        indices: Those of them that count (N,).
        desc: For the progress bar.
        confusion: Count classes against classes, for the first head.

    Returns:
        ``top1``, ``top5``, ``loss`` and ``images`` of each head, and the counts (K, K).
    """
    processes, size = source.processes, model.options.batch
    classes = len(source.folder.listing.classes)
    mine = indices[processes.rank :: processes.world_size]
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    sums = torch.zeros(4, len(model.heads), dtype=torch.float64)
    counts = torch.zeros(classes * classes if confusion else 0, dtype=torch.int64)
    model.eval()
    for inputs, labels in source.batches(model, 0, batches, False, desc):
        for k, logits in enumerate(model(inputs)):
            ranks = common.true_ranks(logits, labels)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            row = [(ranks == 0).sum(), (ranks < 5).sum(), loss, torch.tensor(len(labels))]
            sums[:, k] += torch.stack([x.cpu().double() for x in row])
            if confusion and k == 0:
                pairs = (labels * classes + logits.argmax(1)).cpu()
                counts += torch.bincount(pairs, minlength=len(counts))
    sums = processes.sum(sums)
    found = [
        {"top1": right / n, "top5": five / n, "loss": loss / n, "images": int(n)}
        for right, five, loss, n in sums.T.tolist()
    ]
    if not confusion:
        return found, None
    return found, processes.sum(counts).reshape(classes, classes).numpy()


# ----------------------------------------------------------------------------------------- the run


def run(
    args: argparse.Namespace,
    processes: Processes | None = None,
    caches: tuple[FeatureCache, FeatureCache] | None = None,
) -> dict[str, Any]:
    """Train as the arguments say, or go on, and evaluate.

    Args:
        args: From :func:`parse`.
        processes: The processes; None starts them.
        caches: Features of training and validation images that hold these taps at least, and at
            least as large; None has them made where ``--cache`` says so.

    Returns:
        The content of ``results.json``.

    Raises:
        ToolError: It cannot be done as given.
        CacheError: The cache is of other settings, or cannot be written.
        CheckpointError: Weights don't fit.
    """
    processes = processes or Processes.start(args.device)
    compute = common.compute_dtype(args.precision, processes.device)
    out = Path(args.out)
    kept = _OF_TRAINING if args.evaluate else () if args.resume else (*_OF_TRAINING, "results.json")
    if any((out / name).is_file() for name in kept):
        way = "" if args.evaluate else "--resume goes on with it, or "
        raise ToolError(f"{out} already holds a run: {way}take another --out")
    train_root, val_root = common.find_folders(args.data, args.train_dir, args.val_dir)
    train = common.list_folder(train_root, None, args.value_range)
    val = common.list_folder(val_root, train.listing.classes, args.value_range)
    _report_data(processes, args, train, val)
    if args.subset:
        train = common.choose_subset(train, args.subset, args.seed)
        processes.say(f"subset {args.subset}: {len(train.listing)} training images")
    learn_from, held_out = np.arange(len(train.listing)), None
    if args.select_on == "heldout":
        learn_from, held_out = common.split_holdout(train.labels, args.holdout, args.seed)
    model = build_model(args, len(train.listing.classes), compute, len(args.lr))
    model.options.batch = math.ceil(args.batch_size / processes.world_size)
    common.warn_random(args, processes)
    settings = _settings(args, train, val)
    saved = None
    last = out / "last.pt"
    if args.evaluate or last.is_file():
        saved = read_checkpoint(Path(args.evaluate or last))
        if not args.evaluate:
            _check_settings(out, saved["settings"], settings)
        load_weights(model.backbone, saved["backbone"])  # before features are taken from it
    cached = args.cache and all((Path(args.cache, p) / "manifest.json").is_file() for p in SPLITS)
    if processes.first and not cached and caches is None:
        common.check_images(train)
        common.check_images(val)
    processes.barrier()
    if args.cache and caches is None:
        caches = _open_caches(args, model, (train, val), processes)
    model.to(processes.device)
    sources = Source(train, args, processes), Source(val, args, processes)
    if caches is not None:
        sources[0].cache, sources[1].cache = caches
    if args.evaluate:
        return _evaluate_only(args, model, saved, sources[1], settings, processes)
    return _Run(args, model, saved, sources, learn_from, held_out, settings, processes).finish()


SPLITS = ("train", "val")


def _open_caches(
    args: argparse.Namespace,
    model: Classifier,
    folders: tuple[ImageFolder, ImageFolder],
    processes: Processes,
) -> tuple[FeatureCache, FeatureCache]:
    opened = [
        common.open_cache(
            Path(args.cache) / split,
            folder,
            model.backbone,
            model.options,
            processes,
            copies=2 if split == "train" and args.augment == "flip" else 1,
            workers=args.workers,
            shard_mib=args.shard_mib,
            overwrite=args.overwrite_cache,
        )
        for split, folder in zip(SPLITS, folders)
    ]
    return opened[0], opened[1]


def _report_data(
    processes: Processes, args: argparse.Namespace, train: ImageFolder, val: ImageFolder
) -> None:
    """Say what there is, and what is unusual about it."""
    classes = train.listing.classes
    numbers = (len(classes), len(train.listing), len(val.listing))
    processes.say(f"{numbers[0]} classes, {numbers[1]} training and {numbers[2]} validation images")
    absent = len(classes) - len(set(val.listing.labels))
    if absent:
        processes.say(f"warning: {absent} classes have no validation image")
    if args.recipe == "fgvc":
        name = next((n for n, sizes in TABLE_7.items() if sizes[0] == numbers[0]), None)
        if name is None:
            sets = ", ".join(f"{n} {sizes[0]}" for n, sizes in TABLE_7.items())
            processes.say(f"note: no set of the paper's Table 7 has {numbers[0]} classes: {sets}")
        elif TABLE_7[name] != numbers:
            processes.say(
                f"note: {name} has {TABLE_7[name][1]} training and {TABLE_7[name][2]} test images "
                "in the paper's Table 7"
            )


def _settings(args: argparse.Namespace, train: ImageFolder, val: ImageFolder) -> dict[str, Any]:
    """The command line and the data, as plain values."""
    settings = json.loads(json.dumps(vars(args)))
    for split, folder in zip(SPLITS, (train, val)):
        names = json.dumps([folder.listing.paths, folder.listing.labels])
        settings[f"{split}_images"] = len(folder.listing)
        settings[f"{split}_sha256"] = hashlib.sha256(names.encode()).hexdigest()
    settings["classes"] = list(train.listing.classes)
    return settings


def _check_settings(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = [n for n in {**before, **now} if n not in _FREE and before.get(n) != now.get(n)]
    if names:
        lines = [f"{n}: {before.get(n)!r} before, {now.get(n)!r} now" for n in names]
        raise ToolError(f"{out} is a run of other settings:\n  " + "\n  ".join(lines))


def _evaluate_only(
    args: argparse.Namespace,
    model: Classifier,
    saved: Mapping[str, Any],
    source: Source,
    settings: Mapping[str, Any],
    processes: Processes,
) -> dict[str, Any]:
    """Evaluate a saved head on the validation images."""
    if saved["settings"]["classes"] != settings["classes"]:
        raise ToolError(f"{args.evaluate} was trained on other classes than those of the data")
    best = saved["best"] or {"index": 0, "lr": saved["settings"]["lr"][0]}  # none chosen yet
    _load_weights(model, saved, best["index"])
    (scores,), counts = evaluate(model, source, np.arange(len(source.folder.listing)), "val", True)
    results = {"evaluated": str(args.evaluate), "lr": best["lr"], "val": scores}
    _write_results(Path(args.out), results, counts, settings["classes"], processes)
    processes.say(
        f"val: top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}\n{args.out}: results.json, "
        "confusion.png"
    )
    return results


class _Run:
    """A training run: its state, from epoch to epoch."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: Classifier,
        saved: Mapping[str, Any] | None,
        sources: tuple[Source, Source],
        learn_from: np.ndarray,
        held_out: np.ndarray | None,
        settings: dict[str, Any],
        processes: Processes,
    ) -> None:
        self.args = args
        self.out = Path(args.out)
        self.model = model
        self.train, self.val = sources
        self.learn_from = learn_from
        self.held_out = held_out
        self.settings = settings
        self.processes = processes
        self.optimizer = build_optimizer(args, model)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        if saved is not None:
            self._resume(saved)
        self.wrapped: nn.Module = model
        if processes.world_size > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def _resume(self, saved: Mapping[str, Any]) -> None:
        for index, head in enumerate(self.model.heads):
            head.load_state_dict(saved["heads"][index])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.history, self.best = saved["history"], saved["best"]
        self.processes.say(f"resumed after epoch {len(self.history)}")

    def finish(self) -> dict[str, Any]:
        """Train the epochs that are left, and evaluate what was chosen."""
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        trainable //= 1 if len(self.args.lr) == 1 else len(self.args.lr)
        self.processes.say(f"{trainable:,} trained parameters")
        board = self._board()
        for epoch in range(len(self.history), self.args.epochs):
            self._epoch(epoch, board)
        if board is not None:
            board.close()
        return self._report(trainable)

    def _board(self) -> Any:
        if not self.processes.first:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.processes.say("note: TensorBoard is not installed; metrics.jsonl has the numbers")
            return None
        return SummaryWriter(str(self.out / "tensorboard"), purge_step=len(self.history))

    def _epoch(self, epoch: int, board: Any) -> None:
        args, processes = self.args, self.processes
        start = time.perf_counter()
        record: dict[str, Any] = {"epoch": epoch + 1}
        record.update(
            train_epoch(
                self.model, self.wrapped, self.optimizer, self.train, self.learn_from, epoch
            )
        )
        if not any(math.isfinite(loss) for loss in record["train_loss"]):
            raise ToolError(
                f"training diverged in epoch {epoch + 1}: the loss is not finite. Take a smaller "
                f"--lr than {min(args.lr)}; the epochs before are kept in {self.out}"
            )
        record["seconds"] = {"train": time.perf_counter() - start}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            self._share_buffers()
            start = time.perf_counter()
            if self.held_out is not None:
                record["heldout"] = evaluate(self.model, self.train, self.held_out, "held out")[0]
            everything = np.arange(len(self.val.folder.listing))
            record["val"] = evaluate(self.model, self.val, everything, "val")[0]
            record["seconds"]["evaluate"] = time.perf_counter() - start
        self.history.append(record)
        improved = self._choose(record)
        if processes.first:
            if improved:
                self._save_best()
            self._save_last()
            common.write_lines(self.out / "metrics.jsonl", map(common.finite, self.history))
            if board is not None:
                self._log(board, record)
        self._say(record)
        processes.barrier()

    def _share_buffers(self) -> None:
        """All processes evaluate with the first one's running statistics."""
        if self.processes.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _choose(self, record: dict[str, Any]) -> bool:
        """Update the choice; ties go to the smaller loss, then to the earlier epoch and rate."""
        on = {"heldout": "heldout", "val": "val", "none": "val"}[self.args.select_on]
        if on not in record:
            return False
        improved = False
        for index in range(len(record[on])):
            key = _order(record, on, index)
            if self.best is None or self.args.select_on == "none" or key > self.best["key"]:
                self.best = {
                    "key": key,
                    "index": index,
                    "lr": self.args.lr[index],
                    "epoch": record["epoch"],
                    "selected_on": self.args.select_on,
                }
                improved = True
        return improved

    def _save_best(self) -> None:
        assert self.best is not None
        self._save(
            "best.pt",
            {
                "format": FORMAT,
                "settings": self.settings,
                "best": self.best,
                "head": self.model.heads[self.best["index"]].state_dict(),
                "backbone": self.model.backbone.state_dict(),
            },
        )

    def _save_last(self) -> None:
        self._save(
            "last.pt",
            {
                "format": FORMAT,
                "settings": self.settings,
                "best": self.best,
                "history": self.history,
                "heads": [head.state_dict() for head in self.model.heads],
                "backbone": self.model.backbone.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def _save(self, name: str, content: Mapping[str, Any]) -> None:
        common.write_whole(self.out / name, lambda path: torch.save(dict(content), path))

    def _log(self, board: Any, record: Mapping[str, Any]) -> None:
        for index, lr in enumerate(self.args.lr):
            suffix = f"/lr {lr:g}" if len(self.args.lr) > 1 else ""
            for name in ("train_loss", "train_top1"):
                board.add_scalar(name + suffix, record[name][index], record["epoch"])
            for split in ("heldout", "val"):
                for name, value in record.get(split, [{}] * (index + 1))[index].items():
                    if name != "images":
                        board.add_scalar(f"{split}_{name}{suffix}", value, record["epoch"])
        board.flush()

    def _say(self, record: Mapping[str, Any]) -> None:
        index = 0 if self.best is None else self.best["index"]
        text = f"epoch {record['epoch']}/{self.args.epochs}"
        if len(self.args.lr) > 1:
            text += f" (lr {self.args.lr[index]:g} leads)"
        text += f": loss {record['train_loss'][index]:.4f}"
        for split, name in (("heldout", "held out"), ("val", "val")):
            if split in record:
                text += f", {name} top-1 {record[split][index]['top1']:.2%}"
        seconds = record["seconds"]
        self.processes.say(f"{text} ({seconds['train']:.3g} s)")

    def _report(self, trainable: int) -> dict[str, Any]:
        best = self.best
        assert best is not None
        _load_weights(self.model, read_checkpoint(self.out / "best.pt"), 0)
        everything = np.arange(len(self.val.folder.listing))
        kept = self.model.heads
        self.model.heads = nn.ModuleList([kept[0]])
        (scores,), counts = evaluate(self.model, self.val, everything, "val", True)
        self.model.heads = kept
        evaluated = [record for record in self.history if "val" in record]
        rates = []
        for index, lr in enumerate(self.args.lr):
            on = "heldout" if self.held_out is not None else "val"
            top = max(evaluated, key=lambda r: _order(r, on, index))  # the first of equals
            if self.args.select_on == "none":
                top = evaluated[-1]
            rates.append(
                {
                    "lr": lr,
                    "epoch": top["epoch"],
                    **({"heldout_top1": top["heldout"][index]["top1"]} if on == "heldout" else {}),
                    "val_top1": top["val"][index]["top1"],
                    "val_top5": top["val"][index]["top5"],
                }
            )
        results = {
            "head": self.args.head,
            "feedback": self.args.feedback,
            "recipe": self.args.recipe,
            "trained_parameters": trainable,
            "frozen": bool(self.args.freeze),
            "selected_on": self.args.select_on,
            "lr": best["lr"],
            "epoch": best["epoch"],
            "val": scores,
            "learning_rates": rates,
            "settings": self.settings,
            "seconds": {
                "train_epochs": [record["seconds"]["train"] for record in self.history],
                "total": sum(sum(record["seconds"].values()) for record in self.history),
            },
        }
        _write_results(self.out, results, counts, self.settings["classes"], self.processes)
        self._say_results(results)
        return results

    def _say_results(self, results: Mapping[str, Any]) -> None:
        if len(results["learning_rates"]) > 1:
            for rate in results["learning_rates"]:
                held = f"held out {rate['heldout_top1']:.2%}, " if "heldout_top1" in rate else ""
                self.processes.say(
                    f"  lr {rate['lr']:g}: {held}val {rate['val_top1']:.2%} (epoch {rate['epoch']})"
                )
        how = {
            "none": "the last epoch; nothing was chosen",
            "heldout": "chosen on held-out training images",
            "val": "CHOSEN ON THE VALIDATION IMAGES, so these numbers are too good",
        }[self.args.select_on]
        val = results["val"]
        self.processes.say(
            f"val: top-1 {val['top1']:.2%}, top-5 {val['top5']:.2%} of {val['images']} images; lr "
            f"{results['lr']:g}, epoch {results['epoch']} ({how})\n{self.out}: results.json, "
            "confusion.png, best.pt"
        )


def _order(record: Mapping[str, Any], on: str, index: int) -> list[float]:
    """What is chosen by: top-1 accuracy, then the loss; a diverged head comes last."""
    scores = record[on][index]
    finite = math.isfinite(scores["loss"]) and math.isfinite(record["train_loss"][index])
    return [scores["top1"], -scores["loss"]] if finite else [-1.0, 0.0]


def _write_results(
    out: Path,
    results: Mapping[str, Any],
    counts: np.ndarray | None,
    classes: Sequence[str],
    processes: Processes,
) -> None:
    if processes.first:
        assert counts is not None
        _common.save_picture(common.draw_confusion(counts, classes), out / "confusion.png")
        common.write_json(
            out / "results.json", common.finite({**results, "confusion": counts.tolist()})
        )
    processes.barrier()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this tool: weights and plain values, no code.

    Raises:
        ToolError: There is none, it is damaged, or it is something else.
    """
    if not path.is_file():
        raise ToolError(f"there is no checkpoint {path}")
    try:
        content = read_weights(path, mapped=False)
    except Exception as error:  # a damaged file can fail in the reader in any way
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ToolError(f"{path} is damaged or holds more than weights: {first}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ToolError(f"{path} is no checkpoint of this tool")
    return content


def _load_weights(model: Classifier, saved: Mapping[str, Any], index: int) -> None:
    """Load one head, and what of the backbone was saved.

    Raises:
        ToolError: They are of another model.
    """
    head = saved["heads"][index] if "heads" in saved else saved["head"]
    load_weights(model.heads[0], head)
    load_weights(model.backbone, saved["backbone"])


def load_weights(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load what a checkpoint of this tool holds of a head or backbone.

    Raises:
        CheckpointError: A frozen U-Net has other weights than in training.
        ToolError: It is of another model.
    """
    try:
        module.load_state_dict(dict(state_dict))
    except CheckpointError:
        raise
    except RuntimeError as error:
        raise ToolError(f"the checkpoint's weights are of another model: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: It cannot be done as given; the message says why.
    """
    common.run_tool(lambda: parse(argv), run)


if __name__ == "__main__":
    main()
