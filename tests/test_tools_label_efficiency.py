"""`tools/label_efficiency.py`: the grid, its reports, and a small real cell of each kind."""

# ruff: noqa: E402 - the tools are found by their folder

from __future__ import annotations

import csv
import dataclasses
import importlib.util
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

pytest.importorskip("PIL")
pytest.importorskip("tqdm")
pytest.importorskip("cv2")
pytest.importorskip("sklearn")

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import _classification as common
import _label_tasks as tasks
import label_efficiency as tool
from _classification import Processes, ToolError
from _label_tasks import Cell, Lab, Recipe
from image_folders import write_weights

from diffbackbone import UNet, UNetConfig, load_checkpoint
from diffbackbone.checkpoint import read_unet_config

TINY = UNetConfig.from_preset("tiny")
SMALL = Recipe(
    scenes=12,
    val_scenes=3,
    digits=60,
    val_digits=20,
    image_size=32,
    tap=(90, 24),
    random_tap=(120, 30),
    pool=2,
    timesteps=(90,),
    blocks=(24, 30),
    steps={"attention": 2, "difformer": 2, "difffeed": 1},
    heads={
        name: ("--width", "32", "--num-heads", "2", "--layers", "1", "--batch-size", "32")
        for name in ("attention", "difformer", "difffeed")
    },
    upernet_options={"train_cfg.max_iters": 1, "train_cfg.val_interval": 1},
    maskrcnn_options=("SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "1", "SOLVER.IMS_PER_BATCH", "2"),
)


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, checkpoint):
    return Lab(tmp_path_factory.mktemp("grid"), TINY, str(checkpoint), SMALL, Processes())


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
    """Plant a runner for kNN and the linear probe; gives the cells that it was asked for."""
    asked = []

    def run(lab, cell):
        asked.append(cell)
        base = {"pretrained": 80, "random": 60, "initial": 50}[cell.weights]
        return result(base * cell.labels + cell.seed)

    for name in ("knn", "linear"):
        monkeypatch.setitem(tasks.TASKS, name, dataclasses.replace(tasks.TASKS[name], run=run))
    return asked


def command(out, *options):
    arguments = ["--out", str(out), "--tasks", "knn", "--device", "cpu", *map(str, options)]
    args = tool.parse(arguments)
    tool.run(args, Processes(), SMALL)


# ---------------------------------------------------------------------------------------- the grid


