"""Which block, timestep and pooling suit my images? Linear probes, kNN and CKA over a whole grid.

The network runs over the images once; every combination is then measured on the cached taps, as in
the paper's Figures 3 and 4 and Table 9. OUT gets ``summary.md`` (the recommendation, tables and
figures), ``results.json``, ``linear_pool2.png`` and the like (block x timestep), and ``cka/``
(Figure 5): linear CKA between flattened maps of the validation images, which needs no labels.

The fixed noise is the same for every image, so a large timestep costs less accuracy than with
noise of each image's own, as in the paper's figures: choose the timestep with the noise that you
will use it with. A run that was killed continues from the cache and the combinations that are done.
Pools and seeds may be added later; other blocks or timesteps need another pass of the network
(``--overwrite-cache``), but the measurements stay.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from tqdm import tqdm

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.cli import run_command
from diffbackbone.costs import counting_flops
from diffbackbone.eval import onepass
from diffbackbone.eval.cka import compare_taps, draw_networks, draw_slices
from diffbackbone.eval.data import ImageFolder, choose_subset, list_images
from diffbackbone.eval.features import FeatureCache, FeatureSpec, Tap, open_caches
from diffbackbone.eval.options import (
    BackboneOptions,
    CacheOptions,
    DataOptions,
    build_backbone,
    check_settings,
    split_model,
)
from diffbackbone.eval.plots import BEST_COLOR, CHEAPEST_COLOR, draw_heatmap
from diffbackbone.eval.probe import MEASURES, Labels, measure_tap
from diffbackbone.utils import (
    RandomStream,
    UserError,
    markdown_table,
    save_figure,
    write_json,
    write_text,
)

FORMAT = "diffbackbone sweep 4"
LARGEST_CACHE = 100e9
"""Bytes of a cache from which on --probe auto trains probes in one pass."""
BLOCKS = (6, 9, 12, 15, 18, 19, 21, 24, 27, 30, 33, 36)


@dataclass(kw_only=True)
class SweepConfig(DataOptions, BackboneOptions, CacheOptions):
    """Find the block, timestep and pooling that suit a data set, by probes, kNN and CKA."""

    out: Path = Path("work_dirs/sweep")
    """Folder for the results."""
    timesteps: tuple[int, ...] = (10, 30, 50, 90, 150, 300, 500, 700)
    """0-based timesteps t."""
    blocks: tuple[int, ...] = ()
    """1-based blocks b; default: 6 9 12 15 18 19 21 24 27 30 33 36, if the network has them."""
    pools: tuple[int, ...] = (1, 2, 4)
    """Heights and widths that maps are pooled to; CKA takes the largest."""
    measures: tuple[Literal["linear", "knn"], ...] = ("linear", "knn")
    """Measures; the first one gives the recommendation."""
    subset: str | None = None
    """Labels for a share of the training images (1%, 0.01), or for those of a list file."""
    seeds: tuple[int, ...] = ()
    """Each draws the subset and the held-out images; several give mean and spread."""
    k: int = 20
    """Number of neighbors; all training images if there are fewer."""
    probe: Literal["auto", "cached", "one-pass"] = "auto"
    """cached: scikit-learn's logistic regression, and kNN, on cached features. one-pass: Adam on
    probes of all cells at once, by the paper's protocol, from one run of the network: no cache, no
    kNN, no CKA. auto: one-pass where the cache would take more than 100 GB."""
    lr: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """One-pass probes: learning rates; held-out training images choose one for each tap."""
    epochs: int = 28
    """One-pass probes: epochs."""
    probe_batch: int = 128
    """One-pass probes: images of a step; with few images a smaller number gives more steps."""
    flip: bool = True
    """One-pass probes: mirror images at random; --no-flip for text and digits."""
    standardize: bool = True
    """One-pass probes: standardize features, as cached probes do; the paper doesn't."""
    probe_memory: float = 8.0
    """One-pass probes: GB that they may take with gradients and moments."""
    cka: bool = True
    """Compute CKA."""
    cka_only: bool = False
    """Compute CKA only, of all images below DATA; they need no labels."""
    cka_images: int = 2500
    """Images for CKA at most."""
    cka_with: str | None = None
    """Compute CKA with every block of another network, too: timm:vit_base_patch16_224.dino, with
    weights after "=" where it does not bring its own."""
    overwrite: bool = False
    """Measure all anew."""


