"""`tools/train_net.py`, `tools/lazyconfig_train_net.py`, `tools/visualize_predictions.py`."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.logger import setup_logger
from omegaconf.errors import ConfigKeyError
from PIL import Image

from diffbackbone import detectron2_engine as engine
from diffbackbone.detectron2 import SAMPLE_ROOT, register_sample_data
from diffbackbone.sample_data import make_sample_data

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
CONFIGS = ROOT / "configs" / "detectron2"
YAML = sorted(path.name for path in CONFIGS.glob("*.yaml"))
PYTHON = sorted(path.name for path in CONFIGS.glob("*.py"))
TWINS = ["mask_rcnn_gd_t75_b24", "mask_rcnn_difffeed", "mask_rcnn_gd_t90_multi"]
SAMPLE = "mask_rcnn_gd_sample"


@pytest.fixture(scope="module")
def tools():
    """The command lines as modules."""
    names = ["_common", "_detectron2", "train_net", "lazyconfig_train_net"]
    names += ["visualize_predictions"]
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(TOOLS))
    yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(TOOLS))
    for name, module in before.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module


@pytest.fixture(scope="module")
def data(tools, tmp_path_factory):
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
def refused(tools, capsys):
    """Run a command line that is to end with a clear error; the error."""

    def run(*arguments, tool="train_net", logged=False) -> str:
        with pytest.raises(SystemExit) as exit_:
            getattr(tools, tool).entry([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        message = exit_.value.code
        if message == 2:  # argparse's
            message = printed.err[printed.err.rindex("error: ") :]
        assert isinstance(message, str)
        assert message.startswith("error: ")
        assert "Traceback" not in message + printed.err
        assert logged or "Traceback" not in printed.out
        assert len(message) < 2000
        return message

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Building a model is an error: what is wrong has to be found before."""

    def build(*args, **kwargs):
        pytest.fail("a model was built")

    monkeypatch.setattr(engine, "build_model", build)
    monkeypatch.setattr("detectron2.config.instantiate", build)


ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}


def start(*command, env=None, cwd=ROOT, code=0) -> str:
    """Run a command in a process of its own."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **ONE_THREAD, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == code, result.stdout[-4000:]
    return result.stdout


# Runs a tool and writes down the losses of each iteration, which metrics.json has as running
# medians only; and halts where it is told to, so that a kill comes at a known moment.
RECORD = """
import json, os, runpy, sys, time
from detectron2.engine.train_loop import SimpleTrainer

write = SimpleTrainer.write_metrics

def record(losses, data_time, iteration, prefix=""):
    with open(os.environ["LOSSES"], "a") as file:
        values = {name: float(value) for name, value in losses.items()}
        file.write(json.dumps([iteration, values]) + chr(10))
    if iteration == int(os.environ.get("HALT", -1)):
        time.sleep(600)
    write(losses, data_time, iteration, prefix)

SimpleTrainer.write_metrics = staticmethod(record)
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def read_losses(path: Path) -> dict[int, dict[str, float]]:
    return dict(map(json.loads, path.read_text().splitlines()))


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


def assert_goes_on(recorder: Path, command: Sequence, whole: Path, folder: Path) -> None:
    """A run that stopped after two of six iterations goes on as if nothing had happened.

    Args:
        recorder: `RECORD`.
        command: The run; its second and third argument name the config.
        whole: Folder of the run that was not stopped, with its `losses.json`.
        folder: Folder of the run that was.
    """
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    killed = folder / ".partial-0.writing"
    killed.write_bytes(b"PK\3\4 half")
    os.utime(killed, (1, 1))
    losses = folder / "resumed.json"
    command = [recorder, *command[:3], "--resume", *command[3:]]
    output = start(*command, env={"LOSSES": str(losses)})
    assert "Starting training from iteration 2" in output
    expected, resumed = read_losses(whole / "losses.json"), read_losses(losses)
    assert list(resumed) == [2, 3, 4, 5]
    assert resumed == {i: expected[i] for i in resumed}
    a, b = (torch.load(p / "model_final.pth", weights_only=True) for p in (whole, folder))
    assert_same(a, b)
    assert repr(read_results(whole)) == repr(read_results(folder))  # nan is unequal to itself
    assert not list(folder.glob(".*"))
    names = [[path.name for path in sorted(p.glob("*.pth"))] for p in (whole, folder)]
    assert names[0] == names[1]  # as many are kept


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recorder") / "record.py"
    path.write_text(RECORD)
    return path


# --------------------------------------------------------------------------------------------------
# configs


@pytest.mark.parametrize("name", YAML)
def test_yaml_configs_load(tools, name):
    cfg = tools._detectron2.load_yaml(str(CONFIGS / name), [])
    assert cfg.is_frozen()
    assert f"work_dirs/{Path(name).stem}" == cfg.OUTPUT_DIR
    assert cfg.VERSION == 2


@pytest.mark.parametrize("name", PYTHON)
def test_python_configs_load(tools, name):
    if "vitdet" in name:
        pytest.importorskip("timm", reason="timm is not installed")
    arguments = types.SimpleNamespace(config_file=str(CONFIGS / name), opts=[], eval_only=False)
    cfg = tools.lazyconfig_train_net.load(arguments)
    assert cfg.train.output_dir.startswith(f"work_dirs/{Path(name).stem}")


def shrunken_twins(tools, name: str):
    keys = ["MODEL.DIFFUSION.UNET", "tiny", "MODEL.DIFFUSION.CHECKPOINT", ""]
    yaml = tools._detectron2.load_yaml(str(CONFIGS / f"{name}.yaml"), keys)
    python = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    net = python.model.backbone.get("net") or python.model.backbone.bottom_up
    net.update(unet="tiny", checkpoint=None)
    python.train.device = "cpu"
    return yaml, python


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
def test_python_twins_build_the_yaml_configs_model(tools, name):
    yaml, python = shrunken_twins(tools, name)
    a, b = build_model(yaml), instantiate(python.model)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (a, b)]
    assert shapes[0] == shapes[1]
    assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]
    a_settings, b_settings = settings(a), settings(b)
    assert len(a_settings) > 300
    assert a_settings == b_settings