def test_grid_is_the_product_and_its_seeds_come_one_after_the_other():
    args = tool.parse(["--checkpoint", "x.pt"])
    cells = tool.make_grid(args)
    assert len(cells) == len(set(cells)) == 7 * 2 * 3 * 3
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert {cell.labels for cell in cells} == {1.0, 0.1, 0.01}
    assert [cell.weights for cell in cells[:2]] == ["pretrained", "random"]
    args = tool.parse(["--weights", "random", "--tasks", "knn", "--labels", "0.5", "--seeds", "7"])
    assert tool.make_grid(args) == [Cell("knn", "random", 0.5, 7)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "detr"], "--tasks detr: choose from knn, linear, .*, maskrcnn"),
        (["--weights", "noise"], "--weights noise: choose from pretrained, random, initial"),
        (["--labels", "0"], "--labels 0: a share must lie above 0 and up to 1"),
        (["--labels", "10"], "--labels 10: a share"),
        (["--labels", "nan"], "--labels nan: a share"),
        (["--seeds", "-1"], "--seeds -1: a seed must be at least 0"),
        (["--seeds", "1", "1"], "--seeds 1 1: one comes twice"),
        (["--time-limit", "0"], "--time-limit 0: minutes must be above 0"),
        (["--pool", "9"], "--pool 9: must be from 1 to 8"),
        (["--digits", "99"], "--digits 99: must be at least 100"),
        (["--scenes", "0"], "--scenes 0: must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_named_with_what_is_allowed(options, message):
    with pytest.raises(ToolError, match=message):
        tool.parse(["--checkpoint", "x.pt", *options])


def test_pretrained_cells_need_a_checkpoint_that_is_there(tmp_path):
    with pytest.raises(ToolError, match="needs --checkpoint FILE"):
        command(tmp_path)
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        command(tmp_path, "--checkpoint", tmp_path / "lost.safetensors")


def test_only_missing_cells_are_measured(tmp_path, checkpoint, measured):
    grid = ["--checkpoint", checkpoint, "--unet", "tiny", "--labels", "1", "0.1"]
    command(tmp_path, *grid, "--seeds", "0")
    first = [Cell("knn", w, labels, 0) for labels in (1, 0.1) for w in ("pretrained", "random")]
    assert measured == first
    before = (tmp_path / "results.jsonl").read_text().splitlines()
    command(tmp_path, *grid, "--seeds", "0", "1")
    assert measured == first + [dataclasses.replace(cell, seed=1) for cell in first]
    after = (tmp_path / "results.jsonl").read_text().splitlines()
    assert after[:4] == before
    assert len(after) == 8
    (tmp_path / "results.jsonl").write_text("\n".join(after[:2] + after[3:]) + "\n")
    command(tmp_path, *grid, "--seeds", "0", "1")
    assert measured[8:] == [first[2]]


def test_a_killed_run_goes_on_with_the_cells_that_are_missing(tmp_path, checkpoint):
    script = tmp_path / "slow.py"
    script.write_text(
        f"import sys, time, dataclasses\nsys.path.append({str(ROOT / 'tools')!r})\n"
        "import _label_tasks as tasks, label_efficiency as tool\n"
        "def run(lab, cell):\n"
        "    print(cell.name, flush=True)\n"
        "    time.sleep(60 if cell.seed == 1 else 0)\n"
        "    return dict(score=1.0, metrics={}, train_images=1, val_images=1)\n"
        "tasks.TASKS['knn'] = dataclasses.replace(tasks.TASKS['knn'], run=run)\n"
        "tool.main()\n"
    )
    options = ["--out", str(tmp_path / "out"), "--tasks", "knn", "--labels", "1", "--weights"]
    options += ["random", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, str(script), *options], stdout=subprocess.PIPE, text=True
    )
    seen = ""
    while "knn-random-1-1" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen = line
    with pytest.raises(ToolError, match="another run works in"), tool.lock(tmp_path / "out"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done = tool.read_records(tmp_path / "out" / "results.jsonl")
    assert list(done) == [Cell("knn", "random", 1.0, 0)]
    assert (tmp_path / "out" / "summary.md").is_file()
    with tool.lock(tmp_path / "out"):  # ended with the process
        pass


def test_results_of_other_settings_are_not_mixed(tmp_path, checkpoint, measured):
    grid = ["--unet", "tiny", "--labels", "1", "--seeds", "0"]
    command(tmp_path, *grid, "--weights", "random")  # knows no checkpoint yet
    command(tmp_path, *grid, "--checkpoint", checkpoint)
    assert len(measured) == 2
    other = tmp_path / "other.pt"
    weights = torch.load(checkpoint)
    weights["time_embed.0.bias"] += 1
    torch.save(weights, other)
    with pytest.raises(ToolError, match=r"(?s)other settings.*checkpoint.*--overwrite"):
        command(tmp_path, *grid, "--checkpoint", other)
    old = tmp_path / "weights" / "pretrained.safetensors"
    tasks.write_weights(old, "pretrained", TINY, str(checkpoint), 0)
    command(tmp_path, *grid, "--checkpoint", other, "--overwrite")
    assert not old.exists()
    assert len(measured) == 4
    assert len(tool.read_records(tmp_path / "results.jsonl")) == 2


def test_the_recipe_takes_its_values_from_the_command_line(tmp_path, measured):
    grid = ["--unet", "tiny", "--labels", "1", "--seeds", "0", "--weights", "random"]
    given = {"tap": [30, 9], "random_tap": [60, 12], "pool": 1, "digits": 123, "scenes": 45}
    words = [
        word
        for name, value in given.items()
        for word in (f"--{name.replace('_', '-')}", *(value if name.endswith("tap") else [value]))
    ]
    command(tmp_path, *grid, *words)
    recipe = json.loads((tmp_path / "settings.json").read_text())["recipe"]
    assert recipe == {**json.loads(json.dumps(dataclasses.asdict(SMALL))), **given}


def test_recipe_is_part_of_the_settings(tmp_path):
    settings = {"checkpoint": None, "recipe": {"k": 5}}
    common.write_json(tmp_path / "settings.json", settings)
    tool.Ledger(tmp_path, settings)
    with pytest.raises(ToolError, match=r"recipe\.k"):
        tool.Ledger(tmp_path, {"checkpoint": None, "recipe": {"k": 6}})


def test_what_a_config_says_is_part_of_the_settings(tmp_path, monkeypatch):
    pytest.importorskip("mmseg")
    pytest.importorskip("detectron2")
    made = tasks.config_digests(tasks.TASKS, SMALL)
    assert set(made) == {"upernet", "maskrcnn"}
    for name, text in (
        ("upernet", "_base_ = '{}'\n# {}\ntrain_cfg = dict(max_iters={})\n"),
        ("maskrcnn", "_BASE_: {} # {}\nSOLVER: {{MAX_ITER: {}}}\n"),
    ):
        base = {"upernet": ROOT / "configs/mmseg", "maskrcnn": ROOT / "configs/detectron2"}[name]
        digests = []
        for remark, iterations in (("one", 7), ("two", 7), ("two", 8)):
            path = tmp_path / getattr(SMALL, name)  # of the same name each time
            path.write_text(text.format(base / getattr(SMALL, name), remark, iterations))
            options = {f"{name}_options": type(getattr(SMALL, f"{name}_options"))()}
            recipe = dataclasses.replace(SMALL, **{name: str(path)}, **options)
            digests.append(tasks.config_digests([name], recipe)[name])
        assert digests[0] == digests[1] != digests[2]


def test_a_framework_that_is_missing_is_named_before_anything_is_measured(
    tmp_path, monkeypatch, measured
):
    def missing():
        raise SystemExit("error: there is no Detectron2")

    monkeypatch.setattr(tasks._detectron2, "prepare", missing)
    grid = ["--weights", "random", "--labels", "1", "--seeds", "0"]
    with pytest.raises(ToolError, match=r"there is no Detectron2\n--tasks goes without maskrcnn"):
        command(tmp_path, *grid, "--tasks", "knn", "maskrcnn")
    assert measured == []
    command(tmp_path, *grid, "--tasks", "knn")
    assert measured == [Cell("knn", "random", 1.0, 0)]


def test_results_of_a_config_that_says_something_else_now_are_not_mixed(tmp_path):
    def ledger(overwrite=False, checkpoint=None, **configs):
        settings = {"checkpoint": checkpoint, "configs": configs}
        made = tool.Ledger(tmp_path, settings, overwrite)
        common.write_json(tmp_path / "settings.json", made.settings)
        return made.settings["configs"]

    common.write_json(tmp_path / "settings.json", {"checkpoint": None})  # older than digests
    assert ledger() == {}
    assert ledger(upernet="a") == {"upernet": "a"}
    assert ledger(maskrcnn="b") == {"upernet": "a", "maskrcnn": "b"}
    assert ledger() == {"upernet": "a", "maskrcnn": "b"}
    with pytest.raises(ToolError, match=r"configs\.maskrcnn: it has 'b', wanted is 'c'"):
        ledger(maskrcnn="c")
    assert ledger(overwrite=True, maskrcnn="c") == {"maskrcnn": "c"}  # nothing else is left
    assert ledger(upernet="d") == {"maskrcnn": "c", "upernet": "d"}


def test_damaged_results_are_named_by_their_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(planted()[0]) + "\n{\n")
    with pytest.raises(ToolError, match="line 2, is damaged"):
        tool.read_records(path)


