"""Configs of Detectron2: YAML and Python twins, names, options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from detectron2_runs import CONFIGS, SAMPLE

from diffbackbone.detectron2 import (
    datasets,
    engine,
    launch,
    lazyconfig_train_net,
    load_yaml,
    train_net,
    visualize,
)
from diffbackbone.detectron2.solver import build_optimizer

pytest_plugins = ["detectron2_runs"]
pytestmark = pytest.mark.usefixtures("as_it_was")
YAML = sorted(path.name for path in CONFIGS.glob("*.yaml"))
PYTHON = sorted(path.name for path in CONFIGS.glob("*.py"))
TWINS = ["mask_rcnn_gd_t75_b24", "mask_rcnn_difffeed", "mask_rcnn_gd_t90_multi"]


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
def test_python_twins_build_the_yaml_configs_model_and_optimizer(name):
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
    python.optimizer.params.model = b
    groups = [
        [
            (g["lr"], g["weight_decay"], *g["betas"], len(g["params"]))
            for g in optimizer.param_groups
        ]
        for optimizer in (build_optimizer(yaml, a), instantiate(python.optimizer))
    ]
    assert groups[0] == groups[1]
    assert len(groups[0]) > 10


def test_the_python_twin_trains_as_the_yaml_config_does():
    cfg = load_yaml(str(CONFIGS / f"{TWINS[0]}.yaml"))
    twin = LazyConfig.load(str(CONFIGS / f"{TWINS[0]}.py"))
    net, node, solver = twin.model.backbone.net, cfg.MODEL.DIFFUSION, cfg.SOLVER
    train, loader = twin.train, twin.dataloader.train
    for given, wanted in {
        (net.unet, node.UNET),
        (net.checkpoint, node.CHECKPOINT),
        (net.activation_checkpointing, node.ACTIVATION_CHECKPOINTING),
        (train.max_iter, solver.MAX_ITER),
        (train.eval_period, cfg.TEST.EVAL_PERIOD),
        (train.checkpointer.period, solver.CHECKPOINT_PERIOD),
        (train.checkpointer.max_to_keep, solver.CHECKPOINT_KEEP),
        (train.amp.enabled, solver.AMP.ENABLED and torch.cuda.is_available()),
        (train.amp.dtype, solver.AMP.DTYPE),
        (loader.dataset.names, cfg.DATASETS.TRAIN[0]),
        (twin.dataloader.test.dataset.names, cfg.DATASETS.TEST[0]),
        (loader.total_batch_size, solver.IMS_PER_BATCH),
        (loader.num_workers, cfg.DATALOADER.NUM_WORKERS),
    }:
        assert given == wanted
    a, b = datasets.build_mapper(cfg, True), instantiate(loader.mapper)
    assert cfg.INPUT.LSJ.ENABLED
    for key in ("is_train", "image_format", "use_instance_mask", "recompute_boxes"):
        assert getattr(a, key) == getattr(b, key), key
    assert str(a.augmentations) == str(b.augmentations)
    a, b = DatasetMapper(cfg, is_train=False), instantiate(twin.dataloader.test.mapper)
    assert a.image_format == b.image_format
    for mapper in (a, b):
        (resize,) = mapper.augmentations.augs
        assert resize.max_size == cfg.INPUT.MAX_SIZE_TEST
        assert set(resize.short_edge_length) == {cfg.INPUT.MIN_SIZE_TEST}

    multiplier = instantiate(twin.lr_multiplier)
    weight, last = torch.nn.Parameter(torch.zeros(1)), solver.MAX_ITER
    scheduler = engine.Trainer.build_lr_scheduler(cfg, torch.optim.SGD([weight], 1.0))
    for iteration in (0, 1, 100, 249, 250, 1000, 262221, 262222, 284073, 284074, last - 1):
        scheduler.last_epoch = iteration
        (rate,) = scheduler.get_lr()
        assert multiplier(iteration / last) == pytest.approx(rate, rel=1e-3), iteration


def test_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = []

    def run(*words):
        launch.run_training(words, (".yaml",), "", seen.append)
        return seen[-1].config_file

    file = f"{SAMPLE}.yaml"
    assert run("--config", SAMPLE) == run("--config-file", file) == str(CONFIGS / file)
    Path(file).touch()
    assert run("--config", file, "--resume", "SOLVER.BASE_LR", "1e-3") == file
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
        (["MODEL.DIFFUSION.UNET_OPTIONS.chanel_mult", "3"], "UNET_OPTIONS.chanel_mult"),
        (["SOLVER.MAX_ITER"], "odd length"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["MODEL.LOAD_PROPOSALS", "True"], "MODEL.LOAD_PROPOSALS"),
    ],
)
def test_wrong_options(refused, arguments, text):
    assert text in refused("--config", SAMPLE, *arguments)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("train.max_itr=3", "train.max_itr"),
        ("trin.max_iter=3", "trin.max_iter"),
        ("train.max_iter.x=3", "train.max_iter.x"),
        ("dataloader.test.mapper.augmentations.1.max_size=3", "augmentations.1"),
        ("dataloader.train.dataset.names=coco", "'coco' is not registered"),
        ("model.roi_heads.num_classes=80", "has 10 classes"),
    ],
)
def test_wrong_options_of_python_configs(refused, python_config, option, text):
    assert text in refused("--config", python_config, option, tool=lazyconfig_train_net)


def test_python_options_take_effect(python_config):
    changes = ["train.max_iter=3", "dataloader.test.mapper.augmentations.0.max_size=99"]
    changes += ["model.backbone.net.feedback={24: 14}", "model.backbone.net.noise=none"]
    cfg = lazyconfig_train_net.load_lazy(str(python_config), changes)
    assert cfg.train.max_iter == 3
    assert cfg.dataloader.test.mapper.augmentations[0].max_size == 99
    assert cfg.model.backbone.net.feedback == {24: 14}
    assert cfg.model.backbone.net.noise == "none"
