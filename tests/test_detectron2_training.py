"""`tools/train_net.py` and `tools/lazyconfig_train_net.py` from data to evaluation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from detectron2_runs import (
    DIFFFEED,
    SAMPLE,
    SHORT,
    SMALL,
    assert_resumes,
    options,
    predictions,
    read_results,
    start,
    write_lazy,
)
from torch.multiprocessing import ProcessExitedException

from diffbackbone.detectron2 import launch, lazyconfig_train_net, train_net

pytest_plugins = ["detectron2_runs"]
pytestmark = pytest.mark.usefixtures("as_it_was")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a whole run of six iterations in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    command = ["tools/train_net.py", "--config", DIFFFEED, *options(folder / "work", **SHORT)]
    start(data, folder / "log", *command)
    return folder / "work"


@pytest.fixture(scope="module")
def lazily_trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lazily")
    config = write_lazy(folder / "tiny.py", folder / "work")
    start(data, folder / "log", "tools/lazyconfig_train_net.py", "--config", config)
    return folder / "work"


@pytest.mark.parametrize(
    ("flags", "changes", "text"),
    [
        ([], ["MODEL.WEIGHTS", "gone.pth"], "gone.pth"),
        (["--eval-only"], [], "model_final.pth not found"),
        ([], ["DATASETS.TRAIN", "('coco_2018',)"], "'coco_2018' is not registered"),
        ([], ["DATASETS.TEST", "('coco_2017_val',)"], "annotations/instances_val2017.json"),
        ([], ["MODEL.ROI_HEADS.NUM_CLASSES", "80"], "diffbackbone_sample_train' has 10"),
        ([], ["MODEL.DIFFUSION.TIMESTEP", "1000"], "timestep must be"),
    ],
)
def test_errors(refused, small, flags, changes, text):
    assert text in refused("--config", SAMPLE, *flags, *small, *changes)


@pytest.mark.parametrize("tool", [train_net, lazyconfig_train_net])
@pytest.mark.parametrize(("split", "damage"), [("train", "cut"), ("val", "empty")])
def test_damaged_annotations(refused, copied_data, small, python_config, tool, split, damage):
    path = copied_data / "coco" / "annotations" / f"instances_{split}2017.json"
    content = json.dumps({**json.loads(path.read_text()), "images": [], "annotations": []})
    path.write_text(content if damage == "empty" else content[:1000])
    command = ["--config", SAMPLE, *small] if tool is train_net else ["--config", python_config]
    message = refused(*command, tool=tool)
    assert f"diffbackbone_sample_{split} ({path})" in message


def test_damaged_images(refused, copied_data, small):
    for path in (copied_data / "coco" / "train2017").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    message = refused("--config", SAMPLE, *small, "DATALOADER.NUM_WORKERS", "1")
    assert message.startswith(f"error: training image {copied_data}")


@pytest.mark.parametrize(
    "error", [FloatingPointError("lost"), ProcessExitedException("lost", 0, 1, exit_code=1)]
)
def test_errors_with_a_message(error):
    def fail(args):
        raise error

    with pytest.raises(SystemExit, match="error: lost"):
        launch._run_process(fail, None)


def test_training_run(trained):
    assert (trained / "last_checkpoint").read_text() == "model_final.pth"
    names = [f"model_000000{i}.pth" for i in (3, 5)]
    assert sorted(path.name for path in trained.glob("*.pth")) == [*names, "model_final.pth"]
    assert {"bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"} <= read_results(trained).keys()
    lines = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    (last,) = (line for line in lines if "total_loss" in line)
    assert last["iteration"] == 5
    assert np.isfinite(last["loss_mask"])
    content = torch.load(trained / "model_final.pth", weights_only=True)
    assert content["iteration"] == 5
    assert {"model", "trainer"} <= content.keys()


AUGMENTED = {
    "TEST.AUG.ENABLED": True,
    "TEST.AUG.MIN_SIZES": "(48, 72)",
    "TEST.AUG.MAX_SIZE": 96,
    "TEST.EXPECTED_RESULTS": "[['bbox', 'AP', 50, 50], ['segm_TTA', 'AP', 50, 50]]",
}


def test_augmented_evaluation(trained, tmp_path, capsys):
    """After training and alone, beside the plain one."""
    keys = {**SHORT, **AUGMENTED, "SOLVER.MAX_ITER": 7}
    folder = shutil.copytree(trained, tmp_path / "work")
    train_net.main(["--config", DIFFFEED, "--resume", *options(folder, **keys)])
    kinds = {f"{kind}/AP" for kind in ("bbox", "bbox_TTA", "segm", "segm_TTA")}
    assert kinds <= read_results(folder).keys()
    keys["MODEL.WEIGHTS"] = folder / "model_final.pth"
    train_net.main(["--config", DIFFFEED, "--eval-only", *options(tmp_path, **keys)])
    assert "Results verification passed" in capsys.readouterr().out
    for kind in ("inference", "inference_TTA"):
        assert predictions(tmp_path, kind) == predictions(folder, kind)
    assert predictions(tmp_path) != predictions(tmp_path, "inference_TTA")


def test_augmented_evaluation_of_another_detector(small):
    """It fails before training, not at its end."""
    model = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "10"]
    model += ["MODEL.RETINANET.IN_FEATURES", "['p3', 'p4', 'p5']", "TEST.AUG.ENABLED", "True"]
    with pytest.raises(AssertionError, match="TTA is only supported on GeneralizedRCNN"):
        train_net.main(["--config", SAMPLE, *small, *model])


def test_resumed_runs_end_as_unbroken_ones(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "work")
    # neither the weights to start from nor the seed are read again
    again = {**SHORT, "SEED": 8, "MODEL.WEIGHTS": "gone.pth"}
    assert_resumes(
        train_net.main, ["--config", DIFFFEED, *options(folder, **again)], trained, folder
    )


def test_checkpoint_of_another_model(refused, trained, tmp_path):
    keys = {**SMALL, "MODEL.WEIGHTS": trained / "model_final.pth", "DATASETS.TEST": "()"}
    other = [*options(tmp_path / "work", **keys), "MODEL.ROI_BOX_HEAD.NUM_CONV", "2"]
    message = refused("--config", DIFFFEED, "--eval-only", *other)
    assert "missing: roi_heads.box_head.conv2.weight" in message
    # to start from, a part is enough, as everywhere in Detectron2
    train_net.main(["--config", DIFFFEED, *other])
    # but not to resume
    other[-1] = "1"
    message = refused("--config", DIFFFEED, "--resume", *other, "SOLVER.MAX_ITER", "5")
    assert "unexpected: roi_heads.box_head.conv2.weight" in message


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_two_processes(data, tmp_path):
    folder = tmp_path / "work"
    two = ["--num-gpus", "2", "--dist-url", "auto", *options(folder, **SMALL)]
    start(data, tmp_path / "log", "tools/train_net.py", "--config", DIFFFEED, *two)
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [1]
    assert "bbox/AP" in read_results(folder)
    assert len({found["image_id"] for found in predictions(folder)}) == 3  # of both processes
    content = torch.load(folder / "model_final.pth", weights_only=True)
    assert not any(key.startswith("module.") for key in content["model"])
    assert (folder / "log.txt.rank1").exists()


# As a script starts jobs in the background: SIGINT is ignored. The first process starts another.
ORPHAN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.argv[1] == "parent":
    subprocess.Popen([sys.executable, __file__, "child"])
else:
    from diffbackbone.cli import end_with_parent
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
    assert "model_final.pth not found" in refused(*command, tool=lazyconfig_train_net)
    command.append(f"train.init_checkpoint={trained / 'model_final.pth'}")
    assert "does not fit" in refused(*command, tool=lazyconfig_train_net)