@pytest.mark.parametrize("name", TWINS)
def test_python_twins_train_as_the_yaml_configs_do(tools, name):
    cfg = tools._detectron2.load_yaml(str(CONFIGS / f"{name}.yaml"), [])
    twin = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    node = cfg.MODEL.DIFFUSION
    net = twin.model.backbone.get("net") or twin.model.backbone.bottom_up
    assert (net.unet, net.checkpoint) == (node.UNET, node.CHECKPOINT)
    assert (net.timestep, tuple(net.blocks)) == (node.TIMESTEP, node.BLOCKS)
    assert net.feedback == (node.FEEDBACK or None)
    assert net.activation_checkpointing is node.ACTIVATION_CHECKPOINTING is True

    solver, optimizer = cfg.SOLVER, twin.optimizer
    assert optimizer._target_ is torch.optim.AdamW
    assert solver.OPTIMIZER == "ADAMW"
    assert (optimizer.lr, tuple(optimizer.betas)) == (solver.BASE_LR, solver.BETAS)
    assert optimizer.params.base_lr == solver.BASE_LR
    assert optimizer.weight_decay == solver.WEIGHT_DECAY
    assert optimizer.params.weight_decay_norm == solver.WEIGHT_DECAY_NORM
    assert optimizer.params.layer_decay_rate == solver.LAYER_DECAY_RATE
    assert not solver.CLIP_GRADIENTS.ENABLED

    train = twin.train
    assert train.max_iter == solver.MAX_ITER
    assert train.eval_period == cfg.TEST.EVAL_PERIOD
    assert train.checkpointer.period == solver.CHECKPOINT_PERIOD
    assert train.checkpointer.max_to_keep == solver.CHECKPOINT_KEEP
    assert train.amp.enabled is (solver.AMP.ENABLED and torch.cuda.is_available())
    assert train.amp.dtype == solver.AMP.DTYPE
    steps = twin.lr_multiplier.scheduler
    assert tuple(steps.milestones) == solver.STEPS
    decays = [solver.GAMMA**power for power in range(len(solver.STEPS) + 1)]
    assert list(steps["values"]) == pytest.approx(decays)
    assert twin.lr_multiplier.warmup_length * solver.MAX_ITER == pytest.approx(solver.WARMUP_ITERS)
    assert twin.lr_multiplier.warmup_factor == solver.WARMUP_FACTOR

    loader, lsj = twin.dataloader.train, cfg.INPUT.LSJ
    assert loader.dataset.names == cfg.DATASETS.TRAIN[0]
    assert twin.dataloader.test.dataset.names == cfg.DATASETS.TEST[0]
    assert loader.total_batch_size == solver.IMS_PER_BATCH
    assert loader.num_workers == cfg.DATALOADER.NUM_WORKERS
    a = engine.build_train_mapper(cfg)
    b = instantiate(loader.mapper)
    assert lsj.ENABLED
    for key in ("is_train", "image_format", "use_instance_mask", "recompute_boxes"):
        assert getattr(a, key) == getattr(b, key), key
    assert str(a.augmentations) == str(b.augmentations)
    a = engine.DatasetMapper(cfg, is_train=False)
    b = instantiate(twin.dataloader.test.mapper)
    assert a.image_format == b.image_format
    (resize,), (twin_resize,) = a.augmentations.augs, b.augmentations.augs
    assert {resize.max_size, twin_resize.max_size} == {cfg.INPUT.MAX_SIZE_TEST}
    assert {*resize.short_edge_length, *twin_resize.short_edge_length} == {cfg.INPUT.MIN_SIZE_TEST}


def test_learning_rates_of_the_twins_agree_all_the_way(tools):
    cfg = tools._detectron2.load_yaml(str(CONFIGS / "mask_rcnn_gd_t75_b24.yaml"), [])
    twin = LazyConfig.load(str(CONFIGS / "mask_rcnn_gd_t75_b24.py"))
    multiplier = instantiate(twin.lr_multiplier)
    weight = torch.nn.Parameter(torch.zeros(1))
    scheduler = engine.Trainer.build_lr_scheduler(cfg, torch.optim.SGD([weight], 1.0))
    last = cfg.SOLVER.MAX_ITER
    for iteration in (0, 1, 100, 249, 250, 1000, 262221, 262222, 284073, 284074, last - 1):
        scheduler.last_epoch = iteration
        (rate,) = scheduler.get_lr()
        assert multiplier(iteration / last) == pytest.approx(rate, rel=1e-3), iteration


# --------------------------------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize("flag", ["--config", "--config-file"])
@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_bare_names_are_found_in_the_checkout(tools, monkeypatch, tmp_path, flag, suffix):
    monkeypatch.chdir(tmp_path)
    arguments = [flag, SAMPLE + suffix, "--num-gpus", "2", "SOLVER.BASE_LR", "1e-3"]
    args = tools._detectron2.parse_args(arguments, ".yaml", "")
    assert args.config_file == str(CONFIGS / f"{SAMPLE}.yaml")
    assert (args.num_gpus, args.resume, args.eval_only) == (2, False, False)
    assert tools._detectron2.load_yaml(args.config_file, args.opts).SOLVER.BASE_LR == 1e-3
    args = tools._detectron2.parse_args([flag, "mask_rcnn_gd_t75_b24"], ".py", "")
    assert args.config_file == str(CONFIGS / "mask_rcnn_gd_t75_b24.py")


def test_paths_go_before_the_checkout(tools, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path(f"{SAMPLE}.yaml").write_text("VERSION: 2\n")
    for name in (f"{SAMPLE}.yaml", f"{tmp_path}/{SAMPLE}.yaml", f"./{SAMPLE}.yaml"):
        args = tools._detectron2.parse_args(["--config", name], ".yaml", "")
        assert args.config_file == name
    args = tools._detectron2.parse_args(["--config", SAMPLE], ".yaml", "")
    assert args.config_file == str(CONFIGS / f"{SAMPLE}.yaml")


def test_help(tools, capsys):
    for tool in ("train_net", "lazyconfig_train_net", "visualize_predictions"):
        with pytest.raises(SystemExit) as exit_:
            getattr(tools, tool).entry(["--help"])
        assert exit_.value.code == 0
        printed = capsys.readouterr().out
        assert "--config" in printed
        assert f"python tools/{tool}.py --config mask_rcnn_gd" in printed


def test_what_is_missing_is_said_first(tools, monkeypatch):
    from diffbackbone import compat

    def fail():
        raise ImportError("what is missing")

    monkeypatch.setattr(compat, "check_detectron2_stack", fail)
    for tool in (tools.train_net, tools.lazyconfig_train_net):
        with pytest.raises(SystemExit, match=r"^error: what is missing$"):
            tool.entry(["--help"])


def test_unknown_configs_list_what_there_is(refused):
    for name in ("mask_rcnn", "configs/detectron2/mask_rcnn", "_base_", "."):
        message = refused("--config", name)
        assert message.startswith(f"error: there is no config '{name}'")
        assert [line.strip() for line in message.splitlines()[1:]] == YAML
        lines = refused("--config", name, tool="lazyconfig_train_net").splitlines()
        assert [line.strip() for line in lines[1:]] == PYTHON
    assert YAML[0] in refused()
    assert PYTHON[0] in refused(tool="lazyconfig_train_net")


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        ("train_net", "mask_rcnn_gd_t75_b24.py"),
        ("lazyconfig_train_net", "mask_rcnn_gd_t75_b24.yaml"),
        ("lazyconfig_train_net", "evil.yml"),
    ],
)
def test_configs_of_the_other_kind_are_sent_to_the_other_tool(refused, tmp_path, tool, name):
    code = f"a: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]\n"
    (tmp_path / "evil.yml").write_text(code)
    path = tmp_path / name if name == "evil.yml" else CONFIGS / name
    for given in (path, name):
        message = refused("--config", given, tool=tool)
        assert "YAML configs go to tools/train_net.py" in message
        assert "Python configs to tools/lazyconfig_train_net.py" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--num-gpus", "0"], ["--num-gpus and --num-machines must be at least 1"]),
        (["--num-gpus", "two"], ["invalid int value: 'two'"]),
        (["--bogus"], ["unrecognized arguments: --bogus"]),
        (["--machine-rank", "1"], ["--machine-rank must be from 0 to 0", "--num-machines is 1"]),
        (["SOLVER.MAXITER", "3"], ["no config key 'SOLVER.MAXITER'", "mean SOLVER.MAX_ITER?"]),
        (["solver.max_iter", "3"], ["no config key", "did you mean SOLVER.MAX_ITER"]),
        (["SOLVER.max_iter", "3"], ["no config key", "did you mean SOLVER.MAX_ITER"]),
        (["SOLVR.MAX_ITER", "3"], ["no config key", "did you mean SOLVER.MAX_ITER?"]),
        (["MAX_ITER", "3"], ["no config key 'MAX_ITER'", "did you mean SOLVER.MAX_ITER?"]),
        (["FOO", "3"], ["no config key 'FOO'; the config has", "MODEL, INPUT, DATASETS"]),
        (["MODEL.DIFFUSION.TIMESTP", "3"], ["did you mean MODEL.DIFFUSION.TIMESTEP?"]),
        (["MODEL.DIFFUSION.XYZ", "3"], ["; MODEL.DIFFUSION has UNET, UNET_OPTIONS, CHECKPOINT"]),
        (["SOLVER.MAX_ITER"], ["options come as KEY VALUE pairs, got SOLVER.MAX_ITER"]),
        (["SOLVER.MAX_ITER", "3", "--resume"], ["flags stand before", "--resume came later"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER many:", "int", "str"]),
        (["SOLVER.BASE_LR", "(1,)"], ["SOLVER.BASE_LR (1,):", "float", "tuple"]),
        (["SOLVER", "3"], ["SOLVER is a section of keys, not a value"]),
        (["MODEL.DEVICE", "gpu"], ["'gpu' is no device, such as cuda or cpu"]),
    ],
)
def test_wrong_options(refused, arguments, texts):
    message = refused("--config", SAMPLE, *arguments)
    for text in texts:
        assert text in message


