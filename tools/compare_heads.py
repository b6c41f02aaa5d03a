"""Train several heads on the same images, and report them with kNN in one table.

Linear, Attention and DifFormer heads and kNN share one cache of features; DifFeed runs the U-Net in
each step. Without ``--data`` the handwritten digits of `tools/make_sample_digits.py` are taken. ::

    python tools/compare_heads.py --out work_dirs/compare

OUT gets ``table.md``, ``results.json``, ``accuracy.png`` and a folder for each run. All heads have
one learning rate and the last epoch counts, so that nothing is chosen by the validation images.
Without ``--checkpoint`` the U-Net is random, and the numbers say how far a head gets on random
features; they don't tell how heads compare on trained ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _classification as common
import _common
import knn
import train_classifier
from _classification import FeatureOptions, Processes, ToolError

from diffbackbone import CheckpointError
from diffbackbone.features import CacheError
from diffbackbone.images import ImageError
from diffbackbone.sample_data import make_digits
from diffbackbone.utils import UserError

TIMESTEPS, BLOCKS = (90, 150, 300), (19, 24, 30)
TAP = (150, 24)
KNN_TAP = (90, 24)
KNN_POOLS = (1, 4)
"""The paper's, and one that keeps some of where things are: digits differ in that alone."""
POOL = 8
METHODS: dict[str, list[str]] = {
    "Linear": ["--head", "linear", "--lr", "3e-2", "--epochs", "40", "--step", "15"],
    "Attention": ["--head", "attention", "--lr", "1e-3", "--epochs", "20"],
    "DifFormer": [
        "--head", "difformer", "--lr", "1e-3", "--epochs", "10", "--batch-size", "32",
        "--pool", str(POOL),
    ],
    "DifFeed": [
        "--feedback", "bottleneck", "--lr", "1e-3", "--epochs", "5", "--batch-size", "16",
        "--eval-every", "5",
    ],
}  # fmt: skip


def compare(args: argparse.Namespace, processes: Processes) -> list[dict[str, Any]]:
    """Run everything, and write table, numbers and chart.

    Args:
        args: The command line.
        processes: One.

    Returns:
        A row for each method: ``method``, ``trained_parameters``, ``top1``, ``top5``, ``seconds``.
    """
    out = Path(args.out)
    data = args.data
    if data is None:
        data = str(out / "digits")
        processes.say(make_digits(data, size=args.image_size))
    general = ["--data", data, "--recipe", "digits", "--unet", args.unet]
    general += ["--image-size", str(args.image_size), "--seed", str(args.seed)]
    general += ["--workers", str(args.workers), "--device", args.device]
    if args.checkpoint:
        general += ["--checkpoint", args.checkpoint]
    runs = {
        name: train_classifier.parse(
            [*general, "--out", str(out / name.lower()), "--resume", *options]
        )
        for name, options in METHODS.items()
    }
    start = time.perf_counter()
    caches = _caches(runs["DifFormer"], out / "cache", processes)
    cache_seconds = time.perf_counter() - start
    rows: list[dict[str, Any]] = []
    k = min(20, len(caches[0].listing))
    for pool in KNN_POOLS:
        start = time.perf_counter()
        (scores,) = knn.evaluate_caches(*caches, [KNN_TAP], [k], pool=pool, processes=processes)
        rows.append(
            {
                "method": f"kNN (k = {k}, {pool}x{pool})",
                "features": f"t={KNN_TAP[0]}, b={KNN_TAP[1]}",
                "trained_parameters": 0,
                "epochs": 0,
                "top1": scores["top1"],
                "top5": scores["top5"],
                "seconds": time.perf_counter() - start,
            }
        )
    for name, run in runs.items():
        processes.say(f"\n{name}")
        shared = caches if run.feedback == "none" else None
        results = train_classifier.run(run, processes, shared)
        several = run.head == "difformer"
        rows.append(
            {
                "method": name,
                "features": f"t={run.timesteps}, b={run.blocks}"
                if several
                else f"t={run.timesteps[0]}, b={run.blocks[0]}",
                "trained_parameters": results["trained_parameters"],
                "epochs": run.epochs,
                "top1": results["val"]["top1"],
                "top5": results["val"]["top5"],
                "seconds": results["seconds"]["total"],
            }
        )
    weights = f"weights of {Path(args.checkpoint).name}" if args.checkpoint else "random weights"
    caption = (
        f"`{args.unet}` U-Net, {weights}, frozen; {len(caches[1].listing)} held-out images of "
        f"{len(caches[0].listing.classes)} classes, {len(caches[0].listing)} training images, "
        f"{args.image_size} px. The shared features took {cache_seconds:.0f} s."
    )
    text = f"{caption}\n\n{table(rows)}\n"
    common.write_whole(out / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
    common.write_json(
        out / "results.json", {"caption": caption, "cache_seconds": cache_seconds, "rows": rows}
    )
    bars = {row["method"]: row["top1"] for row in rows}
    _common.save_picture(
        common.draw_bars(f"top-1 on held-out images ({args.unet}, {weights})", bars),
        out / "accuracy.png",
    )
    processes.say(f"\n{text}\n{out}: table.md, results.json, accuracy.png")
    return rows


def _caches(run: argparse.Namespace, folder: Path, processes: Processes) -> Any:
    """Features of every timestep and block that a method needs."""
    train_root, val_root = common.find_folders(run.data, None, None)
    train = common.list_folder(train_root, None, run.value_range)
    val = common.list_folder(val_root, train.listing.classes, run.value_range)
    for images in (train, val):
        common.check_images(images)
    backbone = common.build_backbone(run)
    compute = common.compute_dtype(run.precision, processes.device)
    options = FeatureOptions(
        TIMESTEPS, BLOCKS, POOL, run.feature_dtype, run.image_size, compute, batch=64
    )
    return tuple(
        common.open_cache(
            folder / split,
            images,
            backbone,
            options,
            processes,
            workers=run.workers,
        )
        for split, images in (("train", train), ("val", val))
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| method | features | trained parameters | epochs | top-1 | top-5 | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['features']} | {row['trained_parameters']:,} | "
            f"{row['epochs']} | {row['top1']:.1%} | {row['top5']:.1%} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: It cannot be done as given; the message says why.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="work_dirs/compare", help="where the results go")
    parser.add_argument("--data", metavar="DIR", help="folder with train/<class>/, val/<class>/")
    parser.add_argument("--unet", default="tiny", help="preset of the U-Net")
    parser.add_argument("--checkpoint", metavar="FILE", help="guided-diffusion weights")
    parser.add_argument("--image-size", type=int, default=64, help="height and width")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    try:
        processes = Processes.start(args.device)
        if processes.world_size > 1:
            raise ToolError("compare_heads runs in one process")
        compare(args, processes)
    except (ToolError, ImageError, CacheError, CheckpointError, UserError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
