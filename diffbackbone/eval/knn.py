"""Classify images by their nearest neighbors in the features of a frozen diffusion U-Net.

The protocol of the paper's Table 9: a map is pooled to one vector, neighbors are found by cosine
similarity, and the k nearest training images vote with weight exp(similarity / temperature). The
paper gives neither weights nor temperature; these are the usual ones. Several timesteps and blocks
make a table from one cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffbackbone.cli import run_command
from diffbackbone.eval.features import FeatureSpec, open_caches
from diffbackbone.eval.options import BackboneOptions, CacheOptions, DataOptions, build_backbone
from diffbackbone.utils import UserError, markdown_table, settings_of, write_json, write_text


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
    out: Path = Path("work_dirs/knn")
    """Folder for the results."""


def nearest(queries: Tensor, bank: Tensor, k: int, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Find the k rows of a bank (N, D) that are most similar by cosine to each query (Q, D).

    Returns:
        Similarities (Q, k), descending, and rows (Q, k).
    """
    queries = F.normalize(queries.float(), dim=1)
    values = queries.new_empty(len(queries), 0)
    rows = values.long()
    for start in range(0, len(bank), chunk):
        part = bank[start : start + chunk].to(queries.device).float()
        found = (queries @ F.normalize(part, dim=1).T).topk(min(k, len(part)), dim=1)
        values = torch.cat([values, found.values], dim=1)
        rows = torch.cat([rows, found.indices + start], dim=1)
        values, best = values.topk(min(k, values.shape[1]), dim=1)
        rows = rows.gather(1, best)
    return values, rows


def true_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes come before the true one (N,), by scores (N, num_classes).

    Equal scores come in order of the class index, so that a constant head gets no credit; where a
    score is not finite, the true class comes last.
    """
    own = scores.gather(1, labels[:, None])
    index = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (index < labels[:, None]))
    return before.sum(1).where(scores.isfinite().all(1), scores.shape[1])


def knn_accuracy(
    train: Tensor,
    train_labels: np.ndarray,
    val: Tensor,
    val_labels: np.ndarray,
    ks: Sequence[int],
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
    chunk: int = 4096,
) -> dict[int, dict[str, float]]:
    """Classify features (M, D) by training features (N, D) for several k <= N, from one search.

    A class without a vote is never correct, not even among the first five.

    Returns:
        ``{k: {"top1": ..., "top5": ...}}``.
    """
    labels, truth = (torch.as_tensor(x).to(device) for x in (train_labels, val_labels))
    classes = 1 + int(max(labels.max(), truth.max()))
    correct = torch.zeros(len(ks), 2, dtype=torch.float64)
    for queries, own in zip(val.split(chunk), truth.split(chunk)):
        similarities, found = nearest(queries.to(device), train, max(ks), chunk)
        for i, k in enumerate(ks):
            votes = (similarities[:, :k].double() / temperature).softmax(1)  # shares of exp(s / T)
            scores = votes.new_zeros(len(own), classes)
            scores.scatter_add_(1, labels[found[:, :k]], votes)
            voted = scores.gather(1, own[:, None])[:, 0] > 0
            ranks = true_ranks(scores, own)
            correct[i] += torch.stack([(voted & (ranks < n)).sum() for n in (1, 5)]).cpu()
    shares = (correct / len(val)).tolist()
    return {k: {"top1": top1, "top5": top5} for k, (top1, top5) in zip(ks, shares)}


def run(config: KnnConfig) -> list[dict[str, Any]]:
    """Compute or read the features; return rows of Table 9: t, b, pool, k, top1 and top5.

    Of several processes, all but the first only help with the features and return none.
    """
    state = config.start()
    train, val = config.list_folders(config.network().in_channels)
    if max(config.k) > len(train):
        raise UserError(f"--k {max(config.k)}: there are {len(train)} training images")
    folders, spec = {"train": train, "val": val}, FeatureSpec.of(config, config.pool, state)
    caches = open_caches(config, folders, build_backbone(config), spec, state)
    if not state.is_main_process:
        return []
    rows, lines = [], []
    for t, b in ((t, b) for b in config.blocks for t in config.timesteps):
        x, queries = (cache.images((t, b)).flatten(1) for cache in caches)
        found = knn_accuracy(
            x, train.labels, queries, val.labels, config.k, config.temperature, state.device
        )
        rows += [
            {"t": t, "b": b, "pool": config.pool, "k": k, **shares} for k, shares in found.items()
        ]
        top = [share for shares in found.values() for share in shares.values()]
        lines.append([b, t, config.pool, *(f"{100 * share:.2f}" for share in top)])
    names = [f"Top{n}@{k}:" for k in config.k for n in (1, 5)]
    table = markdown_table(["b:", "t:", "pool:", *names], lines)
    print(table)
    write_text(config.out / "summary.md", table)
    write_json(config.out / "results.json", {"rows": rows, "settings": settings_of(config)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(KnnConfig, run, argv)
