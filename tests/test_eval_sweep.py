"""The sweep: evaluator, recommendation, files, interruptions."""

from __future__ import annotations

import csv
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")
pytest.importorskip("tyro")

import tyro
from image_folders import CLASSES, write_folder, write_weights
from test_eval_features import ALONE

from diffbackbone import UNetConfig
from diffbackbone.costs import block_costs
from diffbackbone.eval import knn, sweep
from diffbackbone.eval.cka import MinibatchCKA
from diffbackbone.eval.data import Listing, choose_subset, list_folder, split_folds
from diffbackbone.eval.features import FeatureCache, pool_maps, write_cache
from diffbackbone.eval.probe import Labels, ProbeEvaluator, linear_accuracy
from diffbackbone.eval.recommend import describe, flops_to, recommend, show_grid, summarize
from diffbackbone.utils import RandomStream, UserError

ROOT = Path(__file__).resolve().parents[1]
TRAIN, VAL = 6, 4
L2 = (1e-2, 1e-3, 1e-4, 1e-5)
SMALL = [
    "--unet", "tiny", "--image-size", "32", "--workers", "0", "--device", "cpu", "--batch-size",
    "6", "--blocks", "12", "24", "--timesteps", "20", "90", "400", "--pools", "1", "2",
]  # fmt: skip

COMMAND = [sys.executable, ROOT / "tools/sweep.py", *SMALL]

pytestmark = pytest.mark.filterwarnings("ignore:DiffusionBackbone. no checkpoint")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count, seed in (("train", TRAIN, 0), ("val", VAL, 1)):
        write_folder(root / split, count, seed, contrast=4)  # hard to tell
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture
def measured(monkeypatch):
    """Taps that are measured, each with the pools and seeds asked for."""
    calls = []
    original = ProbeEvaluator.measure

    def spy(self, tap, wanted):
        calls.append((tap, list(wanted)))
        return original(self, tap, wanted)

    monkeypatch.setattr(ProbeEvaluator, "measure", spy)
    return calls


@pytest.fixture
def no_flops(monkeypatch):
    """Operations take long to count."""
    monkeypatch.setattr(sweep, "flops_to", lambda unet, blocks, size: dict(zip(blocks, blocks)))


def run(data, out, *options):
    argv = [*SMALL, "--out", out, *(["--data", data] if data else []), *options]
    return sweep.run(tyro.cli(sweep.SweepConfig, args=list(map(str, argv))))


