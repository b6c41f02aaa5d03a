"""Detectron2 backbones: maps by name, ViTDet's simple feature pyramid, feature pyramid network."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import Tensor, nn

from diffbackbone.backbone import DiffusionBackbone as _DiffusionBackbone
from diffbackbone.checks import check_choice
from diffbackbone.padding import pad_to_multiple, pad_to_size
from diffbackbone.utils import UserError

PADDINGS = ("separate", "reflect", "keep")
"""How to treat the zeros that bring images of unequal size into one batch."""


def content_sizes(images: Tensor) -> list[tuple[int, int]]:
    """Return the sizes of the images in a batch (N, C, H, W), without Detectron2's zero padding.

    With mean 127.5 no pixel of 0..255 becomes zero, so rows and columns of zeros at the bottom and
    right are padding. An image of zeros only has the batch's size.
    """
    filled = (images != 0).any(dim=1)
    sizes = []
    for used in (filled.any(dim=2), filled.any(dim=1)):
        last = torch.arange(1, used.shape[1] + 1, device=used.device) * used
        sizes.append(last.amax(dim=1))
    height, width = images.shape[-2:]
    return [(h or height, w or width) for h, w in torch.stack(sizes, dim=1).tolist()]


class _PaddedBatches(Backbone):
    """Base of the backbones below: batches of images of any sizes."""

    size_divisibility: int = 0  # replaces Backbone's property, so that __init__ can set it
    padding: str

    def _run_batch(
        self, images: Tensor, run: Callable[[Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Compute the maps of a batch of zero-padded images (N, 3, H, W).

        ``run`` is the network, for images whose sides are multiples of ``size_divisibility``. With
        ``"separate"`` the maps are zero beyond an image's own size.
        """
        height, width = images.shape[-2:]
        padding = self._effective_padding()
        sizes = [(height, width)] * len(images)
        if padding == "separate":
            sizes = content_sizes(images)
        elif padding == "reflect":
            images = torch.cat(
                [
                    pad_to_size(x[None, :, :h, :w], height, width)
                    for x, (h, w) in zip(images, content_sizes(images))
                ]
            )
        shapes, parts, order = self.output_shape(), [], []
        for h, w in dict.fromkeys(sizes):
            group = [i for i, size in enumerate(sizes) if size == (h, w)]
            part = images if len(group) == len(images) else images[group]
            maps = run(pad_to_multiple(part[..., :h, :w], self.size_divisibility))
            parts.append(
                {name: _fit(x, height, width, shapes[name].stride) for name, x in maps.items()}
            )
            order += group
        if len(parts) == 1:
            return parts[0]
        places = torch.tensor(order, device=images.device).argsort()
        return {name: torch.cat([maps[name] for maps in parts])[places] for name in parts[0]}

    def _effective_padding(self) -> str:
        """Synchronized batch norm needs the same number of passes in all processes."""
        several = self.training and torch.distributed.is_initialized()
        if several and any("SyncBatch" in type(module).__name__ for module in self.modules()):
            return "reflect" if self.padding == "separate" else self.padding
        return self.padding


def _fit(x: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Crop or zero-pad a map to that of a (height, width) image, at the bottom and right."""
    bottom = math.ceil(height / stride) - x.shape[-2]
    right = math.ceil(width / stride) - x.shape[-1]
    return x if right == bottom == 0 else nn.functional.pad(x, (0, right, 0, bottom))


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

    """

    def __init__(
        self,
        unet: str | Mapping[str, Any] = "gd256_uncond",
        checkpoint: str | os.PathLike[str] | None = None,
        timestep: int | Sequence[int] = 75,
        blocks: Sequence[int] | int = (24,),
        feedback: str | Mapping[int, int] | None = None,
        out_channels: int | None = None,
        out_strides: Sequence[int] | None = None,
        *,
        padding: str = "separate",
        save_frozen: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            _plain(unet),
            checkpoint,
            _plain(timestep),
            _plain(blocks),
            _plain(feedback),
            out_channels,
            _plain(out_strides),
            save_frozen=save_frozen,
            **kwargs,
        )
        self.padding = check_choice("padding", padding, PADDINGS)
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
        return self._run_batch(images, self._named_maps)

    def _named_maps(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._out_features, super().forward(images)))


def _plain(value: Any) -> Any:
    """Convert a config's own containers to dicts and tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(map(_plain, value))
    return value


class _Pyramid(_PaddedBatches):
    """Base of the two pyramids, which pad in place of the backbone inside."""

    def _take_over_padding(self, net: DiffusionBackbone) -> None:
        self.size_divisibility = math.lcm(self._size_divisibility, net.size_divisibility)
        self.padding, net.padding = net.padding, "keep"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute ``{"p<l>": (N, C, ceil(H / 2^l), ceil(W / 2^l))}``, from fine to coarse."""
        return self._run_batch(images, super().forward)


class DiffusionSimpleFeaturePyramid(_Pyramid, SimpleFeaturePyramid):
    """ViTDet's simple feature pyramid on one tap (Section 7.2).

    Args:
        net: The backbone, with one tapped block.
        out_channels: Channels of each level.
        scale_factors: Size of each level relative to the tap's, of 4, 2, 1 and 0.5.
        top_block: Block on top, for instance Detectron2's ``LastLevelMaxPool``.
        norm: Norm of the convolutions, such as ``"LN"``.

    Raises:
        UserError: The backbone has several taps.
    """

    def __init__(
        self,
        net: DiffusionBackbone,
        out_channels: int = 256,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        top_block: nn.Module | None = None,
        norm: str = "LN",
    ) -> None:
        if len(net.blocks) != 1:
            raise UserError(
                f"the simple feature pyramid takes exactly one block, got {list(net.blocks)}; "
                "for several blocks use DiffusionFPN (build_diffusion_fpn_backbone)"
            )
        if top_block is not None:
            top_block.in_feature = f"p{int(math.log2(net.strides[0] / scale_factors[-1]))}"
        (in_feature,) = net.output_shape()
        super().__init__(net, in_feature, out_channels, scale_factors, top_block, norm)
        self._take_over_padding(net)


class DiffusionFPN(_Pyramid, FPN):
    """Feature pyramid network on several taps.

    Args:
        bottom_up: The backbone; its maps have strides s, 2s, 4s, ...
        in_features: Names of the taps from fine to coarse; None or empty takes all.
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
        if isinstance(top_block, LastLevelMaxPool):
            top_block.in_feature = f"p{int(math.log2(shapes[names[-1]].stride))}"
        super().__init__(bottom_up, names, out_channels, norm, top_block, fuse_type)
        self._take_over_padding(bottom_up)
