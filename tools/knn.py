"""Classify images by their nearest neighbours in the features of a frozen diffusion U-Net.

The protocol of the paper's Table 9: a map is pooled to one vector, neighbours are found by cosine
similarity, and the k nearest training images vote with weight exp(similarity / temperature). The
paper gives neither weight nor temperature; these are the usual ones (0.07). Several timesteps and
blocks make a table with a row for each pair, from one cache. ::

    python tools/knn.py --data DIR --checkpoint 256x256_diffusion_uncond.pt \
        --timesteps 10 30 50 90 150 300 500 --blocks 19 24 --cache work_dirs/knn_cache

Neither all training features nor all similarities are held in memory at once.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _classification as common
import numpy as np
import torch
import torch.nn.functional as F
from _classification import FeatureOptions, Processes, ToolError
from torch import Tensor

from diffbackbone.features import FeatureCache, Tap

CHUNK = 4096
"""Rows of queries, and of training features, at a time."""
_INDEX_BITS = 32

Reader = Callable[[int, int], Tensor]
"""Features (n, D) of the rows from the first number up to the second."""


def nearest(
    queries: Tensor, bank: Reader, size: int, k: int, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of a bank, by cosine.

    Of rows that are equally similar the first ones are taken.

    Args:
        queries: (Q, D).
        bank: Reads the bank, of ``size`` rows, piece by piece.
        size: Rows of the bank, fewer than 2^32.
        k: How many, at most ``size``.
        chunk: Rows of the bank at a time.

    Returns:
        Similarities (Q, k) float32, falling, and rows (Q, k) int64.

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k <= size:
        raise ValueError(f"k must lie between 1 and the {size} training images, got {k}")
    queries = F.normalize(queries.float(), dim=1)
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, size, chunk):
        end = min(start + chunk, size)
        rows = F.normalize(bank(start, end).to(queries.device).float(), dim=1)
        keys = _to_keys(queries @ rows.T, start)
        keys = keys.topk(min(k, keys.shape[1]), dim=1).values
        best = torch.cat([best, keys], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return _from_keys(best)


def _to_keys(similarities: Tensor, first: int) -> Tensor:
    """One integer for similarity and row, that orders by similarity and then by the first row.

    The bits of a positive float32 order like integers, those of a negative one the other way.

    Args:
        similarities: (Q, n) float32.
        first: Number of the first row.
    """
    bits = (similarities + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0
    order = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    index = torch.arange(first, first + similarities.shape[1], device=similarities.device)
    return (order << _INDEX_BITS) + ((1 << _INDEX_BITS) - 1 - index)


def _from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    order = keys >> _INDEX_BITS
    rows = (1 << _INDEX_BITS) - 1 - (keys & ((1 << _INDEX_BITS) - 1))
    values = order.abs().int().view(torch.float32)
    return torch.where(order >= 0, values, -values), rows


def vote(similarities: Tensor, labels: Tensor, classes: int, temperature: float = 0.07) -> Tensor:
    """Votes of neighbours, each of weight exp(similarity / temperature).

    Args:
        similarities: (Q, k).
        labels: Class of each neighbour (Q, k).
        classes: Number of classes.
        temperature: Above 0; a small one lets the nearest decide.

    Returns:
        (Q, classes) float64, scaled so that the largest single vote is 1. A class without a
        neighbour has 0.
    """
    strongest = similarities.double().max(1, keepdim=True).values
    weights = ((similarities.double() - strongest) / temperature).exp()
    weights = weights.clamp_min(torch.finfo(torch.float64).tiny)  # a vote stays a vote
    scores = torch.zeros(len(labels), classes, dtype=torch.float64, device=labels.device)
    return scores.scatter_add_(1, labels, weights)


def knn_accuracy(
    train: Reader,
    train_labels: np.ndarray,
    val: Reader,
    val_labels: np.ndarray,
    ks: Sequence[int],
    classes: int,
    *,
    temperature: float = 0.07,
    chunk: int = CHUNK,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
) -> dict[int, dict[str, float]]:
    """Accuracy of the nearest neighbours, for several k from one search.

    A class that no neighbour belongs to is never right, not even among the first five.

    Args:
        train: Reads the training features.
        train_labels: (N,).
        val: Reads the features to classify.
        val_labels: (M,).
        ks: Numbers of neighbours.
        classes: Number of classes.
        temperature: See :func:`vote`.
        chunk: Rows at a time, of either.
        device: Where to compute.
        processes: They divide the features to classify; None for one.

    Returns:
        ``{k: {"top1": ..., "top5": ...}}``.

    Raises:
        ValueError: A k is out of range.
    """
    processes = processes or Processes()
    labels = torch.from_numpy(np.asarray(train_labels, dtype=np.int64)).to(device)
    truth = torch.from_numpy(np.asarray(val_labels, dtype=np.int64)).to(device)
    ks = sorted(set(ks))
    right = torch.zeros(len(ks), 2, dtype=torch.int64)
    first = len(truth) * processes.rank // processes.world_size
    last = len(truth) * (processes.rank + 1) // processes.world_size
    for start in range(first, last, chunk):
        end = min(start + chunk, last)
        similarities, rows = nearest(val(start, end).to(device), train, len(labels), max(ks), chunk)
        for i, k in enumerate(ks):
            scores = vote(similarities[:, :k], labels[rows[:, :k]], classes, temperature)
            ranks = common.true_ranks(scores, truth[start:end])
            voted = scores.gather(1, truth[start:end, None])[:, 0] > 0
            right[i, 0] += int((voted & (ranks == 0)).sum())
            right[i, 1] += int((voted & (ranks < 5)).sum())
    shares = processes.sum(right).double() / len(truth)
    return {k: {"top1": top1, "top5": top5} for k, (top1, top5) in zip(ks, shares.tolist())}


def cache_reader(cache: FeatureCache, tap: Tap, pool: int) -> Reader:
    """Reads one tap of a cache as vectors, pooled to ``pool`` x ``pool`` where it is larger.

    Args:
        cache: Features; its mirrored copies are left out.
        tap: Timestep and block.
        pool: Height and width of the pooled map.
    """

    def read(start: int, end: int) -> Tensor:
        x = cache.read(np.arange(start, end), [tap])[tap].float()
        grid = (min(x.shape[-2], pool), min(x.shape[-1], pool))
        return F.adaptive_avg_pool2d(x, grid).flatten(1)

    return read


def evaluate_caches(
    train: FeatureCache,
    val: FeatureCache,
    taps: Sequence[Tap],
    ks: Sequence[int],
    *,
    pool: int = 1,
    temperature: float = 0.07,
    chunk: int = CHUNK,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Rows of Table 9: ``t``, ``b``, ``pool``, ``k``, ``top1`` and ``top5``.

    Raises:
        ToolError: k is larger than the training set.
    """
    processes = processes or Processes()
    count = len(train.listing)
    if max(ks) > count:
        raise ToolError(f"--k {max(ks)}: there are {count} training images only")
    rows = []
    for tap in taps:
        found = knn_accuracy(
            cache_reader(train, tap, pool),
            train.labels,
            cache_reader(val, tap, pool),
            val.labels,
            ks,
            len(train.listing.classes),
            temperature=temperature,
            chunk=chunk,
            device=processes.device,
            processes=processes,
        )
        rows += [
            {"t": tap[0], "b": tap[1], "pool": pool, "k": k, **scores}
            for k, scores in found.items()
        ]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Table 9's layout as Markdown."""
    ks = sorted({row["k"] for row in rows})
    names = [f"Top{n}@{k}" for k in ks for n in (1, 5)]
    lines = [
        "| b | t | pool | " + " | ".join(names) + " |",
        "|" + "---:|" * (3 + len(names)),
    ]
    for t, b in dict.fromkeys((row["t"], row["b"]) for row in rows):
        own = {row["k"]: row for row in rows if (row["t"], row["b"]) == (t, b)}
        values = [f"{100 * own[k][name]:.2f}" for k in ks for name in ("top1", "top5")]
        lines.append(f"| {b} | {t} | {own[ks[0]]['pool']} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_data_arguments(parser)
    common.add_backbone_arguments(parser)
    common.add_cache_arguments(parser)
    group = parser.add_argument_group("neighbours")
    group.add_argument("--k", type=int, nargs="+", default=[20, 200], help="numbers of neighbours")
    group.add_argument("--temperature", type=float, default=0.07, help="of the votes")
    group.add_argument("--pool", type=int, default=1, help="height and width of the pooled map")
    group.add_argument("--chunk", type=int, default=CHUNK, help="rows in memory at a time")
    group.add_argument("--batch-size", type=int, default=64, help="images in the U-Net at a time")
    group.add_argument("--out", default="knn.json", help="where the numbers go")
    args = parser.parse_args(argv)
    args.timesteps = args.timesteps or [90]
    args.blocks = args.blocks or [19]
    common.check_common(args)
    common.check_at_least_one(args, "chunk", "batch_size", "pool")
    check_neighbours(args, args.k)
    return args


def check_neighbours(args: argparse.Namespace, ks: Sequence[int]) -> None:
    """Check what neighbours are asked for, without looking at the images.

    Raises:
        ToolError: A value is out of range.
    """
    if ks and min(ks) < 1:
        raise ToolError(f"--k must be at least 1, got {min(ks)}")
    if not (args.temperature > 0 and math.isfinite(args.temperature)):
        raise ToolError(f"--temperature must be above 0, got {args.temperature}")
    if args.noise == "random":
        raise ToolError("--noise random: features have to stay the same; take fixed or none")


def run(args: argparse.Namespace, processes: Processes) -> list[dict[str, Any]]:
    """Compute or read the features, and evaluate.

    Args:
        args: The command line.
        processes: The processes; they divide both work.

    Returns:
        See :func:`evaluate_caches`.
    """
    train_root, val_root = common.find_folders(args.data, args.train_dir, args.val_dir)
    train = common.list_folder(train_root, None, args.value_range)
    val = common.list_folder(val_root, train.listing.classes, args.value_range)
    if max(args.k) > len(train.listing):
        raise ToolError(f"--k {max(args.k)}: there are {len(train.listing)} training images only")
    backbone = common.build_backbone(args)
    common.warn_random(args, processes)
    options = FeatureOptions(
        tuple(args.timesteps),
        tuple(args.blocks),
        args.pool,
        args.feature_dtype,
        args.image_size,
        common.compute_dtype(args.precision, processes.device),
        args.batch_size,
    )
    if args.cache is None and processes.world_size > 1:
        raise ToolError("several processes need a folder that all can write: give --cache")
    with tempfile.TemporaryDirectory(prefix="knn-") as scratch:
        folder = Path(scratch if args.cache is None else args.cache)
        whole = all((folder / split / "manifest.json").is_file() for split in ("train", "val"))
        if processes.first and not whole:
            common.check_images(train)
            common.check_images(val)
        processes.barrier()
        opened = [
            common.open_cache(
                folder / split,
                images,
                backbone,
                options,
                processes,
                workers=args.workers,
                shard_mib=args.shard_mib,
                overwrite=args.overwrite_cache,
            )
            for split, images in (("train", train), ("val", val))
        ]
        taps = [(t, b) for b in args.blocks for t in args.timesteps]
        rows = evaluate_caches(
            *opened,
            taps,
            args.k,
            pool=args.pool,
            temperature=args.temperature,
            chunk=args.chunk,
            processes=processes,
        )
    processes.say(table(rows))
    if processes.first:
        names = ("unet", "checkpoint", "image_size", "noise", "seed", "temperature")
        common.write_json(
            Path(args.out), {"rows": rows, **{name: getattr(args, name) for name in names}}
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: It cannot be done as given; the message says why.
    """
    common.run_tool(lambda: _parse(argv), run)


if __name__ == "__main__":
    main()