# ------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("size", "pools", "expected"),
    [(32, (1, 2, 4), 4), (48, (1, 2, 4), 12), (32, (1, 3), 32), (100, (2,), 50), (96, (1, 3), 3)],
)
def test_every_pool_follows_exactly_from_the_cached_grid(size, pools, expected):
    sides = {-(-size // stride) for stride in (1, 2, 4, 8, 16, 32)}
    grid = sweep.cache_pool(sides, pools)
    assert grid == expected
    for side, pool in itertools.product(sides, pools):
        maps = torch.randn(2, 3, side, side, generator=torch.manual_seed(side))
        cached = F.adaptive_avg_pool2d(maps, min(side, grid))
        assert torch.allclose(pool_maps(cached, pool), pool_maps(maps, pool), atol=1e-5)


def planted_cache(folder, labels, strength, seed):
    """Features that tell the class as clearly as ``strength`` of the tap says."""
    rng = np.random.default_rng(seed)
    features = {}
    for tap, size in strength.items():
        x = rng.normal(size=(len(labels), 6, 2, 2))
        x[np.arange(len(labels)), labels] += size
        features[tap] = torch.from_numpy(x).float()
    zeros = (0,) * len(labels)
    paths = tuple(f"{c}/{i}.png" for i, c in enumerate(labels))
    return write_cache(
        folder,
        {"dtype": "float32", "copies": 1},
        Listing(paths, tuple(map(int, labels)), zeros, zeros, ("a", "b", "c")),
        {tap: (6, 2, 2) for tap in strength},
        lambda batches: ({tap: x[b] for tap, x in features.items()} for b in batches),
        ALONE,
    )


STRENGTH = {(t, b): 0.15 for t in (10, 90, 300) for b in (12, 19, 24)}
STRENGTH.update({(90, 19): 2.5, (300, 24): 1.2})


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    return tuple(
        planted_cache(root / name, np.arange(count) % 3, STRENGTH, seed)
        for seed, (name, count) in enumerate((("train", 120), ("val", 90)))
    )


def draw(planted, seed, rows=None):
    rows = np.arange(120) if rows is None else rows
    return Labels.draw(seed, rows, planted[0].labels[rows], 0.2)


def test_planted_cell_is_found_and_recommended(planted):
    evaluator = ProbeEvaluator(*planted, [draw(planted, seed) for seed in (0, 1)])
    wanted = list(itertools.product((1, 2), (0, 1)))
    records = [record for tap in STRENGTH for record in evaluator.measure(tap, wanted)]
    cells = summarize(records, ("linear", "knn"))
    for measure in ("linear", "knn"):
        advice = recommend(cells, measure, {12: 10, 19: 20, 24: 30}, 90, 2)
        assert (advice["best"]["t"], advice["best"]["b"]) == (90, 19)
        assert advice["cheapest"] is advice["best"]
        ranked = sorted(cells, key=lambda cell: -cell[measure])
        assert {(c["t"], c["b"]) for c in ranked[2:4]} == {(300, 24)}
        assert ranked[-1][measure] < 0.6


def test_measures_of_a_cell_are_those_of_its_features(planted):
    rows = np.sort(np.random.default_rng(0).permutation(120)[:30])
    labels = planted[0].labels[rows]
    evaluator = ProbeEvaluator(*planted, [draw(planted, 3, rows)], k=7)
    whole, pooled, unpooled = evaluator.measure((300, 24), [(2, 3), (1, 3), (4, 3)])
    maps = [cache.read(range(len(cache)), [(300, 24)])[300, 24] for cache in planted]
    x, queries = maps[0][rows].mean((2, 3)), maps[1].mean((2, 3))
    splits = split_folds(labels, 5, 3)
    expected = linear_accuracy(x, labels, queries, planted[1].labels, L2, splits)
    assert (pooled["linear"], pooled["l2"]) == (expected["top1"], expected["l2"])
    assert pooled["loss"] == pytest.approx(expected["loss"])
    near = knn.knn_accuracy(
        lambda a, b: x[a:b], labels, lambda a, b: queries[a:b], planted[1].labels, [7], 3
    )
    assert pooled["knn"] == near[7]["top1"]
    assert (pooled["features"], pooled["train_images"], pooled["seed"]) == (6, 30, 3)
    assert (whole["features"], unpooled["features"]) == (24, 24)
    assert whole == {**unpooled, "pool": 2}
    assert (
        "linear"
        not in ProbeEvaluator(*planted, evaluator.draws, ["knn"]).measure((10, 12), [(1, 3)])[0]
    )


# ------------------------------------------------------------------------------- recommendation


def cell(b, t, accuracy, std=None, pool=1, features=8):
    return {
        "b": b, "t": t, "pool": pool, "features": features, "linear": accuracy, "linear_std": std
    }  # fmt: skip


FLOPS = {12: 10, 19: 20, 24: 40}


def test_cheaper_one_within_a_standard_error_is_named():
    cells = [cell(12, 90, 0.85), cell(19, 10, 0.875), cell(19, 90, 0.88), cell(24, 90, 0.9)]
    advice = recommend(cells, "linear", FLOPS, 100, 1)
    assert advice["standard_error"] == pytest.approx(0.03)
    assert (advice["best"]["b"], advice["within"], advice["combinations"]) == (24, 3, 4)
    assert (advice["cheapest"]["b"], advice["cheapest"]["t"]) == (19, 90)  # best of its block
    text = describe([advice])
    assert "Take b = 24, t = 90" in text
    assert "b = 19, t = 90, pool = 1**, 88.0%, 2e-08 GFLOPs (50% less)" in text
    cells += [cell(19, 10, 0.8), cell(12, 10, 0.8), cell(24, 10, 0.7)]
    table, figure = show_grid(cells, 1, advice, "caption")
    assert table.splitlines()[2:] == [
        "| 12 | 85.0 | 80.0 |", "| 19 | *88.0* | 80.0 |", "| 24 | **90.0** | 70.0 |"
    ]  # fmt: skip
    assert len(figure.axes[0].patches) == 2
    advice = recommend(cells, "linear", FLOPS, 10_000, 1)
    assert advice["cheapest"] is advice["best"]
    assert advice["within"] == 1


def test_spread_over_seeds_widens_the_standard_error():
    cells = [cell(12, 90, 0.8, 0.01), cell(24, 90, 0.9, 0.2)]
    advice = recommend(cells, "linear", FLOPS, 10_000, 2)
    assert advice["standard_error"] == pytest.approx((0.09 / 10_000 + 0.02) ** 0.5)
    assert advice["cheapest"]["b"] == 12
    assert recommend(cells, "linear", FLOPS, 10_000, 200)["cheapest"]["b"] == 24


def test_ties_go_to_the_cheapest():
    cells = [
        cell(24, 10, 0.9), cell(19, 300, 0.9), cell(19, 90, 0.9, pool=2, features=32),
        cell(19, 90, 0.9), cell(19, 90, 0.9, pool=4),
    ]  # fmt: skip
    for order in (cells, cells[::-1]):
        best = recommend(order, "linear", FLOPS, 100, 1)["best"]
        assert (best["b"], best["t"], best["pool"], best["features"]) == (19, 90, 1, 8)


def test_mean_and_spread_over_seeds():
    records = [{**cell(1, 2, x), "seed": s} for s, x in enumerate((0.5, 0.6, 0.7))]
    (found,) = summarize(records, ["linear"])
    assert found["linear"] == pytest.approx(0.6)
    assert found["linear_std"] == pytest.approx(0.1)
    assert summarize(records[:1], ["linear"])[0]["linear_std"] is None


def test_operations_are_those_of_the_padded_image():
    config = UNetConfig.from_preset("tiny")
    costs = {cost.index: cost.flops for cost in block_costs(config, 64, 64, last_block=12)}
    assert flops_to(config, [12, 9], 40) == {12: costs[12], 9: costs[9]}


# ------------------------------------------------------------------------------------ the command


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def content(out):
    """Every file of a sweep but its cache."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "cache" not in path.relative_to(out).parts
    }


OPTIONS = ["--seeds", 0, 3, "--cka-batch", 5]


@pytest.fixture(scope="module")
def whole(data, weights, tmp_path_factory):
    """A sweep through the real command line: its folder and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    command = [*COMMAND, "--data", data, "--checkpoint", weights, "--out", out, *OPTIONS]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return out, done.stdout


def test_sweep_writes_numbers_figures_and_advice(whole):
    out, printed = whole
    results = json.loads((out / "results.json").read_text())
    rows = read_csv(out / "results.csv")
    assert len(rows) == len(results["records"]) == 2 * 3 * 2 * 2
    for row, record in zip(rows, results["records"]):
        assert all(str(record[name]) == row[name] for name in record)
    assert len(results["cells"]) == 12
    assert set(content(out)) == {
        "cells.jsonl", "settings.json", "results.csv", "results.json", "summary.md", "cka.csv",
        *(f"{m}_pool{p}.png" for m in ("linear", "knn") for p in (1, 2)),
        *(f"cka/blocks_t{t}.png" for t in (20, 90, 400)),
        *(f"cka/timesteps_b{b}.png" for b in (12, 24)),
    }  # fmt: skip
    text, best = (out / "summary.md").read_text(), results["advice"][0]["best"]
    assert f"Take b = {best['b']}, t = {best['t']}" in printed
    assert "18 training and 12 validation images, 3 classes" in text
    for part in (f"blocks_t{best['t']}.png", f"timesteps_b{best['b']}.png", "knn_pool2.png"):
        assert part in text


def test_cka_of_a_sweep_is_that_of_its_taps(whole):
    out, _ = whole
    cache = FeatureCache(out / "cache/val")
    order = RandomStream.ORDER.generator(0).permutation(CLASSES * VAL)
    found = MinibatchCKA(2)
    for part in np.array_split(order, 3):
        found.add([cache.read(part, [tap])[tap].float() for tap in ((90, 12), (90, 24))])
    rows = read_csv(out / "cka.csv")
    assert len(rows) == 3 * 4 + 2 * 9
    (value,) = (
        float(r["cka"]) for r in rows
        if (r["between"], r["at"], r["first"], r["second"]) == ("blocks", "t=90", "12", "24")
    )  # fmt: skip
    assert value == pytest.approx(float(found.result()[0, 1]), abs=1e-6)


def test_images_without_labels_are_compared(data, tmp_path, weights):
    folder = tmp_path / "images"
    (folder / "deep/er").mkdir(parents=True)
    for i, path in enumerate(sorted((data / "val").rglob("*.png"))):
        (folder / ("deep/er" if i % 2 else "") / f"{i}.png").write_bytes(path.read_bytes())
    options = ["--checkpoint", weights]
    results = run(None, tmp_path / "out", "--images", folder, *options)
    names = {name for name in content(tmp_path / "out") if "/" not in name}
    assert names == {"cka.csv", "results.json", "settings.json", "summary.md"}
    assert [(s["between"], s["at"]) for s in results["cka"]] == [
        ("blocks", 20), ("blocks", 90), ("blocks", 400), ("timesteps", 12), ("timesteps", 24)
    ]  # fmt: skip
    run(None, tmp_path / "limited", "--images", folder, "--cka-images", 7, *options)
    assert len(FeatureCache(tmp_path / "limited/cache/images").listing) == 7
    labeled = run(data, tmp_path / "data", "--cka-only", *options)
    assert "cells" not in labeled
    assert len(FeatureCache(tmp_path / "data/cache/images").listing) == CLASSES * VAL
    for others in ([], ["--cka-only", "--seed", 1]):
        before = content(tmp_path / "data")
        with pytest.raises(UserError, match="other settings"):
            run(data, tmp_path / "data", *options, *others)
        assert content(tmp_path / "data") == before


def test_subsets_are_drawn_by_each_seed(data, tmp_path, weights, no_flops):
    options = ["--checkpoint", weights, "--subset", "50%", "--seeds", 0, 1, 2, "--no-cka"]
    out = tmp_path / "out"
    results = run(data, out, *options)
    assert not list(out.glob("cka*"))
    assert {record["train_images"] for record in results["records"]} == {9}
    (folder,) = (p for p in (out / "cache").iterdir() if p.name != "val")
    train, val = FeatureCache(folder), FeatureCache(out / "cache/val")
    whole = list_folder(data / "train")
    drawn = [choose_subset(whole, "50%", s).listing.paths for s in range(3)]
    assert train.listing.paths == tuple(sorted({path for paths in drawn for path in paths}))
    for seed, paths in enumerate(drawn):
        rows = [train.listing.paths.index(path) for path in paths]
        x, queries = (
            c.read(range(len(c)), [(90, 24)])[90, 24].float().mean((2, 3)) for c in (train, val)
        )
        expected = knn.knn_accuracy(
            lambda a, b, x=x, rows=rows: x[rows][a:b], train.labels[rows],
            lambda a, b, queries=queries: queries[a:b], val.labels, [9], 3,
        )  # fmt: skip
        (record,) = (
            r for r in results["records"]
            if (r["b"], r["t"], r["pool"], r["seed"]) == (24, 90, 1, seed)
        )  # fmt: skip
        assert record["knn"] == expected[9]["top1"]


# --------------------------------------------------------------------------------- interruptions


def test_grid_may_grow(data, tmp_path, weights, measured, no_flops):
    out = tmp_path / "out"
    options = ["--checkpoint", weights, "--no-cka", "--timesteps", 90]
    run(data, out, *options, "--pools", 2, "--blocks", 12)
    options += ["--pools", 1, 2, "--seeds", 0, 4]
    measured.clear()
    run(data, out, *options, "--blocks", 12)
    assert measured == [((90, 12), [(1, 0), (1, 4), (2, 4)])]
    measured.clear()
    run(data, out, *options, "--blocks", 12)
    assert not measured
    with pytest.raises(UserError, match=r"blocks: \[12\], now \[12, 30\]"):
        run(data, out, *options, "--blocks", 12, 30)
    grown = run(data, out, *options, "--blocks", 12, 30, "--overwrite-cache")
    assert [tap for tap, _ in measured] == [(90, 30)]
    whole = run(data, tmp_path / "whole", *options, "--blocks", 12, 30)
    assert grown["cells"] == whole["cells"]
    ours, theirs = content(out), content(tmp_path / "whole")
    assert sorted(ours.pop("cells.jsonl").splitlines()) == sorted(
        theirs.pop("cells.jsonl").splitlines()
    )
    assert ours == theirs


def test_other_settings_are_not_mixed(data, tmp_path, weights, no_flops):
    out = tmp_path / "out"
    options = ["--checkpoint", weights, "--no-cka", "--timesteps", "90"]
    run(data, out, *options)
    before = content(out)
    for others in (["--l2", 0.1], ["--k", 3], ["--checkpoint", "None"], ["--holdout", 0.3]):
        with pytest.raises(UserError, match="holds a sweep of other settings"):
            run(data, out, *options, *others)
    assert content(out) == before
    results = run(data, out, *options, "--l2", "0.1", "--overwrite")
    assert {record["l2"] for record in results["records"]} == {0.1}


def test_sigkill_and_rerun_end_as_an_unbroken_run(data, tmp_path, weights, measured, whole):
    out = tmp_path / "killed"
    options = ["--checkpoint", weights, *OPTIONS]
    for sign in (out / "cache/train/manifest.json", out / "cells.jsonl"):
        process = subprocess.Popen(
            list(map(str, [*COMMAND, "--data", data, "--out", out, *options])),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not sign.exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was still at work
        assert sign.exists()
    done = {
        (r["t"], r["b"]) for r in map(json.loads, (out / "cells.jsonl").read_text().splitlines())
    }
    assert 0 < len(done) < 6
    assert not (out / "results.json").exists()
    measured.clear()
    run(data, out, *options)
    assert len(measured) == 6 - len(done)
    assert content(out) == content(whole[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pools", "2", "2"], "--pools"),
        (["--k", "99"], "there are 18 training images"),
        (["--noise", "random"], "stay the same"),
        (["--blocks", "38"], "from 1 to 37"),
        (["--timesteps", "1000"], "from 0 to 999"),
        (["--subset", "1%"], "subset"),
        (["--cka-images", "3"], "at least 4"),
        (["--val-dir", "nowhere"], "no folder nowhere of val images"),
    ],
)
def test_bad_options_are_errors_before_work(data, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(data, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
