"""Detectron2 adapter: the backbone, its pyramids, and the keys that configure them.

YAML configs name a builder and set keys that :func:`add_diffusion_config` adds::

    from detectron2.config import get_cfg
    from diffbackbone.detectron2 import add_diffusion_config

    cfg = get_cfg()
    add_diffusion_config(cfg)
    cfg.merge_from_file("configs/detectron2/mask_rcnn_gd_t75_b24.yaml")

Python configs take the classes, ``L(DiffusionSimpleFeaturePyramid)(net=L(DiffusionBackbone)())``.
Importing this module also registers the sample data by name (:data:`SAMPLE_DATASETS`).
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from diffbackbone import compat

compat.check_detectron2_stack()

import torch  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import load_coco_json, load_sem_seg  # noqa: E402
from detectron2.data.datasets.coco_panoptic import merge_to_panoptic  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone  # noqa: E402
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7  # noqa: E402
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid  # noqa: E402
from detectron2.solver.build import get_default_optimizer_params  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from diffbackbone.backbone import MAX_CHANNELS  # noqa: E402
from diffbackbone.backbone import DiffusionBackbone as _DiffusionBackbone  # noqa: E402
from diffbackbone.models.base import is_number  # noqa: E402
from diffbackbone.models.gd_config import UNetConfig  # noqa: E402
from diffbackbone.optim import layer_scales  # noqa: E402
from diffbackbone.padding import pad_to_multiple, pad_to_size  # noqa: E402
from diffbackbone.utils import check_names  # noqa: E402

PADDINGS = ("separate", "reflect", "keep")
"""What is done about the padding that brings images of unequal size into one batch."""
TOP_BLOCKS = ("none", "maxpool", "p6p7")
"""What a pyramid gets on top of its coarsest level."""
PIXEL_MEAN = PIXEL_STD = (127.5, 127.5, 127.5)
"""``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` that bring RGB of 0..255 to [-1, 1]."""


# --------------------------------------------------------------------------------------------------
# batches of images


def content_sizes(images: Tensor) -> list[tuple[int, int]]:
    """Sizes of the images in a batch, without the zeros that Detectron2 pads them with.

    Detectron2 hands a backbone the padded batch only. With mean 127.5 no pixel of 0..255 becomes
    zero, so rows and columns of zeros at the bottom and right are padding.

    Args:
        images: (N, C, H, W), normalized and zero-padded.

    Returns:
        Height and width of each image; those of the batch where an image is zero everywhere.
    """
    filled = images != 0
    rows, columns = filled.any(dim=3).any(dim=1), filled.any(dim=2).any(dim=1)
    sizes = []
    for used in (rows, columns):
        last = torch.arange(1, used.shape[1] + 1, device=used.device) * used
        sizes.append(last.amax(dim=1))
    height, width = images.shape[-2:]
    return [(h or height, w or width) for h, w in torch.stack(sizes, dim=1).tolist()]


def _run_batch(
    images: Tensor,
    run: Callable[[Tensor], dict[str, Tensor]],
    strides: Mapping[str, int],
    divisibility: int,
    padding: str,
) -> dict[str, Tensor]:
    """Maps of a batch of zero-padded images, of which ``run`` gets none.

    Args:
        images: (N, 3, H, W), normalized and zero-padded.
        run: The network, for images whose sides are multiples of ``divisibility``.
        strides: Stride of each map.
        divisibility: See ``run``.
        padding: One of :data:`PADDINGS`.

    Returns:
        Maps (N, C, ceil(H / stride), ceil(W / stride)). With ``"separate"`` they are zero beyond
        an image's own size, rounded up to ``divisibility``.
    """
    height, width = images.shape[-2:]
    sizes = [(height, width)] if padding == "keep" else content_sizes(images)
    if padding == "reflect" and set(sizes) != {(height, width)}:
        parts = [pad_to_size(x[None, :, :h, :w], height, width) for x, (h, w) in zip(images, sizes)]
        images = torch.cat(parts)
    if padding != "separate" or len(set(sizes)) == 1:
        h, w = sizes[0] if padding == "separate" else (height, width)
        maps = run(pad_to_multiple(images[..., :h, :w], divisibility))
        return {
            name: _fit(x, math.ceil(height / strides[name]), math.ceil(width / strides[name]))
            for name, x in maps.items()
        }
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    out: dict[str, list[Tensor]] = {}
    order = [index for group in groups.values() for index in group]
    for (h, w), group in groups.items():
        maps = run(pad_to_multiple(images[group][..., :h, :w], divisibility))
        for name, x in maps.items():
            size = math.ceil(height / strides[name]), math.ceil(width / strides[name])
            out.setdefault(name, []).append(_fit(x, *size))
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=images.device)
    return {name: torch.cat(parts)[back] for name, parts in out.items()}


def _fit(x: Tensor, height: int, width: int) -> Tensor:
    """Cut or zero-pad a map at the bottom and right."""
    right, bottom = width - x.shape[-1], height - x.shape[-2]
    return x if right == bottom == 0 else nn.functional.pad(x, (0, right, 0, bottom))


class _WholeBatches(Backbone):
    """What the backbones below share: any image sizes in a batch, and no TorchScript."""

    padding: str
    divisibility: int

    def _setup_batches(self, padding: str, divisibility: int) -> None:
        if padding not in PADDINGS:
            raise ValueError(
                f"padding must be one of {', '.join(PADDINGS)}, got {shorten(padding)}"
            )
        self.padding, self.divisibility = padding, divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What Detectron2 pads batches to, in pixels."""
        return {"size_divisibility": self.divisibility}

    def _forward_batch(
        self, images: Tensor, run: Callable[[Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if torch.jit.is_tracing():
            raise RuntimeError(_NO_TORCHSCRIPT)
        strides = {name: shape.stride for name, shape in self.output_shape().items()}
        return _run_batch(images, run, strides, self.divisibility, self._effective_padding())

    def _effective_padding(self) -> str:
        """Synchronized batch norm waits for all processes: each has to run it equally often."""
        if self.padding == "separate" and self.training and torch.distributed.is_initialized():
            kinds = (nn.SyncBatchNorm,)
            if any(isinstance(m, kinds) or "SyncBatch" in type(m).__name__ for m in self.modules()):
                return "reflect"
        return self.padding

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(_NO_TORCHSCRIPT)


_NO_TORCHSCRIPT = (
    "diffusion backbones can't be traced or scripted to TorchScript: noise, padding and the number "
    "of passes depend on the size of the images, which a trace would freeze. torch.compile works"
)


# --------------------------------------------------------------------------------------------------
# backbones


class DiffusionBackbone(_DiffusionBackbone, _WholeBatches):
    """:class:`diffbackbone.DiffusionBackbone` as a Detectron2 backbone: maps by name.

    The map of block b is called ``"b<b>"``, say ``"b24"``. Images come as Detectron2 normalizes
    them with mean and std 127.5, RGB; any sizes, equal or not.

    Args:
        unet: See :class:`diffbackbone.DiffusionBackbone`, like all arguments that are not listed.
        timestep: The paper's for detection (Section 4.5).
        blocks: Tapped blocks, 1-based, each once.
        out_channels: None keeps the taps' channels.
        out_strides: None keeps the taps' strides.
        padding: ``"separate"`` runs images of each size on their own, so that an image's maps
            don't depend on what shares its batch; ``"reflect"`` replaces Detectron2's zeros by the
            images' mirror image and runs the batch at once; ``"keep"`` leaves the zeros (which are
            mid-grey). With synchronized batch norm, training takes ``"reflect"`` for
            ``"separate"``.
        save_frozen: See :class:`diffbackbone.DiffusionBackbone`; off here.

    Raises:
        ValueError: See :class:`diffbackbone.DiffusionBackbone`; or a block is named twice.
    """

    size_divisibility: int = 0  # in place of Backbone's property: __init__ sets it

    def __init__(
        self,
        unet: str | Mapping[str, Any] = "gd256_uncond",
        checkpoint: str | os.PathLike[str] | None = None,
        timestep: int = 75,
        blocks: Sequence[int] | int = (24,),
        feedback: str | Mapping[int, int] | None = None,
        out_channels: int | None = None,
        out_strides: Sequence[int] | None = None,
        noise: str = "fixed",
        freeze: bool = False,
        *,
        padding: str = "separate",
        save_frozen: bool = False,
        **kwargs: Any,
    ) -> None:
        check_names("DiffusionBackbone", kwargs, _ARGUMENTS)
        super().__init__(
            _plain(unet),
            checkpoint,
            timestep,
            _plain(blocks),
            _plain(feedback),
            out_channels,
            _plain(out_strides),
            noise,
            freeze,
            save_frozen=save_frozen,
            **kwargs,
        )
        if len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks {list(self.blocks)}: Detectron2's maps are named by block")
        self._setup_batches(padding, self.size_divisibility)
        self._out_features = [f"b{block}" for block in self.blocks]
        self._out_feature_channels = dict(zip(self._out_features, self.channels))
        self._out_feature_strides = dict(zip(self._out_features, self.strides))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of a batch.

        Args:
            images: (N, 3, H, W) RGB in [-1, 1], zero-padded.

        Returns:
            ``{"b<b>": (N, C_b, ceil(H / stride_b), ceil(W / stride_b))}``.

        Raises:
            ValueError: See :meth:`diffbackbone.DiffusionBackbone.forward`.
            RuntimeError: In tracing.
        """
        return self._forward_batch(images, self._named_maps)

    def _named_maps(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._out_features, _DiffusionBackbone.forward(self, images)))


_ARGUMENTS = (
    *(name for name in inspect.signature(_DiffusionBackbone.__init__).parameters if name != "self"),
    "padding",
)


def _plain(value: Any) -> Any:
    """A dict or tuple in place of a config's own container; anything else as it is."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(map(_plain, value))
    return value


NORMS = (
    "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"
)  # fmt: skip
"""Detectron2's norms by name."""


def _check_pyramid(out_channels: Any, norm: Any) -> None:
    """Check what both pyramids take: Detectron2 gives a bare KeyError for an unknown norm.

    Raises:
        ValueError: It can't be used.
    """
    named = isinstance(norm, str) and norm in ("", *NORMS)
    if not named and (isinstance(norm, str) or not callable(norm)):
        raise ValueError(
            f"there is no norm {shorten(norm)} (MODEL.FPN.NORM); choose from {', '.join(NORMS)}"
        )
    if out_channels is None:
        raise ValueError("out_channels must be a positive integer, got None")
    if not is_number(out_channels, int) or not 1 <= out_channels <= MAX_CHANNELS:
        raise ValueError(
            f"out_channels must be an integer from 1 to {MAX_CHANNELS}, got {out_channels!r:.200}"
        )
    if norm == "GN" and out_channels % 32:
        raise ValueError(f"norm 'GN' needs out_channels in multiples of 32, got {out_channels}")


class _Pyramid(_WholeBatches):
    """What the two pyramids share."""

    def _setup_pyramid(self, net: DiffusionBackbone) -> None:
        coarsest = max(net.output_shape()[f"b{b}"].stride for b in net.blocks)
        divisibility = math.lcm(self._size_divisibility, net.size_divisibility, coarsest)
        self._setup_batches(net.padding, divisibility)
        net.padding = "keep"  # the pyramid sees to it

    @property
    def size_divisibility(self) -> int:
        """What Detectron2 pads batches to, in pixels."""
        return self.divisibility


class DiffusionSimpleFeaturePyramid(_Pyramid, SimpleFeaturePyramid):
    """ViTDet's simple feature pyramid on one tap, as Section 7.2 borrows it.

    Args:
        net: The backbone, with one tapped block.
        in_feature: Name of the tap; None takes the only one.
        out_channels: Channels of each level.
        scale_factors: Size of each level relative to the tap's: 4, 2, 1 and 0.5 can be had.
        top_block: What comes on top, for instance Detectron2's ``LastLevelMaxPool``.
        norm: Norm of the convolutions, such as ``"LN"``.

    Raises:
        ValueError: The backbone has several taps, the tap's stride doesn't divide up, or there is
            no norm.
    """

    def __init__(
        self,
        net: DiffusionBackbone,
        in_feature: str | None = None,
        out_channels: int = 256,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        top_block: nn.Module | None = None,
        norm: str = "LN",
    ) -> None:
        shapes = net.output_shape()
        if in_feature is None and len(shapes) != 1:
            raise ValueError(
                f"a simple feature pyramid stands on one block, got {len(shapes)}: "
                f"{list(net.blocks)}; for several blocks take build_diffusion_fpn_backbone"
            )
        in_feature = in_feature or next(iter(shapes))
        if in_feature not in shapes:
            raise ValueError(f"in_feature must be one of {list(shapes)}, got {in_feature!r}")
        scale_factors = _plain(scale_factors)
        known = isinstance(scale_factors, tuple) and all(
            is_number(scale) and scale in (4.0, 2.0, 1.0, 0.5) for scale in scale_factors
        )
        if not known or not scale_factors or len(set(scale_factors)) < len(scale_factors):
            given = list(scale_factors) if isinstance(scale_factors, tuple) else scale_factors
            raise ValueError(f"scale factors must be of 4, 2, 1, 0.5, got {shorten(given)}")
        _check_pyramid(out_channels, norm or "")
        if not norm:
            raise ValueError(
                "Detectron2's simple feature pyramid needs a norm, such as 'LN' (MODEL.FPN.NORM)"
            )
        stride, finest = shapes[in_feature].stride, int(max(scale_factors))
        if stride % finest:
            raise ValueError(
                f"block {in_feature[1:]} has stride {stride}, which can't be divided by "
                f"{finest}, the largest scale factor; {_blocks_by_stride(net, finest)}"
            )
        with contextlib.suppress(AttributeError):  # modules have no place before __init__
            top_block.in_feature = f"p{int(math.log2(stride / scale_factors[-1]))}"
        super().__init__(
            net, in_feature, out_channels, list(scale_factors), top_block, norm, square_pad=0
        )
        self._setup_pyramid(net)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of a batch.

        Args:
            images: (N, 3, H, W) RGB in [-1, 1], zero-padded.

        Returns:
            ``{"p<l>": (N, C, ceil(H / 2^l), ceil(W / 2^l))}``, from fine to coarse.

        Raises:
            ValueError: See :meth:`diffbackbone.DiffusionBackbone.forward`.
            RuntimeError: In tracing.
        """
        return self._forward_batch(images, super().forward)


class DiffusionFPN(_Pyramid, FPN):
    """Feature pyramid network on several taps.

    Args:
        bottom_up: The backbone; its maps have strides s, 2s, 4s, ...
        in_features: Names of the taps from fine to coarse; None takes all.
        out_channels: Channels of each level.
        norm: Norm of the convolutions; "" for none.
        top_block: What comes on top.
        fuse_type: ``"sum"`` or ``"avg"``.

    Raises:
        ValueError: There are fewer than two taps, or their strides don't double.
    """

    def __init__(
        self,
        bottom_up: DiffusionBackbone,
        in_features: Sequence[str] | None = None,
        out_channels: int = 256,
        norm: str = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
    ) -> None:
        shapes = bottom_up.output_shape()
        if isinstance(in_features, str) or not isinstance(in_features, (Sequence, type(None))):
            raise ValueError(f"in_features must be a list of names, got {shorten(in_features)}")
        _check_pyramid(out_channels, norm or "")
        if fuse_type not in ("sum", "avg"):
            raise ValueError(f"fuse_type must be sum or avg, got {shorten(fuse_type)}")
        names = list(in_features or sorted(shapes, key=lambda name: shapes[name].stride))
        unknown = [name for name in names if name not in shapes]
        if unknown:
            raise ValueError(f"in_features must be of {list(shapes)}, got {unknown}")
        strides = [shapes[name].stride for name in names]
        doubled = [strides[0] << level for level in range(len(strides))]
        if len(names) < 2 or strides != doubled:
            raise ValueError(
                f"a feature pyramid network needs two or more taps whose strides double, such as "
                f"4, 8, 16, 32; got {dict(zip(names, strides))}; "
                f"{_blocks_by_stride(bottom_up, 1)}"
            )
        with contextlib.suppress(AttributeError):
            if top_block.in_feature == "p5":  # LastLevelMaxPool's, whatever the pyramid
                top_block.in_feature = f"p{int(math.log2(strides[-1]))}"
        super().__init__(bottom_up, names, out_channels, norm, top_block, fuse_type)
        self._setup_pyramid(bottom_up)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`DiffusionSimpleFeaturePyramid.forward`."""
        return self._forward_batch(images, super().forward)


def _blocks_by_stride(net: DiffusionBackbone, divisor: int) -> str:
    """The blocks at each stride that ``divisor`` divides, in words."""
    strides: dict[int, list[int]] = {}
    for block in net.unet.config.blocks.values():
        if block.stride % divisor == 0:
            strides.setdefault(block.stride, []).append(block.index)
    return "this U-Net's blocks: " + "; ".join(
        f"stride {stride}: {_ranges(blocks)}" for stride, blocks in sorted(strides.items())
    )


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


# --------------------------------------------------------------------------------------------------
# YAML configs


def add_diffusion_config(cfg: CfgNode) -> None:
    """Add the keys of this package to a Detectron2 config, in place.

    ``MODEL.DIFFUSION``, read by the three builders; empty strings, empty tuples and 0 channels
    stand for None. See :class:`DiffusionBackbone` for what each does.

    =========================  =====================================================================
    UNET                       Preset (``diffbackbone.models.guided_diffusion.PRESETS``)
    UNET_OPTIONS               Fields of ``UNetConfig`` that differ from the preset
    CHECKPOINT                 Path or URL of guided-diffusion weights; "" leaves random weights
    TIMESTEP                   t, 0-based
    BLOCKS                     Tapped blocks, 1-based
    FEEDBACK                   "", "all", "bottleneck", "windowed" or "multi-scale"
    FEEDBACK_MAP               In place of FEEDBACK: pairs (source block, target block)
    FIRST_PASS_GRAD            Gradient through DifFeed's first pass
    OUT_CHANNELS, OUT_STRIDES  1x1 projections and bilinear resizing of the taps
    NOISE, SEED                "fixed" (by SEED), "random" or "none"
    CLASS_LABEL                Label given to a class-conditional U-Net; -1 for none
    FREEZE                     Keep the U-Net as it is
    SAVE_FROZEN                Keep a frozen U-Net's weights in training checkpoints
    DTYPE                      Of a frozen U-Net: "float32", "bfloat16" or "float16"
    ACTIVATION_CHECKPOINTING   Recompute blocks in the backward pass
    ACTIVATION_BUDGET          GB that they may keep for it instead; -1.0 for no limit
    PADDING                    "separate", "reflect" or "keep"
    SCALE_FACTORS              Levels of the simple feature pyramid
    TOP_BLOCK                  "maxpool", "p6p7" or "none", on both pyramids
    =========================  =====================================================================

    Both pyramids read ``MODEL.FPN.OUT_CHANNELS`` and ``MODEL.FPN.NORM``; the feature pyramid
    network also ``MODEL.FPN.IN_FEATURES`` (empty: all taps) and ``MODEL.FPN.FUSE_TYPE``.

    For the trainer in :mod:`diffbackbone.detectron2_engine`:

    =========================  =====================================================================
    SOLVER.OPTIMIZER           "SGD" (Detectron2's) or "ADAMW"
    SOLVER.BETAS               AdamW's
    SOLVER.LAYER_DECAY_RATE    See ``diffbackbone.optim.layer_scales``; 1.0 for none
    SOLVER.AMP.DTYPE           "auto" (bfloat16 where the GPU has it), "bfloat16" or "float16"
    SOLVER.CHECKPOINT_KEEP     How many of the latest checkpoints stay; 0 for all
    SOLVER.CLIP_GRADIENTS      CLIP_TYPE "full_model" too: the norm of all gradients together
    INPUT.LSJ                  Large-scale jitter: ENABLED, SIZE (px, square), MIN_SCALE, MAX_SCALE
    =========================  =====================================================================
    """
    node = CfgNode()
    node.UNET = "gd256_uncond"
    node.UNET_OPTIONS = CfgNode(new_allowed=True)
    node.CHECKPOINT = ""
    node.TIMESTEP = 75
    node.BLOCKS = (24,)
    node.FEEDBACK = ""
    node.FEEDBACK_MAP = ()
    node.FIRST_PASS_GRAD = False
    node.OUT_CHANNELS = 0
    node.OUT_STRIDES = ()
    node.NOISE = "fixed"
    node.SEED = 0
    node.CLASS_LABEL = -1
    node.FREEZE = False
    node.SAVE_FROZEN = False
    node.DTYPE = "float32"
    node.ACTIVATION_CHECKPOINTING = False
    node.ACTIVATION_BUDGET = -1.0
    node.PADDING = "separate"
    node.SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)
    node.TOP_BLOCK = "maxpool"
    cfg.MODEL.DIFFUSION = node
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.BETAS = (0.9, 0.999)
    cfg.SOLVER.LAYER_DECAY_RATE = 1.0
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    cfg.SOLVER.AMP.DTYPE = "auto"
    cfg.INPUT.LSJ = CfgNode()
    cfg.INPUT.LSJ.ENABLED = False
    cfg.INPUT.LSJ.SIZE = 1024
    cfg.INPUT.LSJ.MIN_SCALE = 0.1
    cfg.INPUT.LSJ.MAX_SCALE = 2.0


@BACKBONE_REGISTRY.register()
def build_diffusion_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DiffusionBackbone:
    """The taps by themselves, named ``"b24"`` and so on; see :func:`add_diffusion_config`.

    Raises:
        ValueError: A key has a value that can't be used.
        FileNotFoundError: No such checkpoint.
        CheckpointError: The checkpoint does not fit.
    """
    if not hasattr(cfg.MODEL, "DIFFUSION"):
        raise ValueError(
            "the config has no MODEL.DIFFUSION: call "
            "diffbackbone.detectron2.add_diffusion_config(cfg) before it is filled"
        )
    node = cfg.MODEL.DIFFUSION
    _check_pixels(cfg, input_shape)
    _check_node(node)
    if node.FEEDBACK and node.FEEDBACK_MAP:
        raise ValueError(
            f"MODEL.DIFFUSION.FEEDBACK {node.FEEDBACK!r} and FEEDBACK_MAP "
            f"{list(node.FEEDBACK_MAP)} exclude each other"
        )
    pairs = [p for p in node.FEEDBACK_MAP if isinstance(p, (list, tuple)) and len(p) == 2]
    if len(pairs) < len(node.FEEDBACK_MAP) or any(
        not is_number(number, int) for pair in pairs for number in pair
    ):
        raise ValueError(
            "MODEL.DIFFUSION.FEEDBACK_MAP must hold pairs (source block, target block), got "
            f"{shorten(list(node.FEEDBACK_MAP))}"
        )
    with _named_keys():
        return DiffusionBackbone(
            unet={"preset": node.UNET, **node.UNET_OPTIONS},
            checkpoint=node.CHECKPOINT or None,
            timestep=node.TIMESTEP,
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
    """ViTDet's simple feature pyramid on one tap; see :func:`add_diffusion_config`.

    Raises:
        ValueError: See :func:`build_diffusion_backbone`; or the pyramid can't be built on these
            blocks, or lacks levels that the heads read.
    """
    net = build_diffusion_backbone(cfg, input_shape)
    channels, scales = cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.DIFFUSION.SCALE_FACTORS
    with _named_keys():
        pyramid = DiffusionSimpleFeaturePyramid(
            net,
            out_channels=channels,
            scale_factors=scales,
            top_block=_top_block(cfg.MODEL.DIFFUSION.TOP_BLOCK, channels, None),
            norm=cfg.MODEL.FPN.NORM,
        )
    _check_levels(cfg, pyramid, net)
    return pyramid


@BACKBONE_REGISTRY.register()
def build_diffusion_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DiffusionFPN:
    """Feature pyramid network on several taps; see :func:`add_diffusion_config`.

    Raises:
        ValueError: See :func:`build_diffusion_sfp_backbone`.
    """
    net = build_diffusion_backbone(cfg, input_shape)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    coarsest = max(net.output_shape().items(), key=lambda item: item[1].stride)
    with _named_keys():
        pyramid = DiffusionFPN(
            net,
            cfg.MODEL.FPN.IN_FEATURES,
            channels,
            cfg.MODEL.FPN.NORM,
            _top_block(cfg.MODEL.DIFFUSION.TOP_BLOCK, channels, coarsest),
            cfg.MODEL.FPN.FUSE_TYPE,
        )
    _check_levels(cfg, pyramid, net)
    return pyramid


@contextlib.contextmanager
def _named_keys() -> Iterator[None]:
    """Say where a wrong value was given."""
    try:
        yield
    except ValueError as error:
        error.args = (f"MODEL.DIFFUSION: {error}",)
        raise


def _check_node(node: CfgNode) -> None:
    """Check types: yacs lets None pass for any key, and a config made in Python anything.

    Raises:
        ValueError: Names the key, what it was given and what it takes.
    """
    defaults = CfgNode()
    defaults.MODEL, defaults.SOLVER, defaults.INPUT = CfgNode(), CfgNode(), CfgNode()
    defaults.SOLVER.AMP = CfgNode()
    add_diffusion_config(defaults)
    names = {bool: "True or False", int: "an integer", float: "a number", str: "a string",
             tuple: "a list", CfgNode: "keys and values"}  # fmt: skip
    known = defaults.MODEL.DIFFUSION
    check_names("MODEL.DIFFUSION", node, known)
    for key, default in known.items():
        value, kind = node.get(key), type(default)
        if kind in (int, float):
            fits = is_number(value, int if kind is int else (int, float))
        else:
            fits = isinstance(value, (tuple, list) if kind is tuple else kind)
        if not fits:
            raise ValueError(
                f"MODEL.DIFFUSION.{key} must be {names[kind]}, such as the default "
                f"{default!r}, got {shorten(value)}"
            )
    fields = UNetConfig.__dataclass_fields__
    check_names("MODEL.DIFFUSION.UNET_OPTIONS", node.UNET_OPTIONS, fields)


def _check_pixels(cfg: CfgNode, input_shape: ShapeSpec) -> None:
    model = cfg.MODEL
    for name, wanted in (("PIXEL_MEAN", PIXEL_MEAN), ("PIXEL_STD", PIXEL_STD)):
        given = getattr(model, name)
        numbers = isinstance(given, (list, tuple)) and all(map(is_number, given))
        if not numbers or len(given) != 3 or any(abs(a - b) > 0.5 for a, b in zip(given, wanted)):
            shown = list(given) if numbers else shorten(given)
            raise ValueError(
                f"MODEL.{name} is {shown}; diffusion U-Nets take pixels in [-1, 1], which is "
                f"MODEL.PIXEL_MEAN {list(PIXEL_MEAN)} and MODEL.PIXEL_STD {list(PIXEL_STD)}"
            )
    if cfg.INPUT.FORMAT != "RGB" or input_shape.channels not in (None, 3):
        raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; diffusion U-Nets take 'RGB'")


def _top_block(name: str, channels: int, tap: tuple[str, ShapeSpec] | None) -> nn.Module | None:
    _check_pyramid(channels, "")
    if name not in TOP_BLOCKS:
        raise ValueError(f"TOP_BLOCK must be one of {', '.join(TOP_BLOCKS)}, got {shorten(name)}")
    if name == "p6p7":
        in_feature, in_channels = (tap[0], tap[1].channels) if tap else ("p5", channels)
        return LastLevelP6P7(in_channels, channels, in_feature)
    return LastLevelMaxPool() if name == "maxpool" else None


def _check_levels(cfg: CfgNode, pyramid: Backbone, net: DiffusionBackbone) -> None:
    """Check that the pyramid has the levels that the heads of this architecture read."""
    model, meta = cfg.MODEL, cfg.MODEL.META_ARCHITECTURE
    readers = {
        "GeneralizedRCNN": ("RPN", "ROI_HEADS"),
        "PanopticFPN": ("RPN", "ROI_HEADS", "SEM_SEG_HEAD"),
        "ProposalNetwork": ("RPN",),
        "RetinaNet": ("RETINANET",),
        "SemanticSegmentor": ("SEM_SEG_HEAD",),
    }.get(meta, ())
    levels = list(pyramid.output_shape())
    for reader in readers:
        missing = [name for name in model[reader].IN_FEATURES if name not in levels]
        if missing:
            taps = {f"b{b}": s for b, s in zip(net.blocks, net.strides)}
            raise ValueError(
                f"MODEL.{reader}.IN_FEATURES asks for {missing}, but the pyramid on blocks with "
                f"strides {taps} has the levels {levels} (p<l> has stride 2^l); "
                f"{_blocks_by_stride(net, 1)}"
            )


# --------------------------------------------------------------------------------------------------
# Python configs


def get_optimizer_params(
    model: nn.Module | None = None, layer_decay_rate: float = 1.0, **kwargs: Any
) -> list[dict[str, Any]]:
    """Detectron2's ``get_default_optimizer_params`` with layer-wise decay for the U-Net.

    Args:
        model: The model.
        layer_decay_rate: See :func:`diffbackbone.optim.layer_scales`; needs ``base_lr``.
        **kwargs: Arguments of ``get_default_optimizer_params``, ``lr_factor_func`` excepted.

    Raises:
        ValueError: See :func:`diffbackbone.optim.layer_scales`.
    """
    if layer_decay_rate != 1.0:
        scales = layer_scales(model, layer_decay_rate)
        by_name = {name: scales.get(id(p), 1.0) for name, p in model.named_parameters()}
        kwargs["lr_factor_func"] = by_name.__getitem__
    return get_default_optimizer_params(model, **kwargs)


# --------------------------------------------------------------------------------------------------
# sample data

SAMPLE_ROOT = "DIFFBACKBONE_SAMPLE_DATA"
"""Environment variable: where ``tools/make_sample_data.py`` wrote to, ``data/sample`` if unset."""
SAMPLE_CLASSES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
)  # fmt: skip
SAMPLE_DATASETS = (
    "diffbackbone_sample_train",
    "diffbackbone_sample_val",
    "diffbackbone_sample_train_panoptic_separated",
    "diffbackbone_sample_val_panoptic_separated",
)
"""Names of the sample data in Detectron2's catalogs."""


def register_sample_data(root: str | os.PathLike[str] | None = None) -> None:
    """Register the sample data; again with another root, in place of what is registered.

    Args:
        root: Folder that ``tools/make_sample_data.py`` wrote to; None takes what the environment
            variable ``DIFFBACKBONE_SAMPLE_DATA`` says, else ``data/sample``.
    """
    coco = Path(root or os.environ.get(SAMPLE_ROOT, "data/sample")) / "coco"
    for split in ("train", "val"):
        _register_sample_split(f"diffbackbone_sample_{split}", coco, f"{split}2017")


def _register_sample_split(name: str, coco: Path, split: str) -> None:
    panoptic = f"{name}_panoptic_separated"
    for old in (name, panoptic):
        if old in DatasetCatalog:
            DatasetCatalog.remove(old)
            MetadataCatalog.remove(old)
    images = str(coco / split)
    instances = str(coco / "annotations" / f"instances_{split}.json")
    stuff = str(coco / f"panoptic_stuff_{split}")
    DatasetCatalog.register(name, lambda: load_coco_json(instances, images, name))
    things = {
        "json_file": instances,
        "image_root": images,
        "thing_classes": list(SAMPLE_CLASSES),
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(SAMPLE_CLASSES))},
    }
    MetadataCatalog.get(name).set(evaluator_type="coco", **things)
    DatasetCatalog.register(
        panoptic,
        lambda: merge_to_panoptic(
            load_coco_json(instances, images, panoptic), load_sem_seg(stuff, images)
        ),
    )
    MetadataCatalog.get(panoptic).set(
        evaluator_type="coco_panoptic_seg",
        panoptic_root=str(coco / f"panoptic_{split}"),
        panoptic_json=str(coco / "annotations" / f"panoptic_{split}.json"),
        sem_seg_root=stuff,
        ignore_label=255,
        stuff_classes=["things", "background"],
        stuff_dataset_id_to_contiguous_id={0: 0, 11: 1},
        **things,
    )


register_sample_data()
