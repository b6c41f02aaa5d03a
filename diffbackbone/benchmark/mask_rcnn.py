"""Mask R-CNN's training step: Detectron2's, with this project's trainer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from diffbackbone.benchmark.config import STEPS, BenchmarkConfig, Case
from diffbackbone.benchmark.training import TrainingStep, random_image
from diffbackbone.cli import CONFIGS
from diffbackbone.detectron2 import add_diffusion_config
from diffbackbone.detectron2.engine import Trainer, make_step_trainer

OBJECTS = 8
"""In an image; COCO has 7.3 on average."""


def read_config(case: Case, config: BenchmarkConfig) -> Any:
    """Return the case's config with the options."""
    cfg = get_cfg()
    add_diffusion_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "detectron2" / STEPS[case.name][0]))
    model, diffusion = cfg.MODEL, cfg.MODEL.DIFFUSION
    model.DEVICE = config.device
    diffusion.UNET, diffusion.CHECKPOINT = config.unet, config.checkpoint or ""
    diffusion.FREEZE = case.mode == "frozen"
    if config.activation_checkpointing is not None:
        diffusion.ACTIVATION_CHECKPOINTING = config.activation_checkpointing
    if case.dtype != "float32":
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, case.dtype
    if width := config.head_channels:
        model.FPN.OUT_CHANNELS = model.ROI_MASK_HEAD.CONV_DIM = width
        model.ROI_BOX_HEAD.CONV_DIM = model.ROI_BOX_HEAD.FC_DIM = width
    return cfg


def build(who: str, case: Case, config: BenchmarkConfig, folder: Path) -> TrainingStep:
    """Build the model, its optimizer and a batch."""
    cfg = read_config(case, config)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    random = torch.Generator().manual_seed(0)
    classes, amp = cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.SOLVER.AMP
    batch = [random_sample(case.size, classes, random) for _ in range(case.batch)]
    trainer = make_step_trainer(model, itertools.repeat(batch), optimizer, amp.ENABLED, amp.DTYPE)

    def update() -> None:
        with EventStorage():
            trainer.run_step()

    return TrainingStep(model, optimizer, update, case.dtype)


def random_sample(size: int, classes: int, random: torch.Generator) -> dict[str, Any]:
    """Return an image with rectangles of 1/16 to 3/4 of its side."""
    sides = size * 12 ** torch.rand(OBJECTS, 2, generator=random) / 16
    corners = (size - sides) * torch.rand(OBJECTS, 2, generator=random)
    boxes = torch.cat([corners, corners + sides], dim=1)
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.randint(0, classes, (OBJECTS,), generator=random)
    polygons = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].numpy()
    instances.gt_masks = PolygonMasks([[polygon] for polygon in polygons])
    image = random_image(size, random)
    return {"image": image, "height": size, "width": size, "instances": instances}