def test_time_limit_begins_no_cell_that_would_not_end_in_time(tmp_path):
    now, said, measured = [0.0], [], []

    def measure(cell):
        measured.append(cell)
        now[0] += 40
        return result(1.0)

    cells = [Cell("knn", "random", 1.0, seed) for seed in range(5)]
    ledger = tool.Ledger(tmp_path, {"checkpoint": None})
    failed = tool.run_grid(
        cells, ledger, measure, lambda: None, said.append, 100, clock=lambda: now[0]
    )
    assert measured == cells[:2]  # a third one would end at 120
    assert not failed
    assert "3 cells are left" in said[-1]


def test_a_failed_cell_is_left_out_and_three_in_a_row_end_the_run(tmp_path):
    measured, bad = [], {0, 2, 3, 4}

    def measure(cell):
        measured.append(cell.seed)
        if cell.seed in bad:
            raise ToolError("diverged")
        return result(1.0)

    cells = [Cell("knn", "random", 1.0, seed) for seed in range(7)]
    ledger = tool.Ledger(tmp_path, {"checkpoint": None})
    reports = []
    failed = tool.run_grid(cells, ledger, measure, lambda: reports.append(1), lambda text: None)
    assert measured == [0, 1, 2, 3, 4]
    assert [text.split(":")[0] for text in failed] == [cells[i].name for i in (0, 2, 3, 4)]
    assert list(tool.read_records(tmp_path / "results.jsonl")) == [cells[1]]
    assert len(reports) == 1


