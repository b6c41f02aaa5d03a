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
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.cli import run_command
from diffbackbone.costs import counting_flops
from diffbackbone.eval import onepass
from diffbackbone.eval.cka import compare_taps, draw_figures
from diffbackbone.eval.data import ImageFolder, choose_subset, list_images
from diffbackbone.eval.features import FeatureCache, FeatureSpec, open_caches
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
class SweepConfig(DataOptions, BackboneOptions, CacheOptions, onepass.OnePassOptions):
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
    return Sweep(config).run()


class Sweep:
    """The images, network and settings of a sweep, and the measurements that are done."""

    def __init__(self, config: SweepConfig) -> None:
        self.config = config = replace(
            config,
            blocks=config.blocks or config.existing(BLOCKS),
            seeds=config.seeds or (config.seed,),
            image_size=config.image_size or config.network().image_size,
        )
        self.state = config.start()
        self.taps = [(t, b) for b in config.blocks for t in config.timesteps]
        settings: dict[str, Any] = {"format": FORMAT, "batch_size": config.batch_size}
        self.draws: list[Labels] = []
        if config.cka_only:
            options = {"value_range": config.value_range, "channels": config.network().in_channels}
            images = list_images(config.data.expanduser(), **options)
            order = RandomStream.ORDER.generator(config.seed).permutation(len(images))
            self.images = images.subset(np.sort(order[: config.cka_images]))
            self.folders = {"images": self.images}
        else:
            train, self.images = config.list_folders(config.network().in_channels)
            part, self.draws = draw_labels(config, train)
            # one cache for each draw of the labels
            name = f"train-{part.digest()[:8]}" if config.subset else "train"
            self.folders = {name: part, "val": self.images}
            settings.update(subset=config.subset, k=config.k, measures=config.measures)
            settings["train_sha256"] = train.digest()
        count = min(len(self.images), config.cka_images)
        if config.cka and count < 4:
            raise UserError(f"CKA needs at least 4 images, got {count} of {self.images.root}")
        # with the last block, so that the digest of the weights is the same for other blocks
        last = max(config.network().blocks)
        self.backbone = build_backbone(replace(config, blocks=(*config.blocks, last)))
        strides = [self.backbone.unet.blocks[b].stride for b in config.blocks]
        sides = [math.ceil(config.image_size / stride) for stride in strides]
        self.spec = FeatureSpec.of(config, cache_pool(sides, config.pools), self.state)
        settings.update(self.spec.settings(self.backbone, self.images))
        del settings["timesteps"], settings["blocks"]
        self.one_pass = self._takes_one_pass()
        if self.one_pass:
            self.config = replace(config, measures=("linear",), cka=False)
            names = ("epochs", "probe_batch", "flip", "standardize")
            settings.update({name: getattr(config, name) for name in names})
            settings.update(probe="one-pass", lr=list(config.lr), measures=["linear"])
        self.results: dict[str, Any] = {"settings": settings, "records": []}
        path = config.out / "results.json"
        if path.is_file() and not config.overwrite:
            saved = json.loads(path.read_text(encoding="utf-8"))
            check_settings(config.out, saved["settings"], settings)
            self.results["records"] = saved["records"]
        self.done = {_key(record): record for record in self.results["records"]}

    def _takes_one_pass(self) -> bool:
        """Decide between cached and one-pass probes, and say why."""
        config = self.config
        if config.cka_only or config.probe == "cached":
            return False
        if config.probe == "auto":
            count = sum(map(len, self.folders.values()))
            size = onepass.cache_bytes(self.spec, self.backbone, count)
            if size <= LARGEST_CACHE or "linear" not in config.measures:
                return False
            print(f"one-pass probes: a cache of all taps would take {size / 1e9:,.0f} GB")
        print("kNN and CKA need a cache and are left out", flush=True)
        return True

    def run(self) -> dict[str, Any]:
        """Measure what is missing, and report; see :func:`run`."""
        config, results, state = self.config, self.results, self.state
        caches, other = [], None
        if self.one_pass:
            self._train_in_one_pass()
        else:
            caches = open_caches(config, self.folders, self.backbone, self.spec, state)
            if config.cka and config.cka_with:  # all processes share its work, too
                other = self._open_other()
        if not state.is_main_process:
            return {}
        weights = Path(config.checkpoint).name if config.checkpoint else "no checkpoint"
        name = f"{Path(config.unet).name} ({weights}), {config.image_size} px, noise {config.noise}"
        sections = [f"# Features of {name}"]
        if not config.cka_only:
            self._measure(caches)
            cells = itertools.product(self.taps, config.pools, self.draws)
            wanted = [self.done[b, t, pool, draw.seed] for (t, b), pool, draw in cells]
            flops = flops_to(self.backbone, config.blocks, config.image_size)
            sections += report(config, results, wanted, flops, self.images)
        if config.cka:
            results["cka"], parts = self._compare_maps(caches[-1], other, name)
            sections += parts
        write_json(config.out / "results.json", results)
        write_text(config.out / "summary.md", "\n\n".join(sections) + "\n")
        print(results.get("recommendation", "").replace("**", ""))
        print(f"{config.out}: summary.md and its figures, results.json")
        return results

    def _train_in_one_pass(self) -> None:
        """Train the probes of the draws of labels that are not done yet."""
        train, val = self.folders.values()
        if self.state.is_main_process:
            train.check()
            val.check()
        self.state.wait_for_everyone()
        self.backbone.to(self.state.device).eval()
        config = self.config
        trainer = onepass.OnePass(
            config, self.backbone, self.spec, config.pools, config.out / "probes",
            config.workers, self.state,
        )  # fmt: skip
        for draw in self.draws:
            cells = [(b, t, pool, draw.seed) for t, b in self.taps for pool in config.pools]
            if not all(cell in self.done for cell in cells):
                records = trainer.run(train.subset(draw.rows), val, draw.seed)
                self.done.update({_key(record): record for record in records})

    def _measure(self, caches: Sequence[FeatureCache]) -> None:
        """Measure the missing cells on cached features; keep the results after each tap."""
        config = self.config
        for t, b in tqdm(self.taps, "probes", unit="tap", leave=False, disable=None):
            for pool, draw in itertools.product(config.pools, self.draws):
                if (b, t, pool, draw.seed) not in self.done:
                    self.done[b, t, pool, draw.seed] = measure_tap(
                        *caches, (t, b), pool, draw, config.measures, config.k, self.state.device
                    )
            self.results["records"] = list(self.done.values())
            write_json(config.out / "results.json", self.results)

    def _compare_maps(
        self, cache: FeatureCache, other: FeatureCache | None, name: str
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return CKA as :func:`draw_figures` does, and the parts of ``summary.md`` about it."""
        config, pool = self.config, max(self.config.pools)
        count = min(config.cka_images, len(self.images))
        caption = f"{count:,} images, maps pooled to {pool}x{pool}"
        sets, others = [(cache, tap) for tap in self.taps], None
        if other is not None:
            sets += [(other, tap) for tap in other.taps]
            px = other.settings["image_size"]
            others = f"{config.cka_with}, {px} px", other.settings["blocks"]
        values = compare_taps(sets, pool, config.cka_images, config.seed)
        values = values[: len(self.taps)]
        found = draw_figures(config.out, self.taps, values, f"{name}\n{caption}", others)
        parts = [f"## Linear CKA\n\n{caption} and flattened, unbiased HSIC over minibatches."]
        return found, parts + [f"![CKA]({part['file']})" for part in found]

    def _open_other(self) -> FeatureCache:
        """Compute or read all blocks of the network ``cka_with``, on images without noise."""
        unet, checkpoint = split_model(self.config.cka_with)
        network = BackboneOptions(unet=unet).network()
        config = replace(
            self.config,
            unet=unet,
            checkpoint=checkpoint,
            blocks=tuple(network.blocks),
            timesteps=(0,),
            noise="none",
            image_size=network.image_size,
        )
        spec = FeatureSpec.of(config, max(config.pools), self.state)
        folders = {"other": self.images}
        return open_caches(config, folders, build_backbone(config), spec, self.state)[0]


def _key(record: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return record["b"], record["t"], record["pool"], record["seed"]


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
    """Average each combination over the seeds; ``<measure>_std`` is None for a single seed."""
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

    The cheapest is the best itself where no cheaper block is within the error.
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
    """Show one measure at one pool, blocks by timesteps, as a Markdown table and a heat map."""
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
