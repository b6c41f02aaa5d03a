"""UperNet's training step: MMSegmentation's, in the way of MMEngine's runner for one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# isort: off
import diffbackbone.mmseg  # noqa: F401  checks and repairs what mmseg needs
from mmengine import DefaultScope
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules

# isort: on
from diffbackbone.benchmark.config import STEPS, BenchmarkConfig, Case
from diffbackbone.benchmark.training import TrainingStep, random_image
from diffbackbone.cli import CONFIGS

register_all_modules(init_default_scope=False)


def read_config(case: Case, config: BenchmarkConfig) -> Any:
    """Return the case's config with the options."""
    cfg = Config.fromfile(str(CONFIGS / "mmseg" / STEPS[case.name][0]))
    weights = config.checkpoint and {"type": "Pretrained", "checkpoint": config.checkpoint}
    backbone = cfg.model.backbone
    backbone.update(unet=config.unet, freeze=case.mode == "frozen", init_cfg=weights)
    if config.activation_checkpointing is not None:
        backbone.activation_checkpointing = config.activation_checkpointing
    if width := config.head_channels:
        backbone.out_channels = width
        levels = len(cfg.model.decode_head.in_channels)
        cfg.model.decode_head.update(channels=width, in_channels=[width] * levels)
        cfg.model.auxiliary_head.update(channels=width, in_channels=width)
    cfg.model.data_preprocessor.size = (case.size, case.size)
    if case.dtype != "float32":  # as --amp of MMSegmentation's tools/train.py
        amp = {"type": "AmpOptimWrapper", "loss_scale": "dynamic", "dtype": case.dtype}
        cfg.optim_wrapper.update(amp)
    return cfg


def build(who: str, case: Case, config: BenchmarkConfig, folder: Path) -> TrainingStep:
    """Build the model, its optimizer and a batch."""
    cfg = read_config(case, config)
    torch.backends.cudnn.benchmark = cfg.env_cfg.cudnn_benchmark
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
        model = revert_sync_batchnorm(model).to(config.device).train()
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    random = torch.Generator().manual_seed(0)
    classes = model.decode_head.num_classes
    batch = {
        "inputs": [random_image(case.size, random) for _ in range(case.batch)],
        "data_samples": [random_labels(case.size, classes, random) for _ in range(case.batch)],
    }

    def update() -> None:
        model.train_step(batch, wrapper)

    return TrainingStep(model, wrapper.optimizer, update, case.dtype)


def random_labels(size: int, classes: int, random: torch.Generator) -> SegDataSample:
    """Return a label map of noise."""
    sample = SegDataSample(metainfo={"img_shape": (size, size), "ori_shape": (size, size)})
    labels = torch.randint(0, classes, (1, size, size), generator=random)
    sample.gt_sem_seg = PixelData(data=labels)
    return sample