def test_list_runs_nothing_and_says_what_is_missing(tmp_path, capsys, measured):
    command(tmp_path, "--weights", "random", "--labels", "1", "--seeds", "0")
    capsys.readouterr()
    command(tmp_path, "--weights", "random", "--labels", "1", "--seeds", "0", "1", "--list")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("knn-random-1-0: top-1 60.00 (")
    assert lines[1:] == ["knn-random-1-1: missing", "1 of 2 cells are done"]
    only = ["--labels", "1", "--seeds", "0", "1", "--list", "--only-missing"]
    command(tmp_path, "--weights", "random", *only)
    assert capsys.readouterr().out.splitlines() == lines[1:]
    assert len(measured) == 1


# ---------------------------------------------------------------------------------------- reports


def test_summary_has_mean_spread_and_paired_difference():
    text = tool.summarise(planted(), "What.")
    assert "| labels | images | pretrained | random | pretrained - random |" in text
    # the spread of the differences, not the difference of the spreads
    assert "| 1 | 5 | 81.0 ± 1.0 | 62.0 ± 2.0 | +19.0 ± 1.0 |" in text
    assert "| 0.1 | 5 | 8.1 ± 0.1 | 6.2 ± 0.2 | +1.9 ± 0.1 |" in text
    assert "## kNN: top-1 in %" in text
    assert "What." in text


def test_summary_sets_pretrained_against_each_of_the_others():
    initial = [{**r, "weights": "initial", "score": r["score"] - 10 - r["seed"]}
               for r in planted() if r["weights"] == "random"]  # fmt: skip
    text = tool.summarise([*planted(), *initial], "")
    assert "| random | initial | pretrained - random | pretrained - initial |" in text
    line = "| 81.0 ± 1.0 | 62.0 ± 2.0 | 51.0 ± 1.0 | +19.0 ± 1.0 | +30.0 ± 0.0 |"
    assert line in text
    text = tool.summarise(initial, "")
    assert "| labels | images | initial |\n" in text


def test_summary_says_how_many_seeds_there_are_and_pairs_what_both_have():
    records = planted(seeds=(0, 1))
    records = [r for r in records if (r["weights"], r["seed"]) != ("random", 0)]
    text = tool.summarise(records, "")
    assert "| 1 | 5 | 80.5 ± 0.7 (2) | 62.0 (1) | +19.0 (1) |" in text


def test_heads_are_compared_seed_by_seed_and_shown_in_one_table():
    records = planted("linear") + planted("attention") + planted("difffeed")
    for r in records:
        r["score"] += {"linear": 0, "attention": 3 + r["seed"], "difffeed": 10}[r["task"]]
    text = tool.summarise(records, "").split("## Heads against each other")[1]
    header = "| weights | labels | linear probe | attention head | DifFeed, attention head |"
    assert f"{header} attention - linear | difffeed - attention |" in text
    line = "| pretrained | 1 | 81.0 ± 1.0 | 85.0 ± 2.0 | 91.0 ± 1.0 | +4.0 ± 1.0 | +6.0 ± 1.0 |"
    assert line in text


