"""Training loop of the classifier, for CPU, GPUs and several machines.

What is drawn in a step follows from the seed, the epoch and the image or step alone, and each
batch is divided among the processes, so results depend neither on interruptions nor, but for
rounding, on the number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.eval.data import ImageFolder, RowImages, load_batches, split_holdout
from diffbackbone.eval.features import CachedRows, FeatureCache, FeatureSpec, Tap
from diffbackbone.eval.knn import true_ranks
from diffbackbone.eval.recipes import ClassifierConfig
from diffbackbone.heads import DifFormerHead
from diffbackbone.utils import (
    RandomStream,
    UserError,
    atomic_write,
    seed_everything,
    write_json_lines,
)

FORMAT = "diffbackbone classifier 2"  # 2: the optimizer's state is named by parameters
METRICS = ("top1", "top5", "loss")
_WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


class DivergedError(UserError):
    """The loss of every head is infinite or not a number."""


class Classifier(nn.Module):
    """A backbone with a head for each learning rate; ``spec`` says which taps they take."""

    def __init__(
        self, backbone: DiffusionBackbone, heads: Sequence[nn.Module], spec: FeatureSpec
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.spec = spec

    def forward(self, x: Tensor | Mapping[Tap, Tensor]) -> list[Tensor]:
        """Return each head's logits (N, num_classes).

        Args:
            x: Images (N, 3, H, W), or their features ``{(t, b): (N, C, h, w)}``.
        """
        if isinstance(x, Tensor) and self.backbone.frozen and self.backbone.feedback is None:
            x = self.spec.extract(self.backbone, x)
        elif isinstance(x, Tensor):
            first = getattr(self.heads[0], "first_blocks", ())
            x = self.backbone.forward_taps(
                x, self.spec.timesteps, self.spec.blocks, first_blocks=first
            )
        inputs = x if isinstance(self.heads[0], DifFormerHead) else x[self.spec.taps[0]]
        return [head(inputs).float() for head in self.heads]


class Scores:
    """Loss, accuracy and confusion matrix of a head, over all processes."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.means = {
            name: MeanMetric(nan_strategy="disable").set_dtype(torch.float64).to(device)
            for name in METRICS
        }
        self.matrix = MulticlassConfusionMatrix(classes, validate_args=False).to(device)

    @torch.no_grad()
    def update(self, x: Tensor, labels: Tensor, count: int) -> None:
        """Count a batch, unless ``count`` is 0: logits (N, num_classes) and labels (N,)."""
        if not count:
            return
        ranks = true_ranks(x, labels)
        loss = F.cross_entropy(x, labels, reduction="none")
        for mean, values in zip(self.means.values(), (ranks < 1, ranks < 5, loss)):
            mean.update(values)
        self.matrix.update(x.argmax(1), labels)

    def compute(self) -> dict[str, float]:
        """Return ``top1``, ``top5``, ``loss`` and the number of ``images``."""
        means = {name: float(mean.compute()) for name, mean in self.means.items()}
        return {"images": int(self.confusion().sum()), **means}

    def confusion(self) -> Tensor:
        """Return how many images of class i (row) are taken for class j (column): (K, K)."""
        return self.matrix.compute().cpu()


