"""`tools/sweep.py`, and the probes, similarities and heat maps it is made of."""

# ruff: noqa: E402 - the tools are found by their folder

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path.append(str(TOOLS))

import _analysis
import _classification as common
import knn
import sweep
from _classification import Processes, ToolError
from image_folders import CLASSES, write_folder, write_weights

from diffbackbone import UNet, UNetConfig
from diffbackbone.features import CacheError, FeatureCache, Listing, write_cache
from diffbackbone.saving import save_safetensors

TRAIN, VAL = 6, 4
SMALL = [
    "--unet", "tiny", "--image-size", "32", "--workers", "0", "--device", "cpu", "--batch-size",
    "6", "--blocks", "12", "24", "--timesteps", "20", "90", "400", "--pools", "1", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count, seed in (("train", TRAIN, 0), ("val", VAL, 1)):
        write_folder(root / split, count, seed, contrast=4)  # hard to tell
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measured(monkeypatch):
    """Taps that are measured, each with the pools and seeds asked for."""
    calls = []
    original = sweep.Judge.measure

    def spy(self, tap, wanted):
        calls.append((tap, list(wanted)))
        return original(self, tap, wanted)

    monkeypatch.setattr(sweep.Judge, "measure", spy)
    return calls


def parse(data, out, *options):
    return sweep.parse(["--data", str(data), "--out", str(out), *SMALL, *map(str, options)])


def run(data, out, *options):
    return sweep.run(parse(data, out, *options), Processes())


def fails(*options) -> str:
    with pytest.raises(SystemExit) as error:
        sweep.main([*SMALL, *map(str, options)])
    message = str(error.value)
    assert message.startswith("error: ")
    return message


# --------------------------------------------------------------------------- choosing strengths


def problem(count=60, width=12, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = rng.normal(size=(classes, width))
    x = centres[labels] + 1.2 * rng.normal(size=(count, width)) * (1 + np.arange(width))
    return torch.from_numpy(x), torch.from_numpy(labels)


def test_regularisation_is_chosen_by_held_out_images():
    x, y = problem(80, 40, seed=5)
    queries, truth = problem(30, 40, seed=6)
    learn, held = split = common.split_holdout(y.numpy(), 0.25, 0)
    strengths = [1e-4, 1e-1, 1e-2]
    found = sweep.linear_accuracy(x, y, queries, truth, 4, strengths, [split])
    (z,) = _analysis.standardise(x)
    losses = {
        l2: float(F.cross_entropy(_analysis.fit_probe(z[learn], y[learn], 4, l2)(z[held]), y[held]))
        for l2 in strengths
    }
    assert found["l2"] == min(losses, key=losses.get)
    assert len({round(loss, 3) for loss in losses.values()}) == 3
    alone = sweep.linear_accuracy(x, y, queries, truth, 4, [found["l2"]])
    assert alone["top1"] == found["top1"]
    assert alone["loss"] == pytest.approx(found["loss"], rel=1e-3)
    other = sweep.linear_accuracy(x, y, queries, truth.flip(0), 4, strengths, [split])
    assert other["l2"] == found["l2"]  # the validation labels have no say
    assert other["top1"] != found["top1"]
    with pytest.raises(ValueError, match="3 strengths need held-out images"):
        sweep.linear_accuracy(x, y, queries, truth, 4, strengths)


def test_few_images_are_each_held_out_once():
    x, y = problem(60, 40, seed=5)
    queries, truth = problem(30, 40, seed=6)
    rows = np.arange(60)
    draw = sweep.Labels.draw(3, rows, y.numpy(), 0.2)
    assert len(draw.splits) == 5
    assert sorted(np.concatenate([held for _, held in draw.splits])) == rows.tolist()
    for learn, held in draw.splits:
        assert sorted([*learn, *held]) == rows.tolist()
        assert np.bincount(y[held], minlength=4).tolist() == [3, 3, 3, 3]
    again, other = (sweep.Labels.draw(seed, rows, y.numpy(), 0.2) for seed in (3, 4))
    assert np.array_equal(again.splits[0][1], draw.splits[0][1])
    assert not np.array_equal(other.splits[0][1], draw.splits[0][1])

    strengths = [1.0, 1e-1, 1e-2, 1e-3]
    (z,) = _analysis.standardise(x)
    losses = torch.tensor(
        [
            [
                F.cross_entropy(_analysis.fit_probe(z[learn], y[learn], 4, l2)(z[held]), y[held])
                for l2 in strengths
            ]
            for learn, held in draw.splits
        ]
    )
    found = sweep.linear_accuracy(x, y, queries, truth, 4, strengths, draw.splits)
    assert found["l2"] == strengths[losses.mean(0).argmin()]
    assert len(losses.argmin(1).unique()) > 1  # one fold alone may say something else


@pytest.mark.parametrize(
    ("counts", "share", "folds"),
    [
        ([9, 3, 50], 0.2, 3),  # each class is to be learned from each time, and chosen by
        ([2, 2], 0.2, 2),
        ([7, 7, 7], 0.33, 3),  # one left over in each class, for folds that differ
        ([400, 599], 0.9, 2),
        ([500, 500], 0.2, 1),  # enough for one share
        ([5, 1], 0.2, 0),
    ],
)
def test_folds_follow_the_number_of_images(counts, share, folds):
    labels = np.repeat(np.arange(len(counts)), counts)
    draw = sweep.Labels.draw(0, np.arange(len(labels)), labels, share)
    assert len(draw.splits) == folds
    for learn, held in draw.splits:
        assert set(labels[learn]) == set(labels[held]) == set(range(len(counts)))
        assert not set(learn) & set(held)
    sizes = [len(held) for _, held in draw.splits]
    assert folds < 2 or max(sizes) - min(sizes) <= 1


# ------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("size", "pools", "expected"),
    [
        (32, (1, 2, 4), 4), (64, (1, 2, 4), 4), (48, (1, 2, 4), 12), (32, (1,), 1),
        (32, (1, 3), 32), (100, (2,), 50), (96, (1, 3), 3),
    ],
)  # fmt: skip
def test_every_pool_follows_exactly_from_the_cached_grid(size, pools, expected):
    sides = {-(-size // stride) for stride in (1, 2, 4, 8, 16, 32)}
    grid = sweep.cache_pool(sides, pools)
    assert grid == expected
    for side, pool in itertools.product(sides, pools):
        maps = torch.randn(2, 3, side, side, generator=torch.manual_seed(side))
        direct = sweep.pooled(maps, pool)
        cached = F.adaptive_avg_pool2d(maps, min(side, grid))
        assert torch.allclose(sweep.pooled(cached, pool), direct, atol=1e-5)
        assert direct.shape == (2, 3 * min(side, pool) ** 2)


def listing(labels):
    paths = tuple(f"{c}/{i}.png" for i, c in enumerate(labels))
    zeros = (0,) * len(labels)
    return Listing(paths, tuple(map(int, labels)), zeros, zeros, ("a", "b", "c"))


def planted_cache(folder, labels, strength, seed):
    """Features that tell the class as clearly as ``strength`` of the tap says."""
    rng = np.random.default_rng(seed)
    features = {}
    for tap, size in strength.items():
        x = rng.normal(size=(len(labels), 6, 2, 2))
        x[np.arange(len(labels)), labels] += size
        features[tap] = torch.from_numpy(x).float()
    return write_cache(
        folder,
        {"dtype": "float32", "copies": 1},
        listing(labels),
        {tap: (6, 2, 2) for tap in strength},
        lambda batches: ({tap: x[b] for tap, x in features.items()} for b in batches),
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


def judge(planted, *options):
    args = sweep.parse(["--data", "x", "--unet", "tiny", *map(str, options)])
    args.k = args.k or 20
    labels = planted[0].labels
    draws = [
        sweep.Labels.draw(seed, np.arange(len(labels)), labels, args.holdout) for seed in args.seeds
    ]
    return sweep.Judge(planted, draws, args, torch.device("cpu"))


def test_planted_cell_is_found_and_recommended(planted):
    found = judge(planted, "--seeds", 0, 1)
    records = [
        record
        for tap in STRENGTH
        for record in found.measure(tap, itertools.product((1, 2), (0, 1)))
    ]
    cells = sweep.summarise(records, ("linear", "knn"))
    flops = {12: 10, 19: 20, 24: 30}
    for measure in ("linear", "knn"):
        advice = sweep.recommend(cells, measure, flops, 90, 2)
        assert (advice["best"]["t"], advice["best"]["b"]) == (90, 19)
        assert advice["cheapest"] is advice["best"]
        ranked = sorted(cells, key=lambda cell: -cell[measure])
        assert {(c["t"], c["b"]) for c in ranked[2:4]} == {(300, 24)}
        assert ranked[-1][measure] < 0.6
    text = sweep.recommendation(advice, [])
    assert f"Take {sweep.name_cell(advice['best'])}" in text
    assert "none with fewer operations" in text


def test_neighbours_are_those_of_the_knn_tool(planted):
    found = judge(planted, "--k", 7, "--measures", "knn")
    for tap in ((10, 12), (300, 24)):
        for pool in (1, 2, 4):
            (record,) = found.measure(tap, [(pool, 0)])
            (row,) = knn.evaluate_caches(*planted, [tap], [7], pool=pool)
            assert record["knn"] == row["top1"]
            assert record["features"] == 6 * min(pool, 2) ** 2
            assert "linear" not in record


def test_probe_of_a_cell_is_that_of_its_features(planted):
    found = judge(planted)
    (record,) = found.measure((300, 24), [(1, 0)])
    vectors = [
        cache.read(np.arange(len(cache)), [(300, 24)])[300, 24].mean((2, 3)) for cache in planted
    ]
    labels = [torch.from_numpy(cache.labels) for cache in planted]
    splits = common.split_folds(planted[0].labels, 5, 0)
    expected = sweep.linear_accuracy(
        vectors[0], labels[0], vectors[1], labels[1], 3, sweep.L2, splits
    )
    assert record["linear"] == expected["top1"]
    assert record["l2"] == expected["l2"]
    assert record["loss"] == pytest.approx(expected["loss"])


def test_probe_sees_only_the_rows_that_have_labels(planted):
    found = judge(planted)
    rows = np.sort(np.random.default_rng(0).permutation(120)[:30])
    labels = planted[0].labels[rows]
    found.draws = [sweep.Labels.draw(0, rows, labels, 0.2)]
    (record,) = found.measure((90, 19), [(1, 0)])
    assert record["train_images"] == 30
    x, queries = (cache.read(np.arange(len(cache)), [(90, 19)])[90, 19] for cache in planted)
    truth = torch.from_numpy(planted[1].labels)
    expected = sweep.linear_accuracy(
        x[rows].mean((2, 3)), torch.from_numpy(labels), queries.mean((2, 3)), truth, 3, sweep.L2,
        common.split_folds(labels, 5, 0),
    )  # fmt: skip
    assert (record["linear"], record["l2"]) == (expected["top1"], expected["l2"])


# ------------------------------------------------------------------------------- recommendation


def cell(b, t, accuracy, std=None, pool=1, features=8):
    return {
        "b": b, "t": t, "pool": pool, "features": features, "linear": accuracy, "linear_std": std
    }  # fmt: skip


FLOPS = {12: 10, 19: 20, 24: 40}


def test_cheaper_one_within_a_standard_error_is_named():
    cells = [cell(12, 90, 0.85), cell(19, 10, 0.875), cell(19, 90, 0.88), cell(24, 90, 0.9)]
    advice = sweep.recommend(cells, "linear", FLOPS, 100, 1)
    assert advice["standard_error"] == pytest.approx(0.03)
    assert (advice["best"]["b"], advice["within"]) == (24, 3)
    assert (advice["cheapest"]["b"], advice["cheapest"]["t"]) == (19, 90)  # best of its block
    text = sweep.recommendation(advice, [])
    assert "b = 19, t = 90, pool = 1**, 88.0%, 2e-08 GFLOPs (50% less)" in text
    assert "2 other combinations lie within it" in text
    advice = sweep.recommend(cells, "linear", FLOPS, 10_000, 1)
    assert advice["cheapest"] is advice["best"]
    assert advice["within"] == 1


def test_spread_over_seeds_widens_the_standard_error():
    cells = [cell(12, 90, 0.8, 0.01), cell(24, 90, 0.9, 0.2)]
    advice = sweep.recommend(cells, "linear", FLOPS, 10_000, 2)
    assert advice["standard_error"] == pytest.approx((0.09 / 10_000 + 0.02) ** 0.5)
    assert advice["cheapest"]["b"] == 12
    assert sweep.recommend(cells, "linear", FLOPS, 10_000, 200)["cheapest"]["b"] == 24


def test_equals_go_to_the_cheapest():
    cells = [
        cell(24, 10, 0.9), cell(19, 300, 0.9), cell(19, 90, 0.9, pool=2, features=32),
        cell(19, 90, 0.9), cell(19, 90, 0.9, pool=4),
    ]  # fmt: skip
    for order in (cells, cells[::-1]):
        advice = sweep.recommend(order, "linear", FLOPS, 100, 1)
        best = advice["best"]
        assert (best["b"], best["t"], best["pool"], best["features"]) == (19, 90, 1, 8)


def test_mean_and_spread_over_seeds():
    records = [
        {"b": 1, "t": 2, "pool": 1, "seed": s, "features": 4, "linear": x}
        for s, x in enumerate((0.5, 0.6, 0.7))
    ]
    (found,) = sweep.summarise(records, ["linear"])
    assert found["linear"] == pytest.approx(0.6)
    assert found["linear_std"] == pytest.approx(0.1)
    assert sweep.percent(found, "linear") == "60.0 ± 10.0"
    assert sweep.summarise(records[:1], ["linear"])[0]["linear_std"] is None


def test_operations_are_those_of_the_padded_image():
    from diffbackbone.costs import block_costs

    config = UNetConfig.from_preset("tiny")
    found = sweep.flops_to(config, [12, 9], 40)
    costs = {cost.index: cost.flops for cost in block_costs(config, 64, 64, last_block=12)}
    assert found == {12: costs[12], 9: costs[9]}
    assert sweep.flops_to(config.replace(num_classes=10), [9], 40) == {9: costs[9]}


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


def test_sweep_writes_numbers_pictures_and_advice(data, tmp_path, weights, capsys):
    out = tmp_path / "out"
    options = ["--data", data, "--out", out, "--checkpoint", weights, "--seeds", 0, 3]
    sweep.main([*SMALL, *map(str, options)])
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    rows = read_csv(out / "results.csv")
    assert len(rows) == len(results["records"]) == 2 * 3 * 2 * 2
    for row, record in zip(rows, results["records"]):
        assert all(str(record[name]) == row[name] for name in record)
    assert len(results["cells"]) == 12
    expected = {
        "cells.jsonl", "settings.json", "results.csv", "results.json", "summary.md", "cka.csv",
        *(f"{m}_pool{p}.png" for m in ("linear", "knn") for p in (1, 2)),
        *(f"cka/blocks_t{t}.png" for t in (20, 90, 400)),
        *(f"cka/timesteps_b{b}.png" for b in (12, 24)),
    }  # fmt: skip
    assert set(content(out)) == expected
    for name in expected:
        if name.endswith(".png"):
            with Image.open(out / name) as picture:
                picture.load()
    text = (out / "summary.md").read_text()
    assert results["recommendation"] in text
    # shards of two batches, so that a killed run loses no more
    assert len(list((out / "cache/train").glob("shard-*.t20.b12.npy"))) == 2
    assert "Take b = " in printed
    best = results["advice"][0]["best"]
    assert f"cka/blocks_t{best['t']}.png" in text
    assert f"cka/timesteps_b{best['b']}.png" in text
    assert "18 training and 12 validation images, 3 classes" in text
    assert all(f"]({name})" in text for name in expected if name.startswith(("linear", "knn")))


def test_a_cells_neighbours_are_the_knn_commands(data, tmp_path, weights):
    results = run(data, tmp_path / "out", "--checkpoint", weights, "--k", 5, "--no-cka")
    arguments = [
        "--data", data, "--unet", "tiny", "--image-size", 32, "--checkpoint", weights, "--k", 5,
        "--timesteps", 90, "--blocks", 24, "--workers", 0, "--device", "cpu", "--pool", 2,
        "--batch-size", 6, "--out", tmp_path / "knn.json",
    ]  # fmt: skip
    knn.main(list(map(str, arguments)))
    (row,) = json.loads((tmp_path / "knn.json").read_text())["rows"]
    (own,) = (c for c in results["cells"] if (c["b"], c["t"], c["pool"]) == (24, 90, 2))
    assert own["knn"] == row["top1"]
    assert not list((tmp_path / "out").glob("cka*"))


def test_architecture_may_come_from_a_pretrained_file(data, tmp_path):
    config = UNetConfig.from_preset("tiny").replace(num_res_blocks=1, noise_schedule="cosine")
    torch.manual_seed(5)
    unet = UNet(config)
    path = tmp_path / "unet.safetensors"
    save_safetensors(path, unet.state_dict(), config, torch.float32)
    options = ["--unet", path, "--checkpoint", path, "--no-cka", "--measures", "knn"]
    results = run(data, tmp_path / "out", *options)
    features = results["settings"]["features"]
    assert features["unet"]["num_res_blocks"] == 1
    assert features["schedule"][0] == "cosine"
    assert len(config.blocks) < 33
    message = fails("--data", data, "--out", tmp_path / "x", *options, "--blocks", 33)
    assert f"from 1 to {len(config.blocks)}" in message
    assert "give a .safetensors file" in fails("--data", data, "--unet", "unet.pt")
    assert "there is no checkpoint" in fails("--data", data, "--unet", "gone.safetensors")


def test_cka_of_a_sweep_is_that_of_its_taps(data, tmp_path, weights):
    out = tmp_path / "out"
    run(data, out, "--checkpoint", weights, "--cka-batch", 5, "--measures", "knn")
    cache = FeatureCache(out / "cache/val")
    order = np.random.default_rng([0, 6]).permutation(CLASSES * VAL)
    found = _analysis.MinibatchCKA(2)
    taps = [(90, 12), (90, 24)]
    for rows in np.array_split(order, 3):
        found.add([cache.read(rows, [tap])[tap].float().flatten(1) for tap in taps])
    rows = read_csv(out / "cka.csv")
    assert len(rows) == 3 * 4 + 2 * 9
    (value,) = (
        float(r["cka"]) for r in rows
        if (r["between"], r["at"], r["first"], r["second"]) == ("blocks", "t=90", "12", "24")
    )  # fmt: skip
    assert value == pytest.approx(float(found.result()[0, 1]), abs=1e-6)
    own = [float(r["cka"]) for r in rows if r["first"] == r["second"]]
    assert own == pytest.approx([1.0] * len(own))


def test_images_without_labels_are_compared(data, tmp_path, weights):
    folder = tmp_path / "images"
    (folder / "deep/er").mkdir(parents=True)
    for i, path in enumerate(sorted((data / "train").rglob("*.png"))):
        (folder / ("deep/er" if i % 2 else "") / f"{i}.png").write_bytes(path.read_bytes())
    out = tmp_path / "out"
    options = ["--out", str(out), "--checkpoint", str(weights)]
    sweep.main([*SMALL, "--images", str(folder), *options])
    names = {name for name in content(out) if "/" not in name}
    assert names == {"cka.csv", "results.json", "settings.json", "summary.md"}
    results = json.loads((out / "results.json").read_text())
    assert [(s["between"], s["at"]) for s in results["cka"]] == [
        ("blocks", 20), ("blocks", 90), ("blocks", 400), ("timesteps", 12), ("timesteps", 24)
    ]  # fmt: skip
    assert len(FeatureCache(out / "cache/images").listing) == CLASSES * TRAIN
    limited = tmp_path / "limited"
    sweep.main([*SMALL, "--images", str(folder), "--cka-images", "7", "--out", str(limited)])
    assert len(FeatureCache(limited / "cache/images").listing) == 7
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="has no images"):
        sweep.main([*SMALL, "--images", str(tmp_path / "none"), *options])


def test_labels_dont_matter_for_cka_alone(data, tmp_path, weights):
    results = run(data, tmp_path / "out", "--checkpoint", weights, "--cka-only")
    labelled = run(data, tmp_path / "all", "--checkpoint", weights, "--measures", "knn")
    assert "cells" not in results
    assert len(FeatureCache(tmp_path / "out/cache/images").listing) == CLASSES * VAL
    for own, other in zip(results["cka"], labelled["cka"]):
        assert np.allclose(own["cka"], other["cka"], atol=1e-9)
    options = ["--data", data, "--checkpoint", weights, "--cache", tmp_path / "cache"]
    for out, others in (("all", ["--cka-only"]), ("out", []), ("out", ["--cka-only", "--seed", 1])):
        before = content(tmp_path / out)
        assert "holds a sweep" in fails(*options, "--out", tmp_path / out, *others)
        assert content(tmp_path / out) == before


def test_subsets_are_drawn_by_each_seed(data, tmp_path, weights):
    options = ["--checkpoint", weights, "--subset", "50%", "--seeds", 0, 1, 2, "--no-cka"]
    out = tmp_path / "out"
    results = run(data, out, *options)
    assert {record["train_images"] for record in results["records"]} == {9}
    assert {c["linear_std"] is not None for c in results["cells"]} == {True}
    assert any(c["knn_std"] > 0 for c in results["cells"])
    (folder,) = (p for p in (out / "cache").iterdir() if p.name != "val")
    whole = common.list_folder(data / "train")
    drawn = [common.choose_subset(whole, "50%", s).listing.paths for s in range(3)]
    assert FeatureCache(folder).paths == tuple(sorted({path for paths in drawn for path in paths}))
    train, val = FeatureCache(folder), FeatureCache(out / "cache/val")
    for seed, paths in enumerate(drawn):
        rows = [train.paths.index(path) for path in paths]
        x, queries = (
            c.read(np.arange(len(c)), [(90, 24)])[90, 24].float().mean((2, 3)) for c in (train, val)
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


def test_one_image_a_class_takes_one_strength(data, tmp_path, weights, capsys):
    options = ["--checkpoint", weights, "--subset", "17%", "--no-cka", "--blocks", "24"]
    results = run(data, tmp_path / "out", *options)
    assert {record["train_images"] for record in results["records"]} == {3}
    assert {record["l2"] for record in results["records"]} == {sweep.FALLBACK_L2}
    assert "--l2 0.001 is taken as it is" in capsys.readouterr().out


# --------------------------------------------------------------------------------- interruptions


def test_pools_and_seeds_may_be_added(data, tmp_path, weights, measured):
    out = tmp_path / "out"
    options = ["--checkpoint", weights, "--no-cka"]
    run(data, out, *options, "--pools", 2)
    measured.clear()
    run(data, out, *options, "--pools", 1, 2, "--seeds", 0, 4)
    assert {cell for _, wanted in measured for cell in wanted} == {(1, 0), (1, 4), (2, 4)}
    whole = tmp_path / "whole"
    run(data, whole, *options, "--pools", 1, 2, "--seeds", 0, 4)
    ours, theirs = content(out), content(whole)
    assert sorted(ours.pop("cells.jsonl").splitlines()) == sorted(
        theirs.pop("cells.jsonl").splitlines()
    )
    assert ours == theirs
    measured.clear()
    run(data, out, *options, "--pools", 1, 2, "--seeds", 0, 4)
    assert not measured


def test_other_blocks_and_timesteps_need_a_pass_but_no_cell_again(
    data, tmp_path, weights, measured, monkeypatch
):
    monkeypatch.setattr(sweep, "_all_flops", lambda *_: {12: 1, 30: 2})  # slow, and not the point
    options = ["--checkpoint", weights, "--no-cka", "--timesteps", 90]
    run(data, tmp_path / "out", *options, "--blocks", 12)
    with pytest.raises(CacheError, match=r"blocks: the cache has \[12\], wanted is \[12, 30\]"):
        run(data, tmp_path / "out", *options, "--blocks", 12, 30)
    measured.clear()
    grown = run(data, tmp_path / "out", *options, "--blocks", 12, 30, "--overwrite-cache")
    assert [tap for tap, _ in measured] == [(90, 30)]
    whole = run(data, tmp_path / "whole", *options, "--blocks", 12, 30)
    assert grown["cells"] == whole["cells"]


def test_other_settings_are_not_mixed(data, tmp_path, weights):
    out = tmp_path / "out"
    options = ["--data", data, "--out", out, "--checkpoint", weights, "--no-cka"]
    sweep.main([*SMALL, *map(str, options)])
    before = content(out)
    message = fails(*options, "--l2", 0.1, "--k", 3)
    assert "l2: it has [0.01, 0.001, 0.0001, 1e-05], wanted is [0.1]" in message
    assert "k: it has 18, wanted is 3" in message
    message = fails(*options[:4], "--no-cka")
    assert "features.weights_sha256" in message
    message = fails(*options, "--blocks", 12)
    assert "blocks: the cache has [12, 24], wanted is [12]" in message
    assert content(out) == before
    sweep.main([*SMALL, *map(str, options), "--l2", "0.1", "--overwrite"])
    records = json.loads((out / "results.json").read_text())["records"]
    assert {record["l2"] for record in records} == {0.1}


def test_sigkill_and_rerun_end_as_an_unbroken_run(data, tmp_path, weights, measured):
    options = ["--checkpoint", str(weights), "--seeds", "0", "1"]
    run(data, tmp_path / "whole", *options)
    out = tmp_path / "killed"
    command = [sys.executable, TOOLS / "sweep.py", "--data", data, "--out", out, *SMALL, *options]
    waits = (out / "cache/train/shard-00000.json", out / "cells.jsonl")
    for sign in waits:
        process = subprocess.Popen(
            list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
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
    assert not done & {tap for tap, _ in measured}
    assert content(out) == content(tmp_path / "whole")


def test_damaged_cells_are_named(data, tmp_path, weights):
    out = tmp_path / "out"
    run(data, out, "--checkpoint", weights, "--no-cka")
    (out / "cells.jsonl").write_text("{broken")
    message = fails("--data", data, "--out", out, "--checkpoint", weights, "--no-cka")
    assert "holds a damaged sweep" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pools", "2", "2"], "--pools 2 2: one comes twice"),
        (["--pools", "0"], "--pools must be at least 1"),
        (["--seeds", "1", "1"], "one comes twice"),
        (["--l2", "0"], "--l2 must be above 0"),
        (["--holdout", "1"], "--holdout between 0 and 1"),
        (["--k", "99"], "--k 99: there are 18 training images only"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--noise", "random"], "have to stay the same"),
        (["--cka-batch", "3"], "at least 4"),
        (["--blocks", "38"], "blocks must be block numbers from 1 to 37"),
        (["--timesteps", "1000"], "timestep must be an integer from 0 to 999"),
        (["--images", "x"], "leave --data and the like out"),
        (["--subset", "1%"], "fewer than the 3 classes"),
        (["--checkpoint", "nowhere.pt"], "there is no checkpoint"),
        (["--shard-mib", "0"], "--shard-mib must be above 0"),
        (["--val-dir", "nowhere"], "there is no folder nowhere of val images"),
    ],
)  # fmt: skip
def test_bad_options_are_errors_before_work(data, tmp_path, options, message):
    assert message in fails("--data", data, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_cache_of_another_kind_is_refused(data, tmp_path):
    (tmp_path / "cache/train").mkdir(parents=True)
    (tmp_path / "cache/train/notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="holds other files"):
        run(data, tmp_path / "out", "--cache", tmp_path / "cache")
    with pytest.raises(ToolError, match="one process"):
        sweep.run(parse(data, tmp_path / "out"), Processes(0, 2))