def test_other_metrics_of_a_detector_are_shown():
    metrics = {"box AP50": 40.0, "mask AP": 20.0, "mask AP50": 30.0}
    text = tool.summarise([record("maskrcnn", "random", 1.0, 0, 25.0, **metrics)], "")
    assert "| labels | box AP50, random | mask AP, random | mask AP50, random |" in text
    assert "| 1 | 40.0 (1) | 20.0 (1) | 30.0 (1) |" in text


def test_csv_has_a_line_for_each_cell_in_the_order_of_the_grid():
    records = [*planted()[::-1], record("maskrcnn", "random", 1.0, 0, 25.0, **{"mask AP": 20.0})]
    rows = list(csv.DictReader(tool.csv_text(records).splitlines()))
    assert len(rows) == 13
    assert [row["seed"] for row in rows[:3]] == ["0", "1", "2"]
    assert (rows[0]["weights"], rows[0]["labels"], rows[0]["score"]) == (
        "pretrained",
        "1.0",
        "80.0",
    )
    assert rows[0]["mask AP"] == ""
    assert (rows[-1]["task"], rows[-1]["mask AP"]) == ("maskrcnn", "20.0")


def test_figure_shows_a_line_with_error_bars_for_each_weights():
    def pixels(picture, kind):
        # the legend has the same colours, below the axis
        found = (np.asarray(picture) == tool.COLOURS[kind]).all(-1)[:480]
        return np.argwhere(found)

    picture = tool.draw_curves("kNN", "top-1", planted())
    pretrained, random = pixels(picture, "pretrained"), pixels(picture, "random")
    assert pretrained[:, 0].min() < random[:, 0].min()  # higher
    assert abs(pretrained[:, 1].min() - random[:, 1].min()) < 3
    one = tool.draw_curves("kNN", "top-1", [r for r in planted() if r["weights"] == "random"])
    assert not len(pixels(one, "pretrained"))
    # a wider spread makes a taller bar, at the right end, where all labels are
    wide = planted()
    for r in wide:
        r["score"] += {0: -9, 1: 0, 2: 9}[r["seed"]] * (r["weights"] == "random") * r["labels"]
    taller = pixels(tool.draw_curves("kNN", "top-1", wide), "random")
    right = taller[taller[:, 1] > 600]
    assert np.ptp(right[:, 0]) > 40


def test_shares_of_labels_stand_on_a_logarithmic_axis():
    shares = (1.0, 0.1, 0.01)
    records = [record("knn", "random", share, 0, 50.0) for share in shares]
    colours = np.asarray(tool.draw_curves("kNN", "top-1", records)) == tool.COLOURS["random"]
    columns = colours.all(-1)[:480].sum(0)
    left, right = np.flatnonzero(columns)[[0, -1]]
    dots = np.flatnonzero(columns > 8)  # a line is 3 pixels high
    assert abs(np.median(dots) - (left + right) / 2) < 3


def test_figure_of_a_single_cell_and_of_nothing_but_zeros():
    for r in (record("knn", "random", 1.0, 0, 50.0), record("knn", "random", 1.0, 0, 0.0)):
        assert isinstance(tool.draw_curves("kNN", "top-1", [r]), Image.Image)


# ------------------------------------------------------------------------------- weights and labels


def test_random_weights_fill_every_zero_and_follow_the_seed(tmp_path):
    made = {}
    for kind, seed in (("random", 0), ("random", 1), ("initial", 0)):
        path = tmp_path / f"{kind}-{seed}.safetensors"
        tasks.write_weights(path, kind, TINY, None, seed)
        assert read_unet_config(path) == TINY
        unet = UNet(TINY)
        load_checkpoint(unet, path)
        made[kind, seed] = unet.state_dict()
    weights = [name for name, x in made["random", 0].items() if x.ndim > 1]
    assert all(made["random", 0][name].any() for name in weights)
    empty = [name for name in weights if not made["initial", 0][name].any()]
    assert len(empty) > 40
    assert not any(torch.equal(made["random", 0][n], made["random", 1][n]) for n in weights)
    rest = [name for name in weights if name not in empty]
    assert all(torch.equal(made["random", 0][n], made["initial", 0][n]) for n in rest)


