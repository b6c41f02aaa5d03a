"""Which block, timestep and pooling suit my images? Linear probes, kNN and CKA over a whole grid.

The U-Net runs over the images once; every combination is then judged on the cached taps, as in the
paper's Figures 3 and 4 and Table 9. Images lie in one folder for each class. ::

    python tools/sweep.py --data DIR --checkpoint 256x256_diffusion_uncond.pt --out work_dirs/sweep
    python tools/sweep.py --data DIR --checkpoint ... --subset 10% --seeds 0 1 2 --out ...
    python tools/sweep.py --images FOLDER --checkpoint ... --out ...  # no labels: CKA alone

OUT gets ``summary.md`` (the recommendation, tables and pictures), ``results.csv`` (one line for
each combination and seed), ``results.json``, ``linear_pool2.png`` and the like (block x timestep),
``cka.csv`` and ``cka/`` (the paper's Figure 5: blocks at each timestep, timesteps at each block).

* **linear**: multinomial logistic regression on standardised features, solved to its minimum, so
  that neither a learning rate nor a seed has a say. The same strengths of regularisation are tried
  for every combination; a share of the training images (``--holdout``) chooses among them, and the
  probe is then fitted to all of them. Of fewer than 1,000 images, where a share is a handful, each
  is held out once (cross-validation by as many folds as the share goes into them).
* **knn**: the protocol of ``tools/knn.py``.
* **cka**: linear CKA between flattened maps (``--cka-pool``), with the unbiased HSIC estimator
  over minibatches (Nguyen et al. 2021), on the validation images. It needs no labels.

The backbone's fixed noise is the same for every image, so a large timestep costs less accuracy
than with noise of each image's own, as in the paper's figures: choose the timestep with the noise
that you will use it with.

A seed draws ``--subset`` (the labels there are) and the held-out share; the features are
those of ``--seed``. A run that was killed goes on from whole shards of the cache and from the
combinations that are done: run the same command again. Pools and seeds may be added later on;
other blocks or timesteps need another pass (``--overwrite-cache``), what was measured stays.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _analysis
import _classification as common
import _common
import knn
import numpy as np
import torch
import torch.nn.functional as F
from _classification import FeatureOptions, ImageFolder, Processes, ToolError
from torch import Tensor

from diffbackbone.costs import block_costs
from diffbackbone.features import (
    FeatureCache,
    Tap,
    setting_differences,
    tap_shapes,
)
from diffbackbone.models.gd_config import UNetConfig

FORMAT = "diffbackbone sweep 2"  # 2: folds where labels are few
BLOCKS = (6, 9, 12, 15, 18, 19, 21, 24, 27, 30, 33, 36)
TIMESTEPS = (10, 30, 50, 90, 150, 300, 500, 700)
PAPERS_BLOCK, PAPERS_TIMESTEP = 24, 90
"""Where Figure 5 looks: timesteps at b = 24, blocks at t = 90."""
MEASURES = {"linear": "linear probe", "knn": "kNN"}
L2 = (1e-2, 1e-3, 1e-4, 1e-5)
FALLBACK_L2 = 1e-3
"""Taken where no training image can be held out to choose by: a class has a single one."""
FEW = 1000
"""Labelled images below which one share of them chooses too much by chance."""
SHARDS = 32
_ORDER = 6  # of the images in CKA, beside the seeds of _classification


# ----------------------------------------------------------------------------------------- the grid


def cache_pool(sides: Iterable[int], pools: Iterable[int]) -> int:
    """The smallest grid to cache maps at that every smaller grid follows from, exactly.

    Averages of averages are averages where windows don't overlap: a map of side s that is cached
    at P has to be P or smaller, or a multiple of it, and P a multiple of each pool.

    Args:
        sides: Height and width of each tap's map.
        pools: Grids wanted.
    """
    sides, pools = set(sides), set(pools)
    for size in range(max(pools), max(sides)):
        if all(side <= size or side % size == 0 for side in sides) and all(
            size % pool == 0 for pool in pools
        ):
            return size
    return max(*sides, *pools)


def pooled(maps: Tensor, pool: int) -> Tensor:
    """Maps averaged down to ``pool`` x ``pool``, where they are larger, as vectors.

    Args:
        maps: (N, C, h, w).
        pool: Height and width.

    Returns:
        (N, C * min(h, pool) * min(w, pool)) float32.
    """
    grid = (min(maps.shape[-2], pool), min(maps.shape[-1], pool))
    return F.adaptive_avg_pool2d(maps.float(), grid).flatten(1)


@dataclass(frozen=True)
class Labels:
    """The labelled images of one seed.

    Attributes:
        seed: The seed.
        rows: Rows of the training features that have a label (N,).
        splits: Which of them the probe is fitted to while the regularisation is chosen (n,), and
            which choose (m,), once or for each fold; empty where none can be held out.
    """

    seed: int
    rows: np.ndarray
    splits: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def draw(cls, seed: int, rows: np.ndarray, labels: np.ndarray, share: float) -> Labels:
        """Hold a share out, class by class, where each class has two images at least.

        Of fewer than :data:`FEW` images, one share after the other is held out.
        """
        counts = np.bincount(labels)
        if counts[counts > 0].min() < 2:
            return cls(seed, rows, ())
        if len(labels) < FEW:
            folds = max(2, round(1 / share))
            return cls(seed, rows, tuple(common.split_folds(labels, folds, seed)))
        return cls(seed, rows, (common.split_holdout(labels, share, seed),))


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    classes: int,
    strengths: Sequence[float],
    splits: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> dict[str, float]:
    """Top-1 accuracy of a linear probe whose regularisation is chosen by held-out images.

    The strengths are tried from strong to weak, each from where the last one ended; the one
    with the smallest held-out loss wins, over all splits. The loss moves more smoothly than the
    accuracy.

    Args:
        train: (N, D).
        train_labels: (N,).
        val: (M, D).
        val_labels: (M,).
        classes: K.
        strengths: See :func:`_analysis.fit_probe`.
        splits: Training images to fit to while choosing, and to choose by, of each fold; one
            strength is taken as it is.

    Returns:
        ``top1``, ``l2`` (the one chosen), and ``loss`` on the validation images.

    Raises:
        ValueError: Several strengths and nothing to choose by.
    """
    train, val = _analysis.standardise(train, [val])
    (train, val), squares = _analysis.rotate(train, [val])
    strengths = sorted(strengths, reverse=True)
    probes: dict[float, _analysis.Probe] = {}
    losses = dict.fromkeys(strengths, 0.0)
    if len(strengths) > 1:
        if not splits:
            raise ValueError(f"{len(strengths)} strengths need held-out images to choose by")
        for learn, held in splits:
            probe = None
            for l2 in strengths:
                probe = _analysis.fit_probe(
                    train[learn], train_labels[learn], classes, l2, probe, squares
                )
                probes[l2] = probe
                loss = F.cross_entropy(probe(train[held]), train_labels[held], reduction="sum")
                losses[l2] += float(loss)
    l2 = min(losses, key=losses.__getitem__)
    probe = _analysis.fit_probe(train, train_labels, classes, l2, probes.get(l2), squares)
    scores = probe(val)
    right = common.true_ranks(scores, val_labels) == 0
    loss = float(F.cross_entropy(scores, val_labels))
    return {"top1": float(right.double().mean()), "l2": l2, "loss": loss}


class Judge:
    """Measures combinations of tap, pool and seed on two caches.

    Args:
        caches: Training and validation features.
        draws: The labelled images of each seed.
        args: The command line.
        device: Where to compute.
    """

    def __init__(
        self,
        caches: tuple[FeatureCache, FeatureCache],
        draws: Sequence[Labels],
        args: argparse.Namespace,
        device: torch.device,
    ) -> None:
        self.caches = caches
        self.draws = draws
        self.args = args
        self.device = device
        self.classes = len(caches[0].listing.classes)
        self.labels = [torch.from_numpy(cache.labels).to(device) for cache in caches]

    def measure(self, tap: Tap, wanted: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
        """Measure one tap.

        Args:
            tap: Timestep and block.
            wanted: Pools and seeds.

        Returns:
            A record each: ``b``, ``t``, ``pool``, ``seed``, ``features`` (their number),
            ``train_images``, and ``linear``, ``l2``, ``loss``, ``knn`` as far as measured.
        """
        train, val = (
            cache.read(np.arange(len(cache.listing)), [tap])[tap].to(self.device)
            for cache in self.caches
        )
        draws = {draw.seed: draw for draw in self.draws}
        known: dict[tuple[Any, ...], dict[str, float]] = {}
        records = []
        for pool, seed in wanted:
            draw, size = draws[seed], min(pool, max(train.shape[-2:]))
            x, queries = pooled(train[torch.from_numpy(draw.rows)], size), pooled(val, size)
            record = {"b": tap[1], "t": tap[0], "pool": pool, "seed": seed}
            record.update(features=x.shape[1], train_images=len(x))
            for measure, own in (("linear", self._linear), ("knn", self._knn)):
                if measure not in self.args.measures:
                    continue
                # maps no larger than several pools, and draws that are equal, are measured once
                same = (measure, size, draw.rows.tobytes())
                if measure == "linear":
                    same += tuple(held.tobytes() for _, held in draw.splits)
                if same not in known:
                    known[same] = own(x, queries, draw)
                record.update(known[same])
            records.append(record)
        return records

    def _linear(self, x: Tensor, queries: Tensor, draw: Labels) -> dict[str, float]:
        labels = self.labels[0][torch.from_numpy(draw.rows)]
        strengths = self.args.l2 if draw.splits else fallback(self.args.l2)
        found = linear_accuracy(
            x, labels, queries, self.labels[1], self.classes, strengths, draw.splits
        )
        return {"linear": found["top1"], "l2": found["l2"], "loss": found["loss"]}

    def _knn(self, x: Tensor, queries: Tensor, draw: Labels) -> dict[str, float]:
        found = knn.knn_accuracy(
            lambda start, end: x[start:end],
            self.caches[0].labels[draw.rows],
            lambda start, end: queries[start:end],
            self.caches[1].labels,
            [self.args.k],
            self.classes,
            temperature=self.args.temperature,
            device=self.device,
        )
        return {"knn": found[self.args.k]["top1"]}


def fallback(strengths: Sequence[float]) -> list[float]:
    """The one strength to take where nothing can be held out to choose by."""
    return [min(strengths, key=lambda l2: abs(math.log(l2 / FALLBACK_L2)))]


# ----------------------------------------------------------------------------- what came out of it


def summarise(
    records: Sequence[Mapping[str, Any]], measures: Sequence[str]
) -> list[dict[str, Any]]:
    """Mean and spread over the seeds.

    Args:
        records: From :meth:`Judge.measure`.
        measures: Those to take.

    Returns:
        For each combination ``b``, ``t``, ``pool``, ``features``, and for each measure its mean
        and ``<measure>_std`` (over seeds, None for a single one).
    """
    groups: dict[tuple[int, int, int], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["b"], record["t"], record["pool"]), []).append(record)
    cells = []
    for (b, t, pool), own in groups.items():
        cell: dict[str, Any] = {"b": b, "t": t, "pool": pool, "features": own[0]["features"]}
        for measure in measures:
            values = np.array([record[measure] for record in own])
            cell[measure] = float(values.mean())
            cell[f"{measure}_std"] = float(values.std(ddof=1)) if len(values) > 1 else None
        cells.append(cell)
    return cells


def recommend(
    cells: Sequence[Mapping[str, Any]],
    measure: str,
    flops: Mapping[int, int],
    images: int,
    seeds: int,
) -> dict[str, Any]:
    """The best combination, and the cheapest that can't be told from it.

    The standard error is that of a share among so many validation images, and of the mean over
    the seeds. Of equals the cheapest is taken: fewest operations up to the block, then fewest
    features, then the smallest timestep.

    Args:
        cells: From :func:`summarise`.
        measure: What to judge by.
        flops: Operations up to each block.
        images: Number of validation images.
        seeds: Number of seeds.

    Returns:
        ``best`` and ``cheapest`` (cells with ``flops``; the same one where nothing cheaper is as
        good), ``standard_error`` of the best, and ``within``: how many lie within it.
    """
    cells = [{**cell, "flops": flops[cell["b"]]} for cell in cells]

    def price(cell: Mapping[str, Any]) -> tuple[int, ...]:
        return cell["flops"], cell["features"], cell["pool"], cell["t"]

    best = min(cells, key=lambda cell: (-cell[measure], price(cell)))
    share = best[measure]
    spread = best[f"{measure}_std"] or 0.0
    error = math.sqrt(share * (1 - share) / images + spread**2 / seeds)
    good = [cell for cell in cells if cell[measure] >= share - error]
    least = min(cell["flops"] for cell in good)
    cheapest = min(
        (cell for cell in good if cell["flops"] == least),
        key=lambda cell: (-cell[measure], price(cell)),
    )
    if least == best["flops"]:
        cheapest = best
    return {
        "measure": measure,
        "best": best,
        "cheapest": cheapest,
        "standard_error": error,
        "within": len(good),
        "combinations": len(cells),
    }


def flops_to(config: UNetConfig, blocks: Sequence[int], image_size: int) -> dict[int, int]:
    """Operations from a square image to each block; the image is padded as in the backbone."""
    deepest = max(block.stride for block in config.blocks.values())
    size = math.ceil(image_size / deepest) * deepest
    flops = _all_flops(config.replace(num_classes=None), size, max(blocks))
    return {b: flops[b] for b in blocks}


@functools.lru_cache
def _all_flops(config: UNetConfig, size: int, last_block: int) -> dict[int, int]:
    return {c.index: c.flops for c in block_costs(config, size, size, last_block=last_block)}


def similarities(
    cache: FeatureCache,
    taps: Sequence[Tap],
    pool: int,
    *,
    batch: int,
    limit: int,
    seed: int,
    processes: Processes,
) -> np.ndarray:
    """Linear CKA between all taps, over shuffled minibatches.

    Args:
        cache: Features; its mirrored copies are left out.
        taps: Timesteps and blocks.
        pool: See :func:`pooled`.
        batch: Images of a batch at most; all batches are about equally large.
        limit: Images at most, drawn by the seed.
        seed: Of their choice and order. (Folders list class by class: without shuffling a batch
            would hold few classes.)
        processes: The first one shows a progress bar.

    Returns:
        (len(taps), len(taps)).

    Raises:
        ToolError: Fewer than 4 images.
    """
    count = len(cache.listing)
    if count < 4:
        raise ToolError(f"CKA needs at least 4 images, {cache.folder} has {count}")
    order = np.random.default_rng([seed, _ORDER]).permutation(count)[:limit]
    batches = np.array_split(order, math.ceil(len(order) / batch))
    cka = _analysis.MinibatchCKA(len(taps))
    for rows in processes.bar(batches, len(batches), "CKA"):
        features = (pooled(cache.read(rows, [tap])[tap], pool) for tap in taps)
        cka.add([x.to(processes.device) for x in features])
    return cka.result().numpy()


# ------------------------------------------------------------------------------------ the reports


def name_cell(cell: Mapping[str, Any]) -> str:
    """A combination in words."""
    return f"b = {cell['b']}, t = {cell['t']}, pool = {cell['pool']}"


def percent(cell: Mapping[str, Any], measure: str, between: str = " ± ") -> str:
    """Accuracy of a cell, with its spread over the seeds if there are several."""
    spread = cell[f"{measure}_std"]
    text = f"{100 * cell[measure]:.1f}"
    return text if spread is None else f"{text}{between}{100 * spread:.1f}"


def recommendation(advice: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The recommendation in words, as Markdown.

    Args:
        advice: From :func:`recommend`, by the first measure.
        others: Likewise by the other measures.
    """
    measure, best, cheapest = advice["measure"], advice["best"], advice["cheapest"]
    error = 100 * advice["standard_error"]
    text = (
        f"**Take {name_cell(best)}**: {percent(best, measure)}% by {MEASURES[measure]} (standard "
        f"error {error:.1f}), {best['flops'] / 1e9:.3g} GFLOPs an image. "
    )
    if cheapest is best:
        text += (
            f"{_others(advice['within'] - 1)} within one standard error, none with fewer "
            "operations."
        )
    else:
        saved = 1 - cheapest["flops"] / best["flops"]
        text += (
            f"**Cheaper, and within one standard error: {name_cell(cheapest)}**, "
            f"{percent(cheapest, measure)}%, {cheapest['flops'] / 1e9:.3g} GFLOPs ({saved:.0%} "
            f"less). {_others(advice['within'] - 1)} within it."
        )
    for other in others:
        found = other["best"]
        text += f" By {MEASURES[other['measure']]} the best is {name_cell(found)} "
        text += f"({percent(found, other['measure'])}%)."
    return (
        f"{text} This is the best of {advice['combinations']} combinations by the same images that "
        "it is scored on, so the accuracy is a little too good: confirm it on others."
    )


