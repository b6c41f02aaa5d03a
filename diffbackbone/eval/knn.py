"""Classify images by their nearest neighbors in the features of a frozen diffusion U-Net.

The protocol of the paper's Table 9: a map is pooled to one vector, neighbors are found by cosine
similarity, and the k nearest training images vote with weight exp(similarity / temperature). The
paper gives neither weights nor temperature; these are the usual ones. Several timesteps and blocks
make a table from one cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor

from diffbackbone.cli import run_command
from diffbackbone.eval.features import FeatureCache, FeatureSpec, Tap, open_splits, pool_maps
from diffbackbone.eval.options import BackboneOptions, CacheOptions, DataOptions, build_backbone
from diffbackbone.utils import UserError, markdown_table, settings_of, write_json

Reader = Callable[[int, int], Tensor]
"""Returns the features (n, D) of the rows from the first number up to the second."""


@dataclass(kw_only=True)
class KnnConfig(DataOptions, BackboneOptions, CacheOptions):
    """Classify images by their nearest neighbors in frozen features (Table 9)."""

    timesteps: tuple[int, ...] = (90,)
    """0-based timesteps t."""
    blocks: tuple[int, ...] = (19,)
    """1-based blocks b."""
    k: tuple[int, ...] = (20, 200)
    """Numbers of neighbors."""
    temperature: float = 0.07
    """Temperature of the votes."""
    pool: int = 1
    """Height and width that maps are pooled to."""
    chunk: int = 4096
    """Rows in memory at a time."""
    batch_size: int = 64
    """Images in the U-Net at a time."""
    out: Path = Path("knn.json")
    """Results."""


def nearest(
    queries: Tensor, bank: Reader, size: int, k: int, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """Find the k most similar rows of a bank, by cosine.

    Args:
        queries: (Q, D).
        bank: Reads the bank's rows.
        size: Number of the bank's rows.
        k: At most ``size``.
        chunk: Rows of the bank in memory at a time.

    Returns:
        Similarities (Q, k), descending, and rows (Q, k).
    """
    queries = F.normalize(queries.float(), dim=1)
    values, rows = queries.new_empty(len(queries), 0), torch.empty(0, device=queries.device).long()
    rows = rows.expand(len(queries), 0)
    for start in range(0, size, chunk):
        part = bank(start, min(start + chunk, size)).to(queries.device).float()
        found = (queries @ F.normalize(part, dim=1).T).topk(min(k, len(part)), dim=1)
        values = torch.cat([values, found.values], dim=1)
        rows = torch.cat([rows, found.indices + start], dim=1)
        values, best = values.topk(min(k, values.shape[1]), dim=1)
        rows = rows.gather(1, best)
    return values, rows


def vote(similarities: Tensor, labels: Tensor, classes: int, temperature: float = 0.07) -> Tensor:
    """Add up the votes exp(similarity / temperature) of each class.

    Args:
        similarities: (Q, k).
        labels: Class of each neighbor (Q, k).
        classes: Number of classes.
        temperature: With a small one the nearest decides.

    Returns:
        Shares of the votes (Q, classes), float64.
    """
    weights = (similarities.double() / temperature).softmax(1)
    scores = torch.zeros(len(labels), classes, dtype=torch.float64, device=labels.device)
    return scores.scatter_add_(1, labels, weights)


def true_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes come before the true one: (N,) int64.

    Equal scores come in order of the class index, so that a constant head gets no credit; where a
    score is not finite, the true class comes last.

    Args:
        scores: (N, num_classes).
        labels: (N,).
    """
    own = scores.gather(1, labels[:, None])
    index = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (index < labels[:, None]))
    return before.sum(1).where(scores.isfinite().all(1), scores.shape[1])


