"""YAML configs: the keys of this package, the builders that read them, and loading."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, GeneralizedRCNN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.utils.file_io import PathManager  # noqa: F401  registers handlers of URLs
from torch import nn

from diffbackbone.detectron2.backbone import (
    DiffusionBackbone,
    DiffusionFPN,
    DiffusionSimpleFeaturePyramid,
)
from diffbackbone.utils import UserError

PIXEL_MEAN = PIXEL_STD = (127.5, 127.5, 127.5)
"""``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` that map RGB of 0..255 to [-1, 1]."""
UNET_OPTIONS = "MODEL.DIFFUSION.UNET_OPTIONS."
HEADS: dict[str, dict[str, str | None]] = {
    "GeneralizedRCNN": {"RPN": None, "ROI_HEADS": "thing_classes"},
    "PanopticFPN": {"RPN": None, "ROI_HEADS": "thing_classes", "SEM_SEG_HEAD": "stuff_classes"},
    "ProposalNetwork": {"RPN": None},
    "RetinaNet": {"RETINANET": "thing_classes"},
    "SemanticSegmentor": {"SEM_SEG_HEAD": "stuff_classes"},
}
"""Heads that read a pyramid's levels, by architecture, and the classes that each predicts."""


def add_diffusion_config(cfg: CfgNode) -> None:
    """Add the keys of this package to a Detectron2 config, in place.

    ``MODEL.DIFFUSION`` describes the backbone; empty strings, empty tuples and 0 channels stand for
    None, see :class:`DiffusionBackbone`. Both pyramids read ``MODEL.FPN.OUT_CHANNELS`` and
    ``MODEL.FPN.NORM``; the feature pyramid network also ``MODEL.FPN.IN_FEATURES`` (empty: all taps)
    and ``MODEL.FPN.FUSE_TYPE``. ``SOLVER`` and ``INPUT.LSJ`` are read by
    :class:`diffbackbone.detectron2.engine.Trainer`, which also allows
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
    cfg.MODEL.DIFFUSION.UNET_OPTIONS = CfgNode(
        new_allowed=True
    )  # UNetConfig's or DiffusersConfig's
    cfg.SOLVER.OPTIMIZER = "SGD"  # or "ADAMW"
    cfg.SOLVER.BETAS = (0.9, 0.999)  # AdamW's
    cfg.SOLVER.LAYER_DECAY_RATE = 1.0  # see diffbackbone.optim.layer_scales
    cfg.SOLVER.CHECKPOINT_KEEP = 0  # number of latest checkpoints to keep; 0 for all
    cfg.SOLVER.AMP.DTYPE = "auto"  # bfloat16 if the GPU has it; or "bfloat16", "float16"
    # large-scale jitter; SIZE is the side of the square in pixels
    cfg.INPUT.LSJ = CfgNode({"ENABLED": False, "SIZE": 1024, "MIN_SCALE": 0.1, "MAX_SCALE": 2.0})


@BACKBONE_REGISTRY.register()
def build_diffusion_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DiffusionBackbone:
    """Build the taps by themselves, named ``"b24"`` and so on; see :func:`add_diffusion_config`."""
    pixels = (*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD)
    scaled = len(pixels) == 6 and all(abs(x - 127.5) <= 0.5 for x in pixels)
    if not scaled or cfg.INPUT.FORMAT != "RGB" or input_shape.channels not in (None, 3):
        raise UserError(
            "diffusion U-Nets take RGB in [-1, 1]: MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be "
            f"{list(PIXEL_MEAN)} and INPUT.FORMAT 'RGB', got {cfg.MODEL.PIXEL_MEAN}, "
            f"{cfg.MODEL.PIXEL_STD} and {cfg.INPUT.FORMAT!r}"
        )
    node = cfg.MODEL.DIFFUSION
    return DiffusionBackbone(
        unet={"preset": node.UNET, **node.UNET_OPTIONS},
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
    net = build_diffusion_backbone(cfg, input_shape)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    pyramid = DiffusionSimpleFeaturePyramid(
        net,
        out_channels=channels,
        scale_factors=cfg.MODEL.DIFFUSION.SCALE_FACTORS,
        top_block=_top_block(cfg.MODEL.DIFFUSION.TOP_BLOCK, channels, ("p5", channels)),
        norm=cfg.MODEL.FPN.NORM or "LN",
    )
    _check_heads(cfg, pyramid)
    return pyramid


@BACKBONE_REGISTRY.register()
def build_diffusion_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DiffusionFPN:
    """Build a feature pyramid network on several taps; see :func:`add_diffusion_config`."""
    net = build_diffusion_backbone(cfg, input_shape)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    name, shape = max(net.output_shape().items(), key=lambda item: item[1].stride)
    pyramid = DiffusionFPN(
        net,
        cfg.MODEL.FPN.IN_FEATURES,
        channels,
        cfg.MODEL.FPN.NORM,
        _top_block(cfg.MODEL.DIFFUSION.TOP_BLOCK, channels, (name, shape.channels)),
        cfg.MODEL.FPN.FUSE_TYPE,
    )
    _check_heads(cfg, pyramid)
    return pyramid


def _top_block(name: str, channels: int, source: tuple[str, int]) -> nn.Module | None:
    """Build a top block; ``source`` is the map and its channels that P6 is computed from."""
    blocks = {
        "none": lambda: None,
        "maxpool": LastLevelMaxPool,
        "p6p7": lambda: LastLevelP6P7(source[1], channels, source[0]),
    }
    return blocks[name]()


def _check_heads(cfg: CfgNode, pyramid: Backbone) -> None:
    heads = HEADS.get(cfg.MODEL.META_ARCHITECTURE, {})
    check_levels(
        pyramid, {f"MODEL.{name}.IN_FEATURES": cfg.MODEL[name].IN_FEATURES for name in heads}
    )


def check_levels(backbone: Backbone, wanted: Mapping[str, Sequence[str]]) -> None:
    """Check that a pyramid has the levels that heads read, given by the config's key."""
    levels = {name: shape.stride for name, shape in backbone.output_shape().items()}
    for key, names in wanted.items():
        missing = [name for name in names if name not in levels]
        if missing:
            raise UserError(
                f"{key} names levels {missing}, which the pyramid lacks; its levels and strides "
                f"are {levels}"
            )


def load_yaml(config_file: str, options: Sequence[str] = ()) -> CfgNode:
    """Load a YAML config (plain YAML, no code) on top of Detectron2's defaults, frozen.

    ``options`` are alternating keys and values, which override the file's.
    """
    cfg = get_cfg()
    add_diffusion_config(cfg)
    options = list(options[1:] if options[:1] == ["--"] else options)
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
        for key, value in zip(options[::2], options[1::2]):
            if key.startswith(UNET_OPTIONS):  # yacs adds new keys from files only
                name = key.removeprefix(UNET_OPTIONS)
                cfg.MODEL.DIFFUSION.UNET_OPTIONS[name] = cfg._decode_cfg_value(value)
        rest = [x for i, x in enumerate(options) if not options[i - i % 2].startswith(UNET_OPTIONS)]
        cfg.merge_from_list(rest)
    except Exception as error:  # yacs and PyYAML raise many types
        text = str(error)  # yacs may quote whole sections
        text = text if len(text) < 600 else f"{text[:300]} ... {text[-200:]}"
        raise UserError(f"{config_file}: {text}") from error
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    return cfg


@functools.cache
def available_device(name: str) -> str:
    """Return a device's name, ``"cpu"`` in place of a GPU that doesn't exist."""
    if torch.device(name).type != "cuda" or torch.cuda.is_available():
        return name
    print("no GPU found: the model runs on the CPU", file=sys.stderr)
    return "cpu"


def check_supported(cfg: CfgNode) -> None:
    """Check that the config asks for nothing that this package or Detectron2 lacks."""
    problems = []
    if cfg.MODEL.LOAD_PROPOSALS:
        problems.append("MODEL.LOAD_PROPOSALS True: proposal files are pickles, which can run code")
    diffusion = cfg.MODEL.DIFFUSION
    feedback = bool(diffusion.FEEDBACK or diffusion.FEEDBACK_MAP)
    if cfg.TEST.PRECISE_BN.ENABLED and feedback and diffusion.PADDING == "separate":
        problems.append(
            "TEST.PRECISE_BN.ENABLED True with DifFeed and MODEL.DIFFUSION.PADDING 'separate', "
            "which runs batch norm once for each size of images"
        )
    if cfg.TEST.AUG.ENABLED:
        kind = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        takes_boxes = (  # PanopticFPN, an R-CNN too, does not
            issubclass(kind, GeneralizedRCNN)
            and "detected_instances" in inspect.signature(kind.inference).parameters
        )
        if not takes_boxes or cfg.MODEL.KEYPOINT_ON or not cfg.TEST.AUG.MIN_SIZES:
            problems.append(
                "TEST.AUG.ENABLED True: needs boxes and masks (no keypoints) of a GeneralizedRCNN "
                f"and TEST.AUG.MIN_SIZES, got MODEL.META_ARCHITECTURE {kind.__name__}, "
                f"MODEL.KEYPOINT_ON {cfg.MODEL.KEYPOINT_ON} and MIN_SIZES {cfg.TEST.AUG.MIN_SIZES}"
            )
    if problems:
        raise UserError("not supported: " + "; ".join(problems))