def cache_pool(sides: Iterable[int], pools: Iterable[int]) -> int:
    """Return a grid to cache maps at from which every pool follows exactly.

    Averages of averages are averages where windows don't overlap.
    """
    grid, sides = math.lcm(*pools), set(sides)
    return grid if all(side <= grid or side % grid == 0 for side in sides) else max(sides)


def draw_labels(config: SweepConfig, train: ImageFolder) -> tuple[ImageFolder, list[Labels]]:
    """Draw each seed's labeled images; return those of any seed, and each seed's rows of them."""
    chosen = {seed: np.arange(len(train)) for seed in config.seeds}
    if config.subset:
        chosen = {seed: choose_subset(train, config.subset, seed) for seed in config.seeds}
    used = np.unique(np.concatenate(list(chosen.values())))
    draws = [
        Labels.draw(seed, np.searchsorted(used, rows), train.labels[rows])
        for seed, rows in chosen.items()
    ]
    return train.subset(used), draws


def run(config: SweepConfig) -> dict[str, Any]:
    """Compute or read the features, measure every combination, and report.

    Returns:
        The content of ``results.json``; nothing in processes that only help with the features.
    """
    config = replace(
        config,
        blocks=config.blocks or config.existing(BLOCKS),
        seeds=config.seeds or (config.seed,),
        image_size=config.image_size or config.network().image_size,
    )
    state = config.start()
    settings: dict[str, Any] = {"format": FORMAT, "batch_size": config.batch_size}
    draws: list[Labels] = []
    if config.cka_only:
        options = {"value_range": config.value_range, "channels": config.network().in_channels}
        images = list_images(config.data.expanduser(), **options)
        order = RandomStream.ORDER.generator(config.seed).permutation(len(images))
        images = images.subset(np.sort(order[: config.cka_images]))
        folders = {"images": images}
    else:
        train, images = config.list_folders(config.network().in_channels)
        part, draws = draw_labels(config, train)
        # one cache for each draw of the labels
        folders = {f"train-{part.digest()[:8]}" if config.subset else "train": part, "val": images}
        settings.update(subset=config.subset, k=config.k, measures=config.measures)
        settings["train_sha256"] = train.digest()
    if config.cka and min(len(images), config.cka_images) < 4:
        raise UserError(f"CKA needs at least 4 images, {images.root} has {len(images)}")
    # with the last block, so that the digest of the weights is the same for other blocks
    last = max(config.network().blocks)
    backbone = build_backbone(replace(config, blocks=(*config.blocks, last)))
    sides = [math.ceil(config.image_size / backbone.unet.blocks[b].stride) for b in config.blocks]
    spec = FeatureSpec.of(config, cache_pool(sides, config.pools), state)
    settings.update(spec.settings(backbone, images))
    del settings["timesteps"], settings["blocks"]
    one_pass = _choose_probe(config, spec, backbone, folders) == "one-pass"
    if one_pass:
        config = replace(config, measures=("linear",), cka=False)
        names = ("epochs", "probe_batch", "flip", "standardize")
        settings.update({name: getattr(config, name) for name in names})
        settings.update(probe="one-pass", lr=list(config.lr), measures=["linear"])
    results: dict[str, Any] = {"settings": settings, "records": []}
    other = None
    if (config.out / "results.json").is_file() and not config.overwrite:
        saved = json.loads((config.out / "results.json").read_text(encoding="utf-8"))
        check_settings(config.out, saved["settings"], settings)
        results["records"] = saved["records"]
    if one_pass:
        done = {_key(r): r for r in results["records"]}
        _train_in_one_pass(config, spec, backbone, part, images, draws, state, done)
        results["records"], caches = list(done.values()), []
    else:
        caches = open_caches(config, folders, backbone, spec, state)
        if config.cka and config.cka_with:  # all processes share its work, too
            other = _open_other(config, images, state)
    if not state.is_main_process:
        return {}
    weights = Path(config.checkpoint).name if config.checkpoint else "no checkpoint"
    name = f"{Path(config.unet).name} ({weights}), {config.image_size} px, noise {config.noise}"
    sections = [f"# Features of {name}"]
    taps = [(t, b) for b in config.blocks for t in config.timesteps]
    if not config.cka_only:
        done = {_key(r): r for r in results["records"]}
        for t, b in tqdm(taps, "probes", unit="tap", leave=False, disable=None):
            for pool, draw in ((pool, draw) for pool in config.pools for draw in draws):
                if (b, t, pool, draw.seed) not in done:
                    done[b, t, pool, draw.seed] = measure_tap(
                        *caches, (t, b), pool, draw, config.measures, config.k, state.device
                    )
            write_json(config.out / "results.json", {**results, "records": list(done.values())})
        results["records"] = list(done.values())
        wanted = [done[b, t, p, draw.seed] for t, b in taps for p in config.pools for draw in draws]
        flops = flops_to(backbone, config.blocks, config.image_size)
        sections += report(config, results, wanted, flops, images)
    if config.cka:
        results["cka"], parts = _compare_maps(config, len(images), caches[-1], taps, name, other)
        sections += parts
    write_json(config.out / "results.json", results)
    write_text(config.out / "summary.md", "\n\n".join(sections) + "\n")
    print(results.get("recommendation", "").replace("**", ""))
    print(f"{config.out}: summary.md and its figures, results.json")
    return results