def test_dashes_and_unet_options(tools):
    load = functools.partial(tools._detectron2.load_yaml, str(CONFIGS / f"{SAMPLE}.yaml"))
    assert load(["--", "SOLVER.MAX_ITER", "7"]).SOLVER.MAX_ITER == 7
    key = "MODEL.DIFFUSION.UNET_OPTIONS"
    cfg = load([f"{key}.num_res_blocks", "3", f"{key}.channel_mult", "(1, 2)"])
    assert cfg.MODEL.DIFFUSION.UNET_OPTIONS == {"num_res_blocks": 3, "channel_mult": (1, 2)}


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("MODEL: [1, {\n", ["is no plain YAML", "line 2"]),
        ("MODEL:\n\tMASK_ON: True\n", ["is no plain YAML", "line 2"]),
        ("", ["is no config of keys and values"]),
        ("- MODEL\n", ["is no config of keys and values"]),
        ("hello\n", ["is no config of keys and values"]),
        ("1: 2\nVERSION: 2\n", ["is no config of keys and values"]),
        ("_BASE_: nowhere.yaml\n", ["No such file", "nowhere.yaml"]),
        ("_BASE_: config.yaml\n", ["_BASE_ leads back to the file itself"]),
        ("VERSION: 3\n", ["Cannot merge a v3 config"]),
        (
            "MODEL:\n  DIFFUSION:\n    TIMESTP: 3\nVERSION: 2\n",
            ["no config key 'MODEL.DIFFUSION.TIMESTP'; did you mean MODEL.DIFFUSION.TIMESTEP?"],
        ),
        ("MODL:\n  MASK_ON: True\nVERSION: 2\n", ["no config key 'MODL'; did you mean MODEL?"]),
        ("MODEL: 3\nVERSION: 2\n", ["MODEL is a section of keys, not a value"]),
        ("SOLVER:\n  MAX_ITER: many\nVERSION: 2\n", ["int", "str", "SOLVER.MAX_ITER"]),
    ],
)
def test_broken_yaml(refused, tmp_path, content, texts):
    config = tmp_path / "config.yaml"
    config.write_text(content)
    message = refused("--config", config)
    assert message.startswith(f"error: {config}")
    for text in texts:
        assert text in message


def test_yaml_is_data_only(refused, tmp_path):
    config, base = tmp_path / "config.yaml", tmp_path / "base.yaml"
    base.write_text(f"A: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]\nVERSION: 2\n")
    config.write_text("_BASE_: base.yaml\nVERSION: 2\n")
    for path in (config, base):
        for tool in ("train_net", "visualize_predictions"):
            message = refused("--config", path, tool=tool)
            assert f"{path} is no plain YAML" in message
            assert "python/object/apply:os.mkdir" in message
    config.write_bytes(b"\xff\xfe\x00\x80")
    assert f"{config}: 'utf-8' codec" in refused("--config", config)
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------
# what a run needs


@pytest.mark.parametrize("tool", ["train_net", "lazyconfig_train_net"])
def test_missing_coco(refused, monkeypatch, tmp_path, no_model, tool):
    monkeypatch.chdir(tmp_path)
    suffix = ".yaml" if tool == "train_net" else ".py"
    missing = MetadataCatalog.get("coco_2017_val").json_file
    if os.path.exists(missing):
        pytest.skip("COCO is there")
    message = refused("--config", f"mask_rcnn_gd_t75_b24{suffix}", tool=tool)
    assert message.startswith("error: there are no data to read:\n")
    for split in ("train", "val"):
        assert f"coco_2017_{split}: no " in message
        assert f"instances_{split}2017.json" in message
    assert "DETECTRON2_DATASETS" in message
    assert "tools/make_sample_data.py" in message
    weights = tmp_path / "model.pth"
    weights.touch()
    key = "MODEL.WEIGHTS {}" if tool == "train_net" else "train.init_checkpoint={}"
    message = refused("--config", f"mask_rcnn_gd_t75_b24{suffix}", "--eval-only",
                      *key.format(weights).split(), tool=tool)  # fmt: skip
    assert "coco_2017_val" in message
    assert "coco_2017_train" not in message  # not needed


def test_missing_files(refused, small, no_model, tmp_path):
    sample = ["--config", SAMPLE]
    (tmp_path / "other.pth").touch()
    missing = tmp_path / "model.pth"
    message = refused(*sample, *small, "MODEL.WEIGHTS", missing)
    assert f"there is no checkpoint '{missing}'; {tmp_path} holds other.pth" in message
    missing = tmp_path / "folder" / "model.pth"
    message = refused(*sample, "--eval-only", *small, "MODEL.WEIGHTS", missing)
    assert f"there is no folder {missing.parent} either" in message
    message = refused(*sample, *small, "MODEL.WEIGHTS", "~/model.pth")
    assert f"there is no checkpoint '{Path.cwd() / '~' / 'model.pth'}'" in message
    assert "there is no dataset 'coco_2018'" in refused(
        *sample, *small, "DATASETS.TRAIN", "('coco_2018',)"
    )