def knn_accuracy(
    train: Reader,
    train_labels: np.ndarray,
    val: Reader,
    val_labels: np.ndarray,
    ks: Sequence[int],
    classes: int,
    *,
    temperature: float = 0.07,
    chunk: int = 4096,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> dict[int, dict[str, float]]:
    """Compute the accuracy for several k from one search.

    A class without a vote is never correct, not even among the first five.

    Args:
        train: Reads the training features.
        train_labels: (N,).
        val: Reads the features to classify.
        val_labels: (M,).
        ks: Numbers of neighbors, at most N.
        classes: Number of classes.
        temperature: See :func:`vote`.
        chunk: Rows in memory at a time.
        device: Where to compute.
        rank: Number of this process; the processes share the features to classify.
        world_size: Number of processes.

    Returns:
        ``{k: {"top1": ..., "top5": ...}}``.
    """
    labels, truth = (torch.as_tensor(x).to(device) for x in (train_labels, val_labels))
    if not 1 <= min(ks) <= max(ks) <= len(labels):
        raise UserError(f"k must be from 1 to the {len(labels)} training images, got {list(ks)}")
    if temperature <= 0:
        raise UserError(f"the temperature must be above 0, got {temperature}")
    correct = torch.zeros(len(ks), 2, dtype=torch.float64)
    last = len(truth) * (rank + 1) // world_size
    for start in range(len(truth) * rank // world_size, last, chunk):
        end = min(start + chunk, last)
        similarities, rows = nearest(val(start, end).to(device), train, len(labels), max(ks), chunk)
        own = truth[start:end]
        for i, k in enumerate(ks):
            scores = vote(similarities[:, :k], labels[rows[:, :k]], classes, temperature)
            voted = scores.gather(1, own[:, None])[:, 0] > 0
            ranks = true_ranks(scores, own)
            correct[i] += torch.stack([(voted & (ranks < n)).sum() for n in (1, 5)]).cpu()
    if world_size > 1:
        correct = reduce(correct.to(device), "sum").cpu()
    shares = (correct / len(truth)).tolist()
    return {k: {"top1": top1, "top5": top5} for k, (top1, top5) in zip(ks, shares)}


def cache_reader(cache: FeatureCache, tap: Tap, pool: int) -> Reader:
    """Return a reader of one tap as pooled vectors."""

    def read(start: int, end: int) -> Tensor:
        return pool_maps(cache.read(range(start, end), [tap])[tap], pool).flatten(1)

    return read


def run(config: KnnConfig) -> list[dict[str, Any]]:
    """Compute or read the features, and evaluate every tap.

    Returns:
        Rows of Table 9: ``t``, ``b``, ``pool``, ``k``, ``top1`` and ``top5``.
    """
    state = config.start()
    train, val = config.list_folders()
    if max(config.k) > len(train):
        raise UserError(f"--k {max(config.k)}: there are {len(train)} training images")
    if config.cache is None and state.num_processes > 1:
        raise UserError("several processes need a folder that all can write: give --cache")
    backbone = build_backbone(config)
    spec = FeatureSpec(
        config.timesteps,
        config.blocks,
        config.image_size or config.unet_config().image_size,
        config.pool,
        config.feature_dtype,
        config.compute_dtype(state.device),
        config.batch_size,
    )
    with tempfile.TemporaryDirectory(prefix="knn-") as scratch:
        caches = open_splits(
            config.cache or Path(scratch),
            {"train": train, "val": val},
            backbone,
            spec,
            state,
            workers=config.workers,
            overwrite=config.overwrite_cache,
        )
        rows = []
        for t, b in sorted(spec.taps, key=lambda tap: config.blocks.index(tap[1])):
            readers = [cache_reader(cache, (t, b), config.pool) for cache in caches]
            found = knn_accuracy(
                readers[0],
                train.labels,
                readers[1],
                val.labels,
                config.k,
                len(train.classes),
                temperature=config.temperature,
                chunk=config.chunk,
                device=state.device,
                rank=state.process_index,
                world_size=state.num_processes,
            )
            row = {"t": t, "b": b, "pool": config.pool}
            rows += [{**row, "k": k, **scores} for k, scores in found.items()]
    state.print(table(rows))
    if state.is_main_process:
        write_json(config.out, {"rows": rows, "settings": settings_of(config)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as Table 9, in Markdown."""
    ks = list(dict.fromkeys(row["k"] for row in rows))
    lines: dict[tuple[int, int], list[Any]] = {}
    for row in rows:
        line = lines.setdefault((row["b"], row["t"]), [row["b"], row["t"], row["pool"]])
        line += [f"{100 * row['top1']:.2f}", f"{100 * row['top5']:.2f}"]
    names = [f"Top{n}@{k}:" for k in ks for n in (1, 5)]
    return markdown_table(["b:", "t:", "pool:", *names], lines.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(KnnConfig, run, argv)