def _compare_maps(
    config: SweepConfig,
    count: int,
    cache: FeatureCache,
    taps: Sequence[Tap],
    name: str,
    other: FeatureCache | None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compute and draw CKA between the taps of ``count`` images, and with another network's.

    Returns:
        What :func:`draw_slices` and :func:`draw_networks` return, and parts of ``summary.md``.
    """
    count, pool = min(config.cka_images, count), max(config.pools)
    caption = f"{count:,} images, maps pooled to {pool}x{pool}"
    sets = [(cache, tap) for tap in taps]
    if other is not None:
        sets += [(other, tap) for tap in other.taps]
    values = compare_taps(sets, pool, config.cka_images, config.seed)
    title, own = f"{name}\n{caption}", len(taps)
    found = draw_slices(config.out, taps, values[:own, :own], title)
    if other is not None:
        title += f"\nColumns: {config.cka_with}, {other.settings['image_size']} px"
        blocks = [b for _, b in other.taps]
        found += draw_networks(config.out, taps, blocks, values[:own, own:], title)
    parts = [f"## Linear CKA\n\n{caption} and flattened, unbiased HSIC over minibatches."]
    return found, parts + [f"![CKA]({part['file']})" for part in found]


def _open_other(config: SweepConfig, images: ImageFolder, state: PartialState) -> FeatureCache:
    """Compute or read all blocks of the network ``cka_with``, on images without noise."""
    unet, checkpoint = split_model(config.cka_with)
    network = BackboneOptions(unet=unet).network()
    config = replace(
        config,
        unet=unet,
        checkpoint=checkpoint,
        blocks=tuple(range(1, len(network.blocks) + 1)),
        timesteps=(0,),
        noise="none",
        image_size=network.image_size,
    )
    backbone, spec = build_backbone(config), FeatureSpec.of(config, max(config.pools), state)
    return open_caches(config, {"other": images}, backbone, spec, state)[0]


def _key(record: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return record["b"], record["t"], record["pool"], record["seed"]


def _choose_probe(
    config: SweepConfig,
    spec: FeatureSpec,
    backbone: DiffusionBackbone,
    folders: Mapping[str, ImageFolder],
) -> str:
    """Return ``"cached"`` or ``"one-pass"``, and say why."""
    if config.cka_only:
        return "cached"
    size = onepass.cache_bytes(spec, backbone, sum(map(len, folders.values())))
    chosen = config.probe
    if chosen == "auto":
        large = size > LARGEST_CACHE and "linear" in config.measures
        chosen = "one-pass" if large else "cached"
        if chosen == "one-pass":
            print(f"one-pass probes: a cache of all taps would take {size / 1e9:,.0f} GB")
    if chosen == "one-pass":
        print("kNN and CKA need a cache and are left out", flush=True)
    return chosen


def _train_in_one_pass(
    config: SweepConfig,
    spec: FeatureSpec,
    backbone: DiffusionBackbone,
    train: ImageFolder,
    val: ImageFolder,
    draws: Sequence[Labels],
    state: PartialState,
    done: dict[tuple[int, int, int, int], Mapping[str, Any]],
) -> None:
    """Add the records of the draws of labels that are not done yet."""
    if state.is_main_process:
        train.check()
        val.check()
    state.wait_for_everyone()
    backbone.to(state.device).eval()
    trainer = onepass.OnePass(
        backbone, spec, config.pools, config.lr, config.epochs,
        config.probe_batch, config.flip, config.standardize, config.out / "probes",
        config.workers, state, 1e9 * config.probe_memory,
    )  # fmt: skip
    taps = [(b, t, pool) for b in config.blocks for t in config.timesteps for pool in config.pools]
    for draw in draws:
        if not all((*tap, draw.seed) in done for tap in taps):
            records = trainer.run(train.subset(draw.rows), val, draw.seed)
            done.update({_key(record): record for record in records})


def report(
    config: SweepConfig,
    results: dict[str, Any],
    records: Sequence[Mapping[str, Any]],
    flops: Mapping[int, int],
    val: ImageFolder,
) -> list[str]:
    """Add the recommendation to the results and draw heat maps; returns parts of ``summary.md``."""
    cells, seeds = summarize(records, config.measures, flops), len(config.seeds)
    advices = [recommend(cells, name, len(val), seeds) for name in config.measures]
    counts = " or ".join(f"{n:,}" for n in sorted({r["train_images"] for r in records}))
    caption = f"{counts} training and {len(val):,} validation images, {len(val.classes)} classes"
    if seeds > 1:
        caption += f", mean ± standard deviation over {seeds} seeds"
    results.update(recommendation=describe(advices), advice=advices, cells=cells)
    parts = [f"{caption}.", results["recommendation"]]
    for advice in advices:
        name = advice["measure"]
        for pool in config.pools:
            file = f"{name}_pool{pool}.png"
            table, figure = show_grid(cells, pool, advice, f"{Path(config.unet).name}, {caption}")
            save_figure(figure, config.out / file)
            heading = f"## Top-1 in % by {MEASURES[name]}, pooled to {pool}x{pool}"
            parts += [heading, table.strip(), f"![{name}]({file})"]
    return [*parts, "Bold: the best of all. Italic: the cheapest within its standard error."]


def flops_to(backbone: DiffusionBackbone, blocks: Sequence[int], image_size: int) -> dict[int, int]:
    """Count the operations from a square image to each block, with the backbone's padding."""
    backbone = copy.deepcopy(backbone).to("meta")
    image = torch.empty(1, backbone.in_channels, image_size, image_size, device="meta")
    flops = {}
    for block in blocks:
        with counting_flops() as counter:
            backbone.forward_taps(image, blocks=[block])
        flops[block] = counter.get_total_flops()
    return flops


def summarize(
    records: Sequence[Mapping[str, Any]], measures: Sequence[str], flops: Mapping[int, int]
) -> list[dict[str, Any]]:
    """Average over the seeds.

    Returns:
        For each combination ``b``, ``t``, ``pool``, ``features``, ``flops``, and for each measure
        its mean and ``<measure>_std`` (None for a single seed).
    """
    groups: dict[tuple[int, int, int], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["b"], record["t"], record["pool"]), []).append(record)
    cells = []
    for (b, t, pool), own in groups.items():
        cell: dict[str, Any] = {"b": b, "t": t, "pool": pool, "features": own[0]["features"]}
        cell["flops"] = flops[b]
        for measure in measures:
            values = np.array([record[measure] for record in own])
            cell[measure] = float(values.mean())
            cell[f"{measure}_std"] = float(values.std(ddof=1)) if len(values) > 1 else None
        cells.append(cell)
    return cells