def test_missing_unet_weights(refused, small):
    message = refused("--config", SAMPLE, *small, "MODEL.DIFFUSION.CHECKPOINT", "gone.pt")
    assert message.startswith("error: checkpoint gone.pt does not exist")
    assert "https://openaipublic" in message


def test_evaluation_needs_weights_and_data(refused, small, no_model, tmp_path):
    sample = ["--config", SAMPLE, "--eval-only"]
    assert "--eval-only needs MODEL.WEIGHTS CHECKPOINT" in refused(*sample, *small)
    assert "--eval-only needs MODEL.WEIGHTS CHECKPOINT" in refused(*sample, "--resume", *small)
    (tmp_path / "model.pth").touch()
    small += ["MODEL.WEIGHTS", tmp_path / "model.pth"]
    assert "DATASETS.TEST is empty" in refused(*sample, *small, "DATASETS.TEST", "()")
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", "80"]
    message = refused(*sample, *small, *classes)
    assert "NUM_CLASSES is 80, but dataset 'diffbackbone_sample_val' has 10" in message
    message = refused(*sample[:2], *small, *classes)
    assert "NUM_CLASSES is 80, but dataset 'diffbackbone_sample_train' has 10" in message
    assert "DATASETS.TRAIN is empty" in refused(*sample[:2], *small, "DATASETS.TRAIN", "()")


@pytest.fixture
def changed(data, tmp_path):
    """Register a copy of the sample data with changed annotations."""
    with contextlib.ExitStack() as stack:

        def change(**splits):
            root = tmp_path / "changed"
            shutil.copytree(data, root, dirs_exist_ok=True)
            for split, values in splits.items():
                path = root / "coco" / "annotations" / f"instances_{split}2017.json"
                path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
            stack.enter_context(registered(root))
            return root

        yield change


@pytest.mark.parametrize("tool", ["train_net", "lazyconfig_train_net"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_datasets(refused, small, changed, python_config, tool, split):
    root = changed(**{split: dict(images=[], annotations=[])})
    command = ["--config", SAMPLE, *small] if tool == "train_net" else ["--config", python_config]
    message = refused(*command, tool=tool)
    assert f"'diffbackbone_sample_{split}' is empty" in message.replace("Dataset", "dataset")
    assert str(root / "coco" / "annotations" / f"instances_{split}2017.json") in message


@pytest.mark.parametrize("tool", ["train_net", "lazyconfig_train_net"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_annotations(refused, small, changed, python_config, tool, split):
    path = changed() / "coco" / "annotations" / f"instances_{split}2017.json"
    path.write_text(path.read_text()[:1000])
    command = ["--config", SAMPLE, *small] if tool == "train_net" else ["--config", python_config]
    message = refused(*command, tool=tool)
    assert f"dataset 'diffbackbone_sample_{split}': {path} is damaged" in message


def test_images_without_annotations(refused, tools, small, changed, python_config, tmp_path):
    changed(train=dict(annotations=[]))
    message = refused("--config", SAMPLE, *small)
    assert "no image has an annotation" in message
    assert "DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps such images" in message
    message = refused("--config", python_config, tool="lazyconfig_train_net")
    assert "diffbackbone_sample_train" in message
    assert "No image has an annotation" in message
    keep = ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False", "DATASETS.TEST", "()"]
    tools.train_net.entry(["--config", SAMPLE, *small, *keep])
    assert (tmp_path / "work" / "model_final.pth").exists()


def test_damaged_data(refused, small, changed):
    root = changed() / "coco" / "train2017"

    def message():  # Detectron2 logs a traceback of what happens in training
        return refused("--config", SAMPLE, *small, logged=True)

    for path in root.iterdir():  # PIL does not name a file whose end is missing
        path.write_bytes(path.read_bytes()[:-200])
    said = message()
    assert f"training image {root}" in said
    assert "truncated" in said
    for path in root.iterdir():
        path.write_bytes(b"no image")
    said = message()
    assert f"training image {root}" in said
    assert "cannot identify image file" in said
    for path in root.iterdir():
        path.unlink()
    assert f"No such file or directory: '{root}" in message()


def test_lost_workers_and_losses(refused, small, monkeypatch):
    """As where memory runs out, and where training diverges."""
    get = engine.SeededStream.__getitem__

    def die(stream, key):
        if torch.utils.data.get_worker_info() and key[0] >= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(stream, key)

    with monkeypatch.context() as patch:
        patch.setattr(engine.SeededStream, "__getitem__", die)
        said = refused("--config", SAMPLE, *small, "DATALOADER.NUM_WORKERS", "1", logged=True)
    assert "DataLoader worker" in said
    assert "/dev/shm" in said
    assert "--resume" in said
    diverging = ["SOLVER.BASE_LR", "1e9", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "6"]
    said = refused("--config", SAMPLE, *small, *diverging, logged=True)
    assert "contain Inf/NaN" in said or "Loss became infinite or NaN at iteration=" in said
    assert "a lower learning rate" in said


@pytest.mark.parametrize(
    ("keys", "texts"),
    [
        (["BLOCKS", "(21,)"], ["asks for ['p2']", "stride 32", "stride 16: 13-15, 22-24"]),
        (["BLOCKS", "(33,)"], ["block 33 has stride 2", "can't be divided by 4", "stride 4: 7-9"]),
        (["BLOCKS", "(24, 21)"], ["stands on one block, got 2: [24, 21]", "fpn_backbone"]),
        (["BLOCKS", "(99,)"], ["blocks must be block numbers from 1 to 37", "[99]"]),
        (["TOP_BLOCK", "p8"], ["TOP_BLOCK must be one of none, maxpool, p6p7, got 'p8'"]),
        (["TIMESTEP", "1000"], ["timestep must be an integer from 0 to 999"]),
        (["FEEDBACK", "top"], ["unknown feedback 'top'", "bottleneck"]),
        (["UNET", "huge"], ["unknown preset 'huge'", "gd256_uncond"]),
        (["UNET_OPTIONS.num_res_blks", "1"], ["num_res_blks", "num_res_blocks"]),
        (["NOISE", "pink"], ["noise must be one of random, fixed, none"]),
    ],
)
def test_wrong_backbones(refused, small, keys, texts):
    message = refused("--config", SAMPLE, *small, f"MODEL.DIFFUSION.{keys[0]}", keys[1])
    for text in texts:
        assert text in message
    assert len(message) < 1200


@pytest.mark.parametrize(
    ("keys", "texts"),
    [
        (["MODEL.PIXEL_MEAN", "[103.5, 116.3, 123.7]"], ["PIXEL_MEAN is [103.5", "127.5"]),
        (["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"], ["PIXEL_STD is [1.0", "127.5"]),
        (["INPUT.FORMAT", "BGR"], ["INPUT.FORMAT is 'BGR'", "'RGB'"]),
        (["MODEL.BACKBONE.NAME", "build_unet"], ["'build_unet'", "'BACKBONE' registry"]),
        (["MODEL.META_ARCHITECTURE", "RCNN"], ["'RCNN'", "'META_ARCH' registry"]),
        (["SOLVER.OPTIMIZER", "ADAM"], ["must be one of SGD, ADAMW, got 'ADAM'"]),
        (["SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH", "positive multiple", "got 0"]),
        (["SOLVER.LAYER_DECAY_RATE", "1.5"], ["(0, 1]", "1.5"]),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "half"], ["auto, bfloat16, float16"]),
        (["INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.SIZE", "8"], ["SIZE of at least 32 px"]),
        (["MODEL.FPN.NORM", ""], ["needs a norm, such as 'LN' (MODEL.FPN.NORM)"]),
    ],
)
def test_wrong_values(refused, small, keys, texts):
    message = refused("--config", SAMPLE, *small, *keys)
    for text in texts:
        assert text in message


def test_folders_that_cannot_be_written(refused, small, tmp_path):
    (tmp_path / "file").touch()
    message = refused("--config", SAMPLE, *small, "OUTPUT_DIR", tmp_path / "file")
    assert f"'{tmp_path / 'file'}" in message


def test_the_traceback_is_there_for_who_asks(tools, small, monkeypatch):
    monkeypatch.setenv("DIFFBACKBONE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no config key 'SOLVER.MAXITER'"):
        tools.train_net.entry(["--config", SAMPLE, *small, "SOLVER.MAXITER", "3"])


def test_what_is_no_input_error_keeps_its_traceback(tools):
    explain = tools._detectron2.explain
    for error in (KeyError("x"), TypeError("no len()"), AssertionError(), RuntimeError("x")):
        assert explain(error) is None
    assert explain(OSError(errno.ENOSPC, "No space left")) == "[Errno 28] No space left"
    assert "Missing key amp" in explain(ConfigKeyError("Missing key amp"))
    assert explain(FloatingPointError("Loss became infinite")).startswith("Loss became infinite. ")


# --------------------------------------------------------------------------------------------------
# checkpoints


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
@pytest.mark.parametrize("only", [True, False])
def test_nothing_in_weights_runs(refused, small, tmp_path, suffix, only):
    path = tmp_path / f"evil{suffix}"
    content = {"model": {"w": torch.zeros(1).numpy()}, "__author__": Evil(tmp_path / "ran")}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    flags = ["--eval-only"] if only else []
    message = refused("--config", SAMPLE, *flags, *small, "MODEL.WEIGHTS", path)
    assert str(path) in message
    assert "holds more than weights" in message
    assert "nothing in it was run" in message
    assert not (tmp_path / "ran").exists()


def test_nothing_in_unet_weights_runs(refused, small, tmp_path):
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    message = refused(
        "--config", SAMPLE, *small, "MODEL.DIFFUSION.CHECKPOINT", tmp_path / "evil.pt"
    )
    assert str(tmp_path / "evil.pt") in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4 half a checkpoint",
        *({}, [1.0], 3.0, {"model": {}}, {"model": [1.0]}, {"blobs": 3.0}, {3: 3.0}, {"a": "b"}),
        {"model": {"a": "b"}, "__author__": "who"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
def test_damaged_weights(tmp_path, content, suffix):
    path = tmp_path / f"model{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    checkpointer = engine.Checkpointer(torch.nn.Linear(2, 2), strict=True)
    with pytest.raises((ValueError, AssertionError)) as error:
        checkpointer.load(str(path))
    assert str(path) in str(error.value) or "checkpoint" in str(error.value)


def test_damaged_weights_are_refused(refused, small, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"PK\3\4 half a checkpoint")
    message = refused("--config", SAMPLE, "--eval-only", *small, "MODEL.WEIGHTS", path)
    assert f"{path} is truncated, damaged" in message


def test_no_space_left_keeps_what_was_there(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    checkpointer = engine.Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"model_0000001.pth", "last_checkpoint"}
    full = OSError(errno.ENOSPC, "No space left on device")

    def save_half(content, path):
        Path(path).write_bytes(b"PK\3\4 half")
        raise full

    def fail(*args):
        raise full

    for owner, name, stand_in in (
        (torch, "save", save_half),
        (os, "fsync", fail),
        (os, "replace", fail),
    ):
        for target in ("model_0000003", "model_0000001"):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, stand_in)
                with pytest.raises(OSError, match="No space left"):
                    checkpointer.save(target, iteration=3)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert checkpointer.load(checkpointer.get_checkpoint_file())["iteration"] == 1


def test_no_space_left_in_training(tools, small, tmp_path, monkeypatch, capsys):
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
        tools.train_net.entry(["--config", SAMPLE, *small, *changes])
    assert "No space left on device" in exit_.value.code
    folder = tmp_path / "work"
    assert (folder / "last_checkpoint").read_text() == "model_0000000.pth"
    assert [path.name for path in folder.glob("*.pth")] == ["model_0000000.pth"]
    assert not list(folder.glob(".*"))
    monkeypatch.setattr(torch, "save", save)
    tools.train_net.entry(["--config", SAMPLE, "--resume", *small, *changes])
    assert "Starting training from iteration 1" in capsys.readouterr().out
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


# --------------------------------------------------------------------------------------------------
# the whole way by YAML

DIFFFEED = "mask_rcnn_difffeed_sample"
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
def trained(data, recorder, tmp_path_factory):
    """A whole run of six iterations in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    losses = {"LOSSES": str(folder / "losses.json")}
    command = [TOOLS / "train_net.py", "--config", DIFFFEED, *options(folder, **SHORT)]
    return folder, start(recorder, *command, env=losses)


def test_training_run(trained):
    folder, output = trained
    assert "Starting training from iteration 0" in output
    assert output.count("Evaluation results for diffbackbone_sample_val in csv format") == 1
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    names = [f"model_000000{i}.pth" for i in (3, 5)]
    assert sorted(path.name for path in folder.glob("*.pth")) == [*names, "model_final.pth"]
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert lines[-1]["iteration"] >= 5
    assert {"bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"} <= read_results(folder).keys()
    losses = read_losses(folder / "losses.json")
    assert list(losses) == list(range(6))
    wanted = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    for values in losses.values():
        assert values.keys() == wanted
        assert np.isfinite([*values.values()]).all()
    content = torch.load(folder / "model_final.pth", weights_only=True)
    assert content["iteration"] == 5
    assert {"model", "trainer"} <= content.keys()


def predictions(folder: Path, kind: str = "inference") -> list:
    """What the last evaluation wrote."""
    found = json.loads((folder / kind / "coco_instances_results.json").read_text())
    assert len(found) > 20
    return found


def copypaste(output: str) -> list[str]:
    """The scores of a printed evaluation, to four digits."""
    return [line.split("copypaste:")[1] for line in output.splitlines() if "copypaste:" in line]


def test_evaluation_alone_finds_what_training_found(tools, trained, tmp_path, capsys):
    folder, printed = trained
    keys = {**SHORT, "MODEL.WEIGHTS": folder / "model_final.pth"}
    command = ["--config-file", DIFFFEED, "--eval-only", *options(tmp_path, **keys)]
    tools.train_net.entry(command)
    output = capsys.readouterr().out
    assert "Starting training" not in output
    assert copypaste(output) == copypaste(printed)
    assert predictions(tmp_path) == predictions(folder)


AUGMENTED = {
    "TEST.AUG.ENABLED": True,
    "TEST.AUG.MIN_SIZES": "(48, 72)",
    "TEST.AUG.MAX_SIZE": 96,
    "TEST.EXPECTED_RESULTS": "[['bbox', 'AP', 50, 50], ['segm_TTA', 'AP', 50, 50]]",
}


def test_augmented_evaluation(tools, trained, tmp_path, capsys, monkeypatch):
    """After training and alone, beside the plain one, over all sizes and flips."""
    keys = {**SHORT, **AUGMENTED, "SOLVER.MAX_ITER": 7}
    folder = shutil.copytree(trained[0], tmp_path / "work")
    tools.train_net.entry(["--config", DIFFFEED, "--resume", *options(folder, **keys)])
    kinds = {f"{kind}/AP" for kind in ("bbox", "bbox_TTA", "segm", "segm_TTA")}
    assert kinds <= read_results(folder).keys()

    preprocess, inputs = GeneralizedRCNN.preprocess_image, []

    def record(self, batched_inputs):
        inputs.extend(x["image"] for x in batched_inputs)
        return preprocess(self, batched_inputs)

    monkeypatch.setattr(GeneralizedRCNN, "preprocess_image", record)
    keys["MODEL.WEIGHTS"] = folder / "model_final.pth"
    tools.train_net.entry(["--config", DIFFFEED, "--eval-only", *options(tmp_path, **keys)])
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
        (SAMPLE, [*TTA, "TEST.AUG.MIN_SIZES", "()"], "TEST.AUG.MIN_SIZES ()"),
        (SAMPLE, ["MODEL.LOAD_PROPOSALS", "True"], "MODEL.LOAD_PROPOSALS True"),
        (DIFFFEED, ["TEST.PRECISE_BN.ENABLED", "True"], "MODEL.DIFFUSION.PADDING"),
    ],
)
def test_what_is_not_supported(refused, small, no_model, arguments, config, keys, text):
    assert text in refused("--config", config, *arguments, *small, *keys)


def test_datasets_without_evaluator(refused, small, no_model):
    meta = MetadataCatalog.get("diffbackbone_sample_val")
    kind = meta.evaluator_type
    try:
        meta.__dict__["evaluator_type"] = "mine"
        assert "'mine'" in refused("--config", SAMPLE, *small)
    finally:
        meta.__dict__["evaluator_type"] = kind


def test_last_checkpoint_is_evaluated(tools, trained, tmp_path, capsys):
    folder = shutil.copytree(trained[0], tmp_path / "work")
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    keys = {**SHORT, "MODEL.WEIGHTS": "gone.pth"}  # not looked at
    command = ["--config", DIFFFEED, "--eval-only", "--resume", *options(folder, **keys)]
    tools.train_net.entry(command)
    assert f"Loading from {folder}/model_0000003.pth" in capsys.readouterr().out
    assert predictions(folder) != predictions(trained[0])


def test_resuming_what_is_finished_and_going_on(tools, refused, trained, tmp_path, capsys):
    folder = shutil.copytree(trained[0], tmp_path / "work")
    tools.train_net.entry(["--config", DIFFFEED, "--resume", *options(folder, **SHORT)])
    assert "Starting training from iteration 6" in capsys.readouterr().out
    longer = {**SHORT, "SOLVER.MAX_ITER": 7}
    tools.train_net.entry(["--config", DIFFFEED, "--resume", *options(folder, **longer)])
    content = torch.load(folder / "model_final.pth", weights_only=True)
    assert content["iteration"] == 6
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"

    (folder / "last_checkpoint").write_text("model_0000042.pth")
    message = refused("--config", DIFFFEED, "--resume", *options(folder, **longer))
    assert f"{folder}/model_0000042.pth" in message


def test_checkpoint_of_another_model(tools, refused, trained, tmp_path, capsys):
    weights = trained[0] / "model_final.pth"
    keys = {k: v for k, v in SHORT.items() if k.startswith("MODEL") or k == "SEED"}
    other = options(tmp_path / "work", **keys, **{"MODEL.WEIGHTS": weights})
    message = refused("--config", SAMPLE, "--eval-only", *other)
    assert "the checkpoint is of another model than the config's:\n" in message
    assert "unexpected: backbone.net.feedback." in message
    assert "missing" not in message
    assert message.count("\n") < 12
    command = ["--config", DIFFFEED, "--eval-only", *other]
    message = refused(*command, "MODEL.FPN.OUT_CHANNELS", "32")
    assert "shape of backbone.simfp_2.4.weight: (64, 16, 1, 1), expected (32, 16, 1, 1)" in message
    assert "more" in message.splitlines()[-2]
    other += ["MODEL.ROI_BOX_HEAD.NUM_CONV", "2"]
    message = refused("--config", DIFFFEED, "--eval-only", *other)
    assert "missing: roi_heads.box_head.conv2.weight" in message
    capsys.readouterr()

    # to train on from, what fits is enough, as everywhere in Detectron2
    tools.train_net.entry(["--config", DIFFFEED, *other, "DATASETS.TEST", "()"])
    assert "roi_heads.box_head.conv2" in capsys.readouterr().out
    assert (tmp_path / "work" / "model_final.pth").exists()
    # but not to go on
    other[-1] = "1"
    message = refused("--config", DIFFFEED, "--resume", *other, "SOLVER.MAX_ITER", "5")
    assert "the checkpoint is of another model than the config's:\n" in message
    assert "unexpected: roi_heads.box_head.conv2.weight" in message


# --------------------------------------------------------------------------------------------------
# several processes

distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch has no distributed"
)
TWO = ["--num-gpus", "2", "--dist-url", "auto"]


@pytest.fixture
def on_two_processes(tools, data, monkeypatch):
    """Run `tools/train_net.py` on two processes, which this one starts."""

    def run(*arguments):
        tools.train_net.entry([*arguments[:2], *TWO, *arguments[2:]])

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    return run


@distributed
@pytest.mark.parametrize("config", [SAMPLE, DIFFFEED])
def test_two_processes(on_two_processes, tmp_path, config):
    keys = {"SOLVER.MAX_ITER": 3, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01}
    if config == DIFFFEED:
        on_two_processes("--config", config, *options(tmp_path, **keys))
    else:
        command = ["tools/train_net.py", "--config", config, *TWO, *options(tmp_path, **keys)]
        output = start(*command)
        assert "Rank of current process: 0. World size: 2" in output
        assert "Traceback" not in output
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [2]
    assert "bbox/AP" in read_results(tmp_path)
    assert len({found["image_id"] for found in predictions(tmp_path)}) == 3  # of both processes
    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert not any(key.startswith("module.") for key in content["model"])
    assert (tmp_path / "log.txt.rank1").exists()


@distributed
def test_errors_of_two_processes_are_one(on_two_processes, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit_:
        on_two_processes("--config", SAMPLE, *options(tmp_path, **{"SOLVER.IMS_PER_BATCH": 3}))
    message = exit_.value.code
    assert message.startswith("error: the batch over all processes")
    assert "must be a positive multiple of their number, 2; got 3" in message
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert "error: " not in printed


# As a script starts jobs in the background: SIGINT is ignored. The first process starts another.
ORPHAN = """
import os, signal, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import _detectron2
signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.argv[2] == "parent":
    subprocess.Popen([sys.executable, __file__, sys.argv[1], "child"])
else:
    _detectron2.end_with_parent()
    print(os.getpid(), flush=True)
time.sleep(120)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what it is done by, Linux alone has")
def test_processes_end_with_the_one_that_started_them(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    command = [sys.executable, str(script), str(TOOLS), "parent"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = Path("/proc", process.stdout.readline().strip(), "stat")
        assert child.exists()
        process.kill()
        deadline = time.monotonic() + 10
        while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)


# --------------------------------------------------------------------------------------------------
# the whole way by Python

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
def lazily_trained(data, recorder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lazily")
    config = write_lazy(folder / "tiny.py", folder / "work")
    losses = {"LOSSES": str(folder / "losses.json")}
    output = start(recorder, TOOLS / "lazyconfig_train_net.py", "--config", config, env=losses)
    (folder / "losses.json").rename(folder / "work" / "losses.json")
    return folder / "work", output


def test_python_training_run(tools, lazily_trained, tmp_path, capsys):
    folder, output = lazily_trained
    assert "Starting training from iteration 0" in output
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == list(range(6))
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[2:] == pytest.approx([1e-3] * 2 + [1e-4] * 2)  # of the head; the last group's
    assert len(copypaste(output)) == 6
    for folder_, weights in ((tmp_path / "a", folder / "model_final.pth"), (folder, "")):
        evaluate = ["--resume"] if not weights else []
        config = write_lazy(tmp_path / "config.py", folder_)
        keys = [f"train.init_checkpoint={weights}"]
        before = predictions(folder)
        tools.lazyconfig_train_net.entry(["--config", str(config), "--eval-only", *evaluate, *keys])
        assert predictions(folder_) == before


def test_python_run_is_resumed(lazily_trained, recorder, tmp_path):
    whole, _ = lazily_trained
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copy(whole / "model_0000001.pth", folder)
    (folder / "model_0000000.pth").touch()  # goes when others come
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    config = write_lazy(tmp_path / "tiny.py", folder)
    command = ["tools/lazyconfig_train_net.py", "--config", config]
    assert_goes_on(recorder, command, whole, folder)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["train.max_itr=3"], ["no config key 'train.max_itr'", "none of max_iter"]),
        (["trin.max_iter=3"], ["no config key 'trin.max_iter'", "none of train"]),
        (["=3"], ["no config key ''"]),
        (["train.max_iter.x=3"], ["'x' is none of no keys"]),
        (["train.max_iter", "3"], ["are written key=value, got 'train.max_iter'"]),
        (["~train.max_iter"], ["are written key=value"]),
        (["train.max_iter=3", "--resume"], ["flags stand before", "--resume came later"]),
        (["train.max_iter=["], ["train.max_iter=[:"]),
        (["train.max_iter=many"], ["train.max_iter must be a number, as 6 is"]),
        (["train.amp.enabled=perhaps"], ["train.amp.enabled must be True or False"]),
        (["optimizer.lr=high"], ["optimizer.lr must be a number"]),
        (["model=3"], ["model is a section with the keys"]),
        (["train=3"], ["train is a section with the keys output_dir"]),
        (["train.device=gpu"], ["'gpu' is no device"]),
        (["train.init_checkpoint=gone.pth"], ["there is no checkpoint 'gone.pth'"]),
        (["dataloader.train.dataset.names=coco"], ["there is no dataset 'coco'"]),
        (["model.roi_heads.num_classes=80"], ["num_classes is 80, but", "has 10 thing_classes"]),
        (["dataloader.test.mapper.augmentations.1.max_size=3"], ["'1' is none of 0"]),
    ],
)
def test_wrong_options_of_python_configs(refused, python_config, no_model, options, texts):
    message = refused("--config", python_config, *options, tool="lazyconfig_train_net")
    for text in texts:
        assert text in message


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["timestp=3"], ["'timestp'"]),
        (["timestep=1000"], ["timestep must be an integer from 0 to 999"]),
        (["blocks=[21]"], ["proposal_generator.in_features asks for ['p2']", "'p3': 8"]),
        (["blocks=[24,21]"], ["stands on one block, got 2: [24, 21]"]),
        (["blocks=[33]"], ["block 33 has stride 2"]),
        (["checkpoint=gone.pt"], ["checkpoint gone.pt does not exist"]),
    ],
)
def test_wrong_backbones_of_python_configs(refused, python_config, options, texts):
    options = [f"model.backbone.net.{option}" for option in options]
    message = refused("--config", python_config, *options, tool="lazyconfig_train_net")
    for text in texts:
        assert text in message


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("model = (\n", ["has syntax error!", "'(' was never closed"]),
        ("import diffbackbone_plus\n", ["No module named 'diffbackbone_plus'"]),
        ("from .nowhere import model\n", ["nowhere.py does not exist"]),
        ("", ["there is no model, dataloader, train, optimizer, lr_multiplier"]),
        ("model = train = optimizer = dict()\n", ["there is no dataloader, lr_multiplier"]),
    ],
)
def test_broken_python_configs(refused, tmp_path, content, texts):
    config = tmp_path / "config.py"
    config.write_text(content)
    message = refused("--config", config, tool="lazyconfig_train_net")
    assert message.startswith(f"error: {config}: ")
    for text in texts:
        assert text in message


