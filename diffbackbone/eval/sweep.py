"""Which block, timestep and pooling suit my images? Linear probes, kNN and CKA over a whole grid.

The U-Net runs over the images once; every combination is then measured on the cached taps, as in
the paper's Figures 3 and 4 and Table 9. OUT gets ``summary.md`` (the recommendation, tables and
figures), ``results.csv`` (one line per combination and seed), ``results.json``,
``linear_pool2.png`` and the like (block x timestep), ``cka.csv`` and ``cka/`` (Figure 5).

* **linear**: see :mod:`diffbackbone.eval.probe`. A share of the training images (``--holdout``)
  chooses the regularization; of fewer than 1,000 images, one share after the other.
* **knn**: see :mod:`diffbackbone.eval.knn`.
* **cka**: linear CKA between flattened maps on the validation images; it needs no labels.

The fixed noise is the same for every image, so a large timestep costs less accuracy than with
noise of each image's own, as in the paper's figures: choose the timestep with the noise that you
will use it with. A run that was killed goes on from the cache and the combinations that are done.
Pools and seeds may be added later; other blocks or timesteps need another pass of the U-Net
(``--overwrite-cache``), but what was measured stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from diffbackbone.cli import run_command
from diffbackbone.eval.cka import compare_taps, slice_file, slices, write_csv, write_slices
from diffbackbone.eval.data import ImageFolder, choose_subset, list_images
from diffbackbone.eval.features import FeatureSpec, Tap, open_splits
from diffbackbone.eval.options import BackboneOptions, CacheOptions, DataOptions, build_backbone
from diffbackbone.eval.probe import MEASURES, Labels, ProbeEvaluator
from diffbackbone.eval.recommend import describe, flops_to, recommend, show_grid, summarize
from diffbackbone.utils import (
    RandomStream,
    UserError,
    changed_settings,
    save_figure,
    write_json,
    write_text,
)

FORMAT = "diffbackbone sweep 3"  # 3: scikit-learn draws folds and shares
BLOCKS = (6, 9, 12, 15, 18, 19, 21, 24, 27, 30, 33, 36)
PAPER_BLOCK, PAPER_TIMESTEP = 24, 90
"""Figure 5 compares timesteps at b = 24 and blocks at t = 90."""


@dataclass(kw_only=True)
class SweepConfig(DataOptions, BackboneOptions, CacheOptions):
    """Find the block, timestep and pooling that suit a data set, by probes, kNN and CKA."""

    out: Path = Path("work_dirs/sweep")
    """Folder for the results."""
    images: Path | None = None
    """Images without labels, in place of --data: CKA only."""
    timesteps: tuple[int, ...] = (10, 30, 50, 90, 150, 300, 500, 700)
    """0-based timesteps t."""
    blocks: tuple[int, ...] = ()
    """1-based blocks b; default: 6 9 12 15 18 19 21 24 27 30 33 36, as far as the U-Net goes."""
    pools: tuple[int, ...] = (1, 2, 4)
    """Heights and widths that maps are pooled to."""
    measures: tuple[Literal["linear", "knn"], ...] = ("linear", "knn")
    """Measures; the first one gives the recommendation."""
    subset: str | None = None
    """Labels for a share of the training images (1%, 0.01), or for those of a list file."""
    seeds: tuple[int, ...] = ()
    """Each draws the subset and the held-out images; several give mean and spread."""
    batch_size: int = 64
    """Images in the U-Net at a time."""
    overwrite: bool = False
    """Replace a sweep of other settings."""
    l2: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)
    """Strengths of the linear probe's regularization."""
    holdout: float = 0.2
    """Share of the training images that chooses among them."""
    k: int | None = None
    """Number of neighbors; default: 20, or all training images if fewer."""
    temperature: float = 0.07
    """Temperature of the neighbors' votes."""
    cka: bool = True
    """Compute CKA."""
    cka_only: bool = False
    """Compute CKA only; labels don't matter."""
    cka_pool: int | None = None
    """Height and width of the maps; default: the largest of --pools."""
    cka_batch: int = 256
    """Images in a minibatch at most."""
    cka_images: int = 2500
    """Images at most."""


def cache_pool(sides: Iterable[int], pools: Iterable[int]) -> int:
    """Return the smallest grid to cache maps at from which every pool follows exactly.

    Averages of averages are averages where windows don't overlap: a map of side s that is cached
    at P must be P or smaller, or a multiple of it, and P a multiple of each pool.
    """
    sides, pools = set(sides), set(pools)
    for size in range(max(pools), max(sides)):
        fits = all(side <= size or side % size == 0 for side in sides)
        if fits and all(size % pool == 0 for pool in pools):
            return size
    return max(*sides, *pools)


def resolve(config: SweepConfig) -> SweepConfig:
    """Fill in the defaults that depend on other options.

    Raises:
        UserError: A block is out of range, or a list is empty or has duplicates.
    """
    unet = config.unet_config()
    config = replace(
        config,
        blocks=config.blocks or tuple(b for b in BLOCKS if b <= len(unet.blocks)),
        seeds=config.seeds or (config.seed,),
        cka_pool=config.cka_pool or max(config.pools),
        image_size=config.image_size or unet.image_size,
        cka_only=config.cka_only or config.images is not None,
    )
    try:
        unet.blocks.check(config.blocks)
    except ValueError as error:
        raise UserError(str(error)) from error
    for name in ("pools", "seeds", "l2", "measures"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{name} needs one or more different values, got {values}")
    return config


def list_unlabeled(config: SweepConfig) -> ImageFolder:
    """List the images that CKA alone looks at."""
    root = config.images or config.folder("val")
    folder = list_images(root.expanduser(), config.value_range)
    order = RandomStream.ORDER.generator(config.seed).permutation(len(folder))
    return folder.subset(np.sort(order[: config.cka_images]))


def draw_labels(config: SweepConfig, train: ImageFolder) -> tuple[ImageFolder, list[Labels]]:
    """Draw the labeled training images of each seed.

    Returns:
        The images that any seed has drawn, and each seed's rows of them.
    """
    row = {path: i for i, path in enumerate(train.listing.paths)}
    chosen = {}
    for seed in config.seeds:
        part = choose_subset(train, config.subset, seed) if config.subset else train
        chosen[seed] = np.array([row[path] for path in part.listing.paths])
    used = np.unique(np.concatenate(list(chosen.values())))
    draws = []
    for seed, rows in chosen.items():
        own = np.searchsorted(used, rows)
        draws.append(Labels.draw(seed, own, train.labels[rows], config.holdout))
    return train.subset(used), draws


def run(config: SweepConfig) -> dict[str, Any]:
    """Compute or read the features, measure every combination, and report.

    Returns:
        The content of ``results.json``.
    """
    config = resolve(config)
    state = config.start()
    if state.num_processes > 1:
        raise UserError("tools/sweep.py runs in one process")
    settings: dict[str, Any] = {"format": FORMAT}
    draws: list[Labels] = []
    if config.cka_only:
        folders = {"images": list_unlabeled(config)}
    else:
        train, val = config.list_folders()
        part, draws = draw_labels(config, train)
        fewest = min(len(draw.rows) for draw in draws)
        config = replace(config, k=min(20, fewest) if config.k is None else config.k)
        if "knn" in config.measures and not 1 <= config.k <= fewest:
            raise UserError(f"--k {config.k}: there are {fewest} training images")
        # a cache for each draw of the labels
        name = f"train-{part.listing.digest()[:8]}" if config.subset else "train"
        folders = {name: part, "val": val}
        settings["train_sha256"] = train.listing.digest()
        for option in ("subset", "l2", "holdout", "k", "temperature", "measures"):
            settings[option] = getattr(config, option)
    images = list(folders.values())[-1]
    if config.cka and min(len(images), config.cka_images) < 4:
        raise UserError(f"CKA needs at least 4 images, {images.root} has {len(images)}")
    # the whole U-Net, so that its digest stays the same with other blocks
    backbone = build_backbone(replace(config, blocks=(len(config.unet_config().blocks),)))
    unet = backbone.unet.config
    sides = [math.ceil(config.image_size / unet.blocks[b].stride) for b in config.blocks]
    pools = {config.cka_pool} if config.cka_only else {*config.pools, config.cka_pool}
    spec = FeatureSpec(
        config.timesteps, config.blocks, config.image_size, cache_pool(sides, pools),
        config.feature_dtype, config.compute_dtype(state.device), config.batch_size,
    )  # fmt: skip
    settings.update(spec.settings(backbone, images), batch_size=config.batch_size)
    del settings["timesteps"], settings["blocks"]
    records = read_records(config, settings)
    caches = open_splits(
        config.cache or config.out / "cache", folders, backbone, spec, state,
        workers=config.workers, overwrite=config.overwrite_cache,
    )  # fmt: skip
    write_json(config.out / "settings.json", settings)
    results: dict[str, Any] = {"settings": settings}
    sections = []
    taps = [(t, b) for b in config.blocks for t in config.timesteps]
    if not config.cka_only:
        evaluator = ProbeEvaluator(
            *caches, draws, config.measures, config.l2, config.k, config.temperature, state.device
        )
        records = measure(config, evaluator, taps, records)
        flops = flops_to(unet, config.blocks, config.image_size)
        found, parts = report(config, records, flops, images)
        results.update(found)
        sections += parts
    if config.cka:
        values = compare_taps(
            caches[-1], taps, config.cka_pool, config.cka_batch, config.cka_images, config.seed
        )
        results["cka"] = list(slices(taps, values))
        sections.append(report_cka(config, results, min(config.cka_images, len(images))))
    write_json(config.out / "results.json", results)
    weights = Path(config.checkpoint).name if config.checkpoint else "random weights"
    title = f"# Features of `{Path(config.unet).name}` ({weights}), {config.image_size} px, "
    title += f"noise {config.noise}"
    write_text(config.out / "summary.md", "\n\n".join([title, *sections]) + "\n")
    print(results.get("recommendation", "").replace("**", ""))
    print(f"{config.out}: summary.md and its figures, results.json")
    return results


def read_records(config: SweepConfig, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what an earlier run has measured.

    Raises:
        UserError: It has other settings, and ``--overwrite`` is not given.
    """
    path = config.out / "cells.jsonl"
    if not (config.out / "settings.json").is_file():
        return []
    changes = changed_settings(json.loads((config.out / "settings.json").read_text()), settings)
    if changes and not config.overwrite:
        raise UserError(
            f"{config.out} holds a sweep of other settings:\n  "
            + "\n  ".join(changes)
            + "\nTake another --out, or --overwrite"
        )
    if changes:
        path.unlink(missing_ok=True)
    return list(map(json.loads, path.read_text().splitlines())) if path.is_file() else []


def measure(
    config: SweepConfig,
    evaluator: ProbeEvaluator,
    taps: Sequence[Tap],
    records: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Measure what is missing; each tap is saved as soon as it is done."""
    done = {(r["b"], r["t"], r["pool"], r["seed"]): r for r in records}
    grid = [(pool, seed) for pool in config.pools for seed in config.seeds]
    for t, b in tqdm(taps, "probes", unit="tap", leave=False, disable=None):
        if wanted := [(pool, seed) for pool, seed in grid if (b, t, pool, seed) not in done]:
            for record in evaluator.measure((t, b), wanted):
                done[b, t, record["pool"], record["seed"]] = record
            lines = [json.dumps(record) + "\n" for record in done.values()]
            write_text(config.out / "cells.jsonl", "".join(lines))
    return [done[b, t, pool, seed] for t, b in taps for pool, seed in grid]


def report(
    config: SweepConfig,
    records: list[dict[str, Any]],
    flops: Mapping[int, int],
    val: ImageFolder,
) -> tuple[dict[str, Any], list[str]]:
    """Write the numbers and figures of the probes.

    Returns:
        Their part of ``results.json``, and of ``summary.md``.
    """
    rows = [
        {**record, "gflops": round(flops[record["b"]] / 1e9, 6), "val_images": len(val)}
        for record in records
    ]
    write_csv(config.out / "results.csv", rows)
    cells, seeds = summarize(records, config.measures), len(config.seeds)
    advices = [recommend(cells, name, flops, len(val), seeds) for name in config.measures]
    counts = " or ".join(f"{n:,}" for n in sorted({r["train_images"] for r in records}))
    caption = f"{counts} training and {len(val):,} validation images, {len(val.classes)} classes"
    if seeds > 1:
        caption += f", mean ± standard deviation over {seeds} seeds"
    text = describe(advices)
    parts = [f"{caption}.", text]
    for advice in advices:
        name = advice["measure"]
        for pool in config.pools:
            file = f"{name}_pool{pool}.png"
            table, figure = show_grid(cells, pool, advice, f"{Path(config.unet).name}, {caption}")
            save_figure(figure, config.out / file)
            heading = f"## Top-1 in % by {MEASURES[name]}, pooled to {pool}x{pool}"
            parts += [heading, table.strip(), f"![{name}]({file})"]
    parts.append(
        "Bold: the best of all. Italic: the fewest operations within its standard error. Linear "
        "probe: logistic regression on standardized features, l2 from "
        f"{', '.join(f'{l2:g}' for l2 in config.l2)}, chosen by {config.holdout:.0%} of the "
        f"training images. kNN: {config.k} neighbors by cosine, temperature "
        f"{config.temperature:g}."
    )
    found = {"recommendation": text, "advice": advices, "cells": cells, "records": records}
    return found, parts


def report_cka(config: SweepConfig, results: Mapping[str, Any], images: int) -> str:
    """Write CKA between the taps; returns its part of ``summary.md``."""
    caption = f"{images:,} images, maps pooled to {config.cka_pool}x{config.cka_pool}"
    write_slices(config.out, results["cka"], f"{Path(config.unet).name}, {caption}")
    best = results["advice"][0]["best"] if "advice" in results else {}
    t, b = best.get("t", PAPER_TIMESTEP), best.get("b", PAPER_BLOCK)
    nearest = (
        slice_file("blocks", min(config.timesteps, key=lambda own: abs(own - t))),
        slice_file("timesteps", min(config.blocks, key=lambda own: abs(own - b))),
    )
    return (
        f"## Linear CKA\n\n{caption} and flattened, unbiased HSIC over minibatches. All blocks "
        "and timesteps: `cka/`, `cka.csv`.\n\n" + "\n".join(f"![CKA]({file})" for file in nearest)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(SweepConfig, run, argv)
