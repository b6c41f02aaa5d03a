"""Label efficiency: the grid, its results and report, and a small real cell of each task."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tyro")
pytest.importorskip("cv2")

from image_folders import write_weights
from PIL import Image

from diffbackbone import UNet, UNetConfig, load_checkpoint
from diffbackbone.checkpoint import read_unet_config
from diffbackbone.eval import label_efficiency, label_tasks
from diffbackbone.eval.label_config import PRESETS, Cell, LabelEfficiencyConfig
from diffbackbone.eval.label_efficiency import ResultsStore, read_records, run_grid, summarize
from diffbackbone.eval.label_tasks import TASKS, LabelEfficiencyRunner
from diffbackbone.utils import UserError, weights_digest

ROOT = Path(__file__).resolve().parents[1]
TINY = UNetConfig.from_preset("tiny")
SMALL = LabelEfficiencyConfig(
    scenes=12,
    val_scenes=3,
    digits=60,
    val_digits=20,
    tap=(90, 24),
    random_tap=(120, 30),
    pool=2,
    timesteps=(90,),
    blocks=(24, 30),
    steps={"attention": 2, "difformer": 2, "difffeed": 1},
    width=32,
    device="cpu",
    upernet_options=("train_cfg.max_iters", "1", "train_cfg.val_interval", "1"),
    maskrcnn_options=("SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "1", "SOLVER.IMS_PER_BATCH", "2"),
)
ONE = {"tasks": ("knn",), "labels": (1.0,), "seeds": (0,)}


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_weights(tmp_path_factory.mktemp("weights") / "tiny.pt"))


@pytest.fixture(scope="module")
def runner(tmp_path_factory, checkpoint):
    out = tmp_path_factory.mktemp("grid")
    config = dataclasses.replace(SMALL, out=out, checkpoint=checkpoint)
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
    """Replace the measurement of kNN; returns the cells that it was asked for."""
    asked = []

    def run(runner, cell):
        asked.append(cell)
        base = {"pretrained": 80, "random": 60, "initial": 50}[cell.weights]
        return result(base * cell.labels + cell.seed)

    monkeypatch.setitem(TASKS, "knn", dataclasses.replace(TASKS["knn"], run=run))
    return asked


def grid(out, **options):
    label_efficiency.run(dataclasses.replace(SMALL, out=out, **{"tasks": ("knn",), **options}))


# ---------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": (0.0,)}, "--labels must be above 0"),
        ({"labels": (10.0,)}, "up to 1"),
        ({"seeds": (-1,)}, "--seeds must be at least 0"),
        ({"pool": 9}, "--pool must be from 1 to 8"),
        ({"scenes": 0}, "--scenes"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        LabelEfficiencyConfig(**options)


def test_preset_gives_the_defaults_of_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(label_efficiency, "run", seen.append)
    label_efficiency.main(["--preset", "heads", "--seeds", "3", "4"])
    assert seen == [dataclasses.replace(PRESETS["heads"], seeds=(3, 4))]
    assert "difffeed" in seen[0].tasks
    assert (seen[0].images, seen[0].labels) == ("scans", (1.0,))


def test_only_missing_cells_are_measured_seed_by_seed(tmp_path, checkpoint, measured):
    options = {"checkpoint": checkpoint, "unet": "tiny", "labels": (1.0, 0.1)}
    with pytest.raises(UserError, match="needs --checkpoint"):
        grid(tmp_path)
    grid(tmp_path, seeds=(0,), **options)
    first = [Cell("knn", w, labels, 0) for labels in (1, 0.1) for w in ("pretrained", "random")]
    assert measured == first
    before = (tmp_path / "results.jsonl").read_text().splitlines()
    grid(tmp_path, seeds=(0, 1), **options)
    assert measured == first + [dataclasses.replace(cell, seed=1) for cell in first]
    after = (tmp_path / "results.jsonl").read_text().splitlines()
    assert after[:4] == before
    assert len(after) == 8
    (tmp_path / "results.jsonl").write_text("\n".join(after[:2] + after[3:]) + "\n")
    grid(tmp_path, seeds=(0, 1), **options)
    assert measured[8:] == [first[2]]
    assert (tmp_path / "knn.png").is_file()


def test_a_killed_run_continues_with_the_missing_cells(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        "import time, dataclasses\n"
        "from diffbackbone.eval import label_efficiency, label_tasks\n"
        "def run(runner, cell):\n"
        "    print(cell.name, flush=True)\n"
        "    time.sleep(60 if cell.seed == 1 else 0)\n"
        "    return dict(score=1.0, metrics={}, train_images=1, val_images=1)\n"
        "knn = label_tasks.TASKS['knn']\n"
        "label_tasks.TASKS['knn'] = dataclasses.replace(knn, run=run)\n"
        "label_efficiency.main()\n"
    )
    out = tmp_path / "out"
    options = f"--out {out} --tasks knn --labels 1 --weights random --device cpu".split()
    process = subprocess.Popen(
        [sys.executable, script, *options], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    line = ""
    while "knn-random-1-1" not in line:
        line = process.stdout.readline()
        assert line
    with pytest.raises(UserError, match="another run works in"):
        grid(out, weights=("random",))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list(read_records(out / "results.jsonl")) == [Cell("knn", "random", 1.0, 0)]
    assert (out / "summary.md").is_file()
    command = [sys.executable, ROOT / "tools/label_efficiency.py", *options, "--list"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert lines.splitlines()[1:] == [
        "knn-random-1-1: missing", "knn-random-1-2: missing", "1 of 3 cells are finished"
    ]  # fmt: skip


def test_results_of_other_settings_are_not_mixed(tmp_path, checkpoint, measured):
    grid(tmp_path, weights=("random",), **{**ONE, "unet": "tiny"})  # has no checkpoint yet
    options = {**ONE, "unet": "tiny", "checkpoint": checkpoint}
    grid(tmp_path, **options)
    assert len(measured) == 2
    other = torch.load(checkpoint)
    other["time_embed.0.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    for changed in ({"checkpoint": str(tmp_path / "other.pt")}, {"pool": 1}):
        with pytest.raises(UserError, match=r"(?s)other settings.*--overwrite"):
            grid(tmp_path, **{**options, **changed})
    old = tmp_path / "weights/pretrained.safetensors"
    label_tasks.write_weights(old, "pretrained", TINY, checkpoint, 0)
    grid(tmp_path, overwrite=True, **{**options, "checkpoint": str(tmp_path / "other.pt")})
    assert not old.exists()
    assert len(measured) == 4
    assert len(read_records(tmp_path / "results.jsonl")) == 2


def test_settings_of_tasks_may_come_later_but_not_change(tmp_path):
    ResultsStore(tmp_path, {"a": 1})
    ResultsStore(tmp_path, {"a": 1, "b": 2})
    assert ResultsStore(tmp_path, {"a": 1}).settings == {"a": 1, "b": 2}
    with pytest.raises(UserError, match="b: 2, now 3"):
        ResultsStore(tmp_path, {"a": 1, "b": 3})
    assert ResultsStore(tmp_path, {"b": 3}, overwrite=True).settings == {"b": 3}


@pytest.mark.parametrize("task", ["upernet", "maskrcnn"])
def test_content_of_a_config_is_part_of_the_settings(tmp_path, task):
    pytest.importorskip({"upernet": "mmseg", "maskrcnn": "detectron2"}[task])
    folder, text = {
        "upernet": ("mmseg", "_base_ = '{}'\n# {}\ntrain_cfg = dict(max_iters={})\n"),
        "maskrcnn": ("detectron2", "_BASE_: {} # {}\nSOLVER: {{MAX_ITER: {}}}\n"),
    }[task]
    base = ROOT / "configs" / folder / getattr(SMALL, task)
    digests = []
    for remark, iterations in (("one", 7), ("two", 7), ("two", 8)):
        path = tmp_path / base.name
        path.write_text(text.format(base, remark, iterations))
        config = dataclasses.replace(SMALL, tasks=(task,), **{task: str(path)})
        digests.append(label_efficiency.grid_settings(config, TINY)[f"content of {task}"])
    assert digests[0] == digests[1] != digests[2]


def test_a_missing_framework_is_named_before_anything_is_measured(tmp_path, monkeypatch, measured):
    monkeypatch.setitem(sys.modules, "detectron2.config", None)
    options = {**ONE, "weights": ("random",), "tasks": ("knn", "maskrcnn")}
    with pytest.raises(UserError, match=r"(?s)detectron2.*leave maskrcnn out"):
        grid(tmp_path, **options)
    assert measured == []


def test_time_limit_starts_no_cell_that_would_not_end_in_time(tmp_path):
    now, measured = [0.0], []

    def measure(cell):
        measured.append(cell)
        now[0] += 40
        return result(1.0)

    cells = [Cell("knn", "random", 1.0, seed) for seed in range(5)]
    store = ResultsStore(tmp_path, {})
    assert not run_grid(cells, store, measure, lambda: None, 100, clock=lambda: now[0])
    assert measured == cells[:2]  # a third one would end at 120


def test_a_failed_cell_is_left_out_and_three_in_a_row_end_the_run(tmp_path):
    measured, bad, reports = [], {0, 2, 3, 4}, []

    def measure(cell):
        measured.append(cell.seed)
        if cell.seed in bad:
            raise UserError("diverged")
        return result(1.0)

    cells = [Cell("knn", "random", 1.0, seed) for seed in range(7)]
    failed = run_grid(cells, ResultsStore(tmp_path, {}), measure, lambda: reports.append(1))
    assert measured == [0, 1, 2, 3, 4]
    assert [text.split(":")[0] for text in failed] == [cells[i].name for i in (0, 2, 3, 4)]
    assert list(read_records(tmp_path / "results.jsonl")) == [cells[1]]
    assert len(reports) == 1


def test_list_runs_nothing_and_tells_what_is_missing(tmp_path, capsys, measured):
    options = {"weights": ("random",), "labels": (1.0,)}
    grid(tmp_path, seeds=(0,), **options)
    capsys.readouterr()
    grid(tmp_path, seeds=(0, 1), list=True, **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("knn-random-1-0: top-1 60.00 (")
    assert lines[1:] == ["knn-random-1-1: missing", "1 of 2 cells are finished"]
    grid(tmp_path, seeds=(0, 1), list=True, only_missing=True, **options)
    assert capsys.readouterr().out.splitlines() == lines[1:]
    assert len(measured) == 1


# ---------------------------------------------------------------------------------------- reports


def test_summary_has_mean_spread_and_paired_difference():
    initial = [{**r, "weights": "initial", "score": r["score"] - 10 - r["seed"]}
               for r in planted() if r["weights"] == "random"]  # fmt: skip
    text = summarize([*planted(), *initial], "What.")
    header = "pretrained | random | initial | pretrained - random | pretrained - initial |"
    assert f"| labels | images | {header}" in text
    # the spread of the differences, not the difference of the spreads
    line = "81.0 ± 1.0 | 62.0 ± 2.0 | 51.0 ± 1.0 | +19.0 ± 1.0 | +30.0 ± 0.0 |"
    assert f"| 1 | 5 | {line}" in text
    assert "| 0.1 | 5 | 8.1 ± 0.1 | 6.2 ± 0.2 |" in text
    assert "## kNN: top-1 in %" in text
    assert "What." in text
    assert "| labels | images | initial |\n" in summarize(initial, "")


def test_summary_tells_how_many_seeds_there_are_and_pairs_what_both_have():
    records = planted(seeds=(0, 1))
    records = [r for r in records if (r["weights"], r["seed"]) != ("random", 0)]
    assert "| 1 | 5 | 80.5 ± 0.7 (2) | 62.0 (1) | +19.0 (1) |" in summarize(records, "")


def test_heads_are_compared_seed_by_seed_in_one_table():
    records = planted("linear") + planted("attention") + planted("difffeed")
    for r in records:
        r["score"] += {"linear": 0, "attention": 3 + r["seed"], "difffeed": 10}[r["task"]]
    text = summarize(records, "").split("## Heads on pretrained features")[1]
    header = "linear | attention | difffeed | attention - linear | difffeed - attention |"
    assert f"| labels | images | {header}" in text
    assert "| 81.0 ± 1.0 | 85.0 ± 2.0 | 91.0 ± 1.0 | +4.0 ± 1.0 | +6.0 ± 1.0 |" in text


def test_other_metrics_of_a_detector_are_shown():
    metrics = {"box AP50": 40.0, "mask AP": 20.0, "mask AP50": 30.0}
    text = summarize([record("maskrcnn", "random", 1.0, 0, 25.0, **metrics)], "")
    for name, value in metrics.items():
        assert f"| 1 | 5 | {value} (1) |" in text.split(f"\n{name} in %")[1].split("\n\n")[1]


def test_picture_has_a_line_with_error_bars_for_each_weights():
    (axes,) = label_efficiency.draw_curves("knn", planted()).axes
    assert axes.get_xscale() == "log"
    lines = {c.get_label(): c for c in axes.containers}
    assert lines.keys() == {"pretrained", "random"}
    for name, means, deviation in (("pretrained", (81, 8.1), 1), ("random", (62, 6.2), 2)):
        line, _, (bars,) = lines[name].lines
        assert list(line.get_xdata()) == pytest.approx([1, 0.1])
        assert list(line.get_ydata()) == pytest.approx(means)
        low, high = bars.get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((means[0] - deviation, means[0] + deviation))
    label_efficiency.draw_curves("knn", [record("knn", "random", 1.0, 0, 0.0)])


# -------------------------------------------------------------------------------- weights, labels


def test_random_weights_fill_every_zero_and_follow_the_seed(tmp_path, checkpoint):
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
    train, val = runner.digits()
    assert (len(train), len(val), len(train.classes)) == (60, 20, 10)
    images = [folder.path(i).read_bytes() for folder in (train, val) for i in range(len(folder))]
    assert len(set(images)) == 80
    assert Image.open(train.path(0)).size == (32, 32)
    half = set(runner.labeled(Cell("knn", "random", 0.5, 0)))
    few = set(runner.labeled(Cell("linear", "pretrained", 0.2, 0)))
    assert few < half
    assert len(few) == 12
    assert set(np.bincount(train.labels[sorted(few)])) <= {1, 2}
    assert few != set(runner.labeled(Cell("knn", "random", 0.2, 1)))
    assert len(runner.labeled(Cell("knn", "random", 1.0, 0))) == 60


# ------------------------------------------------------------------------------------- real cells


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
    assert (found["train_images"], found["val_images"]) == (30, 20)
    json.dumps(found)
    assert not list(runner.folder(cell).rglob("*.pt"))
    if task == "attention":
        assert runner.measure(cell) == found
    cached = {"attention": ("none", False, True), "difffeed": ("bottleneck", False, False)}
    if task in cached:
        assert seen[0] == cached[task]


def test_features_are_of_the_cells_weights_and_tap(runner):
    for weights, name, tap in (
        ("pretrained", "pretrained", SMALL.tap),
        ("random", "random-1", SMALL.random_tap),
    ):
        train, _ = runner.features(Cell("knn", weights, 0.5, 1))
        assert train.folder.parents[1].name == name
        assert list(train.shapes) == [tap]
    train, _ = runner.features(Cell("difformer", "random", 0.5, 1))
    assert set(train.shapes) == {(90, 24), (90, 30)}


def test_upernet_cell(runner):
    if importlib.util.find_spec("mmseg") is None:
        pytest.skip("mmseg is not installed")
    cell = Cell("upernet", "pretrained", 0.25, 1)
    found = runner.measure(cell)
    assert 0 <= found["score"] <= 100
    assert (found["train_images"], found["val_images"]) == (3, 3)
    config = (runner.folder(cell) / "config.py").read_text()
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
    assert (found["train_images"], found["val_images"]) == (3, 3)
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


def test_a_script_that_fails_is_named_with_its_log(runner):
    config = dataclasses.replace(runner.config, maskrcnn="no_such_config.yaml")
    with pytest.raises(UserError, match=r"(?s)train_net.py failed \(1\); .*log.txt ends"):
        LabelEfficiencyRunner(config, TINY).measure(Cell("maskrcnn", "pretrained", 1.0, 2))
