"""`tools/train_net.py`, `tools/lazyconfig_train_net.py`, `tools/visualize_predictions.py`."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.logger import setup_logger
from PIL import Image

from diffbackbone.detectron2 import (
    SAMPLE_ROOT,
    datasets,
    engine,
    launch,
    lazyconfig_train_net,
    load_yaml,
    register_sample_data,
    train_net,
    visualize,
)
from diffbackbone.sample_data import make_sample_data

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
CONFIGS = ROOT / "configs" / "detectron2"
YAML = sorted(path.name for path in CONFIGS.glob("*.yaml"))
PYTHON = sorted(path.name for path in CONFIGS.glob("*.py"))
TWINS = ["mask_rcnn_gd_t75_b24", "mask_rcnn_difffeed", "mask_rcnn_gd_t90_multi"]
SAMPLE = "mask_rcnn_gd_sample"
DIFFFEED = "mask_rcnn_difffeed_sample"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few scenes, registered under the sample data's names."""
    root = tmp_path_factory.mktemp("data") / "sample"
    make_sample_data(root, train=12, val=3, unlabelled=0)
    with registered(root):
        yield root


@contextlib.contextmanager
def registered(root: Path):
    before = os.environ.get(SAMPLE_ROOT)
    os.environ[SAMPLE_ROOT] = str(root)
    register_sample_data()
    yield
    del os.environ[SAMPLE_ROOT]
    if before is not None:
        os.environ[SAMPLE_ROOT] = before
    register_sample_data()


@pytest.fixture(autouse=True)
def _as_it_was():
    """Detectron2's `default_setup` adds log handlers and sets what holds for the process."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "diffbackbone")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    benchmark, state = torch.backends.cudnn.benchmark, torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in processes of their own: results agree to the last bit
    yield
    torch.set_num_threads(threads)
    setup_logger.cache_clear()
    for logger, (handlers, level, propagate) in zip(loggers, before):
        for handler in set(logger.handlers).difference(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    torch.backends.cudnn.benchmark = benchmark
    torch.set_rng_state(state)


@pytest.fixture
def small(data, tmp_path):
    """Options that make the sample config train within a second."""
    return options(tmp_path / "work")


def options(folder: Path, **changes) -> list[str]:
    keys = {
        "OUTPUT_DIR": folder,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": "(4,)",
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.IMS_PER_BATCH": 2,
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "INPUT.MIN_SIZE_TEST": 64,
        "TEST.EVAL_PERIOD": 0,
        **changes,
    }
    return [str(word) for pair in keys.items() for word in pair]


@pytest.fixture
def refused(capsys):
    """Run a command that is to end with an error message; return the message."""

    def run(*arguments, tool=train_net) -> str:
        with pytest.raises(SystemExit) as exit_:
            tool.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        message = str(exit_.value.code)
        return printed.err if message == "2" else message  # argparse's

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Building a model is an error: what is wrong must be found before."""

    def build(*args, **kwargs):
        pytest.fail("a model was built")

    monkeypatch.setattr(engine, "build_model", build)
    monkeypatch.setattr(lazyconfig_train_net, "instantiate", build)


def start(*command, code=0) -> str:
    """Run a command in a process of its own."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == code, result.stdout[-4000:]
    return result.stdout


def read_results(folder: Path) -> dict[str, float]:
    """The last evaluation of a training run."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [line for line in lines if "bbox/AP" in line][-1]