@dataclass
class Trainer:
    """A model, its data and the state of its training.

    ``caches`` are the features of training and validation images, if there are any; ``settings``
    are those that its checkpoints hold; ``history`` has a record of each epoch; ``best`` is the
    selected head: learning rate, epoch, scores, confusion.
    """

    config: ClassifierConfig
    accelerator: Accelerator
    model: Classifier
    train: ImageFolder
    val: ImageFolder
    caches: Sequence[FeatureCache] | None
    settings: Mapping[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.learn_from, self.held_out = np.arange(len(self.train)), None
        if self.config.select_on == "heldout":
            self.learn_from, self.held_out = split_holdout(
                self.train.labels, self.config.holdout, self.config.seed
            )

    def prepare(self, saved: Mapping[str, Any] | None = None) -> None:
        """Distribute the model; with the content of ``last.pt``, load heads and optimizer."""
        if saved is not None:
            for head, weights in zip(self.model.heads, saved["heads"]):
                head.load_state_dict(weights)
            self.history, self.best = saved["history"], saved["best"]
        optimizer = build_optimizer(self.config, self.model)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if saved is not None and saved["optimizer"]["state"]:  # SGD without momentum has none
            sharded.set_optimizer_state_dict(
                self.wrapped, self.optimizer.optimizer, saved["optimizer"], options=_WHOLE
            )

    def fit(self) -> None:
        """Train the remaining epochs; write checkpoints and metrics after each."""
        config = self.config
        self._start_tracker()
        for epoch in range(len(self.history), config.epochs):
            start = time.perf_counter()
            record: dict[str, Any] = {"epoch": epoch + 1, "train": self._train_epoch(epoch)}
            if not any(math.isfinite(scores["loss"]) for scores in record["train"]):
                raise DivergedError(
                    f"training diverged in epoch {epoch + 1}: the loss is not finite; use a "
                    f"smaller --lr than {min(config.lr)}"
                )
            improved = False
            if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
                if self.held_out is not None:
                    held_out = self._evaluate(0, self.held_out)
                    record["heldout"] = [scores.compute() for scores in held_out]
                val = self.evaluate()
                record["val"] = [scores.compute() for scores in val]
                improved = self._select(record, val)
            record["seconds"] = time.perf_counter() - start
            self.history.append(record)
            self._save(improved)
            self._log(record)
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def evaluate(self) -> list[Scores]:
        """Evaluate each head on the validation images."""
        return self._evaluate(1, np.arange(len(self.val)))

    @torch.no_grad()
    def _evaluate(self, split: int, rows: np.ndarray) -> list[Scores]:
        scores = self._new_scores()
        self.wrapped.eval()
        batches = _cut(rows, self.model.spec.batch * self.accelerator.num_processes)
        for inputs, labels, count in self._batches(split, batches):
            for own, x in zip(scores, self.wrapped(inputs)):
                own.update(x, labels, count)
        return scores

    def _new_scores(self) -> list[Scores]:
        classes, device = len(self.train.classes), self.accelerator.device
        return [Scores(classes, device) for _ in self.config.lr]

    def _train_epoch(self, epoch: int) -> list[dict[str, float]]:
        """Train on every image once, mirrored or not, in an order of this epoch."""
        config, total = self.config, len(self.train)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * config.gamma ** (epoch // config.step)
        order = RandomStream.PERMUTATION.generator(config.seed, epoch)
        rows = self.learn_from[order.permutation(len(self.learn_from))]
        if config.augment != "none":
            flips = RandomStream.FLIPS.generator(config.seed, epoch).random(total) < 0.5
            rows = rows + total * flips[rows]
        scores, batches = self._new_scores(), _cut(rows, config.batch_size)
        self.wrapped.train()
        loaded = self._batches(0, batches, epoch, config.accumulate)
        for number, (inputs, labels, count) in enumerate(loaded):
            batch, part = divmod(number, config.accumulate)
            last = part + 1 == config.accumulate
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                logits = self.wrapped(inputs)
                loss = sum(F.cross_entropy(x, labels, reduction="sum") for x in logits)
                # gradients are averaged over the processes
                weight = self.accelerator.num_processes / len(batches[batch]) if count else 0
                self.accelerator.backward(loss * weight)
            if last:
                self.optimizer.step()
                self.optimizer.zero_grad()
            for own, x in zip(scores, logits):
                own.update(x, labels, count)
        return [own.compute() for own in scores]

    def _batches(
        self, split: int, batches: Sequence[np.ndarray], epoch: int | None = None, parts: int = 1
    ) -> Iterator[tuple[Any, Tensor, int]]:
        """Load this process's parts of the batches, of the training (0) or validation images (1).

        The epoch determines random crops, noise and dropout. A process divides its share of a batch
        into ``parts``.

        Yields:
            Images or features, labels, and how many of them count. A process takes part in each
            step; where a batch is too small to give it a share, none counts.
        """
        config, device = self.config, self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own, counts = [], []
        for batch in batches:
            pieces = np.array_split(batch, world * parts)[rank * parts : (rank + 1) * parts]
            own += [piece if len(piece) else batch[:1] for piece in pieces]
            counts += map(len, pieces)
        images = (self.train, self.val)[split]
        crop = epoch is not None and config.augment == "crop-flip"
        if self.caches is None:
            rows_of: Any = RowImages(images, config.image_size, config.seed if crop else None)
        else:
            rows_of = CachedRows(images, self.caches[split])
        loaded = load_batches(rows_of, own, config.workers, epoch or 0)
        labels = torch.from_numpy(images.labels)
        desc = "evaluation" if epoch is None else f"epoch {epoch + 1}"
        disable = None if self.accelerator.is_main_process else True
        bar = tqdm(own, desc, unit="batch", leave=False, disable=disable)
        for number, (rows, count, inputs) in enumerate(zip(bar, counts, loaded)):
            seed_everything(config.seed, epoch or 0, number, rank, RandomStream.STEP)
            yield send_to_device(inputs, device), labels[rows % len(labels)].to(device), count

    def _select(self, record: Mapping[str, Any], val: Sequence[Scores]) -> bool:
        """Update the selected head; of equals, the earlier epoch and rate stay."""
        before = self.best
        for index, lr in enumerate(self.config.lr):
            key = self.key(record, index)
            if self.best is None or self.config.select_on == "none" or key > self.best["key"]:
                self.best = {
                    "key": key, "index": index, "lr": lr, "epoch": record["epoch"],
                    "val": record["val"][index], "confusion": val[index].confusion(),
                    **({"heldout": record["heldout"][index]} if self.held_out is not None else {}),
                }  # fmt: skip
        return self.best is not before

    def key(self, record: Mapping[str, Any], index: int) -> list[float]:
        """Return what a head is selected by: accuracy, then loss; a diverged head comes last."""
        scores = record["val" if self.held_out is None else "heldout"][index]
        finite = math.isfinite(scores["loss"]) and math.isfinite(record["train"][index]["loss"])
        return [scores["top1"], -scores["loss"]] if finite else [-1.0, 0.0]

    def _save(self, improved: bool) -> None:
        state = self.accelerator.get_state_dict(self.wrapped)
        optimizer = sharded.get_optimizer_state_dict(
            self.wrapped, self.optimizer.optimizer, options=_WHOLE
        )
        if self.accelerator.is_main_process:
            out = self.config.out
            heads = [_below(state, f"heads.{i}.") for i in range(len(self.model.heads))]
            content = {"format": FORMAT, "settings": dict(self.settings), "best": self.best}
            content["backbone"] = _below(state, "backbone.")
            if improved:
                best = {**content, "head": heads[self.best["index"]]}
                atomic_write(out / "best.pt", lambda path: torch.save(best, path))
            content.update(heads=heads, history=self.history, optimizer=optimizer)
            atomic_write(out / "last.pt", lambda path: torch.save(content, path))
            write_json_lines(out / "metrics.jsonl", self.history)
        self.accelerator.wait_for_everyone()

    def _start_tracker(self) -> None:
        out = self.config.out.resolve()
        run_id = hashlib.sha256(str(out).encode()).hexdigest()[:12]
        options: dict[str, Any] = {
            "tensorboard": {"purge_step": len(self.history)},
            "wandb": {"dir": str(out), "id": run_id, "name": out.name, "resume": "allow"},
        }
        logged = {k: v for k, v in self.settings.items() if isinstance(v, (int, float, str))}
        self.accelerator.init_trackers("diffbackbone", logged, options)

    def _log(self, record: Mapping[str, Any]) -> None:
        found = [
            (split, lr, scores)
            for split in ("train", "heldout", "val")
            for lr, scores in zip(self.config.lr, record.get(split, ()))
        ]
        values = {f"{split}_{name}/{lr:g}": x[name] for split, lr, x in found for name in METRICS}
        self.accelerator.log(values, record["epoch"])
        top1 = ", ".join(f"{split} {x['top1']:.2%} ({lr:g})" for split, lr, x in found)
        self.accelerator.print(
            f"epoch {record['epoch']}/{self.config.epochs}: top-1 {top1}, {record['seconds']:.3g} s"
        )


def build_optimizer(config: ClassifierConfig, model: Classifier) -> torch.optim.Optimizer:
    """Build one optimizer with a parameter group per head, and one of a fine-tuned U-Net.

    Adam and SGD work element by element, so groups do not influence each other.
    """
    groups: list[dict[str, Any]] = [
        {"params": list(head.parameters()), "lr": lr} for head, lr in zip(model.heads, config.lr)
    ]
    if model.backbone.feedback is not None:
        groups[0]["params"] += model.backbone.feedback.parameters()
    if config.finetune:
        unet = [p for p in model.backbone.unet.parameters() if p.requires_grad]
        groups.append({"params": unet, "lr": config.backbone_lr or config.lr[0]})
    for group in groups:
        group["base_lr"] = group["lr"]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
