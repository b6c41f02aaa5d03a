"""Detectron2 backbones: maps by name, ViTDet's simple feature pyramid, feature pyramid network."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import Tensor, nn

from diffbackbone.backbone import DiffusionBackbone as _DiffusionBackbone
from diffbackbone.padding import pad_to_multiple, pad_to_size
from diffbackbone.utils import UserError

PADDINGS = ("separate", "reflect", "keep")
"""How to treat the zeros that bring images of unequal size into one batch."""


def content_sizes(images: Tensor) -> list[tuple[int, int]]:
    """Return the sizes of the images in a batch, without Detectron2's zero padding.

    Detectron2 hands a backbone the padded batch only. With mean 127.5 no pixel of 0..255 becomes
    zero, so rows and columns of zeros at the bottom and right are padding.

    Args:
        images: (N, C, H, W), normalized and zero-padded.

    Returns:
        Height and width of each image; those of the batch for an image of zeros only.
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
    """Compute the maps of a batch of zero-padded images (N, 3, H, W).

    ``run`` is the network, for images whose sides are multiples of ``divisibility``. The maps are
    (N, C, ceil(H / stride), ceil(W / stride)); with ``"separate"`` they are zero beyond an image's
    own size, rounded up to ``divisibility``.
    """
    height, width = images.shape[-2:]
    whole = [(height, width)] * len(images)
    sizes = whole if padding == "keep" else content_sizes(images)
    if padding == "reflect" and sizes != whole:
        parts = [pad_to_size(x[None, :, :h, :w], height, width) for x, (h, w) in zip(images, sizes)]
        images = torch.cat(parts)
    if padding == "reflect":
        sizes = whole
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    out: dict[str, list[Tensor]] = {}
    for (h, w), group in groups.items():
        part = images if len(groups) == 1 else images[group]
        for name, x in run(pad_to_multiple(part[..., :h, :w], divisibility)).items():
            size = math.ceil(height / strides[name]), math.ceil(width / strides[name])
            out.setdefault(name, []).append(_fit(x, *size))
    if len(groups) == 1:
        return {name: x for name, (x,) in out.items()}
    order = torch.tensor(list(itertools.chain(*groups.values())), device=images.device).argsort()
    return {name: torch.cat(parts)[order] for name, parts in out.items()}


def _fit(x: Tensor, height: int, width: int) -> Tensor:
    """Crop or zero-pad a map at the bottom and right."""
    right, bottom = width - x.shape[-1], height - x.shape[-2]
    return x if right == bottom == 0 else nn.functional.pad(x, (0, right, 0, bottom))


class _PaddedBatches(Backbone):
    """Base of the backbones below: batches of images of any sizes."""

    padding: str
    divisibility: int

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Multiple in pixels that Detectron2 pads batches to."""
        return {"size_divisibility": self.divisibility}

    def _forward_batch(
        self, images: Tensor, run: Callable[[Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if torch.jit.is_tracing():
            raise RuntimeError(
                "diffusion backbones can't be traced to TorchScript: noise, padding and the "
                "number of passes depend on the images' sizes; use torch.compile"
            )
        strides = {name: shape.stride for name, shape in self.output_shape().items()}
        return _run_batch(images, run, strides, self.divisibility, self._effective_padding())

    def _effective_padding(self) -> str:
        """Synchronized batch norm needs the same number of passes in all processes."""
        several = self.training and torch.distributed.is_initialized()
        if several and any("SyncBatch" in type(module).__name__ for module in self.modules()):
            return "reflect" if self.padding == "separate" else self.padding
        return self.padding


class DiffusionBackbone(_DiffusionBackbone, _PaddedBatches):
    """:class:`diffbackbone.DiffusionBackbone` as a Detectron2 backbone: maps by name.

    The map of block b is called ``"b<b>"``, for instance ``"b24"``. Images come as Detectron2
    normalizes them with mean and std 127.5, RGB, and may differ in size.

    Args:
        unet: See :class:`diffbackbone.DiffusionBackbone`, as for all arguments not listed here.
        timestep: The paper's for detection (Section 4.5).
        blocks: Tapped blocks, 1-based, each once.
        out_channels: None keeps the taps' channels.
        out_strides: None keeps the taps' strides.
        padding: ``"separate"`` runs images of each size on their own, so that an image's maps
            don't depend on the rest of its batch; ``"reflect"`` replaces Detectron2's zeros by the
            mirrored image and runs the batch at once; ``"keep"`` leaves the zeros (mid-gray). With
            synchronized batch norm, training uses ``"reflect"`` for ``"separate"``.
        save_frozen: See :class:`diffbackbone.DiffusionBackbone`; off by default here.

    Raises:
        ValueError: See :class:`diffbackbone.DiffusionBackbone`; or a block is named twice.
    """

    size_divisibility: int = 0  # replaces Backbone's property, so that __init__ can set it

    def __init__(
        self,
        unet: str | Mapping[str, Any] = "gd256_uncond",
        checkpoint: str | os.PathLike[str] | None = None,
        timestep: int | Sequence[int] = 75,
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
        if padding not in PADDINGS:
            raise UserError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r:.200}")
        super().__init__(
            _plain(unet),
            checkpoint,
            _plain(timestep),
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
            raise UserError(f"blocks contains duplicates: {list(self.blocks)}")
        self.padding, self.divisibility = padding, self.size_divisibility
        self._out_features = [f"b{block}" for block in self.blocks]
        self._out_feature_channels = dict(zip(self._out_features, self.channels))
        self._out_feature_strides = dict(zip(self._out_features, self.strides))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the maps of a batch.

        Args:
            images: (N, 3, H, W) RGB in [-1, 1], zero-padded.

        Returns:
            ``{"b<b>": (N, C_b, ceil(H / stride_b), ceil(W / stride_b))}``.
        """
        return self._forward_batch(images, self._named_maps)

    def _named_maps(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._out_features, _DiffusionBackbone.forward(self, images)))