def test_pretrained_weights_are_the_checkpoints_and_stay_what_they_were(tmp_path, checkpoint):
    path = tmp_path / "pretrained.safetensors"
    tasks.write_weights(path, "pretrained", TINY, str(checkpoint), 5)
    digest = tasks.checkpoint_digest(TINY, str(path))
    assert digest == tasks.checkpoint_digest(TINY, str(checkpoint))
    tasks.write_weights(path, "pretrained", TINY, "lost.pt", 5)  # not read again
    assert tasks.checkpoint_digest(TINY, str(path)) == digest


def test_scenes_of_fewer_labels_are_part_of_those_of_more():
    assert tasks.choose_scenes(800, 1.0, 0) == list(range(800))
    for seed in (0, 1):
        few, more = (set(tasks.choose_scenes(800, share, seed)) for share in (0.01, 0.1))
        assert (len(few), len(more)) == (8, 80)
        assert few < more
    assert tasks.choose_scenes(800, 0.1, 0) != tasks.choose_scenes(800, 0.1, 1)
    assert len(tasks.choose_scenes(20, 0.01, 0)) == 1


def test_digits_have_one_class_each_and_splits_that_share_no_image(lab):
    train, val = lab.digits()
    assert (len(train.listing), len(val.listing)) == (60, 20)
    assert len(train.listing.classes) == 10
    images = [folder.path(i).read_bytes() for folder in (train, val)
              for i in range(len(folder.listing))]  # fmt: skip
    assert len(set(images)) == 80
    with Image.open(train.path(0)) as image:
        assert image.size == (32, 32)


def test_labels_of_digits_are_balanced_and_nested(lab):
    train, _ = lab.digits()
    half = set(lab.labelled(Cell("knn", "random", 0.5, 0)))
    few = set(lab.labelled(Cell("linear", "pretrained", 0.2, 0)))
    assert few < half
    assert len(few) == 12
    assert set(np.bincount(train.labels[sorted(few)])) <= {1, 2}
    assert few != set(lab.labelled(Cell("knn", "random", 0.2, 1)))
    assert len(lab.labelled(Cell("knn", "random", 1.0, 0))) == 60


# ---------------------------------------------------------------------------------- real cells


@pytest.mark.parametrize("task", ["knn", "linear", "attention", "difformer", "difffeed"])
def test_classification_cell(lab, task):
    cell = Cell(task, "random", 0.5, 1)
    found = lab.measure(cell)
    assert 0 <= found["score"] <= 100
    assert (found["train_images"], found["val_images"]) == (30, 20)
    json.dumps(found)
    assert not list(lab.folder(cell).rglob("*.pt"))
    if task == "attention":  # the same once more, and from other weights something else
        assert lab.measure(cell) == found
    if task == "difffeed":
        settings = json.loads((lab.folder(cell) / "results.json").read_text())["settings"]
        assert (settings["feedback"], settings["freeze"]) == ("bottleneck", True)


def test_probe_reads_its_own_weights_and_labels(lab, monkeypatch):
    seen = []

    class Spy:
        def __init__(self, caches, draws, args, device):
            seen.append((caches[0].folder.parents[1].name, tuple(draws[0].rows)))

        def measure(self, tap, wanted):
            assert list(wanted) == [(SMALL.pool, 1)]
            seen[-1] += (tap,)
            return [{"knn": 0.5}]

    monkeypatch.setattr(tasks.sweep, "Judge", Spy)
    for weights in ("pretrained", "random"):
        assert lab.measure(Cell("knn", weights, 0.5, 1))["score"] == 50
    assert [name for name, *_ in seen] == ["pretrained", "random-1"]
    assert [tap for *_, tap in seen] == [SMALL.tap, SMALL.random_tap]
    assert seen[0][1] == seen[1][1] == tuple(lab.labelled(Cell("knn", "random", 0.5, 1)))