def test_python_options_take_effect(tools, python_config):
    changes = ["train.max_iter=3", "dataloader.test.mapper.augmentations.0.max_size=99", "--"]
    changes += ["model.backbone.net.feedback={24: 14}"]
    changes += ["model.backbone.net.noise=none", "optimizer.weight_decay=0"]
    arguments = types.SimpleNamespace(config_file=str(python_config), opts=changes)
    cfg = tools.lazyconfig_train_net.load(arguments)
    assert cfg.train.max_iter == 3
    assert cfg.dataloader.test.mapper.augmentations[0].max_size == 99
    assert cfg.model.backbone.net.feedback == {24: 14}
    assert cfg.model.backbone.net.noise == "none"
    assert cfg.optimizer.weight_decay == 0


def test_python_evaluation_needs_weights(refused, lazily_trained, python_config, no_model):
    command = ["--config", python_config, "--eval-only"]
    for flags in ([], ["--resume"]):
        message = refused(*command, *flags, tool="lazyconfig_train_net")
        assert "--eval-only needs train.init_checkpoint=CHECKPOINT" in message


def test_python_checkpoint_of_another_model(refused, trained, python_config):
    key = f"train.init_checkpoint={trained[0] / 'model_final.pth'}"
    command = ["--config", python_config, "--eval-only", key]
    message = refused(*command, tool="lazyconfig_train_net")
    assert "the checkpoint is of another model than the config's:\n" in message