def assert_same(a, b, where="") -> None:
    """Two checkpoints hold the same, to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_resumes(main, command: Sequence[str], whole: Path, folder: Path) -> None:
    """A copy of a run that goes back to iteration 4 of 6 ends as the run did, to the last bit."""
    (folder / "model_final.pth").unlink()
    (folder / "model_0000005.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    (folder / "model_0000000.pth").touch()  # of an earlier run: counts as kept, too
    main(["--resume", *command])
    a, b = (torch.load(p / "model_final.pth", weights_only=True) for p in (whole, folder))
    assert_same(a, b)
    assert predictions(folder) == predictions(whole)
    logs = [(p / "metrics.json").read_text() for p in (whole, folder)]
    assert len(logs[1].splitlines()) > len(logs[0].splitlines())
    names = [[path.name for path in sorted(p.glob("*.pth"))] for p in (whole, folder)]
    assert names[0] == names[1]


def predictions(folder: Path, kind: str = "inference") -> list:
    """What the last evaluation wrote."""
    found = json.loads((folder / kind / "coco_instances_results.json").read_text())
    assert len(found) > 20
    return found


@pytest.mark.parametrize("name", YAML)
def test_yaml_configs_load(name):
    cfg = load_yaml(str(CONFIGS / name))
    assert cfg.is_frozen()
    assert f"work_dirs/{Path(name).stem}" == cfg.OUTPUT_DIR
    assert cfg.VERSION == 2


@pytest.mark.parametrize("name", PYTHON)
def test_python_configs_load(name):
    if "vitdet" in name:
        pytest.importorskip("timm", reason="timm is not installed")
    cfg = lazyconfig_train_net.load_lazy(str(CONFIGS / name))
    assert cfg.train.output_dir.startswith(f"work_dirs/{Path(name).stem}")


def settings(model: torch.nn.Module) -> dict:
    """What a model's modules, and Detectron2's own objects in them, are set to."""

    def plain(value):
        if isinstance(value, torch.nn.Module):
            return type(value).__name__
        if isinstance(value, torch.Tensor):
            return value.shape
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items()}
        if hasattr(value, "__iter__") and not isinstance(value, str):
            return [plain(x) for x in value]  # whatever kind of list
        return value

    found = {}
    for name, module in model.named_modules():
        owners = {name: module}
        for key, value in vars(module).items():
            if type(value).__module__.startswith("detectron2") and hasattr(value, "__dict__"):
                owners[f"{name}.{key}"] = value
        for owner, holder in owners.items():
            for key, value in vars(holder).items():
                if isinstance(value, (int, float, str)) or hasattr(value, "__getitem__"):
                    found[f"{owner}.{key}"] = plain(value)
        for key, value in module.named_buffers(recurse=False):
            found[f"{name}.{key}"] = value.tolist()
    # a weight of 1 that is written out, and one that isn't
    return {key: value for key, value in found.items() if not key.endswith(".loss_weight")}


@pytest.mark.parametrize("name", TWINS)
def test_python_twins_build_the_yaml_configs_model(name):
    keys = ["MODEL.DIFFUSION.UNET", "tiny", "MODEL.DIFFUSION.CHECKPOINT", ""]
    yaml = load_yaml(str(CONFIGS / f"{name}.yaml"), keys)
    python = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    net = python.model.backbone.get("net") or python.model.backbone.bottom_up
    net.update(unet="tiny", checkpoint=None)
    a, b = build_model(yaml), instantiate(python.model)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (a, b)]
    assert shapes[0] == shapes[1]
    assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]
    a_settings, b_settings = settings(a), settings(b)
    assert len(a_settings) > 300
    assert a_settings == b_settings


@pytest.mark.parametrize("name", TWINS)
def test_python_twins_train_as_the_yaml_configs_do(name):
    cfg = load_yaml(str(CONFIGS / f"{name}.yaml"))
    twin = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    node, solver, test = cfg.MODEL.DIFFUSION, cfg.SOLVER, cfg.DATASETS.TEST[0]
    net = twin.model.backbone.get("net") or twin.model.backbone.bottom_up
    optimizer, train, loader = twin.optimizer, twin.train, twin.dataloader.train
    assert optimizer._target_ is torch.optim.AdamW
    assert solver.OPTIMIZER == "ADAMW"
    assert not solver.CLIP_GRADIENTS.ENABLED
    amp = solver.AMP.ENABLED and torch.cuda.is_available()
    for given, wanted in {
        (net.unet, node.UNET),
        (net.checkpoint, node.CHECKPOINT),
        (net.timestep, node.TIMESTEP),
        (tuple(net.blocks), node.BLOCKS),
        (net.feedback, node.FEEDBACK or None),
        (net.activation_checkpointing, node.ACTIVATION_CHECKPOINTING),
        (optimizer.lr, solver.BASE_LR),
        (tuple(optimizer.betas), solver.BETAS),
        (optimizer.params.base_lr, solver.BASE_LR),
        (optimizer.weight_decay, solver.WEIGHT_DECAY),
        (optimizer.params.weight_decay_norm, solver.WEIGHT_DECAY_NORM),
        (optimizer.params.layer_decay_rate, solver.LAYER_DECAY_RATE),
        (train.max_iter, solver.MAX_ITER),
        (train.eval_period, cfg.TEST.EVAL_PERIOD),
        (train.checkpointer.period, solver.CHECKPOINT_PERIOD),
        (train.checkpointer.max_to_keep, solver.CHECKPOINT_KEEP),
        (train.amp.enabled, amp),
        (train.amp.dtype, solver.AMP.DTYPE),
        (loader.dataset.names, cfg.DATASETS.TRAIN[0]),
        (twin.dataloader.test.dataset.names, test),
        (loader.total_batch_size, solver.IMS_PER_BATCH),
        (loader.num_workers, cfg.DATALOADER.NUM_WORKERS),
    }:
        assert given == wanted
    a, b = datasets.build_train_mapper(cfg), instantiate(loader.mapper)
    assert cfg.INPUT.LSJ.ENABLED
    for key in ("is_train", "image_format", "use_instance_mask", "recompute_boxes"):
        assert getattr(a, key) == getattr(b, key), key
    assert str(a.augmentations) == str(b.augmentations)
    a, b = DatasetMapper(cfg, is_train=False), instantiate(twin.dataloader.test.mapper)
    assert a.image_format == b.image_format
    (resize,), (twin_resize,) = a.augmentations.augs, b.augmentations.augs
    assert {resize.max_size, twin_resize.max_size} == {cfg.INPUT.MAX_SIZE_TEST}
    assert {*resize.short_edge_length, *twin_resize.short_edge_length} == {cfg.INPUT.MIN_SIZE_TEST}


def test_learning_rates_of_the_twins_agree_all_the_way():
    cfg = load_yaml(str(CONFIGS / "mask_rcnn_gd_t75_b24.yaml"))
    twin = LazyConfig.load(str(CONFIGS / "mask_rcnn_gd_t75_b24.py"))
    multiplier = instantiate(twin.lr_multiplier)
    weight = torch.nn.Parameter(torch.zeros(1))
    scheduler = engine.Trainer.build_lr_scheduler(cfg, torch.optim.SGD([weight], 1.0))
    last = cfg.SOLVER.MAX_ITER
    for iteration in (0, 1, 100, 249, 250, 1000, 262221, 262222, 284073, 284074, last - 1):
        scheduler.last_epoch = iteration
        (rate,) = scheduler.get_lr()
        assert multiplier(iteration / last) == pytest.approx(rate, rel=1e-3), iteration


def test_configs_are_found_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = []

    def run(*words):
        launch.run_training(words, (".yaml",), "", seen.append, lambda args: None)
        return seen[-1].config_file

    assert run("--config", SAMPLE) == run("--config-file", f"{SAMPLE}.yaml")
    assert seen[-1].config_file == str(CONFIGS / f"{SAMPLE}.yaml")
    Path(f"{SAMPLE}.yaml").write_text("VERSION: 2\n")
    assert run("--config", f"{SAMPLE}.yaml") == f"{SAMPLE}.yaml"
    run("--config", SAMPLE, "--num-gpus", "1", "--resume", "SOLVER.BASE_LR", "1e-3")
    assert (seen[-1].resume, seen[-1].eval_only) == (True, False)
    assert seen[-1].opts == ["SOLVER.BASE_LR", "1e-3"]


def test_unknown_configs(refused, tmp_path):
    assert YAML[0] in refused("--config", "mask_rcnn")
    assert PYTHON[0] in refused("--config", "mask_rcnn", tool=lazyconfig_train_net)
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"a: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]\n")
    assert "YAML configs" in refused("--config", evil, tool=lazyconfig_train_net)
    assert "Python configs" in refused("--config", CONFIGS / PYTHON[0])
    (tmp_path / "base.yaml").write_text("_BASE_: evil.yaml\nVERSION: 2\n")
    for path in (evil, tmp_path / "base.yaml"):
        for tool in (train_net, visualize):
            assert str(path) in refused("--config", path, tool=tool)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["SOLVER.MAXITER", "3"], "SOLVER.MAXITER"),
        (["MODEL.DIFFUSION.TIMESTP", "3"], "MODEL.DIFFUSION.TIMESTP"),
        (["SOLVER.MAX_ITER"], "odd length"),
        (["SOLVER.MAX_ITER", "3", "--resume"], "odd length"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["SOLVER", "3"], "config key: SOLVER"),
    ],
)
def test_wrong_options(refused, arguments, text):
    assert text in refused("--config", SAMPLE, *arguments)


@pytest.mark.parametrize(
    "content",
    ["MODEL: [1, {\n", "", "- MODEL\n", "_BASE_: nowhere.yaml\n", "_BASE_: config.yaml\n",
     "MODEL:\n  DIFFUSION:\n    TIMESTP: 3\nVERSION: 2\n", "MODEL: 3\nVERSION: 2\n"],
)  # fmt: skip
def test_broken_yaml(tmp_path, content):
    config = tmp_path / "config.yaml"
    config.write_text(content)
    with pytest.raises(ValueError, match=str(config)):
        load_yaml(str(config))


def test_unet_options():
    key = "MODEL.DIFFUSION.UNET_OPTIONS"
    options = ["--", f"{key}.num_res_blocks", "3", "SOLVER.MAX_ITER", "7"]
    cfg = load_yaml(str(CONFIGS / f"{SAMPLE}.yaml"), [*options, f"{key}.channel_mult", "(1, 2)"])
    assert cfg.MODEL.DIFFUSION.UNET_OPTIONS == {"num_res_blocks": 3, "channel_mult": (1, 2)}
    assert cfg.SOLVER.MAX_ITER == 7


@pytest.mark.parametrize("tool", [train_net, lazyconfig_train_net])
def test_missing_coco(refused, monkeypatch, tmp_path, no_model, tool):
    monkeypatch.chdir(tmp_path)
    if os.path.exists(MetadataCatalog.get("coco_2017_val").json_file):
        pytest.skip("COCO is there")
    message = refused("--config", "mask_rcnn_gd_t75_b24", tool=tool)
    assert "instances_train2017.json" in message
    assert "instances_val2017.json" in message
    assert "DETECTRON2_DATASETS" in message
    message = refused("--config", "mask_rcnn_gd_t75_b24", "--eval-only", tool=tool)
    assert "coco_2017_val" in message
    assert "coco_2017_train" not in message  # not needed


def test_missing_weights_and_data(refused, small, no_model, tmp_path):
    sample, evaluate = ["--config", SAMPLE], ["--config", SAMPLE, "--eval-only"]
    (tmp_path / "other.pth").touch()
    missing = tmp_path / "model.pth"
    message = refused(*sample, *small, "MODEL.WEIGHTS", missing)
    assert str(missing) in message
    assert "other.pth" in message
    assert "MODEL.WEIGHTS" in refused(*evaluate, *small)
    assert "MODEL.WEIGHTS" in refused(*evaluate, "--resume", *small)
    assert "coco_2018" in refused(*sample, *small, "DATASETS.TRAIN", "('coco_2018',)")
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


def test_no_space_left_in_training(small, tmp_path, monkeypatch, capsys):
    save, saved = torch.save, []

    def save_once(content, path):
        if saved:
            Path(path).write_bytes(b"PK\3\4 half")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        save(content, path)

    monkeypatch.setattr(torch, "save", save_once)
    changes = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "3", "DATASETS.TEST", "()"]
    with pytest.raises(SystemExit) as exit_:
        train_net.main(["--config", SAMPLE, *small, *changes])
    assert "No space left on device" in exit_.value.code
    folder = tmp_path / "work"
    assert (folder / "last_checkpoint").read_text() == "model_0000000.pth"
    assert [path.name for path in folder.glob("*.pth")] == ["model_0000000.pth"]
    assert not list(folder.glob(".*"))
    monkeypatch.setattr(torch, "save", save)
    train_net.main(["--config", SAMPLE, "--resume", *small, *changes])
    assert "Starting training from iteration 1" in capsys.readouterr().out
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


SHORT = {
    "SOLVER.MAX_ITER": 6,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SOLVER.CHECKPOINT_KEEP": 2,
    "MODEL.DIFFUSION.CHECKPOINT": "",
    "MODEL.DIFFUSION.UNET_OPTIONS.channel_mult": "(1, 1, 1, 1, 2, 2)",
    "SEED": 7,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01,  # it learned too little for more
    "INPUT.MIN_SIZE_TRAIN": "(48, 64)",  # drawn anew for each image, as are flips
    "INPUT.RANDOM_FLIP": "horizontal",
    "DATALOADER.NUM_WORKERS": 1,
}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a whole run of six iterations in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    start("tools/train_net.py", "--config", DIFFFEED, *options(folder, **SHORT))
    return folder


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


LAZY = """
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec

parts = ("dataloader", "lr_multiplier", "optimizer", "train")
dataloader, lr_multiplier, optimizer, train = LazyConfig.load("{base}/coco_10ep.py", parts)
model = LazyConfig.load("{base}/mask_rcnn_gd.py", "model")

unet = dict(preset="tiny", channel_mult=[1, 1, 1, 1, 2, 2])
model.backbone.net.update(unet=unet, checkpoint=None)
model.backbone.out_channels = 32
model.proposal_generator.head.in_channels = 32
heads = model.roi_heads
heads.num_classes = 10
box, mask = ShapeSpec(channels=32, height=7, width=7), ShapeSpec(channels=32, height=14, width=14)
heads.box_head.update(input_shape=box, conv_dims=[32], fc_dims=[64])
heads.box_predictor.update(input_shape=ShapeSpec(channels=64), test_score_thresh=0.01)
heads.mask_head.update(input_shape=mask, conv_dims=[32, 32])

dataloader.train.update(total_batch_size=2, num_workers=1)
dataloader.train.dataset.names = "diffbackbone_sample_train"
dataloader.train.mapper.augmentations.size = 64
dataloader.test.num_workers = 0
dataloader.test.dataset.names = "diffbackbone_sample_val"
dataloader.test.mapper.augmentations[0].short_edge_length = 64
dataloader.evaluator.output_dir = "{folder}/inference"