def recommend(
    cells: Sequence[Mapping[str, Any]], measure: str, images: int, seeds: int
) -> dict[str, Any]:
    """Find the best combination, and the cheapest within its standard error.

    The standard error is that of a share of the validation images and of the mean over the seeds.
    Ties go to the fewest operations, then the fewest features, then the smallest timestep.

    Returns:
        ``best`` and ``cheapest`` (the same cell where no cheaper block is within the error),
        ``standard_error`` and ``within`` (how many cells are).
    """

    def order(cell: Mapping[str, Any]) -> tuple[float, ...]:
        return -cell[measure], cell["flops"], cell["features"], cell["pool"], cell["t"]

    best = min(cells, key=order)
    share, spread = best[measure], best[f"{measure}_std"] or 0.0
    error = math.sqrt(share * (1 - share) / images + spread**2 / seeds)
    good = [cell for cell in cells if cell[measure] >= share - error]
    least = min(cell["flops"] for cell in good)
    cheapest = best
    if least < best["flops"]:
        cheapest = min((cell for cell in good if cell["flops"] == least), key=order)
    return {
        "measure": measure,
        "best": best,
        "cheapest": cheapest,
        "standard_error": error,
        "within": len(good),
    }


def describe(advices: Sequence[Mapping[str, Any]]) -> str:
    """Format the recommendation of the first measure, and the best cells of the others."""
    advice = advices[0]
    best, cheapest = advice["best"], advice["cheapest"]
    lines = [
        f"**Recommended: {_name(best, advice)}**, {best['flops'] / 1e9:.3g} GFLOPs per image. "
        f"{advice['within'] - 1} other combinations are within one standard error "
        f"({100 * advice['standard_error']:.1f}). The accuracy is slightly optimistic, being the "
        "best of many: confirm it on other images."
    ]
    if cheapest is not best:
        saved = 1 - cheapest["flops"] / best["flops"]
        lines.append(f"**Cheapest within the error: {_name(cheapest, advice)}**, {saved:.0%} less.")
    lines += [f"Best: {_name(other['best'], other)}." for other in advices[1:]]
    return "\n\n".join(lines)