# --------------------------------------------------------------------------------------------------
# pictures


def panels(picture: Path, images: int) -> np.ndarray:
    """Truth and prediction of each image, (images, 2, 320, 320, 3), two images a row."""
    with Image.open(picture) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        pixels = np.asarray(image)
    lines = -(-images // 2)
    height = 30 + lines * 330  # the curves of the run are below
    assert pixels.shape[0] in (height, height + 260)
    assert pixels.shape[1] == min(images, 2) * 670
    found = []
    for number in range(images):
        y, x = 30 + number // 2 * 330, 10 + number % 2 * 670
        found.append([pixels[y : y + 320, x + side : x + side + 320] for side in (0, 330)])
    return np.array(found)


def colours(panel: np.ndarray) -> int:
    return len(np.unique(panel.reshape(-1, 3), axis=0))


def test_picture(tools, trained, tmp_path):
    folder, _ = trained
    picture = tmp_path / "pictures" / "picture.png"
    command = ["--config", DIFFFEED, "--images", "9", "--score", "0.01", "--out", str(picture)]
    output = start("tools/visualize_predictions.py", *command, *options(folder, **SHORT))
    assert f"{picture}: truth and prediction side by side" in output
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]
    found = panels(picture, 3)  # as many as there are
    assert all(colours(panel) > 1000 for row in found for panel in row)  # photographs

    # nothing is found with certainty, and the truth stays
    command = [*command, "--weights", str(folder / "model_final.pth")]
    command[command.index("0.01")] = "1"
    tools.visualize_predictions.entry([*command, *options(tmp_path / "gone", **SHORT)])
    empty = panels(picture, 3)
    assert (empty[:, 0] == found[:, 0]).all()
    for record, (truth, bare), (_, drawn) in zip(
        DatasetCatalog.get("diffbackbone_sample_val"), empty, found
    ):
        with Image.open(record["file_name"]) as image:
            scale = 320 / max(image.size)
            size = [int(scale * side + 1e-2) for side in image.size]
            photo = image.resize(size, Image.Resampling.NEAREST)
        photo = np.asarray(photo, dtype=float)

        def distance(panel, photo=photo):
            return np.abs(panel[: photo.shape[0], : photo.shape[1]] - photo).mean()

        assert distance(bare) < 4
        assert distance(truth) > distance(bare) + 4
        assert distance(drawn) > distance(bare) + 4