train.update(output_dir="{folder}", max_iter=6, eval_period=0, log_period=1, device="cpu")
train.checkpointer.update(period=2, max_to_keep=3)
train.amp.enabled = False
optimizer.lr = 1e-3
lr_multiplier.warmup_length = 0.3
lr_multiplier.scheduler.update(values=[1.0, 0.1], milestones=[4], num_updates=6)
"""


def write_lazy(path: Path, folder: Path) -> Path:
    path.write_text(LAZY.format(base=CONFIGS / "_base_", folder=folder))
    return path


@pytest.fixture
def python_config(data, tmp_path):
    return write_lazy(tmp_path / "tiny.py", tmp_path / "work")


@pytest.fixture(scope="module")
def lazily_trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lazily")
    config = write_lazy(folder / "tiny.py", folder / "work")
    start("tools/lazyconfig_train_net.py", "--config", config)
    return folder / "work"


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


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("train.max_itr=3", "train.max_itr"),
        ("trin.max_iter=3", "trin.max_iter"),
        ("train.max_iter.x=3", "train.max_iter.x"),
        ("train.init_checkpoint=gone.pth", "gone.pth"),
        ("dataloader.train.dataset.names=coco", "coco: not registered"),
        ("model.roi_heads.num_classes=80", "has 10 thing_classes"),
        ("dataloader.test.mapper.augmentations.1.max_size=3", "'1'"),
    ],
)
def test_wrong_options_of_python_configs(refused, python_config, no_model, option, text):
    assert text in refused("--config", python_config, option, tool=lazyconfig_train_net)


def test_python_config_without_the_levels(refused, python_config):
    command = ["--config", python_config, "model.backbone.net.blocks=[21]"]
    assert "proposal_generator.in_features" in refused(*command, tool=lazyconfig_train_net)


def test_python_options_take_effect(python_config):
    changes = ["train.max_iter=3", "dataloader.test.mapper.augmentations.0.max_size=99", "--"]
    changes += ["model.backbone.net.feedback={24: 14}", "model.backbone.net.noise=none"]
    cfg = lazyconfig_train_net.load_lazy(str(python_config), changes)
    assert cfg.train.max_iter == 3
    assert cfg.dataloader.test.mapper.augmentations[0].max_size == 99
    assert cfg.model.backbone.net.feedback == {24: 14}
    assert cfg.model.backbone.net.noise == "none"


def test_python_evaluation_needs_fitting_weights(refused, trained, python_config):
    command = ["--config", python_config, "--eval-only"]
    assert "train.init_checkpoint" in refused(*command, tool=lazyconfig_train_net)
    command.append(f"train.init_checkpoint={trained / 'model_final.pth'}")
    assert "does not fit" in refused(*command, tool=lazyconfig_train_net)


def test_picture(trained, tmp_path):
    folder = trained
    picture = tmp_path / "pictures" / "picture.png"
    command = ["--config", DIFFFEED, "--images", "9", "--score", "0.01", "--out", picture]
    start("tools/visualize_predictions.py", *command, *options(folder, **SHORT))
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        height = image.height
    weights = ["--weights", str(folder / "model_final.pth")]
    command = [*map(str, command), *weights, *options(tmp_path / "gone", **SHORT)]
    visualize.main(command)  # of these weights there are no curves
    with Image.open(picture) as image:
        assert image.height < height


def test_predictions_and_truth_are_drawn(trained):
    detector = visualize.read_config(DIFFFEED, options(trained, **SHORT))
    weights = visualize.choose_weights(detector, [])
    assert weights == str(trained / "model_final.pth")
    found = visualize.predict(detector, weights, 9, 0.01)
    empty = visualize.predict(detector, weights, 9, 1.0)
    records = DatasetCatalog.get("diffbackbone_sample_val")
    assert len(found) == len(empty) == len(records)
    for record, (truth, drawn), (same, bare) in zip(records, found, empty):
        assert (truth == same).all()
        with Image.open(record["file_name"]) as image:
            size = bare.shape[1::-1]
            photo = np.asarray(image.resize(size, Image.Resampling.NEAREST), dtype=float)
        assert max(size) == 320
        distances = [np.abs(panel - photo).mean() for panel in (bare, truth, drawn)]
        assert distances[0] < 4
        assert min(distances[1:]) > distances[0] + 4


def test_weights_of_a_picture(lazily_trained, tmp_path, refused):
    folder = lazily_trained
    config = write_lazy(tmp_path / "tiny.py", folder)
    config.write_text(config.read_text() + f"\ntrain.init_checkpoint = '{tmp_path}/gone.pth'\n")
    detector = visualize.read_config(str(config), [])
    assert visualize.choose_weights(detector, []) == str(folder / "model_final.pth")
    option = "train.init_checkpoint=x.pth"
    detector = visualize.read_config(str(config), [option])
    assert visualize.choose_weights(detector, [option]) == "x.pth"
    assert "gone.pth" in refused("--config", config, "--weights", tmp_path / "gone.pth",
                                 tool=visualize)  # fmt: skip
    out = tmp_path / "picture.png"
    visualize.main(["--config", str(config), "--images", "1", "--out", str(out)])
    assert out.exists()


def test_curves_of_a_resumed_run(tmp_path):
    assert visualize.read_curves(tmp_path) == {}
    lines = [
        '{"iteration": 19, "total_loss": 2.0}',
        '{"iteration": 19, "bbox/AP50": 10.0, "segm/AP50": 5.0}',
        '{"iteration": 39, "total_loss": 9.0}',
        '{"iteration": 39, "total_loss": 1.0}',
        '{"iteration": 59, "tot',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    curves = visualize.read_curves(tmp_path)
    assert curves == {
        "total_loss": [(20, 2.0), (40, 1.0)],
        "bbox/AP50": [(20, 10.0)],
        "segm/AP50": [(20, 5.0)],
    }
    panel = np.zeros((320, 320, 3), np.uint8)
    figure = visualize.draw([(panel, panel)] * 3, curves)
    drawn = {
        line.get_label(): line.get_xydata().tolist() for ax in figure.axes for line in ax.lines
    }
    assert [*map(tuple, drawn["boxes"])] == [(20, 10.0)]
    assert [*map(tuple, drawn["masks"])] == [(20, 5.0)]
    assert len(figure.axes) == 6 + 2