def test_heads_learn_from_the_features_of_their_own_images(lab, monkeypatch):
    seen = {}

    def run(args, processes, caches):
        train = common.list_folder(Path(args.data) / "train")
        wanted = common.choose_subset(train, args.subset, args.seed).listing
        seen[args.head, args.feedback] = caches and caches[0].listing.paths == wanted.paths
        assert caches is None or caches[1].listing.paths[0].endswith("png")
        steps = args.epochs * -(-len(wanted) // args.batch_size)
        assert steps >= (1 if args.feedback == "bottleneck" else 2)
        return {"val": {"top1": 0.5, "top5": 0.9, "images": 20}, "trained_parameters": 1}

    monkeypatch.setattr(tasks.train_classifier, "run", run)
    for task in ("attention", "difformer", "difffeed"):
        assert lab.measure(Cell(task, "random", 0.5, 1))["train_images"] == 30
    assert seen == {
        ("attention", "none"): True,
        ("difformer", "none"): True,
        ("attention", "bottleneck"): None,
    }


def test_rows_of_a_cache_are_those_chosen(lab):
    train, _ = lab.caches(Cell("knn", "random", 1.0, 1))
    rows = tasks.CacheRows(train, [3, 5, 8])
    tap = SMALL.random_tap
    assert torch.equal(rows.read([2, 0], [tap])[tap], train.read([8, 3], [tap])[tap])
    assert rows.listing.paths == tuple(train.paths[i] for i in (3, 5, 8))
    assert list(rows.labels) == [train.labels[i] for i in (3, 5, 8)]
    assert len(rows) == 3


def test_upernet_cell(lab):
    if importlib.util.find_spec("mmseg") is None:
        pytest.skip("mmseg is not installed")
    cell = Cell("upernet", "pretrained", 0.25, 1)
    found = lab.measure(cell)
    assert 0 <= found["score"] <= 100
    assert (found["train_images"], found["val_images"]) == (3, 3)
    config = (lab.folder(cell) / "config.py").read_text()
    assert "freeze=True" in config
    assert "pretrained.safetensors" in config
    assert "timestep=90" in config
    labelled = (lab.folder(cell) / "labelled.txt").read_text().split()
    assert [int(name[-8:]) - 1 for name in labelled] == tasks.choose_scenes(12, 0.25, 1)
    log = next(lab.folder(cell).rglob("run/*/*.log")).read_text()
    assert "seed=1" in config or "seed: 1" in log


def test_mask_rcnn_cell(lab):
    if importlib.util.find_spec("detectron2") is None:
        pytest.skip("detectron2 is not installed")
    cell = Cell("maskrcnn", "random", 0.25, 1)
    found = lab.measure(cell)
    assert 0 <= found["score"] <= 100
    assert (found["train_images"], found["val_images"]) == (3, 3)
    assert set(found["metrics"]) == {"box AP50", "mask AP", "mask AP50"}
    config = (lab.folder(cell) / "run" / "config.yaml").read_text()
    assert "random-1.safetensors" in config
    assert "FREEZE: true" in config
    assert "TIMESTEP: 120" in config


def test_coco_subset_keeps_whole_scenes_and_all_of_validation(lab, tmp_path):
    source = lab.scenes() / "coco"
    cell = Cell("maskrcnn", "random", 0.25, 1)
    assert tasks.write_coco_subset(source, tmp_path / "coco", cell) == 3
    name = "annotations/instances_train2017.json"
    whole, part = (json.loads((root / name).read_text()) for root in (source, tmp_path / "coco"))
    chosen = [image["id"] - 1 for image in part["images"]]
    assert chosen == tasks.choose_scenes(12, 0.25, 1)
    kept = {image["id"] for image in part["images"]}
    assert part["annotations"] == [a for a in whole["annotations"] if a["image_id"] in kept]
    name = "annotations/instances_val2017.json"
    assert (tmp_path / "coco" / name).read_text() == (source / name).read_text()


def test_a_tool_that_fails_is_named_with_its_log(lab):
    recipe = dataclasses.replace(SMALL, maskrcnn="no_such_config.yaml")
    broken = Lab(lab.out, TINY, lab.checkpoint, recipe, Processes())
    cell = Cell("maskrcnn", "pretrained", 1.0, 2)
    start = time.perf_counter()
    with pytest.raises(ToolError, match=r"(?s)train_net.py ended with status 1; .*log.txt ends"):
        broken.measure(cell)
    assert time.perf_counter() - start < 60