def _others(count: int) -> str:
    if count == 0:
        return "No other combination lies"
    return f"{count} other combination{'s lie' if count > 1 else ' lies'}"


def table(
    cells: Sequence[Mapping[str, Any]], measure: str, pool: int, advice: Mapping[str, Any]
) -> str:
    """Blocks by timesteps as Markdown; the best is bold, the cheapest of the good ones italic."""
    own = {(cell["b"], cell["t"]): cell for cell in cells if cell["pool"] == pool}
    timesteps = list(dict.fromkeys(t for _, t in own))
    lines = [
        "| b \\\\ t | " + " | ".join(map(str, timesteps)) + " |",
        "|---:|" + "---:|" * len(timesteps),
    ]
    for b in dict.fromkeys(b for b, _ in own):
        texts = []
        for t in timesteps:
            text = percent(own[b, t], measure)
            for key, mark in (("best", "**"), ("cheapest", "*")):
                found = advice[key]
                if (found["b"], found["t"], found["pool"]) == (b, t, pool):
                    text = f"{mark}{text}{mark}"
                    break
            texts.append(text)
        lines.append(f"| {b} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def draw_accuracy(
    cells: Sequence[Mapping[str, Any]],
    measure: str,
    pool: int,
    advice: Mapping[str, Any],
    caption: str,
) -> Any:
    """Heat map of blocks by timesteps, coloured on the range of all pools of the measure."""
    own = {(cell["b"], cell["t"]): cell for cell in cells if cell["pool"] == pool}
    blocks = list(dict.fromkeys(b for b, _ in own))
    timesteps = list(dict.fromkeys(t for _, t in own))
    values = [[100 * own[b, t][measure] for t in timesteps] for b in blocks]
    texts = [[percent(own[b, t], measure, "\n±") for t in timesteps] for b in blocks]
    span = [100 * cell[measure] for cell in cells]
    marks, legend = {}, []
    error = 100 * advice["standard_error"]
    for key, colour, words in (
        ("cheapest", common.CHEAPER_COLOUR, f"fewest operations within {error:.1f} of the best"),
        ("best", common.BEST_COLOUR, "best of all blocks, timesteps and pools"),
    ):
        found = advice[key]
        if found["pool"] == pool:
            marks[blocks.index(found["b"]), timesteps.index(found["t"])] = colour
            if key == "best" or found is not advice["best"]:
                legend.insert(0, (colour, words))
    return common.draw_heatmap(
        np.array(values),
        blocks,
        timesteps,
        f"{MEASURES[measure]}, top-1 in %, pooled to {pool}x{pool}",
        row_name="block b",
        column_name="timestep t",
        caption=caption,
        texts=texts,
        low=min(span),
        high=max(span),
        marks=marks,
        legend=legend,
        scale="{:.1f}",
    )