def test_picture_of_a_python_config(tools, lazily_trained, tmp_path):
    folder, _ = lazily_trained
    config = write_lazy(tmp_path / "tiny.py", folder)
    picture = tmp_path / "picture.png"
    command = ["--config", str(config), "--images", "1", "--out", str(picture)]
    command += ["--score", "0.01"]
    tools.visualize_predictions.entry(command)
    ((truth, drawn),) = panels(picture, 1)
    assert min(colours(truth), colours(drawn)) > 1000
    assert (truth != drawn).any()
    first = picture.read_bytes()
    # the checkpoint of the options goes before the last one, that before the config file's
    tools.visualize_predictions.entry(
        [*command, f"train.init_checkpoint={folder / 'model_0000003.pth'}"]
    )
    assert picture.read_bytes() != first
    config.write_text(config.read_text() + f"\ntrain.init_checkpoint = '{tmp_path}/gone.pth'\n")
    tools.visualize_predictions.entry(command)
    assert picture.read_bytes() == first


def test_wrong_arguments_of_the_picture(refused, trained, data, small, no_model, tmp_path):
    draw = functools.partial(refused, tool="visualize_predictions")
    assert "arguments are required: --config" in draw()
    assert "invalid int value: 'all'" in draw("--config", SAMPLE, "--images", "all")
    for flags in (["--images", "0"], ["--score", "1.5"], ["--score", "-0.1"]):
        assert "--images from 1, --score 0 to 1; got" in draw("--config", SAMPLE, *flags)
    lines = draw("--config", "mask_rcnn").splitlines()
    assert sorted(line.strip() for line in lines[1:]) == sorted([*YAML, *PYTHON])
    message = draw("--config", SAMPLE, *small)
    assert f"{tmp_path / 'work'} holds no checkpoint yet; --weights FILE" in message
    message = draw("--config", SAMPLE, "--weights", tmp_path / "gone.pth", *small)
    assert f"there is no checkpoint '{tmp_path / 'gone.pth'}'" in message
    assert "no config key 'SOLVER.MAXITER'" in draw("--config", SAMPLE, "SOLVER.MAXITER", "3")
    assert "DATASETS.TEST is empty" in draw("--config", SAMPLE, *small, "DATASETS.TEST", "()")
    message = draw("--config", SAMPLE, *small, "DATASETS.TEST", "('coco',)")
    assert "there is no dataset 'coco'" in message
    (tmp_path / "config.py").write_text("model = (\n")
    assert "has syntax error" in draw("--config", tmp_path / "config.py")


def test_picture_by_weights_of_another_model(refused, trained, small, tmp_path):
    weights = ["--weights", trained[0] / "model_final.pth", "--out", tmp_path / "picture.png"]
    message = refused("--config", SAMPLE, *weights, *small, tool="visualize_predictions")
    assert "the checkpoint is of another model than the config's:\n" in message
    assert not (tmp_path / "picture.png").exists()


def test_curves_of_a_run_that_was_resumed(tools, tmp_path):
    tool = tools.visualize_predictions
    assert tool.read_curves(tmp_path) == {}
    lines = [
        '{"iteration": 19, "total_loss": 2.0}',
        '{"iteration": 19, "bbox/AP50": 10.0, "segm/AP50": 5.0}',
        '{"iteration": 39, "total_loss": 9.0}',
        '{"iteration": 39, "total_loss": 1.0}',
        '{"iteration": 59, "tot',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    curves = tool.read_curves(tmp_path)
    assert curves == {
        "total_loss": [(20, 2.0), (40, 1.0)],
        "bbox/AP50": [(20, 10.0)],
        "segm/AP50": [(20, 5.0)],
    }
    drawn = tool.draw_curves(curves, 600)
    assert drawn.size == (600, 260)
    empty = np.asarray(tool.draw_curves({}, 600)).astype(int)
    assert (np.asarray(drawn) != empty).mean() > 0.005
    both = tool.stack(Image.new("RGB", (50, 10)), drawn)
    assert both.size == (600, 270)
