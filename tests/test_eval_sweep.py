"""The sweep: evaluator, recommendation, files, interruptions."""

from __future__ import annotations

import itertools
import json
import time

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")
pytest.importorskip("tyro")

import image_folders
import tyro
from image_folders import CLASSES, write_folder

from diffbackbone import DiffusionBackbone, UNetConfig
from diffbackbone.costs import block_costs
from diffbackbone.eval import knn, sweep
from diffbackbone.eval.cka import MinibatchCKA
from diffbackbone.eval.data import choose_subset, list_folder, split_folds
from diffbackbone.eval.features import FeatureCache, pool_maps
from diffbackbone.eval.probe import STRENGTHS, Labels, linear_accuracy, measure_tap
from diffbackbone.eval.sweep import describe, flops_to, recommend, show_grid, summarize
from diffbackbone.utils import RandomStream, UserError

TRAIN, VAL = 6, 4
SMALL = [
    "--unet", "tiny", "--image-size", "32", "--workers", "0", "--device", "cpu", "--batch-size",
    "6", "--blocks", "12", "24", "--timesteps", "20", "90", "400", "--pools", "1", "2",
]  # fmt: skip

weights = image_folders.weights
one_thread = image_folders.one_thread
pytestmark = [
    pytest.mark.filterwarnings("ignore:DiffusionBackbone. no checkpoint"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count, seed in (("train", TRAIN, 0), ("val", VAL, 1)):
        write_folder(root / split, count, seed, contrast=4)  # hard to tell
    return root


@pytest.fixture
def measured(monkeypatch):
    """Taps, pools and seeds that are measured."""
    calls = []

    def spy(train, val, tap, pool, labels, *args):
        calls.append((tap, pool, labels.seed))
        return measure_tap(train, val, tap, pool, labels, *args)

    monkeypatch.setattr(sweep, "measure_tap", spy)
    return calls


def run(data, out, *options):
    argv = [*SMALL, "--data", data, "--out", out, *options]
    return sweep.run(tyro.cli(sweep.SweepConfig, args=list(map(str, argv))))


@pytest.mark.parametrize(
    ("size", "pools", "expected"),
    [(32, (1, 2, 4), 4), (48, (1, 2, 4), 48), (32, (1, 3), 32), (96, (1, 3), 3)],
)
def test_every_pool_follows_exactly_from_the_cached_grid(size, pools, expected):
    sides = {-(-size // stride) for stride in (1, 2, 4, 8, 16, 32)}
    grid = sweep.cache_pool(sides, pools)
    assert grid == expected
    for side, pool in itertools.product(sides, pools):
        maps = torch.randn(2, 3, side, side, generator=torch.manual_seed(side))
        cached = F.adaptive_avg_pool2d(maps, min(side, grid))
        assert torch.allclose(pool_maps(cached, pool), pool_maps(maps, pool), atol=1e-5)


class PlantedCache:
    """Features that tell the class as clearly as ``strength`` of the tap says."""

    def __init__(self, count, strength, seed):
        rng = np.random.default_rng(seed)
        self.labels, self.features = np.arange(count) % 3, {}
        for tap, size in strength.items():
            x = rng.normal(size=(count, 6, 2, 2))
            x[np.arange(count), self.labels] += size
            self.features[tap] = torch.from_numpy(x).float()

    def images(self, tap):
        return self.features[tap]

    def read(self, rows, tap):
        return self.features[tap][rows]


STRENGTH = dict.fromkeys(itertools.product((10, 90, 300), (12, 19, 24)), 0.15)
STRENGTH |= {(90, 19): 2.5, (300, 24): 1.2}


@pytest.fixture(scope="module")
def planted():
    return PlantedCache(120, STRENGTH, 0), PlantedCache(90, STRENGTH, 1)


def test_planted_cell_is_found_and_recommended(planted):
    draws = [Labels.draw(seed, np.arange(120), planted[0].labels) for seed in (0, 1)]
    records = [
        measure_tap(*planted, tap, pool, draw)
        for tap, pool, draw in itertools.product(STRENGTH, (1, 2), draws)
    ]
    cells = summarize(records, ("linear", "knn"), {12: 10, 19: 20, 24: 30})
    first, second = (record["linear"] for record in records[:2])
    assert cells[0]["linear"] == pytest.approx((first + second) / 2)
    assert cells[0]["linear_std"] == pytest.approx(abs(first - second) / 2**0.5)
    assert summarize(records[:1], ["knn"], {12: 10})[0]["knn_std"] is None
    for name in ("linear", "knn"):
        advice = recommend(cells, name, 90, 2)
        assert (advice["best"]["t"], advice["best"]["b"]) == (90, 19)
        assert advice["cheapest"] is advice["best"]
        ranked = sorted(cells, key=lambda cell: -cell[name])
        assert {(c["t"], c["b"]) for c in ranked[2:4]} == {(300, 24)}
        assert ranked[-1][name] < 0.6


def test_measures_of_a_cell_are_those_of_its_features(planted):
    rows = np.arange(0, 120, 4)
    labels = planted[0].labels[rows]
    draw = Labels.draw(3, rows, labels)
    found = measure_tap(*planted, (300, 24), 1, draw, k=7)
    maps = [cache.images((300, 24)) for cache in planted]
    x, queries = maps[0][rows].mean((2, 3)), maps[1].mean((2, 3))
    splits = split_folds(labels, 5, 3)
    expected = linear_accuracy(x, labels, queries, planted[1].labels, STRENGTHS, splits)
    assert (found["linear"], found["l2"]) == (expected["top1"], expected["l2"])
    assert found["loss"] == pytest.approx(expected["loss"])
    near = knn.knn_accuracy(x, labels, queries, planted[1].labels, [7])
    assert found["knn"] == near[7]["top1"]
    assert (found["features"], found["train_images"], found["seed"]) == (6, 30, 3)
    whole = measure_tap(*planted, (300, 24), 4, draw, ["knn"], k=99)  # pool larger than the map
    assert whole["features"] == 24
    assert "linear" not in whole


def cell(b, t, accuracy, std=None, pool=1, features=8):
    return {
        "b": b, "t": t, "pool": pool, "features": features, "linear": accuracy, "linear_std": std,
        "flops": {12: 10, 19: 20, 24: 40}[b],
    }  # fmt: skip


def test_cheaper_one_within_a_standard_error_is_named():
    cells = [cell(12, 90, 0.85), cell(19, 10, 0.875), cell(19, 90, 0.88), cell(24, 90, 0.9)]
    advice = recommend(cells, "linear", 100, 1)
    assert advice["standard_error"] == pytest.approx(0.03)
    assert (advice["best"]["b"], advice["within"]) == (24, 3)
    assert (advice["cheapest"]["b"], advice["cheapest"]["t"]) == (19, 90)  # best of its block
    text = describe([advice])
    assert "**Recommended: b = 24, t = 90, pool = 1, 90.0% by linear probe**" in text
    assert "b = 19, t = 90, pool = 1, 88.0% by linear probe**, 50% less" in text
    cells += [cell(19, 10, 0.8), cell(12, 10, 0.8), cell(24, 10, 0.7)]
    table, figure = show_grid(cells, 1, advice, "caption")
    assert table.splitlines()[2:] == [
        "| 12 | 85.0 | 80.0 |", "| 19 | *88.0* | 80.0 |", "| 24 | **90.0** | 70.0 |"
    ]  # fmt: skip
    assert len(figure.axes[0].patches) == 2
    advice = recommend(cells, "linear", 10_000, 1)
    assert advice["cheapest"] is advice["best"]
    assert advice["within"] == 1


def test_spread_over_seeds_widens_the_standard_error():
    cells = [cell(12, 90, 0.8, 0.01), cell(24, 90, 0.9, 0.2)]
    advice = recommend(cells, "linear", 10_000, 2)
    assert advice["standard_error"] == pytest.approx((0.09 / 10_000 + 0.02) ** 0.5)
    assert advice["cheapest"]["b"] == 12
    assert recommend(cells, "linear", 10_000, 200)["cheapest"]["b"] == 24


def test_ties_go_to_the_cheapest():
    cells = [
        cell(24, 10, 0.9), cell(19, 300, 0.9), cell(19, 90, 0.9, pool=2, features=32),
        cell(19, 90, 0.9), cell(19, 90, 0.9, pool=4),
    ]  # fmt: skip
    for order in (cells, cells[::-1]):
        best = recommend(order, "linear", 100, 1)["best"]
        assert (best["b"], best["t"], best["pool"], best["features"]) == (19, 90, 1, 8)


def test_operations_are_those_of_the_padded_image():
    backbone = DiffusionBackbone("tiny", None, 90, (12, 18), None, None, None)
    config = UNetConfig.from_preset("tiny")
    costs = {cost.index: cost.flops for cost in block_costs(config, 64, 64, last_block=12)}
    assert flops_to(backbone, [12, 9], 40) == {12: costs[12], 9: costs[9]}
    assert not next(backbone.parameters()).is_meta


def content(out):
    """Every file of a sweep but its cache."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "cache" not in path.relative_to(out).parts
    }


OPTIONS = ["--seeds", 0, 3]


@pytest.fixture(scope="module")
def whole(data, weights, tmp_path_factory):
    """A sweep: its folder and results."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(data, out, "--checkpoint", weights, *OPTIONS)


def test_sweep_writes_numbers_figures_and_advice(whole):
    out, results = whole
    assert json.loads((out / "results.json").read_text())["records"] == results["records"]
    assert len(results["records"]) == 2 * 3 * 2 * 2
    assert len(results["cells"]) == 12
    assert set(content(out)) == {
        "results.json", "summary.md",
        *(f"{m}_pool{p}.png" for m in ("linear", "knn") for p in (1, 2)),
        *(f"cka/blocks_t{t}.png" for t in (20, 90, 400)),
        *(f"cka/timesteps_b{b}.png" for b in (12, 24)),
    }  # fmt: skip
    text, best = (out / "summary.md").read_text(), results["advice"][0]["best"]
    for part in (
        f"Recommended: b = {best['b']}, t = {best['t']}", "knn_pool2.png", "cka/blocks_t90.png",
        "18 training and 12 validation images, 3 classes",
    ):  # fmt: skip
        assert part in text
    cache = FeatureCache(out / "cache/val")
    order = RandomStream.ORDER.generator(0).permutation(CLASSES * VAL)
    cka = MinibatchCKA(2)
    cka.add([cache.read(order, tap).float() for tap in ((90, 12), (90, 24))])
    (part,) = (p for p in results["cka"] if (p["between"], p["at"]) == ("blocks", 90))
    assert part["labels"] == [12, 24]
    assert part["cka"][0][1] == pytest.approx(float(cka.result()[0, 1]), abs=1e-6)


def test_images_without_labels_are_compared(data, tmp_path):
    results = run(data / "val", tmp_path, "--cka-only", "--cka-images", 7)
    names = {name for name in content(tmp_path) if "/" not in name}
    assert names == {"results.json", "summary.md"}
    assert [(s["between"], s["at"]) for s in results["cka"]] == [
        ("blocks", 20), ("blocks", 90), ("blocks", 400), ("timesteps", 12), ("timesteps", 24)
    ]  # fmt: skip
    assert len(FeatureCache(tmp_path / "cache/images")) == 7


def test_subsets_are_drawn_by_each_seed(data, tmp_path):
    results = run(
        data, tmp_path, "--subset", "50%", "--seeds", 0, 1, 2, "--no-cka", "--measures", "knn",
        "--blocks", 24, "--timesteps", 90,
    )  # fmt: skip
    assert not list(tmp_path.glob("cka*"))
    assert {record["train_images"] for record in results["records"]} == {9}
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.name != "val")
    train, val = FeatureCache(folder), FeatureCache(tmp_path / "cache/val")
    images = list_folder(data / "train")
    drawn = [images.subset(choose_subset(images, "50%", seed)).paths for seed in range(3)]
    assert train.paths == tuple(sorted({path for paths in drawn for path in paths}))
    for seed, paths in enumerate(drawn):
        rows = [train.paths.index(path) for path in paths]
        x, queries = (c.images((90, 24)).float().mean((2, 3)) for c in (train, val))
        expected = knn.knn_accuracy(x[rows], train.labels[rows], queries, val.labels, [9])
        (record,) = (r for r in results["records"] if (r["pool"], r["seed"]) == (1, seed))
        assert record["knn"] == expected[9]["top1"]


def test_grid_may_grow_but_not_mix(data, tmp_path, measured):
    out, options = tmp_path / "out", ["--no-cka", "--measures", "knn", "--timesteps", 90]
    run(data, out, *options, "--pools", 2, "--blocks", 12)
    options += ["--pools", 1, 2, "--seeds", 0, 4]
    measured.clear()
    run(data, out, *options, "--blocks", 12)
    assert measured == [((90, 12), 1, 0), ((90, 12), 1, 4), ((90, 12), 2, 4)]
    measured.clear()
    before = content(out)
    for others in (["--k", 3], ["--noise", "none"], ["--seed", 1], ["--subset", "50%"]):
        with pytest.raises(UserError, match="was made with other settings"):
            run(data, out, *options, *others, "--blocks", 12)
    with pytest.raises(UserError, match=r"blocks: \[12\], now \[12, 30\]"):
        run(data, out, *options, "--blocks", 12, 30)
    assert content(out) == before
    grown = run(data, out, *options, "--blocks", 12, 30, "--overwrite-cache")
    assert {tap for tap, *_ in measured} == {(90, 30)}
    fresh = run(data, tmp_path / "fresh", *options, "--blocks", 12, 30)
    assert grown["cells"] == fresh["cells"]
    replaced = run(data, out, *options, "--blocks", 12, 30, "--k", 3, "--overwrite")
    assert replaced["settings"]["k"] == 3


def test_sigkill_and_rerun_end_as_an_unbroken_run(data, tmp_path, weights, measured, whole):
    out = tmp_path / "out"
    options = ["--data", data, "--out", out, "--checkpoint", weights, *OPTIONS]
    script = forked.Script(["tools/sweep.py", *SMALL, *options], tmp_path / "log", {})
    deadline = time.monotonic() + 120
    while not (out / "results.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    script.kill()
    done = len(json.loads((out / "results.json").read_text())["records"])
    assert 0 < done < 24  # it was still at work
    assert not (out / "summary.md").exists()
    run(data, out, "--checkpoint", weights, *OPTIONS)
    assert len(measured) == 24 - done
    assert content(out) == content(whole[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise", "random"], "constant features"),
        (["--blocks", "38"], "from 1 to 37"),
        (["--timesteps", "1000"], "from 0 to 999"),
        (["--subset", "1%"], "subset"),
        (["--cka-images", "3"], "at least 4"),
    ],
)
def test_bad_options_are_errors_before_work(data, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(data, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