def _plain(value: Any) -> Any:
    """Convert a config's own containers to dicts and tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(map(_plain, value))
    return value


class _Pyramid(_PaddedBatches):
    """Base of the two pyramids."""

    def _take_over_padding(self, net: DiffusionBackbone) -> None:
        coarsest = max(shape.stride for shape in net.output_shape().values())
        self.divisibility = math.lcm(self._size_divisibility, net.size_divisibility, coarsest)
        self.padding, net.padding = net.padding, "keep"

    @property
    def size_divisibility(self) -> int:
        """Multiple in pixels that Detectron2 pads batches to."""
        return self.divisibility


class DiffusionSimpleFeaturePyramid(_Pyramid, SimpleFeaturePyramid):
    """ViTDet's simple feature pyramid on one tap (Section 7.2).

    Args:
        net: The backbone, with one tapped block.
        in_feature: Name of the tap; None takes the only one.
        out_channels: Channels of each level.
        scale_factors: Size of each level relative to the tap's, of 4, 2, 1 and 0.5.
        top_block: Block on top, for instance Detectron2's ``LastLevelMaxPool``.
        norm: Norm of the convolutions, such as ``"LN"``.

    Raises:
        UserError: The backbone has several taps, or its stride can't be divided.
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
            raise UserError(
                f"the simple feature pyramid takes exactly one block, got {list(net.blocks)}; "
                "for several blocks use DiffusionFPN (build_diffusion_fpn_backbone)"
            )
        in_feature = in_feature or next(iter(shapes))
        stride, finest = shapes[in_feature].stride, int(max(scale_factors))
        if stride % finest:
            raise UserError(
                f"block {in_feature[1:]} has stride {stride}, which can't be divided by {finest}, "
                "the largest scale factor; tools/inspect_unet.py prints the blocks' strides"
            )
        if top_block is not None:
            top_block.in_feature = f"p{int(math.log2(stride / scale_factors[-1]))}"
        super().__init__(
            net, in_feature, out_channels, list(scale_factors), top_block, norm, square_pad=0
        )
        self._take_over_padding(net)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute ``{"p<l>": (N, C, ceil(H / 2^l), ceil(W / 2^l))}``, from fine to coarse."""
        return self._forward_batch(images, super().forward)


class DiffusionFPN(_Pyramid, FPN):
    """Feature pyramid network on several taps.

    Args:
        bottom_up: The backbone; its maps have strides s, 2s, 4s, ...
        in_features: Names of the taps from fine to coarse; None takes all.
        out_channels: Channels of each level.
        norm: Norm of the convolutions; "" for none.
        top_block: Block on top.
        fuse_type: ``"sum"`` or ``"avg"``.
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
        names = list(in_features or sorted(shapes, key=lambda name: shapes[name].stride))
        if getattr(top_block, "in_feature", None) == "p5":  # LastLevelMaxPool's default
            top_block.in_feature = f"p{int(math.log2(shapes[names[-1]].stride))}"
        super().__init__(bottom_up, names, out_channels, norm, top_block, fuse_type)
        self._take_over_padding(bottom_up)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`DiffusionSimpleFeaturePyramid.forward`."""
        return self._forward_batch(images, super().forward)
