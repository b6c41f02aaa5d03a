"""`tools/train_net.py` and `tools/lazyconfig_train_net.py` from data to evaluation."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2_runs import (
    DIFFFEED,
    SAMPLE,
    SHORT,
    assert_resumes,
    options,
    predictions,
    read_results,
    registered,
    start,
    write_lazy,
)

from diffbackbone.detectron2 import datasets, launch, lazyconfig_train_net, train_net

pytest_plugins = ["detectron2_runs"]
pytestmark = pytest.mark.usefixtures("as_it_was")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a whole run of six iterations in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    start("tools/train_net.py", "--config", DIFFFEED, *options(folder, **SHORT))
    return folder


@pytest.fixture(scope="module")
def lazily_trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lazily")
    config = write_lazy(folder / "tiny.py", folder / "work")
    start("tools/lazyconfig_train_net.py", "--config", config)
    return folder / "work"


def test_missing_weights_and_data(refused, small, no_model, tmp_path):
    sample, evaluate = ["--config", SAMPLE], ["--config", SAMPLE, "--eval-only"]
    (tmp_path / "other.pth").touch()
    missing = tmp_path / "model.pth"
    message = refused(*sample, *small, "MODEL.WEIGHTS", missing)
    assert str(missing) in message
    assert "other.pth" in message
    unknown = [*small, "DATASETS.TRAIN", "('coco_2018',)"]
    assert "coco_2018: not registered" in refused(*sample, *unknown)
    assert "MODEL.WEIGHTS" in refused(*evaluate, *unknown)  # training data are not needed
    assert "MODEL.WEIGHTS" in refused(*evaluate, "--resume", *small)
    missing.touch()
    small += ["MODEL.WEIGHTS", missing]
    assert "evaluate" in refused(*evaluate, *small, "DATASETS.TEST", "()")
    assert "train" in refused(*sample, *small, "DATASETS.TRAIN", "()")
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", "80"]
    assert "diffbackbone_sample_val' has 10" in refused(*evaluate, *small, *classes)
    assert "diffbackbone_sample_train' has 10" in refused(*sample, *small, *classes)


@pytest.mark.parametrize("tool", [train_net, lazyconfig_train_net])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_damaged_annotations(refused, data, small, python_config, tmp_path, tool, split, damage):
    root = shutil.copytree(data, tmp_path / "changed")
    path = root / "coco" / "annotations" / f"instances_{split}2017.json"
    content = json.dumps({**json.loads(path.read_text()), "images": [], "annotations": []})
    path.write_text(content if damage == "empty" else content[:1000])
    command = ["--config", SAMPLE, *small] if tool is train_net else ["--config", python_config]
    with registered(root):
        message = refused(*command, tool=tool)
    assert f"diffbackbone_sample_{split}" in message
    assert str(path) in message


def test_damaged_images(refused, data, small, tmp_path):
    root = shutil.copytree(data, tmp_path / "changed")
    for workers in ("0", "1"):
        for path in (root / "coco" / "train2017").iterdir():
            path.write_bytes(path.read_bytes()[:-200] if workers == "0" else b"no image")
        with registered(root):
            message = refused("--config", SAMPLE, *small, "DATALOADER.NUM_WORKERS", workers)
        assert message.startswith(f"error: training image {root}")
        assert "Traceback" not in message


def test_lost_workers_and_losses(refused, small, monkeypatch):
    """As if memory ran out, and as if training diverged."""
    get = datasets.SeededStream.__getitem__

    def die(stream, key):
        if torch.utils.data.get_worker_info() and key[0] >= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(stream, key)

    with monkeypatch.context() as patch:
        patch.setattr(datasets.SeededStream, "__getitem__", die)
        message = refused("--config", SAMPLE, *small, "DATALOADER.NUM_WORKERS", "1")
    assert "/dev/shm" in message
    diverging = ["SOLVER.BASE_LR", "1e9", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "6"]
    message = refused("--config", SAMPLE, *small, *diverging)
    assert "a lower learning rate" in message


def test_tracebacks(small, monkeypatch):
    for error in (KeyError("x"), TypeError("no len()"), AssertionError(), RuntimeError("x")):
        assert launch.format_user_error(error) is None
    assert "No space left" in launch.format_user_error(OSError(errno.ENOSPC, "No space left"))
    monkeypatch.setenv("DIFFBACKBONE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="MAXITER"):
        train_net.main(["--config", SAMPLE, *small, "SOLVER.MAXITER", "3"])


def test_training_run(trained):
    assert (trained / "last_checkpoint").read_text() == "model_final.pth"
    names = [f"model_000000{i}.pth" for i in (3, 5)]
    assert sorted(path.name for path in trained.glob("*.pth")) == [*names, "model_final.pth"]
    results = read_results(trained)
    assert {"bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"} <= results.keys()
    lines = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    (last,) = (line for line in lines if "total_loss" in line)
    assert last["iteration"] == 5
    losses = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    assert np.isfinite([last[name] for name in losses]).all()
    content = torch.load(trained / "model_final.pth", weights_only=True)
    assert content["iteration"] == 5
    assert {"model", "trainer"} <= content.keys()


def test_evaluation_alone_finds_what_training_found(trained, tmp_path, capsys):
    keys = {**SHORT, "MODEL.WEIGHTS": trained / "model_final.pth"}
    train_net.main(["--config", DIFFFEED, "--eval-only", *options(tmp_path, **keys)])
    assert "Starting training" not in capsys.readouterr().out
    assert predictions(tmp_path) == predictions(trained)


AUGMENTED = {
    "TEST.AUG.ENABLED": True,
    "TEST.AUG.MIN_SIZES": "(48, 72)",
    "TEST.AUG.MAX_SIZE": 96,
    "TEST.EXPECTED_RESULTS": "[['bbox', 'AP', 50, 50], ['segm_TTA', 'AP', 50, 50]]",
}


def test_augmented_evaluation(trained, tmp_path, capsys, monkeypatch):
    """After training and alone, beside the plain one, over all sizes and flips."""
    keys = {**SHORT, **AUGMENTED, "SOLVER.MAX_ITER": 7}
    folder = shutil.copytree(trained, tmp_path / "work")
    train_net.main(["--config", DIFFFEED, "--resume", *options(folder, **keys)])
    kinds = {f"{kind}/AP" for kind in ("bbox", "bbox_TTA", "segm", "segm_TTA")}
    assert kinds <= read_results(folder).keys()

    preprocess, inputs = GeneralizedRCNN.preprocess_image, []

    def record(self, batched_inputs):
        inputs.extend(x["image"] for x in batched_inputs)
        return preprocess(self, batched_inputs)

    monkeypatch.setattr(GeneralizedRCNN, "preprocess_image", record)
    keys["MODEL.WEIGHTS"] = folder / "model_final.pth"
    train_net.main(["--config", DIFFFEED, "--eval-only", *options(tmp_path, **keys)])
    assert "Results verification passed" in capsys.readouterr().out
    sizes = [min(image.shape[1:]) for image in inputs]
    assert [sizes.count(size) for size in (48, 64, 72)] == [12, 3, 12]  # 64 is the plain one
    first = [image for image, size in zip(inputs, sizes) if size == 48][:2]
    assert torch.equal(first[0], first[1].flip(2))
    for kind in ("inference", "inference_TTA"):
        assert predictions(tmp_path, kind) == predictions(folder, kind)
    assert predictions(tmp_path) != predictions(tmp_path, "inference_TTA")


TTA = ["TEST.AUG.ENABLED", "True"]


@pytest.mark.parametrize("arguments", [[], ["--eval-only"]])
@pytest.mark.parametrize(
    ("config", "keys", "text"),
    [
        ("panoptic_fpn_gd", TTA, "PanopticFPN"),
        ("retinanet_gd", TTA, "RetinaNet"),
        (SAMPLE, [*TTA, "MODEL.KEYPOINT_ON", "True"], "MODEL.KEYPOINT_ON True"),
        (SAMPLE, [*TTA, "TEST.AUG.MIN_SIZES", "()"], "MIN_SIZES ()"),
        (SAMPLE, ["MODEL.LOAD_PROPOSALS", "True"], "MODEL.LOAD_PROPOSALS True"),
        (DIFFFEED, ["TEST.PRECISE_BN.ENABLED", "True"], "MODEL.DIFFUSION.PADDING"),
    ],
)
def test_what_is_not_supported(refused, small, no_model, arguments, config, keys, text):
    assert text in refused("--config", config, *arguments, *small, *keys)


def test_datasets_without_evaluator(refused, small, no_model, monkeypatch):
    meta = MetadataCatalog.get("diffbackbone_sample_val")
    monkeypatch.setitem(meta.__dict__, "evaluator_type", "mine")
    assert "'mine'" in refused("--config", SAMPLE, *small)


def test_resumed_runs_end_as_unbroken_ones(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "work")
    command = ["--config", DIFFFEED, *options(folder, **SHORT)]
    assert_resumes(train_net.main, command, trained, folder)
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    command += ["MODEL.WEIGHTS", "gone.pth"]  # not read
    train_net.main(["--eval-only", "--resume", *command])
    assert predictions(folder) != predictions(trained)


def test_checkpoint_of_another_model(refused, trained, tmp_path):
    keys = {k: v for k, v in SHORT.items() if k.startswith("MODEL") or k == "SEED"}
    keys["MODEL.WEIGHTS"] = trained / "model_final.pth"
    other = [*options(tmp_path / "work", **keys), "MODEL.ROI_BOX_HEAD.NUM_CONV", "2"]
    message = refused("--config", DIFFFEED, "--eval-only", *other)
    assert "missing: roi_heads.box_head.conv2.weight" in message
    # to start from, a part is enough, as everywhere in Detectron2
    train_net.main(["--config", DIFFFEED, *other, "DATASETS.TEST", "()"])
    # but not to resume
    other[-1] = "1"
    message = refused("--config", DIFFFEED, "--resume", *other, "SOLVER.MAX_ITER", "5")
    assert "unexpected: roi_heads.box_head.conv2.weight" in message


TWO = ["--num-gpus", "2", "--dist-url", "auto"]
distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch has no distributed"
)


@distributed
def test_two_processes(data, tmp_path):
    keys = {"SOLVER.MAX_ITER": 3, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01}
    start("tools/train_net.py", "--config", DIFFFEED, *TWO, *options(tmp_path, **keys))
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [2]
    assert "bbox/AP" in read_results(tmp_path)
    assert len({found["image_id"] for found in predictions(tmp_path)}) == 3  # of both processes
    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert not any(key.startswith("module.") for key in content["model"])
    assert (tmp_path / "log.txt.rank1").exists()


@distributed
def test_errors_of_two_processes(data, tmp_path):
    keys = {"MODEL.DIFFUSION.TIMESTEP": 1000}
    command = ["tools/train_net.py", "--config", SAMPLE, *TWO, *options(tmp_path, **keys)]
    output = start(*command, code=1)
    assert "timestep must be" in output
    assert "Traceback" not in output


# As a script starts jobs in the background: SIGINT is ignored. The first process starts another.
ORPHAN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.argv[1] == "parent":
    subprocess.Popen([sys.executable, __file__, "child"])
else:
    from diffbackbone.detectron2.launch import end_with_parent
    end_with_parent()
    print(os.getpid(), flush=True)
time.sleep(120)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what it is done by, Linux alone has")
def test_processes_end_with_the_one_that_started_them(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    command = [sys.executable, str(script), "parent"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = Path("/proc", process.stdout.readline().strip(), "stat")
        assert child.exists()
        process.kill()
        deadline = time.monotonic() + 10
        while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_python_training_run(lazily_trained, tmp_path):
    folder = lazily_trained
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == list(range(6))
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[2:] == pytest.approx([1e-3] * 2 + [1e-4] * 2)  # of the head; the last group's
    config = write_lazy(tmp_path / "config.py", tmp_path / "work")
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    lazyconfig_train_net.main(["--config", str(config), "--eval-only", weights])
    assert predictions(tmp_path / "work") == predictions(folder)


def test_python_run_is_resumed(lazily_trained, tmp_path):
    folder = shutil.copytree(lazily_trained, tmp_path / "work")
    command = ["--config", str(write_lazy(tmp_path / "tiny.py", folder))]
    assert_resumes(lazyconfig_train_net.main, command, lazily_trained, folder)


def test_python_evaluation_needs_fitting_weights(refused, trained, python_config):
    command = ["--config", python_config, "--eval-only"]
    assert "train.init_checkpoint" in refused(*command, tool=lazyconfig_train_net)
    command.append(f"train.init_checkpoint={trained / 'model_final.pth'}")
    assert "does not fit" in refused(*command, tool=lazyconfig_train_net)