def _name(cell: Mapping[str, Any], advice: Mapping[str, Any]) -> str:
    measure = advice["measure"]
    score = f"{format_percent(cell, measure)}% by {MEASURES[measure]}"
    return f"b = {cell['b']}, t = {cell['t']}, pool = {cell['pool']}, {score}"


def format_percent(cell: Mapping[str, Any], measure: str) -> str:
    """Format a cell's measure in percent, with the spread over seeds if there is one."""
    spread = cell[f"{measure}_std"]
    text = f"{100 * cell[measure]:.1f}"
    return text if spread is None else f"{text} ± {100 * spread:.1f}"


def show_grid(
    cells: Sequence[Mapping[str, Any]], pool: int, advice: Mapping[str, Any], caption: str
) -> tuple[str, Figure]:
    """Show one measure at one pool, blocks by timesteps, as a Markdown table and a heat map.

    The best of all combinations is bold and framed, the cheapest one within its error italic.
    """
    measure = advice["measure"]
    own = {(cell["b"], cell["t"]): cell for cell in cells if cell["pool"] == pool}
    blocks, timesteps = (list(dict.fromkeys(key[i] for key in own)) for i in (0, 1))
    texts = [[format_percent(own[b, t], measure) for t in timesteps] for b in blocks]
    marks = {}
    for found, color, star, label in (
        (advice["cheapest"], CHEAPEST_COLOR, "*", "fewest operations within one standard error"),
        (advice["best"], BEST_COLOR, "**", "best of all blocks, timesteps and pools"),
    ):
        if found["pool"] == pool:
            i, j = blocks.index(found["b"]), timesteps.index(found["t"])
            marks[i, j] = color, label
            texts[i][j] = f"{star}{format_percent(found, measure)}{star}"
    columns = ["b \\ t:", *(f"{t}:" for t in timesteps)]
    table = markdown_table(columns, ([b, *line] for b, line in zip(blocks, texts)))
    every = [100 * cell[measure] for cell in cells]
    figure = draw_heatmap(
        np.array([[100 * own[b, t][measure] for t in timesteps] for b in blocks]),
        blocks,
        timesteps,
        f"{MEASURES[measure]}, top-1 in %, pooled to {pool}x{pool}\n{caption}",
        "block b",
        "timestep t",
        (min(every), max(every)),
        "{:.1f}",
        marks,
    )
    return table, figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(SweepConfig, run, argv)
