"""YAML configs: the keys of this package, the builders that read them, and loading."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from diffbackbone.detectron2.backbone import (
    DiffusionBackbone,
    DiffusionFPN,
    DiffusionSimpleFeaturePyramid,
)
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.sources import first_line
from diffbackbone.utils import UserError

PIXEL_MEAN = PIXEL_STD = (127.5, 127.5, 127.5)
"""``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` that map RGB of 0..255 to [-1, 1]."""


def add_diffusion_config(cfg: CfgNode) -> None:
    """Add the keys of this package to a Detectron2 config, in place.

    ``MODEL.DIFFUSION`` describes the backbone; empty strings, empty tuples and 0 channels stand for
    None, see :class:`DiffusionBackbone`. ``UNET_OPTIONS`` changes fields of the preset; None leaves
    them. Both pyramids read ``MODEL.FPN.OUT_CHANNELS`` and ``MODEL.FPN.NORM``; the feature pyramid
    network also ``MODEL.FPN.IN_FEATURES`` (empty: all taps) and ``MODEL.FPN.FUSE_TYPE``. The rest
    is read by :class:`diffbackbone.detectron2.engine.Trainer`, which also allows
    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model"``: the norm of all gradients together.
    """
    cfg.MODEL.DIFFUSION = CfgNode(
        {
            "UNET": "gd256_uncond",  # a preset, or diffusers://<folder or hub id>
            "CHECKPOINT": "",  # path or URL of guided-diffusion weights; "" leaves random weights
            "TIMESTEP": 75,  # t, 0-based
            "TIMESTEPS": (),  # overrides TIMESTEP: one run of the U-Net for each
            "COMBINE": "concat",  # taps of several timesteps; or "mean"
            "BLOCKS": (24,),  # tapped blocks, 1-based
            "FEEDBACK": "",  # "", "all", "bottleneck", "windowed" or "multi-scale"
            "FEEDBACK_MAP": (),  # overrides FEEDBACK: pairs (source block, target block)
            "FIRST_PASS_GRAD": False,  # gradient through DifFeed's first pass
            "OUT_CHANNELS": 0,  # 1x1 projections of the taps
            "OUT_STRIDES": (),  # bilinear resizing of the taps
            "NOISE": "fixed",  # "fixed" (by SEED), "image" (by SEED and pixels), "random", "none"
            "SEED": 0,
            "CLASS_LABEL": -1,  # given to a class-conditional U-Net; -1 for none
            "FREEZE": False,  # keep the U-Net as it is
            "SAVE_FROZEN": False,  # keep a frozen U-Net's weights in training checkpoints
            "DTYPE": "float32",  # of a frozen U-Net; or "bfloat16", "float16"
            "ACTIVATION_CHECKPOINTING": False,  # recompute blocks in the backward pass
            "ACTIVATION_BUDGET": -1.0,  # GB of activations to keep instead; -1.0 for no limit
            "PADDING": "separate",  # "separate", "reflect" or "keep"
            "SCALE_FACTORS": (4.0, 2.0, 1.0, 0.5),  # levels of the simple feature pyramid
            "TOP_BLOCK": "maxpool",  # on both pyramids: "maxpool", "p6p7" or "none"
        }
    )
    # fields of UNetConfig, or of the configuration of another family
    fields = {field.name: None for field in dataclasses.fields(UNetConfig)}
    cfg.MODEL.DIFFUSION.UNET_OPTIONS = CfgNode(fields, new_allowed=True)
    cfg.SOLVER.OPTIMIZER = "SGD"  # or "ADAMW"
    cfg.SOLVER.BETAS = (0.9, 0.999)  # AdamW's
    cfg.SOLVER.LAYER_DECAY_RATE = 1.0  # see diffbackbone.optim.layer_scales
    cfg.SOLVER.CHECKPOINT_KEEP = 0  # number of latest checkpoints to keep; 0 for all
    cfg.SOLVER.AMP.DTYPE = "auto"  # bfloat16 if the GPU has it; or "bfloat16", "float16"
    # large-scale jitter; SIZE is the side of the square in pixels
    cfg.INPUT.LSJ = CfgNode({"ENABLED": False, "SIZE": 1024, "MIN_SCALE": 0.1, "MAX_SCALE": 2.0})
    # read images of any depth, of as many channels as PIXEL_MEAN has values; see DeepDatasetMapper
    cfg.INPUT.DEEP = False
    cfg.INPUT.VALUE_RANGE = ()


@BACKBONE_REGISTRY.register()
def build_diffusion_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DiffusionBackbone:
    """Build the taps by themselves, named ``"b24"`` and so on; see :func:`add_diffusion_config`."""
    pixels = (*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD)
    channels = len(cfg.MODEL.PIXEL_MEAN)
    scaled = len(pixels) == 2 * channels and all(abs(x - 127.5) <= 0.5 for x in pixels)
    if not scaled or cfg.INPUT.FORMAT != "RGB" or (channels != 3 and not cfg.INPUT.DEEP):
        raise UserError(
            "diffusion models take RGB in [-1, 1]: MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be "
            f"{list(PIXEL_MEAN)} and INPUT.FORMAT 'RGB', got {cfg.MODEL.PIXEL_MEAN}, "
            f"{cfg.MODEL.PIXEL_STD} and {cfg.INPUT.FORMAT!r}. Other numbers of channels need "
            "INPUT.DEEP"
        )
    node = cfg.MODEL.DIFFUSION
    changes = {name: value for name, value in node.UNET_OPTIONS.items() if value is not None}
    return DiffusionBackbone(
        unet={"preset": node.UNET, **changes},
        checkpoint=node.CHECKPOINT or None,
        timestep=node.TIMESTEPS or node.TIMESTEP,
        combine=node.COMBINE,
        blocks=node.BLOCKS,
        feedback=dict(node.FEEDBACK_MAP) or node.FEEDBACK or None,
        out_channels=node.OUT_CHANNELS or None,
        out_strides=node.OUT_STRIDES or None,
        noise=node.NOISE,
        freeze=node.FREEZE,
        seed=node.SEED,
        class_label=None if node.CLASS_LABEL < 0 else node.CLASS_LABEL,
        first_pass_grad=node.FIRST_PASS_GRAD,
        activation_checkpointing=node.ACTIVATION_CHECKPOINTING,
        activation_budget=None if node.ACTIVATION_BUDGET < 0 else node.ACTIVATION_BUDGET,
        dtype=node.DTYPE,
        padding=node.PADDING,
        save_frozen=node.SAVE_FROZEN,
    )


@BACKBONE_REGISTRY.register()
def build_diffusion_sfp_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> DiffusionSimpleFeaturePyramid:
    """Build ViTDet's simple feature pyramid on one tap; see :func:`add_diffusion_config`."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return DiffusionSimpleFeaturePyramid(
        build_diffusion_backbone(cfg, input_shape),
        channels,
        cfg.MODEL.DIFFUSION.SCALE_FACTORS,
        _build_top_block(cfg, "p5", channels),
        cfg.MODEL.FPN.NORM or "LN",
    )


@BACKBONE_REGISTRY.register()
def build_diffusion_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DiffusionFPN:
    """Build a feature pyramid network on several taps; see :func:`add_diffusion_config`."""
    net = build_diffusion_backbone(cfg, input_shape)
    coarsest, shape = max(net.output_shape().items(), key=lambda item: item[1].stride)
    return DiffusionFPN(
        net,
        cfg.MODEL.FPN.IN_FEATURES,
        cfg.MODEL.FPN.OUT_CHANNELS,
        cfg.MODEL.FPN.NORM,
        _build_top_block(cfg, coarsest, shape.channels),
        cfg.MODEL.FPN.FUSE_TYPE,
    )


def _build_top_block(cfg: CfgNode, in_feature: str, in_channels: int) -> nn.Module | None:
    """Build the block on top of a pyramid; P6 and P7 are computed from ``in_feature``."""
    return {
        "none": lambda: None,
        "maxpool": LastLevelMaxPool,
        "p6p7": lambda: LastLevelP6P7(in_channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature),
    }[cfg.MODEL.DIFFUSION.TOP_BLOCK]()


def load_yaml(config_file: str, options: Sequence[str] = ()) -> CfgNode:
    """Load a YAML config (plain YAML, no code) on top of Detectron2's defaults, frozen.

    ``options`` are alternating keys and values, which override the file's.

    Raises:
        UserError: The file can't be read, or a key doesn't exist.
    """
    cfg = get_cfg()
    add_diffusion_config(cfg)
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
        cfg.merge_from_list(list(options))
    except Exception as error:  # yacs and PyYAML raise many types
        raise UserError(f"{config_file}: {first_line(error)}") from error
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError("MODEL.LOAD_PROPOSALS: proposal files are pickles, which can run code")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU found: the model runs on the CPU", file=sys.stderr)
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg
