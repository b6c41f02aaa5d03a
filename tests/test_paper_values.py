"""The values that the paper and guided-diffusion print, in presets, defaults and configs."""

from __future__ import annotations

import inspect
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffbackbone import DiffusionBackbone, NoiseSchedule
from diffbackbone.feedback import feedback_map
from diffbackbone.models.gd_config import PRESETS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COCO, GPUS = 118_000, 4  # training images (Section 7.1), and one image on each card (7.2)

# --------------------------------------------------------------------------------------------------
# Networks: the flags that guided-diffusion's README gives for each checkpoint

ADM = {  # 256x256_diffusion_uncond.pt; the others differ from it in what follows
    "model_channels": 256,
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "num_res_blocks": 2,
    "attention_strides": (8, 16, 32),  # --attention_resolutions 32,16,8
    "in_channels": 3,
    "out_channels": 6,  # --learn_sigma
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": False,
    "num_classes": None,
    "dropout": 0.0,
    "image_size": 256,
    "noise_schedule": "linear",
}
RELEASED: dict[str, dict[str, Any]] = {
    "gd64": {
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "num_res_blocks": 3,
        "attention_strides": (2, 4, 8),
        "use_new_attention_order": True,
        "num_classes": 1000,
        "dropout": 0.1,
        "image_size": 64,
        "noise_schedule": "cosine",
    },
    "gd128": {
        "channel_mult": (1, 1, 2, 3, 4),
        "attention_strides": (4, 8, 16),
        "num_head_channels": None,
        "num_heads": 4,
        "num_classes": 1000,
        "image_size": 128,
    },
    "gd256": {"num_classes": 1000},
    "gd256_uncond": {},
    "gd512": {
        "channel_mult": (0.5, 1, 1, 2, 2, 4, 4),
        "attention_strides": (16, 32, 64),
        "num_classes": 1000,
        "image_size": 512,
    },
    "lsun_bedroom": {"dropout": 0.1},
    "lsun_cat": {"dropout": 0.1},
    "lsun_horse": {"dropout": 0.1},
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_networks(name):
    values = ADM | RELEASED[name]
    assert {field: getattr(PRESETS[name], field) for field in values} == values


def test_presets_are_all_pinned():
    assert set(PRESETS) == {*RELEASED, "tiny"}


def test_schedules():
    linear, cosine = (NoiseSchedule(name) for name in ("linear", "cosine"))
    assert linear.num_timesteps == cosine.num_timesteps == 1000  # Section 4
    for schedule, values in (  # from the formulas of Ho et al. and of Nichol and Dhariwal
        (linear, {0: 0.9999, 90: 0.91326, 150: 0.78589, 300: 0.39401, 999: 4.0358e-5}),
        (cosine, {0: 0.99996, 150: 0.94000, 500: 0.49229, 999: 2.4288e-9}),
    ):
        for t, value in values.items():
            assert float(schedule.alphas_cumprod[t]) == pytest.approx(value, rel=1e-4)


def test_feedback_strategies():
    blocks = PRESETS["gd256_uncond"].blocks
    assert len(blocks) == 37
    sources = {
        "all": range(20, 38),
        "bottleneck": (21, 24, 27, 30, 33, 36),
        "windowed": range(20, 25),
        "multi-scale": range(20, 25),
    }
    for strategy, expected in sources.items():
        mapping = feedback_map(blocks, strategy)
        assert sorted(mapping) == list(expected)
        single = strategy == "multi-scale"  # all into one block, the others into their mirrors
        assert all(target == (14 if single else 38 - b) for b, target in mapping.items())


def test_backbone_defaults():
    """Section 7.3: t=90, four decoder blocks, 1x1 convolutions to 1024, MAE's strides."""
    signature = inspect.signature(DiffusionBackbone.__init__).parameters
    defaults = {name: parameter.default for name, parameter in signature.items()}
    assert defaults["unet"] == "gd256_uncond"
    assert tuple(defaults["blocks"]) == (33, 30, 27, 24)
    assert defaults["out_channels"] == 1024
    assert tuple(defaults["out_strides"]) == (4, 8, 16, 32)
    small = PRESETS["tiny"]
    with pytest.warns(UserWarning, match="RANDOM"):
        assert DiffusionBackbone(small).timestep == 90


# --------------------------------------------------------------------------------------------------
# Classification


def test_classification_recipes():
    pytest.importorskip("accelerate", reason="extra tools")
    from diffbackbone.eval.recipes import RECIPES, resolve

    def filled(recipe, **options):
        return resolve(replace(RECIPES[recipe], **options))

    for name, epochs in (("probe", 28), ("ablation", 15), ("fgvc", 28)):  # Section 4, Table 2
        recipe = filled(name)
        assert (recipe.optimizer, recipe.epochs, recipe.lr) == ("adam", epochs, (1e-3,))
        assert (recipe.step, recipe.gamma) == (7, 0.1)
        assert (recipe.batch_size, recipe.augment, recipe.select_on) == (128, "flip", "none")
        assert (recipe.unet, recipe.image_size) == ("gd256_uncond", 256)
        assert (recipe.head, recipe.pool) == ("linear", 2)  # Section 4.1
        assert recipe.timesteps == (150,)
        assert recipe.blocks == ((19,) if name == "fgvc" else (24,))  # Figure 4
        assert recipe.layers == 2  # of the attention head (Table 2)
        assert (recipe.width, recipe.feedback_layers) == (1024, ("conv", "batch", "relu"))
        assert not recipe.finetune
    for name, subset in (("semi-1", "1%"), ("semi-10", "10%")):  # Table 5
        recipe = filled(name)
        assert (recipe.subset, recipe.finetune) == (subset, True)
        assert (recipe.optimizer, recipe.lr) == ("sgd", (1e-3,))
    for name in ("probe", "probe-sgd", "ablation", "fgvc"):  # Tables 2 and 4 have CUB, too
        for options in ({"head": "attention"}, {"feedback": "bottleneck"}):
            recipe = filled(name, **options)
            taps = recipe.timesteps, recipe.blocks, recipe.pool  # Sections 3.1, 4.1.1
            assert (recipe.head, taps) == ("attention", ((150,), (24,), 16))
            assert recipe.batch_size == (16 if "feedback" in options else 128)
        recipe = filled(name, head="difformer")  # Table 3
        assert (recipe.timesteps, recipe.blocks) == ((90, 150, 300), (19, 24, 30))
    assert filled("probe", head="attention").lr == (1e-4,)
    sgd = filled("probe-sgd")  # the published scripts
    assert (sgd.optimizer, sgd.lr, sgd.momentum, sgd.augment) == ("sgd", (1e-2,), 0, "crop-flip")
    assert filled("probe-sgd", head="attention").lr == (5e-2,)
    assert filled("probe-sgd", feedback="bottleneck").lr == (1e-2,)


def test_mmpretrain_config():
    cfg = openmmlab_config("mmpretrain/attention_gd_t150_b24_in1k.py")
    backbone, head = cfg.model.backbone, cfg.model.head
    assert (backbone.unet, backbone.timesteps, backbone.blocks) == ("gd256_uncond", [150], [24])
    assert backbone.freeze
    assert (head.num_classes, head.layers) == (1000, 2)
    assert cfg.optim_wrapper.optimizer.type == "Adam"
    assert cfg.train_cfg.max_epochs == 28
    schedule = cfg.param_scheduler
    assert (schedule.type, schedule.step_size, schedule.gamma) == ("StepLR", 7, 0.1)
    kinds = [step.type for step in cfg.train_pipeline]
    assert kinds == ["LoadImageFromFile", "ResizeEdge", "CenterCrop", "RandomFlip", "PackInputs"]
    assert cfg.train_pipeline[2].crop_size == 256


# --------------------------------------------------------------------------------------------------
# Segmentation: Table 6, Sections 4.4 and 7.3


def openmmlab_config(name: str) -> Any:
    """Load a config, which inherits from those of its code base."""
    pytest.importorskip(name.split("/")[0])
    from mmengine.config import Config

    return Config.fromfile(CONFIGS / name, import_custom_modules=False)


GD_ROWS = {
    "gd_t90_b24": ([24, 24, 24, 24], None),
    "gd_t90_b33-30-27-24": ([33, 30, 27, 24], None),
    "difffeed": ([33, 30, 27, 24], "bottleneck"),
}


@pytest.mark.parametrize("row", [*GD_ROWS, "mae-b", "mae-l", "r50"])
def test_segmentation_table(row):
    cfg = openmmlab_config(f"mmseg/upernet_{row}_ade20k.py")
    assert cfg.train_cfg.max_iters == 16_000
    assert cfg.param_scheduler[-1].end == 16_000
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.model.decode_head.type == "UPerHead"
    assert cfg.model.decode_head.num_classes == 150
    (crop,) = (step for step in cfg.train_pipeline if step.type == "RandomCrop")
    assert crop.crop_size == (512, 512)
    assert cfg.model.data_preprocessor.size == (512, 512)
    assert cfg.test_pipeline[1].scale == (2048, 512)  # a single scale
    if row != "r50":
        assert cfg.model.decode_head.channels == (768 if row == "mae-b" else 1024)
    if row in GD_ROWS:
        backbone = cfg.model.backbone
        assert (backbone.unet, backbone.timestep) == ("gd256_uncond", 90)
        assert (backbone.blocks, backbone.get("feedback")) == GD_ROWS[row]
        assert backbone.out_channels == 1024
        assert backbone.out_strides == [4, 8, 16, 32]
        assert not backbone.get("freeze", False)
        assert cfg.optim_wrapper.optimizer.lr == 2e-5
    elif row != "r50":
        size = {"mae-b": (768, 12), "mae-l": (1024, 24)}[row]
        assert (cfg.model.backbone.embed_dims, cfg.model.backbone.num_layers) == size
        assert cfg.model.neck.rescales == [4, 2, 1, 0.5]


# --------------------------------------------------------------------------------------------------
# Detection: Figure 8, Sections 4.5 and 7.2, with ViTDet's settings


def check_jitter(augmentations: list[Any]) -> None:
    """ViTDet's augmentation: mirrored, scaled by 0.1 to 2, cut to 1024 px."""
    flip, scale, crop = augmentations
    assert type(flip).__name__ == "RandomFlip"
    assert (scale.min_scale, scale.max_scale) == (0.1, 2.0)
    assert (scale.target_height, scale.target_width) == (1024, 1024)
    assert tuple(crop.crop_size) == (1024, 1024)


def test_detectron2_yaml():
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.config import get_cfg

    from diffbackbone.detectron2 import add_diffusion_config
    from diffbackbone.detectron2.datasets import build_mapper

    def load(name: str) -> Any:
        cfg = get_cfg()
        add_diffusion_config(cfg)
        cfg.merge_from_file(str(CONFIGS / "detectron2" / name))
        return cfg

    cfg = load("mask_rcnn_gd_t75_b24.yaml")
    diffusion, solver = cfg.MODEL.DIFFUSION, cfg.SOLVER
    assert (diffusion.UNET, diffusion.TIMESTEP) == ("gd256_uncond", 75)
    assert tuple(diffusion.BLOCKS) == (24,)
    assert not diffusion.FREEZE
    assert solver.IMS_PER_BATCH == GPUS
    assert solver.MAX_ITER * GPUS == 10 * COCO
    assert [round(27 * step / solver.MAX_ITER, 3) for step in solver.STEPS] == [24, 26]
    assert (solver.OPTIMIZER, solver.WEIGHT_DECAY) == ("ADAMW", 0.1)
    assert (solver.LAYER_DECAY_RATE, solver.WARMUP_ITERS) == (0.8, 250)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (1024, 1024)
    check_jitter(build_mapper(cfg, True).augmentations.augs)

    resnet = load("mask_rcnn_r50.yaml").SOLVER  # its own batch, as many epochs
    assert resnet.IMS_PER_BATCH == 16
    assert resnet.MAX_ITER * 16 == 10 * COCO
    assert [round(27 * step / resnet.MAX_ITER) for step in resnet.STEPS] == [18, 24]


@pytest.mark.parametrize("name", ["mask_rcnn_gd_t75_b24", "mask_rcnn_vitdet_l_mae"])
def test_detectron2_python(name):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    if "vitdet" in name:
        pytest.importorskip("timm", reason="timm is not installed")
    from detectron2.config import LazyConfig, instantiate

    cfg = LazyConfig.load(str(CONFIGS / "detectron2" / f"{name}.py"))
    assert cfg.train.max_iter * GPUS == 10 * COCO
    assert cfg.dataloader.train.total_batch_size == GPUS
    assert cfg.optimizer.weight_decay == 0.1
    check_jitter(instantiate(cfg.dataloader.train.mapper.augmentations))
    net = cfg.model.backbone.net
    if "gd" in name:
        assert (net.unet, net.timestep, list(net.blocks)) == ("gd256_uncond", 75, [24])
    else:  # ViT-L
        assert (net.embed_dim, net.depth, net.num_heads) == (1024, 24, 16)


def test_mmdet_config():
    cfg = runpy.run_path(str(CONFIGS / "mmdet" / "mask_rcnn_gd_t75_b24_coco.py"))  # as it stands
    backbone = cfg["model"]["backbone"]
    assert (backbone["unet"], backbone["timestep"]) == ("gd256_uncond", 75)
    assert backbone["blocks"] == [24, 24, 24, 24]
    assert cfg["train_cfg"]["max_epochs"] == 10
    assert cfg["train_dataloader"]["batch_size"] == 1
    scale = next(step for step in cfg["train_pipeline"] if step["type"] == "RandomResize")
    assert (scale["ratio_range"], scale["scale"]) == ((0.1, 2.0), (1024, 1024))
    assert cfg["optim_wrapper"]["optimizer"]["weight_decay"] == 0.1
    schedule = cfg["param_scheduler"][-1]
    assert schedule["end"] * GPUS == 10 * COCO
    assert [round(27 * step / schedule["end"]) for step in schedule["milestones"]] == [24, 26]