@dataclass(frozen=True)
class Similarity:
    """CKA of all taps, and the slices of it that Figure 5 shows.

    Attributes:
        taps: Timesteps and blocks.
        values: (len(taps), len(taps)).
    """

    taps: list[Tap]
    values: np.ndarray

    def slices(self) -> Iterator[tuple[str, int, list[int], np.ndarray]]:
        """``blocks`` at each timestep, then ``timesteps`` at each block.

        Yields:
            What varies, what is fixed, its labels, and CKA between them.
        """
        for kind, fixed in (("blocks", 0), ("timesteps", 1)):
            for at in dict.fromkeys(tap[fixed] for tap in self.taps):
                own = [i for i, tap in enumerate(self.taps) if tap[fixed] == at]
                labels = [self.taps[i][1 - fixed] for i in own]
                yield kind, at, labels, self.values[np.ix_(own, own)]

    def file(self, kind: str, at: int) -> str:
        """Name of a slice's picture."""
        return f"cka/{kind}_{'t' if kind == 'blocks' else 'b'}{at}.png"

    def write(self, out: Path, caption: str) -> None:
        """Write ``cka.csv`` and a picture of each slice."""
        rows = []
        for kind, at, labels, values in self.slices():
            fixed, name = ("t", "block b") if kind == "blocks" else ("b", "timestep t")
            picture = common.draw_heatmap(
                values,
                labels,
                labels,
                f"linear CKA between {kind} at {fixed} = {at}",
                row_name=name,
                column_name=name,
                caption=caption,
                low=0.0,
                high=1.0,
                square=True,
            )
            _common.save_picture(picture, out / self.file(kind, at))
            rows += [
                {"between": kind, "at": f"{fixed}={at}", "first": first, "second": second, "cka": x}
                for first, line in zip(labels, values.tolist())
                for second, x in zip(labels, line)
            ]
        _common.write_text(out / "cka.csv", csv_text(rows))

    def nearest(self, timestep: int, block: int) -> list[str]:
        """Pictures of the slices nearest to a timestep and a block."""
        return [
            self.file("blocks", min((t for t, _ in self.taps), key=lambda t: abs(t - timestep))),
            self.file("timesteps", min((b for _, b in self.taps), key=lambda b: abs(b - block))),
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """The slices as plain values."""
        return [
            {"between": kind, "at": at, "labels": labels, "cka": values.tolist()}
            for kind, at, labels, values in self.slices()
        ]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ------------------------------------------------------------------------------------ command line


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ToolError: The values don't go together.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="work_dirs/sweep", help="where the results go")
    common.add_data_arguments(parser)
    common.add_backbone_arguments(parser)
    common.add_cache_arguments(parser)
    parser.set_defaults(shard_mib=None)
    group = parser.add_argument_group("sweep")
    group.add_argument("--images", metavar="DIR", help="images without labels: CKA alone")
    group.add_argument("--pools", type=int, nargs="+", default=[1, 2, 4], help="sides of the maps")
    group.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    group.add_argument("--subset", help="labels for a share (1%%, 0.01) or the images of a list")
    group.add_argument("--seeds", type=int, nargs="+", help="several give mean and spread")
    group.add_argument("--batch-size", type=int, default=64, help="images in the U-Net at a time")
    group.add_argument("--overwrite", action="store_true", help="replace a sweep of other settings")
    group = parser.add_argument_group("linear probe")
    group.add_argument(
        "--l2", type=float, nargs="+", default=list(L2), help="strengths of regularisation"
    )
    group.add_argument("--holdout", type=float, default=0.2, help="share that chooses among them")
    group = parser.add_argument_group("neighbours")
    group.add_argument("--k", type=int, help="how many; default: 20, or all there are if fewer")
    group.add_argument("--temperature", type=float, default=0.07, help="of the votes")
    group = parser.add_argument_group("CKA")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--cka-only", action="store_true", help="no probes, labels don't matter")
    mode.add_argument("--no-cka", action="store_true", help="probes alone")
    group.add_argument("--cka-pool", type=int, help="side of the maps; default: largest of --pools")
    group.add_argument("--cka-batch", type=int, default=256, help="images of a minibatch")
    group.add_argument("--cka-images", type=int, default=2500, help="images at most")
    args = parser.parse_args(argv)
    common.check_common(args)
    count = len(common.unet_config(args.unet).blocks)
    args.timesteps = args.timesteps or list(TIMESTEPS)
    args.blocks = args.blocks or [b for b in BLOCKS if b <= count]
    args.seeds = args.seeds or [args.seed]
    args.cka_pool = max(args.pools) if args.cka_pool is None else args.cka_pool
    for name in ("pools", "seeds", "l2", "measures"):
        common.check_different(args, name)
    try:
        common.unet_config(args.unet).blocks.check(args.blocks)
    except ValueError as error:
        raise ToolError(str(error)) from error
    if min(args.pools) < 1 or min(args.seeds) < 0:
        raise ToolError("--pools must be at least 1, --seeds at least 0")
    common.check_at_least_one(args, "batch_size", "cka_pool", "cka_images")
    if any(not 0 < l2 < math.inf for l2 in args.l2) or not 0 < args.holdout < 1:
        raise ToolError("--l2 must be above 0, --holdout between 0 and 1")
    if min(args.cka_batch, args.cka_images) < 4:
        raise ToolError("--cka-batch and --cka-images must be at least 4")
    knn.check_neighbours(args, [] if args.k is None else [args.k])
    if args.images:
        if args.data or args.train_dir or args.val_dir:
            raise ToolError(
                "--images is for a folder without labels: leave --data and the like out"
            )
        if args.no_cka:
            raise ToolError("--images has no labels for probes: leave --no-cka out")
        args.cka_only = True
    return args


def run(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Compute or read the features, judge every combination, and report.

    Args:
        args: The command line.
        processes: One.

    Returns:
        The content of ``results.json``.

    Raises:
        ToolError: It cannot be done as given.
        CacheError: The cache is of other settings, or cannot be written.
        CheckpointError: Weights don't fit.
    """
    if processes.world_size > 1:
        raise ToolError("sweep runs in one process")
    return _Sweep(args, processes).run()


class _Sweep:
    """A sweep: its grid, where it keeps things, and what it found."""

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        self.args = args
        self.processes = processes
        self.out = Path(args.out)
        self.folders = self._find_folders()
        self.draws: list[Labels] = []
        if not args.cka_only:
            self._draw()
        # the whole U-Net, so that its digest, and with it what was measured, outlasts other blocks
        whole = [len(common.unet_config(args.unet).blocks)]
        self.backbone = common.build_backbone(argparse.Namespace(**{**vars(args), "blocks": whole}))
        self.taps: list[Tap] = [(t, b) for b in args.blocks for t in args.timesteps]
        config = self.backbone.unet.config
        shapes = tap_shapes(config, args.timesteps, args.blocks, args.image_size)
        pools = {args.cka_pool} if args.cka_only else {*args.pools, args.cka_pool}
        self.options = FeatureOptions(
            tuple(args.timesteps),
            tuple(args.blocks),
            cache_pool((shape[-1] for shape in shapes.values()), pools),
            args.feature_dtype,
            args.image_size,
            common.compute_dtype(args.precision, processes.device),
            args.batch_size,
        )

    def _find_folders(self) -> dict[str, ImageFolder]:
        """The folders that features are taken of, by the names of their caches."""
        args = self.args
        if args.images:
            folder = common.list_images(Path(args.images).expanduser(), args.value_range)
        elif args.cka_only:
            root = common.find_folder("val", args.data, args.val_dir)
            folder = common.list_images(root, args.value_range)
        else:
            train_root, val_root = common.find_folders(args.data, args.train_dir, args.val_dir)
            train = common.list_folder(train_root, None, args.value_range)
            val = common.list_folder(val_root, train.listing.classes, args.value_range)
            return {"train": train, "val": val}
        if len(folder.listing) > args.cka_images:
            rng = np.random.default_rng([args.seed, _ORDER])
            chosen = rng.permutation(len(folder.listing))[: args.cka_images]
            folder = folder.subset(np.sort(chosen))
        if len(folder.listing) < 4:
            raise ToolError(f"CKA needs at least 4 images, {folder.root} has {len(folder.listing)}")
        return {"images": folder}

    def _draw(self) -> None:
        """Choose the labelled images of each seed; only those are run through the U-Net."""
        args, train = self.args, self.folders["train"]
        chosen = {}
        for seed in args.seeds:
            chosen[seed] = np.arange(len(train.listing))
            if args.subset:
                paths = set(common.choose_subset(train, args.subset, seed).listing.paths)
                chosen[seed] = np.flatnonzero([path in paths for path in train.listing.paths])
        self.all_train = train
        used = np.unique(np.concatenate(list(chosen.values())))
        if args.subset:
            train = train.subset(used)
            name = f"train-{train.listing.summary()['sha256'][:8]}"
            self.folders = {name: train, "val": self.folders["val"]}
        for seed, rows in chosen.items():
            rows = np.searchsorted(used, rows)
            self.draws.append(Labels.draw(seed, rows, train.labels[rows], args.holdout))
        fewest = min(len(draw.rows) for draw in self.draws)
        args.k = min(20, fewest) if args.k is None else args.k
        if "knn" in args.measures and args.k > fewest:
            raise ToolError(f"--k {args.k}: there are {fewest} training images only")

    def run(self) -> dict[str, Any]:
        args, processes = self.args, self.processes
        settings = self._settings()
        records = self._read(settings)
        common.warn_random(args, processes)
        caches = self._open_caches()
        results: dict[str, Any] = {"settings": settings}
        sections = []
        common.write_json(self.out / "settings.json", settings)
        if not args.cka_only:
            records = self._judge(records, caches)
            sections.append(self._report(records, results))
        if not args.no_cka:
            sections.append(self._compare(caches[-1], results))
        common.write_json(self.out / "results.json", common.finite(results))
        text = "\n\n".join([f"# {self._title()}", *sections]) + "\n"
        _common.write_text(self.out / "summary.md", text)
        if "recommendation" in results:
            processes.say("\n" + results["recommendation"].replace("**", ""))
        processes.say(f"{self.out}: summary.md and what it shows, results.json")
        return results

    def _title(self) -> str:
        args = self.args
        weights = Path(args.checkpoint).name if args.checkpoint else "random weights"
        unet = Path(args.unet).name
        return f"Features of `{unet}` ({weights}), {args.image_size} px, noise {args.noise}"

    def _open_caches(self) -> list[FeatureCache]:
        args = self.args
        root = Path(args.cache) if args.cache else self.out / "cache"
        if not all((root / name / "manifest.json").is_file() for name in self.folders):
            for folder in self.folders.values():
                common.check_images(folder)
        return [
            common.open_cache(
                root / name,
                folder,
                self.backbone,
                self.options,
                self.processes,
                workers=args.workers,
                shard_mib=args.shard_mib or self._shard_mib(len(folder.listing)),
                overwrite=args.overwrite_cache,
            )
            for name, folder in self.folders.items()
        ]

    def _shard_mib(self, images: int) -> float:
        """Size of a shard of some batches: what a killed run loses at most."""
        config = self.backbone.unet.config
        shapes = tap_shapes(
            config, self.args.timesteps, self.args.blocks, self.args.image_size, self.options.pool
        )
        size = 2 if self.args.feature_dtype == "float16" else 4
        row = size * max(math.prod(shape) for shape in shapes.values())
        batches = max(2, math.ceil(images / (SHARDS * self.args.batch_size)))
        return (batches * self.args.batch_size + 0.5) * row / 2**20

    # -- what is done already

    def _settings(self) -> dict[str, Any]:
        """Everything that a measured combination depends on, beside its own block, t and so on."""
        args = self.args
        folders = self.folders if args.cka_only else {
            "train": self.all_train, "val": self.folders["val"]
        }  # fmt: skip
        settings: dict[str, Any] = {"format": FORMAT}
        for name, folder in folders.items():
            made = common.cache_settings(folder, self.backbone, self.options)
            settings[name] = made.pop("data")
            settings["features"] = made
        for name in ("timesteps", "blocks"):
            del settings["features"][name]
        settings["batch_size"] = args.batch_size
        if not args.cka_only:
            for name in ("subset", "l2", "holdout", "k", "temperature", "measures"):
                settings[name] = getattr(args, name)
        return settings

    def _read(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Combinations that an earlier run has measured."""
        path = self.out / "settings.json"
        if not path.is_file():
            return []
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            records = []
            if (self.out / "cells.jsonl").is_file():
                lines = (self.out / "cells.jsonl").read_text(encoding="utf-8").splitlines()
                records = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ToolError(f"{self.out} holds a damaged sweep ({error}): remove it") from error
        differences = setting_differences(made, settings)
        if not differences:
            return records
        if not self.args.overwrite:
            raise ToolError(
                f"{self.out} holds a sweep of other settings:\n  "
                + "\n  ".join(line.replace("the cache has", "it has") for line in differences)
                + "\nTake another --out, or --overwrite"
            )
        (self.out / "cells.jsonl").unlink(missing_ok=True)
        return []

    def _judge(
        self, records: list[dict[str, Any]], caches: Sequence[FeatureCache]
    ) -> list[dict[str, Any]]:
        """Measure what is missing; each tap is kept as soon as it is done."""
        args = self.args
        done = {_key(record): record for record in records}
        judge = Judge((caches[0], caches[1]), self.draws, args, self.processes.device)
        if "linear" in args.measures and len(args.l2) > 1:
            bare = [draw.seed for draw in self.draws if not draw.splits]
            if bare:
                self.processes.say(
                    f"note: a class has one labelled image only (seeds {bare}), so none can be "
                    f"held out: --l2 {fallback(args.l2)[0]:g} is taken as it is"
                )
        for t, b in self.processes.bar(self.taps, len(self.taps), "probes", "tap"):
            wanted = [
                (pool, seed)
                for pool in args.pools
                for seed in args.seeds
                if (b, t, pool, seed) not in done
            ]
            if wanted:
                for record in judge.measure((t, b), wanted):
                    done[_key(record)] = record
                common.write_lines(self.out / "cells.jsonl", done.values())
        return [
            done[b, t, pool, seed]
            for t, b in self.taps
            for pool in args.pools
            for seed in args.seeds
        ]

    # -- reports

    def _report(self, records: Sequence[dict[str, Any]], results: dict[str, Any]) -> str:
        """Write numbers and pictures of the probes; returns their part of the summary."""
        args, val = self.args, self.folders["val"]
        cells = summarise(records, args.measures)
        flops = flops_to(self.backbone.unet.config, args.blocks, args.image_size)
        images = len(val.listing)
        advices = [
            recommend(cells, measure, flops, images, len(args.seeds)) for measure in args.measures
        ]
        text = recommendation(advices[0], advices[1:])
        counts = sorted({record["train_images"] for record in records})
        train = " or ".join(f"{count:,}" for count in counts)
        caption = f"{train} training and {images:,} validation images, {len(val.listing.classes)} "
        caption += "classes"
        if len(args.seeds) > 1:
            caption += f", mean ± standard deviation over {len(args.seeds)} seeds"
        rows = [
            {**record, "gflops": round(flops[record["b"]] / 1e9, 6), "val_images": images}
            for record in records
        ]
        _common.write_text(self.out / "results.csv", csv_text(rows))
        parts = [f"{caption}.", text]
        for measure, advice in zip(args.measures, advices):
            for pool in args.pools:
                file = f"{measure}_pool{pool}.png"
                short = f"{Path(args.unet).name}, {args.image_size} px, {caption}"
                picture = draw_accuracy(cells, measure, pool, advice, short)
                _common.save_picture(picture, self.out / file)
                heading = f"## Top-1 in % by {MEASURES[measure]}, pooled to {pool}x{pool}"
                parts += [heading, table(cells, measure, pool, advice), f"![{measure}]({file})"]
        parts.append(
            "Bold: the best of all. Italic: the fewest operations within its standard error. "
            + self._method()
        )
        results.update(recommendation=text, advice=advices, cells=cells, records=list(records))
        return "\n\n".join(parts)

    def _method(self) -> str:
        args = self.args
        strengths = ", ".join(f"{l2:g}" for l2 in args.l2)
        text = []
        if "linear" in args.measures:
            text.append(
                f"Linear probe: logistic regression on standardised features, l2 from {strengths}, "
                f"chosen by {args.holdout:.0%} of the training images (by each such share of them "
                f"where there are fewer than {FEW:,}), then fitted to all."
            )
        if "knn" in args.measures:
            text.append(
                f"kNN: {args.k} neighbours by cosine, votes weighted with temperature "
                f"{args.temperature:g}."
            )
        return " ".join(text)

    def _compare(self, cache: FeatureCache, results: dict[str, Any]) -> str:
        """CKA between all taps; returns its part of the summary."""
        args = self.args
        found = Similarity(
            self.taps,
            similarities(
                cache,
                self.taps,
                args.cka_pool,
                batch=args.cka_batch,
                limit=args.cka_images,
                seed=args.seed,
                processes=self.processes,
            ),
        )
        images = min(args.cka_images, len(cache.listing))
        caption = (
            f"{Path(args.unet).name}, {args.image_size} px, {images:,} images, maps pooled to "
        )
        caption += f"{args.cka_pool}x{args.cka_pool}"
        found.write(self.out, caption)
        results["cka"] = found.to_json()
        at = (PAPERS_TIMESTEP, PAPERS_BLOCK)
        if "advice" in results:
            best = results["advice"][0]["best"]
            at = (best["t"], best["b"])
        pictures = "\n".join(f"![CKA]({file})" for file in found.nearest(*at))
        batches = math.ceil(images / args.cka_batch)
        return (
            f"## Linear CKA\n\n{images:,} images in {batches} minibatches, unbiased HSIC, maps "
            f"pooled to {args.cka_pool}x{args.cka_pool} and flattened. All blocks and timesteps: "
            f"`cka/`, `cka.csv`.\n\n{pictures}"
        )


def _key(record: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return record["b"], record["t"], record["pool"], record["seed"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: It cannot be done as given; the message says why.
    """
    common.run_tool(lambda: parse(argv), run)


if __name__ == "__main__":
    main()
