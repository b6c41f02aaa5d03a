"""Label efficiency: the grid, its results and report, and a small real cell of each task."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import image_folders
import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tyro")
pytest.importorskip("cv2")


from diffbackbone import UNet, UNetConfig, load_checkpoint
from diffbackbone.checkpoint import read_unet_config
from diffbackbone.eval import label_efficiency, label_tasks
from diffbackbone.eval.label_efficiency import summarize
from diffbackbone.eval.label_tasks import (
    PRESETS,
    Cell,
    LabelEfficiencyConfig,
    LabelEfficiencyRunner,
)
from diffbackbone.utils import UserError, weights_digest

TINY = UNetConfig.from_preset("tiny")
SMALL = LabelEfficiencyConfig(
    scenes=12,
    digits=60,
    tap=(90, 12),
    random_tap=(120, 18),
    timesteps=(90,),
    blocks=(12, 18),
    steps={"attention": 2, "difformer": 2, "difffeed": 1},
    device="cpu",
    upernet_options=("train_cfg.max_iters=1", "train_cfg.val_interval=1"),
    maskrcnn_options=("SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "1", "SOLVER.IMS_PER_BATCH", "2"),
)
ONE = {"tasks": ("knn",), "labels": (1.0,), "seeds": (0,)}

weights = image_folders.weights
one_thread = image_folders.one_thread
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runner(tmp_path_factory, weights):
    out = tmp_path_factory.mktemp("grid")
    config = dataclasses.replace(SMALL, out=out, checkpoint=weights)
    return LabelEfficiencyRunner(config, TINY)


def result(score, images=5):
    return {"score": score, "metrics": {}, "train_images": images, "val_images": 9}


def record(task, weights, labels, seed, score, **metrics):
    cell = dataclasses.asdict(Cell(task, weights, labels, seed))
    return {**cell, **result(score), "metrics": metrics, "seconds": 1.5}


def planted(task="knn", seeds=(0, 1, 2)):
    """Pretrained 80, 81, 82 and random 60, 62, 64 at all labels; a tenth of it at 10%."""
    return [
        record(task, weights, labels, seed, share * (base + step * seed))
        for weights, base, step in (("pretrained", 80.0, 1.0), ("random", 60.0, 2.0))
        for labels, share in ((1.0, 1.0), (0.1, 0.1))
        for seed in seeds
    ]


@pytest.fixture
def measured(monkeypatch):
    """Replace the measurement; returns the cells that it was asked for."""
    asked = []

    def run(runner, cell):
        asked.append(cell)
        base = {"pretrained": 80, "random": 60, "initial": 50}[cell.weights]
        return result(base * cell.labels + cell.seed)

    monkeypatch.setattr(LabelEfficiencyRunner, "measure", run)
    return asked


def grid(out, **options):
    label_efficiency.run(dataclasses.replace(SMALL, out=out, **{"tasks": ("knn",), **options}))


def records_of(out):
    return list(map(json.loads, (out / "results.jsonl").read_text().splitlines()))


def test_preset_gives_the_defaults_of_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(label_efficiency, "run", seen.append)
    label_efficiency.main(["--preset", "heads", "--seeds", "3", "4"])
    assert seen == [dataclasses.replace(PRESETS["heads"], seeds=(3, 4))]
    assert "difffeed" in seen[0].tasks
    assert (seen[0].images, seen[0].labels) == ("scans", (1.0,))


def test_only_missing_cells_are_measured_seed_by_seed(tmp_path, weights, measured):
    options = {"checkpoint": weights, "unet": "tiny", "labels": (1.0, 0.1)}
    with pytest.raises(UserError, match="needs --checkpoint"):
        grid(tmp_path)
    grid(tmp_path, seeds=(0,), **options)
    first = [Cell("knn", w, labels, 0) for labels in (1, 0.1) for w in ("pretrained", "random")]
    assert measured == first
    before = records_of(tmp_path)
    grid(tmp_path, seeds=(0, 1), **options)
    assert measured == first + [dataclasses.replace(cell, seed=1) for cell in first]
    after = (tmp_path / "results.jsonl").read_text().splitlines()
    assert records_of(tmp_path)[:4] == before
    assert len(after) == 8
    (tmp_path / "results.jsonl").write_text("\n".join(after[:2] + after[3:]) + "\n")
    grid(tmp_path, seeds=(0, 1), **options)
    assert measured[8:] == [first[2]]
    assert (tmp_path / "knn.png").is_file()


def test_a_stopped_run_continues_with_the_missing_cells(tmp_path, monkeypatch):
    asked, options = [], {"weights": ("random",), "labels": (1.0,)}

    def stopped(runner, cell):
        asked.append(cell.seed)
        with pytest.raises(TimeoutError):  # another run works in the folder
            grid(tmp_path, **options)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        return result(1.0)

    monkeypatch.setattr(LabelEfficiencyRunner, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        grid(tmp_path, **options)
    assert [record["seed"] for record in records_of(tmp_path)] == [0]
    assert (tmp_path / "summary.md").is_file()
    grid(tmp_path, **options)
    assert asked == [0, 1, 1, 2]


def test_results_of_other_settings_are_not_mixed(tmp_path, weights, measured):
    grid(tmp_path, weights=("random",), **{**ONE, "unet": "tiny"})  # has no checkpoint yet
    options = {**ONE, "unet": "tiny", "checkpoint": weights}
    grid(tmp_path, **options)
    assert len(measured) == 2
    other = torch.load(weights)
    other["time_embed.0.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    grid(tmp_path, weights=("random",), **{**ONE, "unet": "tiny"})  # nor any more
    for changed in ({"checkpoint": str(tmp_path / "other.pt")}, {"digits": 70}):
        with pytest.raises(UserError, match="other settings"):
            grid(tmp_path, **{**options, **changed})
    assert len(records_of(tmp_path)) == len(measured) == 2


def test_content_of_a_config_is_part_of_the_settings(tmp_path):
    digests, path = set(), tmp_path / "config"
    config = dataclasses.replace(SMALL, tasks=("upernet",), upernet=str(path))
    for content in ("a: 1", "a: 2", "a: 2"):
        path.write_text(content)
        digests.add(label_efficiency.grid_settings(config, TINY)["content of upernet"])
    assert len(digests) == 2


def test_summary_has_mean_spread_and_paired_difference():
    initial = [{**r, "weights": "initial", "score": r["score"] - 10 - r["seed"]}
               for r in planted() if r["weights"] == "random"]  # fmt: skip
    text = summarize([*planted(), *initial])
    header = "pretrained | random | initial | pretrained - random | pretrained - initial |"
    assert f"| task | in % | labels | images | {header}" in text
    # the spread of the differences, not the difference of the spreads
    line = "81.0 ± 1.0 | 62.0 ± 2.0 | 51.0 ± 1.0 | +19.0 ± 1.0 | +30.0 ± 0.0 |"
    assert f"| kNN | top-1 | 1 | 5 | {line}" in text
    assert "| 0.1 | 5 | 8.1 ± 0.1 | 6.2 ± 0.2 |" in text
    assert "| images | initial |\n" in summarize(initial)
    records = [r for r in planted(seeds=(0, 1)) if (r["weights"], r["seed"]) != ("random", 0)]
    assert "| 1 | 5 | 80.5 ± 0.7 (2) | 62.0 (1) | +19.0 (1) |" in summarize(records)
    metrics = {"box AP50": 40.0, "mask AP": 20.0, "mask AP50": 30.0}
    records.append(record("maskrcnn", "random", 1.0, 0, 25.0, **metrics))
    for name, value in {"box AP": 25.0, **metrics}.items():
        assert f"| Mask R-CNN | {name} | 1 | 5 |  | {value} (1) |  |" in summarize(records)


def test_random_weights_fill_every_zero_and_follow_the_seed(tmp_path, weights):
    checkpoint = weights
    made = {}
    for kind, seed in (("random", 0), ("random", 1), ("initial", 0), ("pretrained", 0)):
        path = tmp_path / f"{kind}-{seed}.safetensors"
        label_tasks.write_weights(path, kind, TINY, checkpoint, seed)
        label_tasks.write_weights(path, kind, TINY, "lost.pt", seed)  # stays
        assert read_unet_config(path) == TINY
        unet = UNet(TINY)
        load_checkpoint(unet, path)
        made[kind, seed] = unet.state_dict()
        if kind == "pretrained":
            digest = weights_digest(unet)
    load_checkpoint(unet, checkpoint)
    assert weights_digest(unet) == digest
    weights = [name for name, x in made["random", 0].items() if x.ndim > 1]
    assert all(made["random", 0][name].any() for name in weights)
    empty = [name for name in weights if not made["initial", 0][name].any()]
    assert len(empty) > 40
    assert not any(torch.equal(made["random", 0][n], made["random", 1][n]) for n in weights)
    rest = [name for name in weights if name not in empty]
    assert all(torch.equal(made["random", 0][n], made["initial", 0][n]) for n in rest)


def test_scenes_of_fewer_labels_are_part_of_those_of_more():
    assert label_tasks.choose_scenes(800, 1.0, 0) == list(range(800))
    for seed in (0, 1):
        few, more = (set(label_tasks.choose_scenes(800, share, seed)) for share in (0.01, 0.1))
        assert (len(few), len(more)) == (8, 80)
        assert few < more
    assert label_tasks.choose_scenes(800, 0.1, 0) != label_tasks.choose_scenes(800, 0.1, 1)
    assert len(label_tasks.choose_scenes(20, 0.01, 0)) == 1


def test_digits_and_their_labels(runner):
    train, val = runner.images.values()
    assert (len(train), len(val), len(train.classes)) == (60, 6, 10)
    images = [(folder.root / p).read_bytes() for folder in (train, val) for p in folder.paths]
    assert len(set(images)) == 66
    assert train.read(0).shape == (32, 32, 3)
    half = set(runner.labeled(Cell("knn", "random", 0.5, 0)))
    few = set(runner.labeled(Cell("linear", "pretrained", 0.2, 0)))
    assert few < half
    assert len(few) == 12
    assert set(np.bincount(train.labels[sorted(few)])) <= {1, 2}
    assert few != set(runner.labeled(Cell("knn", "random", 0.2, 1)))
    assert len(runner.labeled(Cell("knn", "random", 1.0, 0))) == 60


@pytest.mark.parametrize("task", ["knn", "linear", "attention", "difformer", "difffeed"])
def test_classification_cell(runner, task, monkeypatch):
    seen = []
    original = label_tasks.classify.run

    def spy(config, caches=None):
        seen.append((config.feedback, config.finetune, caches is not None))
        return original(config, caches)

    monkeypatch.setattr(label_tasks.classify, "run", spy)
    cell = Cell(task, "random", 0.5, 1)
    found = runner.measure(cell)
    assert 0 <= found["score"] <= 100
    assert (found["train_images"], found["val_images"]) == (30, 6)
    json.dumps(found)
    train, _ = runner.features(cell)
    assert train.folder.parents[1].name == "random-1"
    assert train.taps == ([(90, 12), (90, 18)] if task == "difformer" else [SMALL.random_tap])
    assert not list(runner.folder(cell).rglob("*.pt"))
    if task == "attention":
        assert runner.measure(cell) == found
    cached = {"attention": ("none", False, True), "difffeed": ("bottleneck", False, False)}
    if task in cached:
        assert seen[0] == cached[task]


def test_own_images_and_a_network_of_timm(tmp_path):
    pytest.importorskip("timm")
    image_folders.write_folder(tmp_path / "data/train", 6, 0)
    image_folders.write_folder(tmp_path / "data/val", 3, 1)
    options = {
        "unet": json.dumps({"preset": "timm:resnet10t", "pretrained": False}),
        "tap": (0, 4), "random_tap": (0, 5), "data": tmp_path / "data",
        "tasks": ("linear",), "seeds": (0, 1), "labels": (0.5,),
    }  # fmt: skip
    grid(tmp_path / "out", **options)
    records = records_of(tmp_path / "out")
    assert [(r["train_images"], r["val_images"]) for r in records] == [(9, 9)] * 4
    features = [
        np.load(tmp_path / f"out/cache/{name}/tap/train/{tap}.npy")
        for name, tap in (("pretrained", "t0.b4"), ("random-0", "t0.b5"), ("random-1", "t0.b5"))
    ]
    assert features[1].shape == features[2].shape
    assert not np.array_equal(features[1], features[2])
    (tmp_path / "data/val/class0/0.png").unlink()
    with pytest.raises(UserError, match="other settings"):
        grid(tmp_path / "out", **options)
    for wrong in ({"tasks": ("difffeed",)}, {"tasks": ("upernet",)}, {"weights": ("initial",)}):
        with pytest.raises(UserError, match="guided-diffusion"):
            grid(tmp_path / "other", **options | wrong)


def test_upernet_cell(runner):
    if importlib.util.find_spec("mmseg") is None:
        pytest.skip("mmseg is not installed")
    cell = Cell("upernet", "pretrained", 0.25, 1)
    found = runner.measure(cell)
    assert 0 <= found["score"] <= 100
    assert (found["train_images"], found["val_images"]) == (3, 1)
    config = (runner.folder(cell) / "run/config.py").read_text()
    for text in ("freeze=True", "pretrained.safetensors", "timestep=90", "seed=1"):
        assert text in config
    labeled = (runner.folder(cell) / "labeled.txt").read_text().split()
    assert [int(name[-8:]) - 1 for name in labeled] == label_tasks.choose_scenes(12, 0.25, 1)


def test_mask_rcnn_cell(runner):
    if importlib.util.find_spec("detectron2") is None:
        pytest.skip("detectron2 is not installed")
    cell = Cell("maskrcnn", "random", 0.25, 1)
    found = runner.measure(cell)
    assert 0 <= found["score"] <= 100
    assert (found["train_images"], found["val_images"]) == (3, 1)
    assert set(found["metrics"]) == {"box AP50", "mask AP", "mask AP50"}
    config = (runner.folder(cell) / "run" / "config.yaml").read_text()
    for text in ("random-1.safetensors", "FREEZE: true", "TIMESTEP: 120"):
        assert text in config
    name = "annotations/instances_train2017.json"
    roots = (runner.scenes() / "coco", runner.folder(cell) / "data/coco")
    whole, part = (json.loads((root / name).read_text()) for root in roots)
    chosen = [image["id"] - 1 for image in part["images"]]
    assert chosen == label_tasks.choose_scenes(12, 0.25, 1)
    kept = {image["id"] for image in part["images"]}
    assert part["annotations"] == [a for a in whole["annotations"] if a["image_id"] in kept]
    name = "annotations/instances_val2017.json"
    assert (roots[1] / name).read_text() == (roots[0] / name).read_text()


def test_a_command_that_fails_is_named_with_its_log(tmp_path, runner, monkeypatch):
    """Its cell is left out."""
    scenes, start = runner.scenes(), label_tasks.subprocess.run

    def fail(words, **options):
        return start([words[0], "-c", "raise SystemExit('out of memory')"], **options)

    monkeypatch.setattr(label_tasks.subprocess, "run", fail)
    monkeypatch.setattr(LabelEfficiencyRunner, "scenes", lambda self: scenes)
    pattern = r"(?s)1 cells failed:\n.*train-net failed \(1\); \S+log.txt ends with\n  out of"
    options = {"tasks": ("maskrcnn", "knn"), "weights": ("random",), "labels": (1.0,)}
    with pytest.raises(UserError, match=pattern):
        grid(tmp_path, seeds=(0,), **options)
    assert [record["task"] for record in records_of(tmp_path)] == ["knn"]
